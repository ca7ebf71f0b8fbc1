"""The Triton kernels of the mixture of experts. Imported by the first call that launches one.

Tokens are sorted by expert, and one launch multiplies all of them: programs find out on the device
which expert and which of its rows they work on, so that nobody waits for the counts on the host. A
tile of rows is of one expert; the grid is as large as any routing may need, and what is left over
of it does nothing.

The idea of the sorted, padded tiles is that of Gale et al., MegaBlocks, 2022 (arXiv:2211.15841).
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from tilewise.quant.triton_finish_kernels import activate
from tilewise.quant.triton_kernels import accumulate


@triton.jit
def experts_product(
    x,
    data,
    scales,
    zeros,
    codebook,
    order,
    ends,
    out,
    choices,
    experts,
    max_tiles,
    N,
    K,
    x_stride,
    row_bytes: tl.constexpr,
    groups,
    top_k,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    IS_FIRST: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of x through the matrices of their experts.

    If IS_FIRST, row i of the result is swiglu of token order[i] / top_k; otherwise row i of x
    gives row order[i] of the result, which puts the choices of a token side by side.

    Args:
        data, scales, zeros, codebook: a weight (experts * N, K), see `weight_tile`.
        order: (choices,) int64, the choices (token * top_k + i) by expert.
        ends: (experts,) int64, where each expert's choices end in `order`.
        max_tiles: of rows, for any routing.
    """
    OUT = N // 2 if IS_FIRST else N
    tile = tl.program_id(0) % max_tiles
    n = (tl.program_id(0) // max_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
    end = tl.load(ends + e, mask=e < experts, other=choices)
    begin = tl.load(ends + e - 1, mask=(e > 0) & (e <= experts), other=0)
    begin = tl.where(e > experts, choices, begin)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    tiles_end = tl.cumsum(tiles, 0)
    expert = tl.sum(tl.where(tiles_end <= tile, 1, 0), 0)
    if expert < experts:
        is_own = e == expert
        first = begin + (tile - tiles_end + tiles) * BLOCK_M
        row = tl.sum(tl.where(is_own, first, 0), 0) + tl.arange(0, BLOCK_M)
        last = tl.sum(tl.where(is_own, end, 0), 0) - 1
        row_in = tl.minimum(row, last)
        choice = tl.load(order + row_in)
        if IS_FIRST:
            x_row, out_row = choice // top_k, row
        else:
            x_row, out_row = row_in, choice
        rows = expert.to(tl.int64) * N + tl.minimum(n, OUT - 1)
        y, up = accumulate(
            x, x_row * x_stride, data, scales, zeros, codebook, rows, rows + OUT, 0, K, K,
            row_bytes, groups, FORMAT, GROUP, IS_FIRST, EVEN, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        if IS_FIRST:
            y = activate(y, up, "swiglu")
        inside = (n < OUT)[:, None] & (row <= last)[None, :]
        at = out + out_row[None, :] * OUT + n[:, None]
        tl.store(at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def combine(parts, weights, out, dim, top_k, BLOCK: tl.constexpr):
    """The weighted sum (tokens, dim) of parts (tokens, top_k, dim), the likeliest expert first."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros([BLOCK], tl.float32)
    for i in range(top_k):
        part = tl.load(parts + (token * top_k + i) * dim + at, mask=at < dim, other=0.0)
        y += tl.load(weights + token * top_k + i) * part
    tl.store(out + token * dim + at, y.to(out.dtype.element_ty), mask=at < dim)
