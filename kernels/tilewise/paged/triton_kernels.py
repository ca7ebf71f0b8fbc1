# mypy: allow-untyped-defs
"""The Triton kernels of attention over a paged cache. Imported by the first call that launches one.

The queries of a request and the heads that share a key head are rows of one block: row r is head
r % GROUP of token r // GROUP. So a tile of keys is read once for all of them, and decoding (one
token), speculation (a few) and chunked prefill (many) are the same program.

A request with few rows would leave most of a GPU idle, so its keys are cut into splits, each a
program of its own that leaves an unnormalised result, its maximum and its sum, which
`triton_split_kernels.py` adds up. Where the cuts are depends on the request's own length alone, and
so do a row's bits.

Of a request that decodes, a block of M rows has but GROUP. Where neighbours in the batch have the
same pages in a split, the first one's program takes the rows of all of them that fit, which would
have been padding, and reads the keys once. It is the same code on a block of the same size, so no
bit tells.

Nothing in a launch depends on values: programs look up what their part is, and those that have none
return. A tile is found key by key (block_table[j // PAGE_SIZE], j % PAGE_SIZE), so that its size
has nothing to do with a page's.

Sources: Dao et al., Flash-Decoding, 2023 (splits); Kwon et al., 2023 (arXiv:2309.06180, pages);
Ye et al., FlashInfer, 2025 (arXiv:2501.01005: heads and tokens as rows). That ragged requests can
be found by bisection over a grid of a fixed size is from vLLM's unified attention kernel.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# --- where things are -----------------------------------------------------------------------------


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _request(i, batch, cu_seqlens_q, cache_seqlens, tokens, capacity, IS_RAGGED: tl.constexpr):
    """First token, number of tokens and number of keys of request i.

    Nobody has to have checked the lengths: whatever they are, the result lies within the tensors.
    The tokens behind the last request's are the padding, and count as request `batch`, which has no
    keys.
    """
    if IS_RAGGED:
        begin = _clamp(tl.load(cu_seqlens_q + i), 0, tokens)
        end = tl.load(cu_seqlens_q + i + 1, mask=i < batch, other=2147483647)
        end = _clamp(end, begin, tokens)
    else:
        begin = i
        end = i + 1
    seqlen = _clamp(tl.load(cache_seqlens + i, mask=i < batch, other=0), 0, capacity)
    return begin, end - begin, seqlen


@triton.jit
def _request_of_block(block, batch, cu_seqlens_q, tokens, GROUP: tl.constexpr, M: tl.constexpr):
    """The request that a block of rows is for, and the number of the block within it.

    Request i may begin at block cu_seqlens_q[i] * GROUP // M + i: whatever the lengths before it,
    those need no more blocks. Some blocks remain without rows.
    """
    low = batch * 0
    high = batch + 1
    while high - low > 1:
        middle = (low + high) // 2
        row = _clamp(tl.load(cu_seqlens_q + middle), 0, tokens).to(tl.int64) * GROUP
        if row // M + middle <= block:
            low = middle
        else:
            high = middle
    row = _clamp(tl.load(cu_seqlens_q + low), 0, tokens).to(tl.int64) * GROUP
    return low, (block - row // M - low).to(tl.int32)


@triton.jit
def _keys_of_block(
    first_row,
    rows,
    q_len,
    seqlen,
    left,
    right,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """The keys [begin, end) that any row of a block may see, and [all_begin, all_end) that all may.

    `begin` is rounded down to a tile.
    """
    # Position of the block's first and last token among the keys.
    first = seqlen - q_len + first_row // GROUP
    last = seqlen - q_len + (tl.minimum(first_row + M, rows) - 1) // GROUP
    begin = seqlen * 0
    all_begin = begin
    end = seqlen
    all_end = seqlen
    if HAS_LEFT:
        begin = tl.maximum(first - left, 0) // N * N
        all_begin = tl.maximum(last - left, 0)
    if HAS_RIGHT:
        end = tl.minimum(seqlen, last + right + 1)
        all_end = tl.minimum(seqlen, first + right + 1)
    return begin, tl.maximum(end, begin), all_begin, all_end


@triton.jit
def _split_size(keys, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Keys per split: of a fixed size, doubled until there are not too many of them.

    So requests of not too different lengths are cut in the same places, and can share splits.
    """
    size = tl.full([], MIN_SPLIT, tl.int32)
    while size < tl.cdiv(keys, MAX_SPLITS):
        size *= 2
    return size


