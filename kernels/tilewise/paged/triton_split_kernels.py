# mypy: allow-untyped-defs
"""The Triton kernels around the splits of decoding: which are shared, and their sum.

Sources: Dao et al., Flash-Decoding, 2023 (splits); Juravsky et al., Hydragen, 2024
(arXiv:2402.05099), and Ye et al., FlashInfer, 2025 (arXiv:2501.01005), for reading a prefix that
requests share once. There the caller says what is shared; here the block table does.
"""

import triton
import triton.language as tl

from tilewise.paged.triton_requests import (
    keys_of_block,
    split_size,
    split_sizes,
    tokens_of_request,
)
from tilewise.paged.triton_rows import is_finite, load_row
from tilewise.paged.triton_softmax import LOG2E, normalise


@triton.jit
def _cut(
    i,
    batch,
    cu_seqlens_q,
    cache_seqlens,
    tokens,
    capacity,
    right,
    IS_RAGGED: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """The tokens of requests, the keys that all of those see, and the size of the splits."""
    _, q_len, seqlen = tokens_of_request(
        i, batch, cu_seqlens_q, cache_seqlens, tokens, capacity, IS_RAGGED
    )
    _, _, _, all_end = keys_of_block(
        0, q_len * GROUP, q_len, seqlen, -1, right, GROUP, M, 1, False, HAS_RIGHT
    )
    return q_len, all_end, split_sizes(seqlen, MIN_SPLIT, MAX_SPLITS)


@triton.jit
def find_shared(
    takes,  # (batch, splits)
    block_table,
    cache_seqlens,
    cu_seqlens_q,
    batch,
    tokens,
    capacity,
    table_stride,
    right,
    IS_RAGGED: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    REQUESTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many requests, from each on, one program takes a split of; 0 for those taken along.

    They have as many tokens each, their splits are as large, the split's keys are in the same
    pages, and all their rows see all of it: nothing is masked, for any of them, shared or not. No
    more are taken than have rows for a block of M. A program looks at REQUESTS of them, and no run
    goes on beyond.
    """
    at = tl.arange(0, REQUESTS)
    number = tl.program_id(0) * REQUESTS + at
    split = tl.program_id(1)
    request = tl.minimum(number, batch)
    before = tl.maximum(request - 1, 0)
    q_len, all_end, size = _cut(
        request,
        batch,
        cu_seqlens_q,
        cache_seqlens,
        tokens,
        capacity,
        right,
        IS_RAGGED,
        HAS_RIGHT,
        GROUP,
        M,
        MIN_SPLIT,
        MAX_SPLITS,
    )
    q_len_before, all_end_before, size_before = _cut(
        before,
        batch,
        cu_seqlens_q,
        cache_seqlens,
        tokens,
        capacity,
        right,
        IS_RAGGED,
        HAS_RIGHT,
        GROUP,
        M,
        MIN_SPLIT,
        MAX_SPLITS,
    )
    end = split * size + size
    is_same = (at > 0) & (number < batch) & (q_len == q_len_before) & (size == size_before)
    is_same = is_same & (end <= tl.minimum(all_end, all_end_before))

    first_page = split * size // PAGE_SIZE
    count = tl.where(is_same, tl.cdiv(end, PAGE_SIZE) - first_page, 0)
    pages = block_table + request.to(tl.int64) * table_stride + first_page
    pages_before = block_table + before.to(tl.int64) * table_stride + first_page
    differences = tl.zeros([REQUESTS, BLOCK], tl.int32)
    for start in range(0, tl.max(count, 0), BLOCK):
        i = start + tl.arange(0, BLOCK)[None, :]
        page = tl.load(pages[:, None] + i, mask=i < count[:, None], other=-1)
        page_before = tl.load(pages_before[:, None] + i, mask=i < count[:, None], other=-1)
        differences |= page ^ page_before
    is_same = is_same & (tl.max((differences != 0).to(tl.int32), 1) == 0)

    # Where the run that each is in begins, and where it ends.
    is_first = is_same.to(tl.int32)[None, :] == 0
    other = at[None, :]
    begin = tl.max(tl.where(is_first & (other <= at[:, None]), other, 0), 1)
    end = tl.min(tl.where(is_first & (other > at[:, None]), other, REQUESTS), 1)
    room = tl.maximum(M // tl.maximum(q_len * GROUP, 1), 1)
    taken = tl.where((at - begin) % room == 0, tl.minimum(end - at, room), 0)
    here = takes + request.to(tl.int64) * tl.num_programs(1) + split
    tl.store(here, taken, mask=number < batch)


@triton.jit
def merge_splits(
    out,
    lse,
    partial_out,
    partial_max,
    partial_sum,
    cache_seqlens,
    cu_seqlens_q,
    sinks,
    batch,
    tokens,
    capacity,
    left,
    right,
    IS_RAGGED: tl.constexpr,
    SMALL_ROWS: tl.constexpr,
    REQUEST_ROWS: tl.constexpr,  # that the partial results have room for
    SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,  # a power of two >= MAX_SPLITS
    GROUP: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    V_DIM: tl.constexpr,
    V_BLOCK: tl.constexpr,
):
    """One row of one request: its splits become one result.

    It holds as many splits as there can ever be, in one order: room that a call has to spare
    changes no bit.
    """
    request = tl.program_id(0) // REQUEST_ROWS
    row = tl.program_id(0) % REQUEST_ROWS
    kv_head = tl.program_id(1)
    q_begin, q_len, seqlen = tokens_of_request(
        request, batch, cu_seqlens_q, cache_seqlens, tokens, capacity, IS_RAGGED
    )
    rows = q_len * GROUP
    if row >= rows:
        return
    if IS_RAGGED:
        is_small = (rows <= SMALL_ROWS) | (q_len == 1)
        if not is_small:
            return
    begin, end, _, _ = keys_of_block(
        row // M * M, rows, q_len, seqlen, left, right, GROUP, M, N, HAS_LEFT, HAS_RIGHT
    )
    count = tl.cdiv(end - begin, split_size(end - begin, MIN_SPLIT, MAX_SPLITS))
    head = kv_head * GROUP + row % GROUP
    split = tl.arange(0, SPLIT_BLOCK)
    exists = split < count
    at = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + kv_head) * SPLITS + split
    maxima = tl.load(partial_max + at, mask=exists, other=float("-inf"))
    sums = tl.load(partial_sum + at, mask=exists, other=0.0)
    m = tl.max(maxima, 0)
    factor = tl.exp2(maxima - tl.where(m == float("-inf"), 0.0, m))
    l = tl.sum(sums * factor, 0)
    x = load_row(partial_out + at * V_DIM, exists, V_DIM, V_BLOCK)
    acc = tl.sum(x * factor[:, None], 0)
    sink = tl.full([], float("-inf"), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
    weight, log_sum = normalise(m, l, sink)
    good = tl.min(is_finite(acc).to(tl.int32), 0)
    weight = tl.where(good == 1, weight * OUT_SCALE, float("nan"))
    acc = tl.where(l != 0.0, acc * weight, 0.0)
    out_at = (q_begin.to(tl.int64) + row // GROUP) * (tl.num_programs(1) * GROUP) + head
    tl.store(lse + out_at, log_sum)
    column = tl.arange(0, V_BLOCK)
    tl.store(out + out_at * V_DIM + column, acc.to(out.dtype.element_ty), mask=column < V_DIM)
