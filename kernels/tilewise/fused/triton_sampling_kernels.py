"""The Triton kernels of sampling: the definition's token without a sort of the vocabulary.

Three launches. `maxima` finds each row's largest logit, penalised and divided by the temperature;
`draw` has the scores, which are the differences to it, and adds the noise; both cut a row into
tiles, so that one row alone fills a GPU too. `choose` then has the likely winner of every row: the
largest sum of score and noise. Top-k and top-p keep the beginning of the tokens in their order, so
the winner is kept if few enough tokens, and little enough probability, come before it, which takes
one pass over the scores to know. If not, nothing behind it is kept either, and the largest sum
among those before it is next. A filter that keeps 90% of the probability lets nine in ten first
winners pass. (FlashInfer narrows its rejection sampling in the same way, drawing anew each time;
here the noise stays, so that the token is the definition's.)

Probabilities are summed in float64, as in the definition but in another order: a token whose
predecessors hold top_p to the last bits of a float64 may be kept by one and not by the other.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

# --- random numbers -------------------------------------------------------------------------------


@triton.jit
def _log(fraction, exponent):
    """log((1 + fraction) * 2^exponent) as in tilewise.fused.philox, rounding by rounding."""
    s = tl.div_rn(fraction, fraction + 2.0)
    square = s * s
    series = square * (1.0 / 13.0) + (1.0 / 11.0)
    series = series * square + (1.0 / 9.0)
    series = series * square + (1.0 / 7.0)
    series = series * square + (1.0 / 5.0)
    series = series * square + (1.0 / 3.0)
    series = series * square + 1.0
    return exponent.to(tl.float32) * 0.693147182464599609375 + (s + s) * series


@triton.jit
def _frexp(x):
    """Mantissa in [1/2, 1) and exponent of normal positive numbers."""
    bits = x.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    return mantissa, (bits >> 23) - 126


@triton.jit
def _gumbel(word):
    """-log(-log(u)) with u = (word + 1/2) / 2^32; of u in the upper half, 1 - u is kept."""
    is_upper = (word >> 31) != 0
    smaller = tl.where(is_upper, word ^ 0xFFFFFFFF, word)
    tail = (smaller * 2 + 1).to(tl.float32) * 1.1641532182693481e-10  # 2^-33
    mantissa, exponent = _frexp(tail)
    fraction = tl.where(is_upper, -tail, mantissa - 1.0)
    exponential = -_log(fraction, tl.where(is_upper, 0, exponent))
    mantissa, exponent = _frexp(exponential)
    return -_log(mantissa - 1.0, exponent)


@triton.jit
def noise(seed, sample_id, position, first, TILE: tl.constexpr):
    """Gumbel noise of tokens first to first + TILE; first is a multiple of 4."""
    block = (first // 4 + tl.arange(0, TILE // 4)).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        block,
        (position & 0xFFFFFFFF).to(tl.uint32),
        (sample_id & 0xFFFFFFFF).to(tl.uint32),
        ((sample_id >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )
    return _gumbel(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))


# --- scores ---------------------------------------------------------------------------------------


@triton.jit
def _scaled(
    logits,
    temperature,
    penalty,
    previous,
    previous_count,
    first,
    vocabulary,
    TILE: tl.constexpr,
    PREVIOUS: tl.constexpr,
):
    """A tile of a row's logits, penalised and divided; -inf for NaN and beyond the vocabulary."""
    at = first + tl.arange(0, TILE)
    h = tl.load(logits + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
    if previous is not None:
        # A histogram rather than a scatter: nothing has to be cleared, and nobody waits.
        counts = tl.zeros([TILE], tl.int32)
        for begin in range(0, previous_count, PREVIOUS):
            i = begin + tl.arange(0, PREVIOUS)
            token = tl.load(previous + i, mask=i < previous_count, other=-1) - first
            here = (token >= 0) & (token < TILE)
            counts += tl.histogram(tl.where(here, token, 0).to(tl.int32), TILE, mask=here)
        penalised = tl.where(h > 0, tl.div_rn(h, penalty + tl.zeros_like(h)), h * penalty)
        h = tl.where(counts > 0, penalised, h)
    h = tl.div_rn(h, tl.where(temperature > 0, temperature, 1.0) + tl.zeros_like(h))
    return tl.where(h == h, tl.minimum(h, 3.4028234663852886e38), -float("inf"))


# A history grows from call to call, and seeds vary: no new kernel for each kind of number.
@triton.jit(do_not_specialize=["previous_count", "previous_stride"])
def maxima(
    logits,
    temperature,
    penalty,
    previous,
    largest,
    vocabulary,
    stride,
    previous_count,
    previous_stride,
    tiles,
    TILE: tl.constexpr,
    PREVIOUS: tl.constexpr,
):
    """The largest of each tile, (rows, tiles)."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if previous is not None:
        previous += row * previous_stride
    h = _scaled(
        logits + row * stride,
        tl.load(temperature + row),
        tl.load(penalty + row),
        previous,
        previous_count,
        tile * TILE,
        vocabulary,
        TILE,
        PREVIOUS,
    )
    tl.store(largest + row * tiles + tile, tl.max(h, 0))


@triton.jit
def _least_score(min_p):
    """The least score whose float32 exponential is not below min_p: rounded, not truncated."""
    below = (min_p.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
    middle = (tl.maximum(min_p, 1e-45).to(tl.float64) + below.to(tl.float64)) * 0.5
    least = tl.log(middle)
    rounded = least.to(tl.float32)
    above = (rounded.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
    return tl.where(rounded.to(tl.float64) < least, above, rounded)


@triton.jit
def _is_filtered(temperature, top_k, top_p, vocabulary):
    """Whether top-k or top-p can change the row's token; the likeliest always stays."""
    return (temperature > 0) & (((top_k > 0) & (top_k < vocabulary)) | (top_p < 1))


@triton.jit(do_not_specialize=["previous_count", "previous_stride", "seed", "first_row"])
def draw(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    penalty,
    previous,
    sample_ids,
    positions,
    largest,
    scores,
    sums,
    odds,
    winners,
    winning_sums,
    totals,
    vocabulary,
    stride,
    previous_count,
    previous_stride,
    seed: tl.int64,
    first_row,
    tiles,
    TILE: tl.constexpr,
    PREVIOUS: tl.constexpr,
    TILES: tl.constexpr,
):
    """The token of each tile with the largest sum of score and noise, and that sum.

    For a row with a filter also everything that `choose` needs of it: the scores, their sums with
    the noise, their exponentials, which are relative to the likeliest token, and the total of these
    in each tile.
    """
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    first = tile * TILE
    at = first + tl.arange(0, TILE)
    t = tl.load(temperature + row)
    p = tl.load(top_p + row)
    part = tl.arange(0, TILES)
    top = tl.max(tl.load(largest + row * tiles + part, part < tiles, other=-float("inf")), 0)
    if previous is not None:
        previous += row * previous_stride
    h = _scaled(
        logits + row * stride,
        t,
        tl.load(penalty + row),
        previous,
        previous_count,
        first,
        vocabulary,
        TILE,
        PREVIOUS,
    )
    score = tl.where(h > -float("inf"), h - top, -float("inf"))
    total = score
    if t > 0:
        sample_id = row + first_row
        if sample_ids is not None:
            sample_id = tl.load(sample_ids + row)
        position = row * 0
        if positions is not None:
            position = tl.load(positions + row)
        total = score + noise(seed, sample_id, position, first, TILE)
    least_odds = tl.load(min_p + row)
    if least_odds > 0:
        total = tl.where(score >= _least_score(least_odds), total, -float("inf"))
    best = tl.max(total, 0)
    tl.store(winning_sums + row * tiles + tile, best)
    tl.store(winners + row * tiles + tile, tl.min(tl.where(total == best, at, 0x7FFFFFFF), 0))
    if _is_filtered(t, tl.load(top_k + row), p, vocabulary):
        to = row * vocabulary + at
        tl.store(scores + to, score, mask=at < vocabulary)
        tl.store(sums + to, total, mask=at < vocabulary)
        if p < 1:
            mass = tl.exp(score.to(tl.float64))
            tl.store(odds + to, mass, mask=at < vocabulary)
            tl.store(totals + row * tiles + tile, tl.sum(mass, 0))


# --- filters --------------------------------------------------------------------------------------


@triton.jit
def _odds_of_top(scores, odds, k, vocabulary, TILE: tl.constexpr):
    """The sum of the k largest exponentials.

    The k-th largest score is found by its bits, eight at a time from the highest: scores are not
    above 0, and so in the order of their bits without the sign.
    """
    kth = tl.zeros([], tl.int32)
    for step in range(4):
        shift = 24 - 8 * step
        counts = tl.zeros([256], tl.int32)
        for begin in range(0, vocabulary, TILE):
            at = begin + tl.arange(0, TILE)
            score = tl.load(scores + at, mask=at < vocabulary, other=-float("inf"))
            bits = tl.abs(score).to(tl.int32, bitcast=True)
            is_equal = (bits >> shift >> 8) == (kth >> shift >> 8)  # so far
            here = is_equal & (at < vocabulary)
            counts += tl.histogram((bits >> shift) & 255, 256, mask=here)
        before = tl.cumsum(counts, 0)
        kth = kth | (tl.sum((before < k).to(tl.int32), 0) << shift)
        k -= tl.sum(tl.where(before < k, counts, 0), 0)
    sums = tl.zeros([TILE], tl.float64)
    for begin in range(0, vocabulary, TILE):
        at = begin + tl.arange(0, TILE)
        score = tl.load(scores + at, mask=at < vocabulary, other=-float("inf"))
        is_above = tl.abs(score).to(tl.int32, bitcast=True) < kth
        sums += tl.load(odds + at, mask=is_above & (at < vocabulary), other=0.0)
    # k is now how many of the equals of the k-th belong to them.
    equal = tl.exp(-kth.to(tl.float32, bitcast=True).to(tl.float64))
    return tl.sum(sums, 0) + k.to(tl.float64) * equal


@triton.jit
def choose(
    scores,
    sums,
    odds,
    winners,
    winning_sums,
    totals,
    largest,
    temperature,
    top_k,
    top_p,
    min_p,
    tokens,
    vocabulary,
    tiles,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """The token of a row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, TILES)
    parts = row * tiles + part
    is_part = part < tiles
    top = tl.max(tl.load(largest + parts, is_part, other=-float("inf")), 0)
    sums_of_parts = tl.load(winning_sums + parts, is_part, other=-float("inf"))
    best = tl.max(sums_of_parts, 0)
    candidates = tl.load(winners + parts, is_part, other=0x7FFFFFFF)
    winner = tl.min(tl.where(sums_of_parts == best, candidates, 0x7FFFFFFF), 0)
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    # Nothing to choose from, or parameters that no token satisfies.
    is_nothing = (top == -float("inf")) | (tl.load(min_p + row) > 1) | (p <= 0)
    if _is_filtered(tl.load(temperature + row), k, p, vocabulary) & (is_nothing == 0):
        scores += row * vocabulary
        sums += row * vocabulary
        odds += row * vocabulary
        most = tl.where((k > 0) & (k < vocabulary), k, vocabulary).to(tl.int32)
        limit = tl.full([], float("inf"), tl.float64)
        if p < 1:
            total = tl.sum(tl.load(totals + parts, is_part, other=0.0), 0)
            if most < vocabulary:
                total = _odds_of_top(scores, odds, most, vocabulary, TILE)
            limit = p.to(tl.float64) * total
        odds_end = tl.where(p < 1, vocabulary, 0)  # they are not there for top-k alone
        is_kept = 0
        while is_kept == 0:
            score = tl.load(scores + winner)
            counts = tl.zeros([TILE], tl.int32)
            masses = tl.zeros([TILE], tl.float64)
            next_sums = tl.full([TILE], -float("inf"), tl.float32)
            next_tokens = tl.full([TILE], 0x7FFFFFFF, tl.int32)
            for begin in range(0, vocabulary, TILE):
                at = begin + tl.arange(0, TILE)
                other = tl.load(scores + at, mask=at < vocabulary, other=-float("inf"))
                is_before = (other > score) | ((other == score) & (at < winner))
                counts += is_before.to(tl.int32)
                masses += tl.load(odds + at, mask=is_before & (at < odds_end), other=0.0)
                total_sum = tl.load(sums + at, mask=is_before, other=-float("inf"))
                is_better = total_sum > next_sums
                next_sums = tl.where(is_better, total_sum, next_sums)
                next_tokens = tl.where(is_better, at, next_tokens)
            count = tl.sum(counts, 0)
            if (count == 0) | ((count < most) & (tl.sum(masses, 0) < limit)):
                is_kept = 1
            else:
                best = tl.max(next_sums, 0)
                winner = tl.min(tl.where(next_sums == best, next_tokens, 0x7FFFFFFF), 0)
    tl.store(tokens + row, tl.where(is_nothing, 0, winner).to(tl.int64))