# --- numbers --------------------------------------------------------------------------------------


@triton.jit
def _tanh(x):
    """Hyperbolic tangent, as exact for small x as for large."""
    y = x * x
    # x + x^3 P(x^2), P fitted on |x| <= 0.6; beyond, the exponential loses no digits.
    p = -0.0062764 * y + 0.02111624
    p = (p * y - 0.05387515) * y + 0.13332924
    small = x + x * y * (p * y - 0.3333333)
    e = tl.exp2(tl.abs(x) * (2 * LOG2E))
    large = 1 - 2 / (e + 1)
    return tl.where(tl.abs(x) < 0.6, small, tl.where(x < 0, -large, large))


@triton.jit
def _is_finite(x):
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def _all_finite(x):
    """(rows,): 1 for a row of which every element is finite, else 0."""
    return tl.min(_is_finite(x).to(tl.int32), 1)


@triton.jit
def _load_row(base, exists, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK): DIM elements from every base on, zeros behind and where no row exists."""
    at = tl.arange(0, BLOCK)
    mask = exists[:, None]
    if DIM < BLOCK:
        mask = mask & (at < DIM)[None, :]
    return tl.load(base[:, None] + at[None, :], mask=mask, other=0)


@triton.jit
def _from_fp8(x):
    """float8 e4m3, in bytes, as float16, divided by 256.

    Moved to the place of float16's exponent and mantissa the bits mean just that, subnormal numbers
    included. All chips can do this; few have an instruction for it.
    """
    bits = (x & 0x7F).to(tl.uint16)
    bits = tl.where(bits == 0x7F, 0x7E00, bits << 7)
    bits = (bits | ((x & 0x80).to(tl.uint16) << 8)).to(tl.uint16)
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def _load_parts(
    base,
    exists,
    DIM_1: tl.constexpr,
    BLOCK_1: tl.constexpr,
    DIM_2: tl.constexpr,
    BLOCK_2: tl.constexpr,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Both parts of rows of a cache, (rows, BLOCK_1) and (rows, BLOCK_2), in DTYPE.

    Codes are not multiplied by their scale. Without a second part it repeats the first.
    """
    x = _load_row(base, exists, DIM_1, BLOCK_1)
    y = x
    if FORMAT == "int4":
        y = (x >> 4).to(tl.int8) - 8
        x = (x & 15).to(tl.int8) - 8
    elif BLOCK_2 > 0:
        y = _load_row(base + DIM_1, exists, DIM_2, BLOCK_2)
    if FORMAT == "fp8":
        x = _from_fp8(x)
        y = _from_fp8(y)
    return x.to(DTYPE), y.to(DTYPE)


# --- attention ------------------------------------------------------------------------------------


