# mypy: allow-untyped-defs
"""The Triton kernels of products with int8 activations: rows to codes, and codes times weights.

Within a group of the weight the product is of whole numbers and exact; scales multiply its result.
What the zero points of the weight add is a product with the sums of the codes of x.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from tilewise.quant.triton_finish_kernels import store
from tilewise.quant.triton_formats import weight_tile
from tilewise.quant.triton_gguf_formats import block_codes, block_zero


@triton.jit
def quantize_rows(
    x,
    codes,
    scales,
    sums,
    rounded,
    K,
    groups,
    x_stride,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some groups of a row as `naive.fake_quantize` rounds them.

    Writes codes, scales and the sums of codes of the groups, or, if `rounded` is there, only the
    values that x is rounded to. A row that is one group (GROUP is -1) takes two passes.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    if GROUP > 0:
        group = tl.program_id(1) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = column < K
        h = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        scale = _scale_of(tl.max(tl.abs(h), 1), tl.max(tl.where(h - h == 0, 0, 1), 1))
        code = _codes_of(h, scale[:, None])
        if rounded is not None:
            y = (code * scale[:, None]).to(rounded.dtype.element_ty)
            tl.store(rounded + row * K + column, y, mask=inside)
        else:
            at = row * groups + group
            here = codes + row * groups * GROUP + column
            tl.store(here, code.to(tl.int8), mask=column < groups * GROUP)
            tl.store(scales + at, scale, mask=group < groups)
            tl.store(sums + at, tl.sum(code, 1).to(tl.int32), mask=group < groups)
    else:
        largest = tl.zeros([BLOCK], tl.float32)
        is_bad = tl.zeros([BLOCK], tl.int32)
        for k in range(0, K, BLOCK):
            column = k + tl.arange(0, BLOCK)
            h = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(h))
            is_bad |= tl.where(h - h == 0, 0, 1)
        scale = _scale_of(tl.max(largest, 0), tl.max(is_bad, 0))
        total = tl.zeros([BLOCK], tl.int32)
        for k in range(0, K, BLOCK):
            column = k + tl.arange(0, BLOCK)
            h = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)
            code = _codes_of(h, scale)
            if rounded is not None:
                y = (code * scale).to(rounded.dtype.element_ty)
                tl.store(rounded + row * K + column, y, mask=column < K)
            else:
                tl.store(codes + row * K + column, code.to(tl.int8), mask=column < K)
                total += code.to(tl.int32)
        if rounded is None:
            tl.store(scales + row, scale)
            tl.store(sums + row, tl.sum(total, 0))


@triton.jit
def _scale_of(largest, is_bad):
    """NaN where something was not finite. Only a correctly rounded quotient is the definition's."""
    scale = tl.div_rn(largest, tl.zeros_like(largest) + 127.0)
    return tl.where(is_bad != 0, float("nan"), scale)


@triton.jit
def _codes_of(h, scale):
    """Round to even by adding 1.5 * 2^23; NaN gives code 0, and the scale says NaN."""
    quotient = tl.div_rn(h, tl.zeros_like(h) + tl.where(scale > 0, scale, 1.0))
    quotient = tl.where(scale == scale, quotient, 0.0)
    code = quotient + 12582912.0 - 12582912.0
    return tl.minimum(tl.maximum(code, -127.0), 127.0)


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
        x, x_scales, x_sums: what `quantize_rows` wrote.
        GROUP: of the activations, which is the weight's: BLOCK_K, or -1.
    """
    PAIR: tl.constexpr = ACTIVATION == "swiglu"
    OUT = N // 2 if PAIR else N
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0)
    m = (tile % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
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
