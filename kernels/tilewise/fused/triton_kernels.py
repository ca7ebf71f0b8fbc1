"""The Triton kernels of the fused operations. Imported by the first call that launches one."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def norm(
    x,
    residual,
    weight,
    bias,
    out,
    total,
    dim,
    x_stride,
    residual_stride,
    eps,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: RMSNorm, or LayerNorm if CENTERED, of x + residual."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < dim
    h = tl.load(x + row * x_stride + at, mask=inside, other=0.0)
    if residual is not None:
        r = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0)
        h = (h.to(tl.float32) + r.to(tl.float32)).to(h.dtype)
        tl.store(total + row * dim + at, h, mask=inside)
    h = h.to(tl.float32)
    if CENTERED:
        h = tl.where(inside, h - tl.sum(h, 0) / dim, 0.0)
    y = h * tl.rsqrt(tl.sum(h * h, 0) / dim + eps)
    y *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * dim + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(
    grad_out,
    grad_total,
    x,
    weight,
    grad_x,
    grad_weights,
    grad_biases,
    rows,
    dim,
    grad_out_stride,
    grad_total_stride,
    x_stride,
    eps,
    ROWS: tl.constexpr,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows, one after the other, and their part of the parameters' gradients."""
    program = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < dim
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    of_weight = tl.zeros([BLOCK], tl.float32)
    of_bias = tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS):
        row = program * ROWS + i
        here = at < tl.where(row < rows, dim, 0)
        h = tl.load(x + row * x_stride + at, mask=here, other=0.0).to(tl.float32)
        g = tl.load(grad_out + row * grad_out_stride + at, mask=here, other=0.0).to(tl.float32)
        if CENTERED:
            h = tl.where(here, h - tl.sum(h, 0) / dim, 0.0)
            of_bias += g
        scale = tl.rsqrt(tl.sum(h * h, 0) / dim + eps)
        normed = h * scale
        of_weight += g * normed
        g *= w
        d = g - normed * (tl.sum(g * normed, 0) / dim)
        if CENTERED:
            d -= tl.sum(g, 0) / dim
        d *= scale
        if grad_total is not None:
            d += tl.load(grad_total + row * grad_total_stride + at, mask=here, other=0.0).to(
                tl.float32
            )
        tl.store(grad_x + row * dim + at, d.to(grad_x.dtype.element_ty), mask=here)
    tl.store(grad_weights + program * dim + at, of_weight, mask=inside)
    if CENTERED:
        tl.store(grad_biases + program * dim + at, of_bias, mask=inside)
