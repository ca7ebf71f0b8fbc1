# mypy: allow-untyped-defs
"""The Triton kernel of products with int8 activations: whole numbers times whole codes.

Within a group of the weight the product is of whole numbers and exact; scales multiply its result.
What the zero points of the weight add is a product with the sums of the codes of x.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from tilewise.quant.triton_finish_kernels import place, store
from tilewise.quant.triton_formats import weight_tile
from tilewise.quant.triton_gguf_formats import block_codes, block_zero


@triton.jit
def matmul_int8(
    x,
    x_scales,
    x_sums,
    data,
    scales,
    zeros,
    bias,
    residual,
    projected,
    adapter_b,
    out,
    M,
    N,
    K,
    row_bytes: tl.constexpr,
    groups,
    rank,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the product with int8 activations, in whole numbers within each group.

    Args:
        x, x_scales, x_sums: what `triton_activation_kernels.quantize_rows` wrote.
        GROUP: of the activations, which is the weight's: BLOCK_K, or -1.
    """
    PAIR: tl.constexpr = ACTIVATION == "swiglu"
    OUT = N // 2 if PAIR else N
    n, m = place(M, BLOCK_N, BLOCK_M)
    m_in, rows = tl.minimum(m, M - 1), tl.minimum(n, OUT - 1)
    y = _accumulate_int8(
        x, x_scales, x_sums, m_in, data, scales, zeros, rows, K, row_bytes, groups,
        FORMAT, GROUP, EVEN, BLOCK_N, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    up = None
    if PAIR:
        up = _accumulate_int8(
            x, x_scales, x_sums, m_in, data, scales, zeros, rows + OUT, K, row_bytes, groups,
            FORMAT, GROUP, EVEN, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    store(y, up, n, m, M, N, bias, residual, projected, adapter_b, rank, out, ACTIVATION)


@triton.jit
def _accumulate_int8(
    x,
    x_scales,
    x_sums,
    m,
    data,
    scales,
    zeros,
    rows,
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
    """A group at a time: an exact product of whole numbers, which its scales then multiply."""
    x_groups = 1 if GROUP < 0 else tl.cdiv(K, BLOCK_K)
    x_stride = K if GROUP < 0 else x_groups * BLOCK_K
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        at = x + m[None, :] * x_stride + column[:, None]
        if EVEN or GROUP > 0:
            h = tl.load(at)
        else:
            h = tl.load(at, mask=(column < K)[:, None], other=0)
        if FORMAT == "int8":
            at = data + (rows * row_bytes)[:, None] + column[None, :]
            if EVEN:
                w = tl.load(at)
            else:
                w = tl.load(at, mask=(column < K)[None, :], other=0)
            w = w.to(tl.int8, bitcast=True)
        elif FORMAT == "int4":
            w = weight_tile(
                data, scales, zeros, None, rows, k, K, row_bytes, groups,
                FORMAT, GROUP, False, EVEN, BLOCK_N, BLOCK_K,
            ).to(tl.int8)  # fmt: skip
        else:
            codes, scale, minimum = block_codes(
                data, rows, k, K, row_bytes, FORMAT, EVEN, BLOCK_N, BLOCK_K
            )
            w = tl.reshape(codes - block_zero(FORMAT), [BLOCK_N, BLOCK_K]).to(tl.int8)
        if GROUP < 0:
            total = tl.dot(w, h, total, out_dtype=tl.int32)
        else:
            group = k // BLOCK_K
            of_x = m * x_groups + group
            part = tl.dot(w, h, out_dtype=tl.int32)
            if FORMAT == "int8" or FORMAT == "int4":
                if FORMAT == "int8" and zeros is not None:
                    part -= _products(zeros, rows * groups + group, x_sums, of_x)
                scaled = part.to(tl.float32) * tl.load(scales + rows * groups + group)[:, None]
            else:
                scaled = part.to(tl.float32) * scale
                scaled += minimum * tl.load(x_sums + of_x).to(tl.float32)[None, :]
            y += scaled * tl.load(x_scales + of_x)[None, :]
    if GROUP < 0:
        if FORMAT == "int8" and zeros is not None:
            total -= _products(zeros, rows, x_sums, m)
        y = total.to(tl.float32) * tl.load(scales + rows)[:, None] * tl.load(x_scales + m)[None, :]
    return y


@triton.jit
def _products(zeros, of_weight, sums, of_x):
    """zero * sum of the codes of x, what the zero points of int8 weights add to a product."""
    zero = tl.load(zeros + of_weight).to(tl.int32)
    return zero[:, None] * tl.load(sums + of_x)[None, :]
