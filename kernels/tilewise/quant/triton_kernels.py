# mypy: allow-untyped-defs
"""The Triton kernels of products with quantized weights. Imported by the first call of one.

A product is computed transposed, W x^T, as (BLOCK_N, BLOCK_M): the weight, unpacked in registers,
is then the left operand of the tensor cores, which Hopper's can take from registers, and a few
rows of x fill their narrow side. Sums are in float32 and in an order that depends on the shapes
alone: where K is split among programs, each writes its part and `finish` adds them up in order.

After the product, in float32 and rounded once: the adapter, the bias, the activation, the residual.
The half of a weight that is swiglu's gate and the half that it multiplies are two accumulators of
one program.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from tilewise.quant.triton_formats import block_codes, block_zero, weight_tile

# --- what follows the product ---------------------------------------------------------------------


@triton.jit
def _add(y, n, m, N, bias, projected, adapter_b, rank):
    """y (BLOCK_N, BLOCK_M) with the adapter and the bias of rows n of the weight."""
    if adapter_b is not None:
        for r in range(rank):
            b = tl.load(adapter_b + r * N + n).to(tl.float32)
            y += b[:, None] * tl.load(projected + m * rank + r)[None, :]
    if bias is not None:
        y += tl.load(bias + n).to(tl.float32)[:, None]
    return y


@triton.jit
def activate(y, up, ACTIVATION: tl.constexpr):
    """The activation of `naive.activate`; up is None but for swiglu."""
    if ACTIVATION == "gelu":
        return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) is the sigmoid of 2u, without the cancellation.
        u = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        return y / (1.0 + tl.exp(-2.0 * u))
    elif ACTIVATION == "silu":
        return y / (1.0 + tl.exp(-y))
    elif ACTIVATION == "swiglu":
        return y / (1.0 + tl.exp(-y)) * up
    else:
        return y


@triton.jit
def _store(
    y,
    up,
    n,
    m,
    M,
    N,
    bias,
    residual,
    projected,
    adapter_b,
    rank,
    out,
    ACTIVATION: tl.constexpr,
):
    """Finish y (BLOCK_N, BLOCK_M) and write it; n and m are not clamped, int64."""
    OUT = N // 2 if ACTIVATION == "swiglu" else N
    inside = (n < OUT)[:, None] & (m < M)[None, :]
    n_in, m_in = tl.minimum(n, OUT - 1), tl.minimum(m, M - 1)
    y = _add(y, n_in, m_in, N, bias, projected, adapter_b, rank)
    if ACTIVATION == "swiglu":
        up = _add(up, n_in + OUT, m_in, N, bias, projected, adapter_b, rank)
    y = activate(y, up, ACTIVATION)
    at = m[None, :] * OUT + n[:, None]
    if residual is not None:
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def finish(
    parts,
    bias,
    residual,
    projected,
    adapter_b,
    out,
    M,
    N,
    rank,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Add up the parts (SPLITS, M, N) of a product, and what follows it."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    OUT = N // 2 if ACTIVATION == "swiglu" else N
    inside = (n < OUT)[:, None] & (m < M)[None, :]
    size = tl.full([], 1, tl.int64) * M * N
    at = parts + m[None, :] * N + n[:, None]
    y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = None
    if ACTIVATION == "swiglu":
        up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for split in range(SPLITS):
        y += tl.load(at + split * size, mask=inside, other=0.0)
        if ACTIVATION == "swiglu":
            up += tl.load(at + split * size + OUT, mask=inside, other=0.0)
    _store(y, up, n, m, M, N, bias, residual, projected, adapter_b, rank, out, ACTIVATION)


@triton.jit
def _store_or_part(
    y,
    up,
    n,
    m,
    M,
    N,
    bias,
    residual,
    projected,
    adapter_b,
    rank,
    out,
    split,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """`_store`, or where K is split this part of the sums."""
    if SPLITS == 1:
        _store(y, up, n, m, M, N, bias, residual, projected, adapter_b, rank, out, ACTIVATION)
    else:
        OUT = N // 2 if ACTIVATION == "swiglu" else N
        inside = (n < OUT)[:, None] & (m < M)[None, :]
        at = out + (split.to(tl.int64) * M + m)[None, :] * N + n[:, None]
        tl.store(at, y, mask=inside)
        if ACTIVATION == "swiglu":
            tl.store(at + OUT, up, mask=inside)


# --- the product ----------------------------------------------------------------------------------


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
        y = tl.dot(w.to(DTYPE), h, y, input_precision="ieee")
        if PAIR:
            w = weight_tile(
                data, scales, zeros, codebook, up_rows, k, K, row_bytes, groups,
                FORMAT, GROUP, SCALED, EVEN, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            up = tl.dot(w.to(DTYPE), h, up, input_precision="ieee")
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
    """A tile of the product on tensor cores. Tiles of the same rows of the weight run together."""
    PAIR: tl.constexpr = ACTIVATION == "swiglu"
    OUT = N // 2 if PAIR else N
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0)
    m = (tile % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(n, OUT - 1)
    begin = tl.program_id(1) * k_per_split
    y, up = accumulate(
        x, tl.minimum(m, M - 1) * x_stride, data, scales, zeros, codebook, rows, rows + OUT,
        begin, min(begin + k_per_split, K), K, row_bytes, groups,
        FORMAT, GROUP, PAIR, EVEN, BLOCK_N, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    _store_or_part(
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
    _store_or_part(
        y, up, n, m, M, N, bias, residual, projected, adapter_b, rank, out, tl.program_id(1),
        ACTIVATION, SPLITS,
    )  # fmt: skip


# --- int8 activations -----------------------------------------------------------------------------


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
    _store(y, up, n, m, M, N, bias, residual, projected, adapter_b, rank, out, ACTIVATION)


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
        y = tl.dot(g, w.to(DTYPE), y, input_precision="ieee")
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
