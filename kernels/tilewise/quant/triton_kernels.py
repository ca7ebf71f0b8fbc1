# mypy: allow-untyped-defs
"""The Triton kernels of products with quantized weights. Imported by the first call of one.

A product is computed transposed, W x^T, as (BLOCK_N, BLOCK_M): the weight, unpacked in registers,
is then the left operand of the tensor cores, which Hopper's can take from registers, and a few
rows of x fill their narrow side. Sums are in float32 and in an order that depends on the shapes
alone, also where K is split among programs. What follows is in `triton_finish_kernels.py`.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from tilewise.quant.triton_finish_kernels import place, store_or_part
from tilewise.quant.triton_formats import weight_tile


@triton.jit
def _add_product(y, a, b):
    """y + a b, in float32.

    Tensor cores add to y in place. Without them, one float32 after the other would be added to it
    along all of K, each time rounded at the size of the whole sum; so a block is summed up first.
    """
    if a.dtype == tl.float32:
        # Said to keep y from becoming the product's own accumulator.
        return y + tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=a.shape[1])
    else:
        return tl.dot(a, b, y)


@triton.jit
def accumulate(
    x,
    x_rows,
    data,
    scales,
    zeros,
    codebook,
    rows,
    up_rows,
    begin,
    end,
    K,
    row_bytes: tl.constexpr,
    groups,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    PAIR: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W x^T of columns begin to end, float32 (BLOCK_N, BLOCK_M); with PAIR, of two sets of rows.

    Args:
        x_rows: (BLOCK_M,) int64, offsets of rows of x.
        rows, up_rows: (BLOCK_N,) int64, rows of the weight.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    SCALED: tl.constexpr = GROUP > 0
    y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(begin, end, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        at = x + x_rows[None, :] + column[:, None]
        if EVEN:
            h = tl.load(at)
        else:
            h = tl.load(at, mask=(column < K)[:, None], other=0.0)
        w = weight_tile(
            data, scales, zeros, codebook, rows, k, K, row_bytes, groups,
            FORMAT, GROUP, SCALED, EVEN, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        y = _add_product(y, w.to(DTYPE), h)
        if PAIR:
            w = weight_tile(
                data, scales, zeros, codebook, up_rows, k, K, row_bytes, groups,
                FORMAT, GROUP, SCALED, EVEN, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            up = _add_product(up, w.to(DTYPE), h)
    if not SCALED:
        y *= tl.load(scales + rows).to(tl.float32)[:, None]
        if PAIR:
            up *= tl.load(scales + up_rows).to(tl.float32)[:, None]
    return y, up


@triton.jit
def matmul(
    x,
    data,
    scales,
    zeros,
    codebook,
    bias,
    residual,
    projected,
    adapter_b,
    out,
    M,
    N,
    K,
    x_stride,
    row_bytes: tl.constexpr,
    groups,
    rank,
    k_per_split,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the product on tensor cores."""
    PAIR: tl.constexpr = ACTIVATION == "swiglu"
    OUT = N // 2 if PAIR else N
    n, m = place(M, BLOCK_N, BLOCK_M)
    rows = tl.minimum(n, OUT - 1)
    begin = tl.program_id(1) * k_per_split
    y, up = accumulate(
        x, tl.minimum(m, M - 1) * x_stride, data, scales, zeros, codebook, rows, rows + OUT,
        begin, min(begin + k_per_split, K), K, row_bytes, groups,
        FORMAT, GROUP, PAIR, EVEN, BLOCK_N, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    store_or_part(
        y, up, n, m, M, N, bias, residual, projected, adapter_b, rank, out, tl.program_id(1),
        ACTIVATION, SPLITS,
    )  # fmt: skip


@triton.jit
def _dot_rows(w, h, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums of 16 products of w (BLOCK_N, BLOCK_K) and h (BLOCK_M, BLOCK_K), within a thread."""
    product = w.to(tl.float32)[:, None, :] * h[None, :, :]
    return tl.sum(tl.reshape(product, [BLOCK_N, BLOCK_M, BLOCK_K // 16, 16]), 3)


@triton.jit
def vector(
    x,
    data,
    scales,
    zeros,
    codebook,
    bias,
    residual,
    projected,
    adapter_b,
    out,
    M,
    N,
    K,
    x_stride,
    row_bytes: tl.constexpr,
    groups,
    rank,
    k_per_split,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All of the few rows of x, float32 throughout: what matters is how the weight is read."""
    PAIR: tl.constexpr = ACTIVATION == "swiglu"
    SCALED: tl.constexpr = GROUP > 0
    OUT = N // 2 if PAIR else N
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M).to(tl.int64)
    rows = tl.minimum(n, OUT - 1)
    x_rows = tl.minimum(m, M - 1) * x_stride
    begin = tl.program_id(1) * k_per_split
    sums = tl.zeros([BLOCK_N, BLOCK_M, BLOCK_K // 16], tl.float32)
    up_sums = tl.zeros([BLOCK_N, BLOCK_M, BLOCK_K // 16], tl.float32)
    for k in range(begin, min(begin + k_per_split, K), BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        at = x + x_rows[:, None] + column[None, :]
        if EVEN:
            h = tl.load(at).to(tl.float32)
        else:
            h = tl.load(at, mask=(column < K)[None, :], other=0.0).to(tl.float32)
        w = weight_tile(
            data, scales, zeros, codebook, rows, k, K, row_bytes, groups,
            FORMAT, GROUP, SCALED, EVEN, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        sums += _dot_rows(w, h, BLOCK_N, BLOCK_M, BLOCK_K)
        if PAIR:
            w = weight_tile(
                data, scales, zeros, codebook, rows + OUT, k, K, row_bytes, groups,
                FORMAT, GROUP, SCALED, EVEN, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            up_sums += _dot_rows(w, h, BLOCK_N, BLOCK_M, BLOCK_K)
    y, up = tl.sum(sums, 2), tl.sum(up_sums, 2)
    if not SCALED:
        y *= tl.load(scales + rows).to(tl.float32)[:, None]
        if PAIR:
            up *= tl.load(scales + rows + OUT).to(tl.float32)[:, None]
    store_or_part(
        y, up, n, m, M, N, bias, residual, projected, adapter_b, rank, out, tl.program_id(1),
        ACTIVATION, SPLITS,
    )  # fmt: skip


# --- the gradient of x, embeddings, whole weights -------------------------------------------------


@triton.jit
def matmul_backward(
    grad,
    data,
    scales,
    zeros,
    codebook,
    grad_x,
    M,
    N,
    K,
    row_bytes: tl.constexpr,
    groups,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile (BLOCK_M, BLOCK_K) of grad W."""
    DTYPE: tl.constexpr = grad.dtype.element_ty
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0)
    m = (tile % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = (tile // tiles_m) * BLOCK_K
    at = grad + (tl.minimum(m, M - 1) * N)[:, None]
    y = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        g = tl.load(at + n[None, :], mask=(n < N)[None, :], other=0.0)
        w = weight_tile(
            data, scales, zeros, codebook, tl.minimum(n, N - 1).to(tl.int64), k, K, row_bytes,
            groups, FORMAT, GROUP, True, EVEN, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        y = _add_product(y, g, w.to(DTYPE))
    column = k + tl.arange(0, BLOCK_K)
    inside = (m < M)[:, None] & (column < K)[None, :]
    at = grad_x + (m * K)[:, None] + column[None, :]
    tl.store(at, y.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def dequantize(
    data,
    scales,
    zeros,
    codebook,
    indices,
    out,
    count,
    N,
    K,
    row_bytes: tl.constexpr,
    groups,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of the weight by number, or all of them; a number out of range gives a row of NaN."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K
    if indices is not None:
        rows = tl.load(indices + place, mask=place < count, other=0)
    else:
        rows = tl.minimum(place, N - 1)
    is_row = (rows >= 0) & (rows < N)
    values = weight_tile(
        data, scales, zeros, codebook, tl.where(is_row, rows, 0), k, K, row_bytes, groups,
        FORMAT, GROUP, True, EVEN, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    values = tl.where(is_row[:, None], values, float("nan"))
    column = k + tl.arange(0, BLOCK_K)
    inside = (place < count)[:, None] & (column < K)[None, :]
    at = out + (place * K)[:, None] + column[None, :]
    tl.store(at, values.to(out.dtype.element_ty), mask=inside)
