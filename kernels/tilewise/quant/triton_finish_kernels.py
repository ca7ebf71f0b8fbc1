# mypy: allow-untyped-defs
"""Where a product with quantized weights goes, in Triton, and what follows it, rounded once.

The adapter, the bias, the activation, the residual, in this order and in float32. The half of a
weight that is swiglu's gate and the half that it multiplies are two accumulators of one program.
Where K was split among programs each has written its part of the sums, and `finish` adds them up
in order first.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def place(M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows n of the weight and m of x that a program multiplies, int64 and not clamped.

    Programs of the same rows of the weight run together.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0)
    m = (tile % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile // tiles_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return n, m


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
def store(
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
    """Finish y (BLOCK_N, BLOCK_M) and write it; n and m are those of `place`."""
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
    store(y, up, n, m, M, N, bias, residual, projected, adapter_b, rank, out, ACTIVATION)


@triton.jit
def store_or_part(
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
    """`store`, or where K is split this part of the sums."""
    if SPLITS == 1:
        store(y, up, n, m, M, N, bias, residual, projected, adapter_b, rank, out, ACTIVATION)
    else:
        OUT = N // 2 if ACTIVATION == "swiglu" else N
        inside = (n < OUT)[:, None] & (m < M)[None, :]
        at = out + (split.to(tl.int64) * M + m)[None, :] * N + n[:, None]
        tl.store(at, y, mask=inside)
        if ACTIVATION == "swiglu":
            tl.store(at + OUT, up, mask=inside)
