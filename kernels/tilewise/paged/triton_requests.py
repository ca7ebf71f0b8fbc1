# mypy: allow-untyped-defs
"""Which rows and which keys a Triton program of paged attention is for.

Nothing in a launch depends on values: programs look up here what their part is, and those that have
none end. Nobody has to have checked lengths and tables: whatever they hold, what is found lies
within the tensors.

That ragged requests can be found by bisection over a grid of a fixed size is from vLLM's unified
attention kernel.
"""

import triton
import triton.language as tl


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def tokens_of_request(
    i, batch, cu_seqlens_q, cache_seqlens, tokens, capacity, IS_RAGGED: tl.constexpr
):
    """First token, number of tokens and number of keys of request i.

    Nobody has to have checked the lengths: whatever they are, the result lies within the tensors.
    The tokens behind the last request's are the padding, and count as request `batch`, which has no
    keys. Without cache_seqlens every request has as many keys as there are.
    """
    if cu_seqlens_q is not None:
        begin = clamp(tl.load(cu_seqlens_q + i), 0, tokens)
        end = tl.load(cu_seqlens_q + i + 1, mask=i < batch, other=2147483647)
        end = clamp(end, begin, tokens)
    elif IS_RAGGED:  # a dense batch
        begin = i * (tokens // batch)
        end = begin + tokens // batch
    else:
        begin = i
        end = i + 1
    if cache_seqlens is not None:
        seqlen = clamp(tl.load(cache_seqlens + i, mask=i < batch, other=0), 0, capacity)
    else:
        seqlen = i * 0 + capacity
    return begin, end - begin, seqlen


@triton.jit
def request_of_block(block, batch, cu_seqlens_q, tokens, GROUP: tl.constexpr, M: tl.constexpr):
    """The request that a block of rows is for, and the number of the block within it.

    Request i may begin at block cu_seqlens_q[i] * GROUP // M + i: whatever the lengths before it,
    those need no more blocks. Some blocks remain without rows.
    """
    low = batch * 0
    high = batch + 1
    while high - low > 1:
        middle = (low + high) // 2
        row = clamp(tl.load(cu_seqlens_q + middle), 0, tokens).to(tl.int64) * GROUP
        if row // M + middle <= block:
            low = middle
        else:
            high = middle
    row = clamp(tl.load(cu_seqlens_q + low), 0, tokens).to(tl.int64) * GROUP
    return low, (block - row // M - low).to(tl.int32)


@triton.jit
def keys_of_block(
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
def split_size(keys, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Keys per split: of a fixed size, doubled until there are not too many of them.

    So requests of not too different lengths are cut in the same places, and can share splits.
    """
    size = tl.full([], MIN_SPLIT, tl.int32)
    while size < tl.cdiv(keys, MAX_SPLITS):
        size *= 2
    return size


@triton.jit
def split_sizes(keys, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """`split_size` of several requests."""
    largest = tl.full([], MIN_SPLIT, tl.int32)
    size = keys * 0 + largest
    longest = tl.max(keys, 0)
    while largest < tl.cdiv(longest, MAX_SPLITS):
        size = tl.where(largest < tl.cdiv(keys, MAX_SPLITS), largest * 2, size)
        largest *= 2
    return size