@triton.jit
def _attend(
    acc_1,  # (M, V_BLOCK_1) and (M, V_BLOCK_2): sums of weights x values
    acc_2,
    m,  # (M,): maxima of the scores, in units of log 2
    l,  # (M,): sums of the weights
    q_1,  # (M, BLOCK_1) and (M, BLOCK_2)
    q_2,
    begin,  # of the keys, a multiple of N
    end,
    any_begin,  # keys [any_begin, any_end) are seen by some row
    any_end,
    row_begin,  # (M,): keys [row_begin, row_end) are seen by each
    row_end,
    position,  # (M,)
    slope,  # (M,)
    k,  # from here on of the key head at hand
    v,
    k_scale,
    v_scale,
    bias,  # (M,) pointers
    pages,
    num_pages,
    k_page_stride,
    k_slot_stride,
    v_page_stride,
    v_slot_stride,
    ks_page_stride,
    ks_slot_stride,
    vs_page_stride,
    vs_slot_stride,
    bias_stride,
    score_scale,
    softcap,
    N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIM_1: tl.constexpr,
    BLOCK_1: tl.constexpr,
    DIM_2: tl.constexpr,
    BLOCK_2: tl.constexpr,
    V_DIM_1: tl.constexpr,
    V_BLOCK_1: tl.constexpr,
    V_DIM_2: tl.constexpr,
    V_BLOCK_2: tl.constexpr,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    CODE_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    BIAS: tl.constexpr,
    MASKED: tl.constexpr,  # not all rows see all of these keys
    CAREFUL: tl.constexpr,  # nor do all rows see the same ones
):
    """Take the keys [begin, end) in, tile by tile."""
    for start in range(begin, end, N):
        at = start + tl.arange(0, N)
        if MASKED:
            page = tl.load(
                pages + at // PAGE_SIZE, mask=(at >= any_begin) & (at < any_end), other=-1
            )
        else:
            page = tl.load(pages + at // PAGE_SIZE)
        exists = (page >= 0) & (page < num_pages)
        page = tl.where(exists, page, 0).to(tl.int64)
        slot = (at % PAGE_SIZE).to(tl.int64)
        k_1, k_2 = _load_parts(
            k + page * k_page_stride + slot * k_slot_stride,
            exists,
            DIM_1,
            BLOCK_1,
            DIM_2,
            BLOCK_2,
            FORMAT,
            DTYPE,
        )
        s = tl.dot(q_1, tl.trans(k_1), input_precision=PRECISION)
        if BLOCK_2 > 0:
            s = tl.dot(q_2, tl.trans(k_2), s, input_precision=PRECISION)
        if FORMAT == "float":
            s *= score_scale
        else:
            ks = tl.load(
                k_scale + page * ks_page_stride + slot * ks_slot_stride, mask=exists, other=0.0
            )
            s *= (ks * score_scale)[None, :]
        # Infinity comes from a query or a key that is not finite, which means NaN.
        s += s * 0.0
        visible = exists[None, :]
        if MASKED:
            visible = visible & (at[None, :] >= row_begin[:, None])
            visible = visible & (at[None, :] < row_end[:, None])
        if HAS_SOFTCAP:
            s = softcap * _tanh(s)
        if HAS_ALIBI:
            s -= slope[:, None] * tl.abs(position[:, None] - at[None, :]).to(tl.float32)
        if BIAS != "none":
            b = tl.load(
                bias[:, None] + at[None, :].to(tl.int64) * bias_stride, mask=visible, other=0
            )
            if BIAS == "mask":
                visible = visible & (b != 0)
            else:
                b = b.to(tl.float32)
                visible = visible & (b != float("-inf"))
                s += b
        if HAS_SOFTCAP or HAS_ALIBI or BIAS == "float":
            s *= LOG2E
        s = tl.where(visible, s, float("-inf"))

        new_m = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(new_m == float("-inf"), 0.0, new_m)
        factor = tl.exp2(m - shift)
        p = tl.exp2(s - shift[:, None])
        l = l * factor + tl.sum(p, 1)
        m = new_m

        v_1, v_2 = _load_parts(
            v + page * v_page_stride + slot * v_slot_stride,
            exists,
            V_DIM_1,
            V_BLOCK_1,
            V_DIM_2,
            V_BLOCK_2,
            FORMAT,
            DTYPE,
        )
        if FORMAT != "float":
            vs = tl.load(
                v_scale + page * vs_page_stride + slot * vs_slot_stride, mask=exists, other=0.0
            )
        if CAREFUL:
            # 0 x NaN is NaN: a value that is not finite becomes 0, and NaN for those who see it.
            good = tl.full([N], 1, tl.int32)
            if FORMAT == "float" or FORMAT == "fp8":
                good = _all_finite(v_1)
                if V_BLOCK_2 > 0:
                    good = tl.minimum(good, _all_finite(v_2))
            if FORMAT != "float":
                good = tl.minimum(good, _is_finite(vs).to(tl.int32))
                vs = tl.where(good == 1, vs, 0.0)
            v_1 = tl.where((good == 1)[:, None], v_1, 0.0).to(DTYPE)
            if V_BLOCK_2 > 0:
                v_2 = tl.where((good == 1)[:, None], v_2, 0.0).to(DTYPE)
            p = tl.where(visible & (good == 0)[None, :], float("nan"), p)
        if FORMAT != "float":
            # A scale times the largest code is a value's size: the products are as far from the
            # ends of DTYPE's range as the result is.
            p *= (vs * CODE_SCALE)[None, :]
        p = p.to(DTYPE)
        acc_1 = tl.dot(p, v_1, acc_1 * factor[:, None], input_precision=PRECISION)
        if V_BLOCK_2 > 0:
            acc_2 = tl.dot(p, v_2, acc_2 * factor[:, None], input_precision=PRECISION)
    return acc_1, acc_2, m, l


@triton.jit
def _normalise(m, l, sink):
    """What to multiply the sums by, and the logarithm of the weights' sum, sink included."""
    top = tl.maximum(m, sink)
    shift = tl.where(top == float("-inf"), 0.0, top)
    factor = tl.exp2(m - shift)
    total = l * factor + tl.exp2(sink - shift)
    divisor = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), (shift + tl.log2(divisor)) * LN2)
    return tl.where(l == 0.0, 0.0, factor / divisor), lse


