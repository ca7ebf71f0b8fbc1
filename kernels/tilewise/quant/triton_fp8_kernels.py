# mypy: allow-untyped-defs
"""The Triton kernel of products with fp8 activations: codes times codes, then their scales.

The product of two E4M3 numbers has 8 significant bits, so every product is exact, as fp8 on tensor
cores that multiply it and as float16 on others; what differs is how they are added up.

Hopper's and Ada's tensor cores add up products of fp8 with 13 bits behind the point of the largest,
and keep no more of the sum. Simulated so, sums of 4096 random products are off by 1.3e-3, where
float16 is rounded by 2e-4; sums of 128, then added up in float32 by other units, by 1.3e-4 at any
depth. So the sums leave the tensor cores every BLOCK_K columns, as DeepSeek's do. Blackwell's add
up in float32.

Sources: DeepSeek-V3 Technical Report, 2024 (arXiv:2412.19437), 3.3.2; Zhang et al., SageAttention2,
2024 (arXiv:2411.10958), 3.2, for the 13 bits.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from tilewise.quant.triton_bytes import fp8_values, load
from tilewise.quant.triton_finish_kernels import place, store


@triton.jit
def matmul_fp8(
    x,
    x_scales,
    data,
    scales,
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
    GROUP: tl.constexpr,
    PROMOTED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the product with fp8 activations.

    Args:
        x, x_scales: what `triton_activation_kernels.quantize_rows` wrote; x in bytes where tensor
            cores multiply fp8, else in float16.
        GROUP: of the activations, which is the weight's: BLOCK_K, or -1.
        PROMOTED: whether sums must leave the tensor cores after BLOCK_K columns.
    """
    PAIR: tl.constexpr = ACTIVATION == "swiglu"
    OUT = N // 2 if PAIR else N
    n, m = place(M, BLOCK_N, BLOCK_M)
    m_in, rows = tl.minimum(m, M - 1), tl.minimum(n, OUT - 1)
    y = _accumulate_fp8(
        x, x_scales, m_in, data, scales, rows, K, row_bytes, groups,
        GROUP, PROMOTED, EVEN, BLOCK_N, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    up = None
    if PAIR:
        up = _accumulate_fp8(
            x, x_scales, m_in, data, scales, rows + OUT, K, row_bytes, groups,
            GROUP, PROMOTED, EVEN, BLOCK_N, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    store(y, up, n, m, M, N, bias, residual, projected, adapter_b, rank, out, ACTIVATION)


@triton.jit
def _accumulate_fp8(
    x,
    x_scales,
    m,
    data,
    scales,
    rows,
    K,
    row_bytes: tl.constexpr,
    groups,
    GROUP: tl.constexpr,
    PROMOTED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    NATIVE: tl.constexpr = x.dtype.element_ty == tl.uint8
    x_groups = 1 if GROUP < 0 else tl.cdiv(K, BLOCK_K)
    x_stride = K if GROUP < 0 else x_groups * BLOCK_K
    y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        h = load(x + m[None, :] * x_stride + column[:, None], (column < K)[:, None], EVEN)
        at = data + (rows * row_bytes)[:, None] + column[None, :]
        w = load(at, (column < K)[None, :], EVEN)
        if NATIVE:
            h = h.to(tl.float8e4nv, bitcast=True)
            w = w.to(tl.float8e4nv, bitcast=True)
        else:
            w = fp8_values(w.to(tl.int32)).to(tl.float16)
        if GROUP > 0:
            group = k // BLOCK_K
            part = tl.dot(w, h)
            part *= tl.load(scales + rows * groups + group).to(tl.float32)[:, None]
            y += part * tl.load(x_scales + m * x_groups + group)[None, :]
        elif PROMOTED:
            # Said to keep the sum from becoming the product's own accumulator.
            y += tl.dot(w, h, max_num_imprecise_acc=BLOCK_K)
        else:
            y = tl.dot(w, h, y)
    if GROUP < 0:
        y *= tl.load(scales + rows).to(tl.float32)[:, None]
        y *= tl.load(x_scales + m)[None, :]
    return y
