# mypy: allow-untyped-defs
"""The Triton kernel of the attention's forward pass, and what it shares with the backward one.

A program holds BLOCK_M queries of one head and goes along the keys BLOCK_N at a time with the
online softmax, in base 2. Tiles of keys begin at multiples of BLOCK_N, whatever the queries see: a
row's bits do not depend on its neighbours. Of the tiles only those are visited that hold a visible
key, and those that every query of the block sees in full skip the masks.

A head dimension is two powers of two: 192 is 128 + 64, and 576 is 512 + 64.

Source: Dao, FlashAttention-2, 2023 (arXiv:2307.08691); finding a program's sequence by a search in
cu_seqlens, so that no length has to reach the host, is from vLLM's unified attention kernel.
"""

import triton
import triton.language as tl

from tilewise.attention.triton_tiles import finite, load_rows, matrix, tile_of, wide

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def find_sequence(cu_seqlens, batch, tile, BLOCK: tl.constexpr):
    """The sequence that a tile of BLOCK tokens belongs to, and its number there.

    A sequence has the tiles from cu_seqlens[b] // BLOCK + b on, one more than it needs at most.
    """
    low, high = 0, batch  # low is in, high is past it
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) // BLOCK + middle <= tile:
            low = middle
        else:
            high = middle
    return low, tile - (tl.load(cu_seqlens + low) // BLOCK + low)


@triton.jit
def place(cu_seqlens, b, tokens):
    """Where sequence b begins and how long it is, within the tensor whatever cu_seqlens holds."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), tokens)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1), begin), tokens)
    return begin, end - begin


@triton.jit
def visible_tiles(first, last, k_len, left, right, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys that queries at positions [first, last] see, [begin, end); in full [inner, outer).

    All but `end` are multiples of BLOCK_N, and begin <= inner <= outer <= end.
    """
    begin = 0
    end = k_len
    inner = 0
    outer = k_len
    if left >= 0:
        begin = tl.maximum(first - left, 0)
        inner = tl.maximum(last - left, 0)
    if right >= 0:
        end = tl.minimum(k_len, last + right + 1)
        outer = tl.minimum(k_len, first + right + 1)
    end = tl.maximum(end, 0)
    begin = tl.minimum(begin, end) // BLOCK_N * BLOCK_N
    inner = (inner + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    outer = tl.maximum(outer, 0) // BLOCK_N * BLOCK_N
    if HAS_BIAS or outer <= inner:  # a bias may hide any key
        inner = begin
        outer = begin
    return begin, inner, outer, end


@triton.jit
def sight(queries, past, q_len, k_len, left, right):
    """The keys that each query sees, [begins, ends); past: the position of the first query.

    Without a window on the left `begins` means nothing.
    """
    reach = right + 1
    if right < 0:
        reach = q_len
    ends = tl.minimum(past + queries + reach, k_len)
    return past + queries - left, tl.where(queries < q_len, ends, 0)


@triton.jit
def score(
    dots,
    queries,
    keys,
    begins,
    ends,
    past,
    scale,
    softcap,
    slope,
    bias,
    bias_stride_q,
    bias_stride_k,
    HAS_LEFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_MASK: tl.constexpr,
    MASKED: tl.constexpr,
    FOLD: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Of products of queries and keys: scores in base 2; what is seen of them; the tanh.

    Either queries, begins and ends are columns and keys are a row, or the other way round. Scores
    are left unscaled if FOLD, and infinite ones become NaN if CHECK. The tanh is what softcap
    multiplies, and the backward pass needs.
    """
    IS_PLAIN: tl.constexpr = not (HAS_SOFTCAP or HAS_ALIBI or HAS_BIAS)
    s = dots
    if not FOLD:
        s *= scale * LOG2_E if IS_PLAIN else scale
    if CHECK:
        s += s * 0.0
    tanh = s
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), without cancellation for small x.
        x = s / softcap
        small = x * x
        series = x * (1.0 + small * (-0.3333333333 + small * (0.1333333333 - small * 0.0539682540)))
        tanh = 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2_E)) + 1.0)
        tanh = tl.where(tl.abs(x) < 0.1, series, tanh)
        s = softcap * tanh
    distance = past + queries - keys
    if HAS_ALIBI:
        s -= slope * tl.abs(distance).to(tl.float32)
    seen = distance == distance
    if MASKED:
        seen = keys < ends
        if HAS_LEFT:
            seen = seen & (keys >= begins)
    if HAS_BIAS:
        at = queries.to(tl.int64) * bias_stride_q + keys * bias_stride_k
        if IS_MASK:
            seen = seen & (tl.load(bias + at, mask=seen, other=0) != 0)
        else:
            added = tl.load(bias + at, mask=seen, other=0.0).to(tl.float32)
            seen = seen & (added != float("-inf"))
            s += added
    if not IS_PLAIN:
        s *= LOG2_E
    return s, seen, tanh


@triton.jit
def _attend(
    sums,
    l,
    m,
    q_main,
    q_rest,
    k,
    k_rest,
    v,
    k_stride,
    v_stride,
    begin,
    end,
    queries,
    begins,
    ends,
    past,
    k_len,
    scale,
    softcap,
    slope,
    bias,
    bias_stride_q,
    bias_stride_k,
    dim,
    v_dim,
    MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_MASK: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FOLD: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Keys [begin, end), in tiles, added to the state of the online softmax."""
    # The scale is then part of the exponent, where it costs nothing: one FMA subtracts the maximum.
    unit = scale * LOG2_E if FOLD else 1.0
    # Masked tiles are few, and each stage in flight takes shared memory.
    for first in tl.range(begin, end, BLOCK_N, num_stages=2 if MASKED and DESCRIPTORS else None):
        keys = first + tl.arange(0, BLOCK_N)
        tile = tile_of(k, k_stride, first, k_len, dim, 0, BLOCK_N, D_MAIN, DESCRIPTORS)
        dots = tl.dot(q_main, tl.trans(tile), input_precision="ieee")
        if D_REST > 0:
            tile = tile_of(
                k_rest, k_stride, first, k_len, dim, D_MAIN, BLOCK_N, D_REST, DESCRIPTORS
            )
            dots = tl.dot(q_rest, tl.trans(tile), dots, input_precision="ieee")
        # Infinity comes from a query or a key that is not finite, which means NaN.
        s, seen, _ = score(
            dots, queries[:, None], keys[None, :], begins[:, None], ends[:, None], past, scale,
            softcap, slope, bias, bias_stride_q, bias_stride_k, HAS_LEFT, HAS_SOFTCAP, HAS_ALIBI,
            HAS_BIAS, IS_MASK, MASKED, FOLD, CHECK=True,
        )  # fmt: skip
        if MASKED or HAS_BIAS:
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * unit)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * unit - shift[:, None])
        decay = tl.exp2(m - shift)
        values = tile_of(v, v_stride, first, k_len, v_dim, 0, BLOCK_N, D_V, DESCRIPTORS)
        if MASKED:  # zero times what nobody may see could be NaN
            values, good = finite(values)
            p = tl.where(seen & (good == 0)[None, :], float("nan"), p)
        l = l * decay + tl.sum(p, 1)
        sums = sums * decay[:, None]
        sums = tl.dot(p.to(values.dtype), values, sums, input_precision="ieee")
        m = m_new
    return sums, l, m


@triton.jit
def forward(
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    alibi_slopes,
    sinks,
    bias,
    batch,
    heads,
    q_tokens,
    k_tokens,
    dim,
    v_dim,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    alibi_stride_b,
    bias_stride_b,
    bias_stride_h,
    bias_stride_q,
    bias_stride_k,
    bias_keys,
    scale,
    softcap,
    left,
    right,
    GROUP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_MASK: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FOLD: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """out and lse, contiguous, of BLOCK_M queries of a head.

    Tokens are those of a batch row where there are no cu_seqlens, and of all sequences otherwise.
    """
    tile = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    q_begin = 0
    q_len = q_tokens
    k_begin = 0
    k_len = k_tokens
    if cu_seqlens_q is not None:
        b, tile = find_sequence(cu_seqlens_q, batch, tile, BLOCK_M)
        q_begin, q_len = place(cu_seqlens_q, b, q_tokens)
        k_begin, k_len = place(cu_seqlens_k, b, k_tokens)
        if bias is not None:
            k_len = tl.minimum(k_len, bias_keys)
    else:
        tile = tl.num_programs(0) - 1 - tile  # under a causal mask the last ones take longest
    if tile * BLOCK_M < q_len:
        row = wide(b)  # of the batch, for tensors that have one
        of_batch = row if cu_seqlens_q is None else row * 0
        q += of_batch * q_stride_b + wide(q_begin) * q_stride_s + h * q_stride_h
        k += of_batch * k_stride_b + wide(k_begin) * k_stride_s + h // GROUP * k_stride_h
        v += of_batch * v_stride_b + wide(k_begin) * v_stride_s + h // GROUP * v_stride_h
        first_row = of_batch * q_tokens + q_begin
        HAS_ALIBI: tl.constexpr = alibi_slopes is not None
        HAS_BIAS: tl.constexpr = bias is not None
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(alibi_slopes + row * alibi_stride_b + h)
        if HAS_BIAS:
            bias += of_batch * bias_stride_b + wide(h) * bias_stride_h
            bias += wide(q_begin) * bias_stride_q

        first = tile * BLOCK_M
        queries = first + tl.arange(0, BLOCK_M)
        past = k_len - q_len
        begins, ends = sight(queries, past, q_len, k_len, left, right)
        q_main = load_rows(q, q_stride_s, first, q_len, dim, 0, BLOCK_M, D_MAIN)
        q_rest = q_main
        if D_REST > 0:
            q_rest = load_rows(q, q_stride_s, first, q_len, dim, D_MAIN, BLOCK_M, D_REST)

        all_k = matrix(k, k_stride_s, k_len, dim, BLOCK_N, D_MAIN, DESCRIPTORS)
        all_k_rest = all_k
        if D_REST > 0:
            all_k_rest = matrix(k, k_stride_s, k_len, dim, BLOCK_N, D_REST, DESCRIPTORS)
        all_v = matrix(v, v_stride_s, k_len, v_dim, BLOCK_N, D_V, DESCRIPTORS)

        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        if sinks is not None:
            sink = tl.load(sinks + h) * LOG2_E
            m = tl.full([BLOCK_M], 0.0, tl.float32) + sink
            l += tl.where(sink == float("-inf"), 0.0, 1.0)
        sums = tl.zeros([BLOCK_M, D_V], tl.float32)
        last = tl.minimum(first + BLOCK_M, q_len) - 1
        begin, inner, outer, end = visible_tiles(
            past + first, past + last, k_len, left, right, HAS_BIAS, BLOCK_N
        )
        # Before, among and behind the keys that all see; without a window there are none before.
        for phase in tl.static_range(0 if HAS_LEFT else 1, 3):
            if phase == 0:
                low, high = begin, inner
            elif phase == 1:
                low, high = inner, outer
            else:
                low, high = outer, end
            sums, l, m = _attend(
                sums, l, m, q_main, q_rest, all_k, all_k_rest, all_v, k_stride_s, v_stride_s, low,
                high, queries, begins, ends, past, k_len, scale, softcap, slope, bias,
                bias_stride_q, bias_stride_k, dim, v_dim, phase != 1, HAS_LEFT, HAS_SOFTCAP,
                HAS_ALIBI, HAS_BIAS, IS_MASK, D_MAIN, D_REST, D_V, BLOCK_N, FOLD, DESCRIPTORS,
            )  # fmt: skip

        total = tl.where(l == 0.0, 1.0, l)  # a row that sees nothing is zero
        log_sum = tl.where(l == 0.0, float("-inf"), (m + tl.log2(total)) * LN_2)
        rows = (first_row + queries).to(tl.int64) * heads + h
        here = queries < q_len
        tl.store(lse + rows, log_sum, mask=here)
        columns = tl.arange(0, D_V)
        at = out + rows[:, None] * v_dim + columns[None, :]
        value = (sums / total[:, None]).to(out.dtype.element_ty)
        tl.store(at, value, mask=here[:, None] & (columns < v_dim)[None, :])
