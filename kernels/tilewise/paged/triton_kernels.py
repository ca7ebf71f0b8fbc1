# mypy: allow-untyped-defs
"""The Triton kernels of attention over a paged cache. Imported by the first call that launches one.

The queries of a request and the heads that share a key head are rows of one block: row r is head
r % GROUP of token r // GROUP. So a tile of keys is read once for all of them, and decoding (one
token), speculation (a few) and chunked prefill (many) are the same program.

A request with few rows would leave most of a GPU idle, so its keys are cut into splits, each a
program of its own that leaves an unnormalised result, its maximum and its sum, which
`triton_split_kernels.py` adds up. Where the cuts are depends on the request's own length alone, and
so do a row's bits.

A request of few tokens leaves most of a block of M rows empty. Where neighbours in the batch have
as many tokens each and the same pages in a split, the first one's program takes the rows of all of
them that fit, which would have been padding, and reads the keys once. It is the same code on a
block of the same size, so no bit tells. In a ragged batch, too: the tokens of neighbours follow
each other, and prompts among them only end a run.

Nothing in a launch depends on values: programs look up what their part is, and those that have none
return. A tile is found key by key (block_table[j // PAGE_SIZE], j % PAGE_SIZE), so that its size
has nothing to do with a page's.

Sources: Dao et al., Flash-Decoding, 2023 (splits); Kwon et al., 2023 (arXiv:2309.06180, pages);
Ye et al., FlashInfer, 2025 (arXiv:2501.01005: heads and tokens as rows).
"""

import triton
import triton.language as tl

from tilewise.paged.triton_requests import (
    clamp,
    keys_of_block,
    request_of_block,
    split_size,
    tokens_of_request,
)
from tilewise.paged.triton_rows import all_finite, load_row, store_row
from tilewise.paged.triton_softmax import LOG2E, attend, normalise


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
    bias_request_stride,  # beside that of its tokens
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
    SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0 where k and v are (batch, keys, kv_heads, dim)
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
        request, block = request_of_block(
            last - tl.program_id(0), batch, cu_seqlens_q, tokens, GROUP, M
        )
    q_begin, q_len, seqlen = tokens_of_request(
        request, batch, cu_seqlens_q, cache_seqlens, tokens, capacity, IS_RAGGED
    )
    request_rows = q_len * GROUP
    rows = request_rows
    first_row = block * M
    if first_row >= rows:
        return
    is_padding = request == batch
    if IS_RAGGED:
        is_small = ((rows <= SMALL_ROWS) | (q_len == 1)) & (request < batch)
        if is_small == (not IS_SMALL):
            return
    begin, end, all_begin, all_end = keys_of_block(
        first_row, rows, q_len, seqlen, left, right, GROUP, M, N, HAS_LEFT, HAS_RIGHT
    )
    any_begin = begin
    any_end = end
    if IS_SMALL:
        size = split_size(end - begin, MIN_SPLIT, MAX_SPLITS)
        if SPLITS > 1:
            begin = begin + split * size
            if begin >= end:
                return
            end = tl.minimum(end, begin + size)
        if takes is not None:
            rows *= tl.load(takes + request.to(tl.int64) * SPLITS + split)
            if rows == 0:
                return

    row = first_row + tl.arange(0, M)
    here = row < rows
    token = q_begin.to(tl.int64) + row // GROUP
    head = kv_head * GROUP + row % GROUP
    # A split that is shared is seen as a whole by the first request's rows, and so by those behind
    # them, as if all were the same request's.
    position = seqlen - q_len + row // GROUP
    row_begin = position * 0
    row_end = row_begin + seqlen
    if HAS_LEFT:
        row_begin = tl.maximum(position - left, 0)
        if not IS_RAGGED:
            any_begin = tl.maximum(seqlen - 1 - left, 0)
    if HAS_RIGHT:
        row_end = tl.minimum(row_end, position + right + 1)
    q_at = q + token * q_token_stride + head * q_head_stride
    q_1 = load_row(q_at, here, DIM_1, BLOCK_1).to(DTYPE)
    q_2 = q_1
    if BLOCK_2 > 0:
        q_2 = load_row(q_at + DIM_1, here, DIM_2, BLOCK_2).to(DTYPE)
    slope = tl.zeros([M], tl.float32)
    if HAS_ALIBI:
        row_request = token * 0 + request
        if takes is not None:
            row_request += row // request_rows
            row_seqlen = tl.load(cache_seqlens + row_request, mask=here, other=0)
            position = clamp(row_seqlen, 0, capacity) - q_len + row % request_rows // GROUP
        at = row_request * alibi_stride + head
        has_slope = row < tl.where(is_padding, 0, rows)
        slope = tl.load(alibi_slopes + at, mask=has_slope, other=0.0).to(tl.float32)
    bias_at = bias
    if BIAS != "none":
        bias_at = bias + head.to(tl.int64) * bias_head_stride + token * bias_token_stride
        bias_at += request.to(tl.int64) * bias_request_stride
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

    pages = request  # without a table: all keys of a request are one page
    if block_table is not None:
        pages = block_table + request.to(tl.int64) * table_stride

    # Most tiles of a long request are seen by all rows. There nothing is masked, and a value that
    # is not finite is everyone's. With one token a request that holds for all its tiles.
    full_begin = end
    full_end = end
    if IS_RAGGED and BIAS == "none":
        full_begin = clamp(tl.cdiv(all_begin, N) * N, begin, end)
        full_end = clamp(all_end // N * N, full_begin, end)
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
            acc_1, acc_2, m, l = attend(
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
        if takes is not None:  # each request has its own rows
            at += row // request_rows * (REQUEST_ROWS - request_rows)
        at = (at * tl.num_programs(1) + kv_head) * SPLITS + split
        tl.store(partial_max + at, m, mask=here)
        tl.store(partial_sum + at, l, mask=here)
        out_at = partial_out + at * (V_DIM_1 + V_DIM_2)
    else:
        sink = tl.full([M], float("-inf"), tl.float32)
        if sinks is not None:
            sink = tl.load(sinks + head, mask=here, other=0.0).to(tl.float32) * LOG2E
            sink = tl.where(is_padding, float("-inf"), sink)
        weight, log_sum = normalise(m, l, sink)
        # Whoever sees a value that is not finite is NaN throughout.
        good = all_finite(acc_1)
        if V_BLOCK_2 > 0:
            good = tl.minimum(good, all_finite(acc_2))
        weight = tl.where(good == 1, weight * OUT_SCALE, float("nan"))
        saw_any = (l != 0.0)[:, None]
        acc_1 = tl.where(saw_any, acc_1 * weight[:, None], 0.0)
        if V_BLOCK_2 > 0:
            acc_2 = tl.where(saw_any, acc_2 * weight[:, None], 0.0)
        at = token * (tl.num_programs(1) * GROUP) + head
        tl.store(lse + at, log_sum, mask=here)
        out_at = out + at * (V_DIM_1 + V_DIM_2)
    store_row(out_at, acc_1, here, V_DIM_1, V_BLOCK_1)
    if V_BLOCK_2 > 0:
        store_row(out_at + V_DIM_1, acc_2, here, V_DIM_2, V_BLOCK_2)