@triton.jit
def _store_row(base, x, here, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of `_load_row`."""
    at = tl.arange(0, BLOCK)
    mask = here[:, None]
    if DIM < BLOCK:
        mask = mask & (at < DIM)[None, :]
    tl.store(base[:, None] + at[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def paged_attention(
    q,  # (tokens, heads, dim)
    k,  # (pages, PAGE_SIZE, kv_heads, dim, or dim / 2 bytes of int4)
    v,
    out,  # (tokens, heads, v_dim), contiguous
    lse,  # (tokens, heads)
    partial_out,  # (rows of all requests, kv_heads, SPLITS, v_dim)
    partial_max,  # (rows of all requests, kv_heads, SPLITS)
    partial_sum,
    takes,  # (batch, SPLITS): of how many requests, see triton_split_kernels.find_shared
    block_table,
    cache_seqlens,
    cu_seqlens_q,
    k_scale,
    v_scale,
    alibi_slopes,
    sinks,
    bias,  # (heads, tokens, keys)
    batch,
    tokens,
    capacity,
    num_pages,
    q_token_stride,
    q_head_stride,
    k_page_stride,
    k_slot_stride,
    k_head_stride,
    v_page_stride,
    v_slot_stride,
    v_head_stride,
    ks_page_stride,
    ks_slot_stride,
    ks_head_stride,
    vs_page_stride,
    vs_slot_stride,
    vs_head_stride,
    table_stride,
    alibi_stride,
    bias_head_stride,
    bias_token_stride,
    bias_key_stride,
    left,
    right,
    score_scale,
    softcap,
    IS_RAGGED: tl.constexpr,
    IS_SMALL: tl.constexpr,  # whether the launch is for requests of few rows, or for the others
    SMALL_ROWS: tl.constexpr,
    REQUEST_ROWS: tl.constexpr,  # of a small request, at most
    SHARE: tl.constexpr,  # requests that one program may take the rows of
    SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIM_1: tl.constexpr,
    BLOCK_1: tl.constexpr,
    DIM_2: tl.constexpr,
    BLOCK_2: tl.constexpr,
    V_DIM_1: tl.constexpr,
    V_BLOCK_1: tl.constexpr,
    V_DIM_2: tl.constexpr,
    V_BLOCK_2: tl.constexpr,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    CODE_SCALE: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """M rows of a request, one key head, one split of the keys."""
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if IS_SMALL:
        blocks: tl.constexpr = (REQUEST_ROWS + M - 1) // M
        request = tl.program_id(0) // blocks
        block = tl.program_id(0) % blocks
    else:
        # The last blocks of a causal prompt see the most keys: they go first.
        last = tl.num_programs(0) - 1
        request, block = _request_of_block(
            last - tl.program_id(0), batch, cu_seqlens_q, tokens, GROUP, M
        )
    q_begin, q_len, seqlen = _request(
        request, batch, cu_seqlens_q, cache_seqlens, tokens, capacity, IS_RAGGED
    )
    rows = q_len * GROUP
    first_row = block * M
    if first_row >= rows:
        return
    is_padding = request == batch
    if IS_RAGGED:
        is_small = ((rows <= SMALL_ROWS) | (q_len == 1)) & (request < batch)
        if is_small == (not IS_SMALL):
            return
    begin, end, all_begin, all_end = _keys_of_block(
        first_row, rows, q_len, seqlen, left, right, GROUP, M, N, HAS_LEFT, HAS_RIGHT
    )
    any_begin = begin
    any_end = end
    if IS_SMALL:
        size = _split_size(end - begin, MIN_SPLIT, MAX_SPLITS)
        if SPLITS > 1:
            begin = begin + split * size
            if begin >= end:
                return
            end = tl.minimum(end, begin + size)
        if SHARE > 1:
            rows *= tl.load(takes + request.to(tl.int64) * SPLITS + split)
            if rows == 0:
                return

    row = first_row + tl.arange(0, M)
    here = row < rows
    token = q_begin.to(tl.int64) + row // GROUP
    head = kv_head * GROUP + row % GROUP
    row_request = token * 0 + request
    row_seqlen = row * 0 + seqlen
    position = seqlen - q_len + row // GROUP
    if SHARE > 1:  # every token is a request's last
        row_request = token
        row_seqlen = tl.load(cache_seqlens + token, mask=here, other=0)
        row_seqlen = _clamp(row_seqlen, 0, capacity)
        position = row_seqlen - 1
    row_begin = position * 0
    row_end = row_begin + row_seqlen
    if HAS_LEFT:
        row_begin = tl.maximum(position - left, 0)
        if not IS_RAGGED:
            any_begin = tl.maximum(seqlen - 1 - left, 0)
    if HAS_RIGHT:
        row_end = tl.minimum(row_end, position + right + 1)
    q_at = q + token * q_token_stride + head * q_head_stride
    q_1 = _load_row(q_at, here, DIM_1, BLOCK_1).to(DTYPE)
    q_2 = q_1
    if BLOCK_2 > 0:
        q_2 = _load_row(q_at + DIM_1, here, DIM_2, BLOCK_2).to(DTYPE)
    slope = tl.zeros([M], tl.float32)
    if HAS_ALIBI:
        at = row_request * alibi_stride + head
        has_slope = row < tl.where(is_padding, 0, rows)
        slope = tl.load(alibi_slopes + at, mask=has_slope, other=0.0).to(tl.float32)
    bias_at = bias
    if BIAS != "none":
        bias_at = bias + head.to(tl.int64) * bias_head_stride + token * bias_token_stride
        row_end = tl.where(here, row_end, 0)  # no bias to read there
    ks = k_scale
    vs = v_scale
    if FORMAT != "float":
        ks = k_scale + kv_head.to(tl.int64) * ks_head_stride
        vs = v_scale + kv_head.to(tl.int64) * vs_head_stride
    acc_1 = tl.zeros([M, V_BLOCK_1], tl.float32)
    acc_2 = tl.zeros([M, V_BLOCK_2 if V_BLOCK_2 > 0 else 1], tl.float32)
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M], tl.float32)

    # Most tiles of a long request are seen by all rows. There nothing is masked, and a value that
    # is not finite is everyone's. With one token a request that holds for all its tiles.
    full_begin = end
    full_end = end
    if IS_RAGGED and BIAS == "none":
        full_begin = _clamp(tl.cdiv(all_begin, N) * N, begin, end)
        full_end = _clamp(all_end // N * N, full_begin, end)
    for part in tl.static_range(3):
        # Before, in, and behind the tiles that all rows see. A part that cannot be is left out.
        if part == 0:
            part_begin = begin
            part_end = full_begin
        elif part == 1:
            part_begin = full_begin
            part_end = full_end
        else:
            part_begin = full_end
            part_end = end
        if (part == 0 and (HAS_LEFT or not IS_RAGGED or BIAS != "none")) or (
            part > 0 and IS_RAGGED and BIAS == "none"
        ):
            acc_1, acc_2, m, l = _attend(
                acc_1,
                acc_2,
                m,
                l,
                q_1,
                q_2,
                part_begin,
                part_end,
                any_begin,
                any_end,
                row_begin,
                row_end,
                position,
                slope,
                k + kv_head.to(tl.int64) * k_head_stride,
                v + kv_head.to(tl.int64) * v_head_stride,
                ks,
                vs,
                bias_at,
                block_table + request.to(tl.int64) * table_stride,
                num_pages,
                k_page_stride,
                k_slot_stride,
                v_page_stride,
                v_slot_stride,
                ks_page_stride,
                ks_slot_stride,
                vs_page_stride,
                vs_slot_stride,
                bias_key_stride,
                score_scale,
                softcap,
                N,
                PAGE_SIZE,
                DIM_1,
                BLOCK_1,
                DIM_2,
                BLOCK_2,
                V_DIM_1,
                V_BLOCK_1,
                V_DIM_2,
                V_BLOCK_2,
                FORMAT,
                DTYPE,
                PRECISION,
                CODE_SCALE,
                HAS_SOFTCAP,
                HAS_ALIBI,
                BIAS,
                part != 1,
                part != 1 and (IS_RAGGED or BIAS != "none"),
            )

    if SPLITS > 1:
        at = request.to(tl.int64) * REQUEST_ROWS + row
        at = (at * tl.num_programs(1) + kv_head) * SPLITS + split
        tl.store(partial_max + at, m, mask=here)
        tl.store(partial_sum + at, l, mask=here)
        out_at = partial_out + at * (V_DIM_1 + V_DIM_2)
    else:
        sink = tl.full([M], float("-inf"), tl.float32)
        if sinks is not None:
            sink = tl.load(sinks + head, mask=here, other=0.0).to(tl.float32) * LOG2E
            sink = tl.where(is_padding, float("-inf"), sink)
        weight, log_sum = _normalise(m, l, sink)
        # Whoever sees a value that is not finite is NaN throughout.
        good = _all_finite(acc_1)
        if V_BLOCK_2 > 0:
            good = tl.minimum(good, _all_finite(acc_2))
        weight = tl.where(good == 1, weight * OUT_SCALE, float("nan"))
        saw_any = (l != 0.0)[:, None]
        acc_1 = tl.where(saw_any, acc_1 * weight[:, None], 0.0)
        if V_BLOCK_2 > 0:
            acc_2 = tl.where(saw_any, acc_2 * weight[:, None], 0.0)
        at = token * (tl.num_programs(1) * GROUP) + head
        tl.store(lse + at, log_sum, mask=here)
        out_at = out + at * (V_DIM_1 + V_DIM_2)
    _store_row(out_at, acc_1, here, V_DIM_1, V_BLOCK_1)
    if V_BLOCK_2 > 0:
        _store_row(out_at + V_DIM_1, acc_2, here, V_DIM_2, V_BLOCK_2)
