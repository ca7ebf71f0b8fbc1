# mypy: allow-untyped-defs
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
    rows,
    dim,
    x_stride,
    residual_stride,
    eps,
    CENTERED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """GROUP rows at once: RMSNorm, or LayerNorm if CENTERED, of x + residual."""
    row = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = (at < dim) & (row < rows)
    h = tl.load(x + row * x_stride + at, mask=inside, other=0.0)
    if residual is not None:
        r = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0)
        h = (h.to(tl.float32) + r.to(tl.float32)).to(h.dtype)
        tl.store(total + row * dim + at, h, mask=inside)
    h = h.to(tl.float32)
    if CENTERED:
        h = tl.where(inside, h - tl.sum(h, 1, keep_dims=True) / dim, 0.0)
    y = h * tl.rsqrt(tl.sum(h * h, 1, keep_dims=True) / dim + eps)
    y *= tl.load(weight + at, mask=at < dim, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + at, mask=at < dim, other=0.0).to(tl.float32)
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
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows, GROUP after GROUP, and their part of the parameters' gradients."""
    program = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + at, mask=at < dim, other=0.0).to(tl.float32)
    of_weight = tl.zeros([GROUP, BLOCK], tl.float32)
    of_bias = tl.zeros([GROUP, BLOCK], tl.float32)
    for i in range(0, ROWS, GROUP):
        row = program * ROWS + i + tl.arange(0, GROUP)[:, None]
        here = (at < dim) & (row < rows)
        h = tl.load(x + row * x_stride + at, mask=here, other=0.0).to(tl.float32)
        g = tl.load(grad_out + row * grad_out_stride + at, mask=here, other=0.0).to(tl.float32)
        if CENTERED:
            h = tl.where(here, h - tl.sum(h, 1, keep_dims=True) / dim, 0.0)
            of_bias += g
        scale = tl.rsqrt(tl.sum(h * h, 1, keep_dims=True) / dim + eps)
        normed = h * scale
        of_weight += g * normed
        g *= w
        d = g - normed * (tl.sum(g * normed, 1, keep_dims=True) / dim)
        if CENTERED:
            d -= tl.sum(g, 1, keep_dims=True) / dim
        d *= scale
        if grad_total is not None:
            d += tl.load(grad_total + row * grad_total_stride + at, mask=here, other=0.0).to(
                tl.float32
            )
        tl.store(grad_x + row * dim + at, d.to(grad_x.dtype.element_ty), mask=here)
    column = tl.arange(0, BLOCK)
    tl.store(grad_weights + program * dim + column, tl.sum(of_weight, 0), mask=column < dim)
    if CENTERED:
        tl.store(grad_biases + program * dim + column, tl.sum(of_bias, 0), mask=column < dim)


@triton.jit
def rotary(
    x,
    cos,
    sin,
    positions,
    out,
    heads,
    dim,
    pairs,
    last,
    token_stride,
    head_stride,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    """HEADS heads of a token: pairs turned, the rest copied; one row of the tables serves all."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    x += token * token_stride + head[:, None].to(tl.int64) * head_stride
    out += (token * heads + head[:, None]) * dim
    position = tl.load(positions + token)
    inside = (position >= 0) & (position <= last)
    pair = tl.arange(0, PAIRS)
    # A position outside the tables reads nothing and gives NaN.
    at = position * pairs + pair
    read = pair < tl.where(inside, pairs, 0)
    c = tl.load(cos + at, mask=read, other=float("nan"))[None, :]
    s = tl.load(sin + at, mask=read, other=float("nan"))[None, :]
    if INVERSE:
        s = -s
    if INTERLEAVED:
        # Neighbours are loaded together and parted in registers.
        both = tl.arange(0, 2 * PAIRS)[None, :]
        here = (head[:, None] < heads) & (both < 2 * pairs)
        h = tl.load(x + both, mask=here, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(h, [HEADS, PAIRS, 2]))
        turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), [HEADS, 2 * PAIRS])
        tl.store(out + both, turned.to(out.dtype.element_ty), mask=here)
    else:
        first = pair[None, :]
        here = (head[:, None] < heads) & (first < pairs)
        a = tl.load(x + first, mask=here, other=0.0).to(tl.float32)
        b = tl.load(x + pairs + first, mask=here, other=0.0).to(tl.float32)
        tl.store(out + first, (a * c - b * s).to(out.dtype.element_ty), mask=here)
        tl.store(out + pairs + first, (b * c + a * s).to(out.dtype.element_ty), mask=here)
    if REST > 0:
        rest = 2 * pairs + tl.arange(0, REST)[None, :]
        here = (head[:, None] < heads) & (rest < dim)
        tl.store(out + rest, tl.load(x + rest, mask=here), mask=here)


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """The activation and its slope.

    The sigmoid's kind is x / (1 + e^-y), in which nothing cancels: silu with y = x, and the tanh
    approximation of gelu, as (1 + tanh u) / 2 = 1 / (1 + e^-2u).
    """
    if KIND == "gelu_erf":
        p = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * p
        slope = p + x * tl.exp(x * x * -0.5) * 0.3989422804014327
    else:
        if KIND == "silu":
            y = x
            y_slope = 1.0
        else:
            y = x * (1.5957691216057308 + 0.0713548162726002527 * x * x)
            y_slope = 1.5957691216057308 + 3 * 0.0713548162726002527 * x * x
        s = 1.0 / (1.0 + tl.exp(-y))
        value = x * s
        slope = s * (1.0 + x * (1.0 - s) * y_slope)
    return value, slope


@triton.jit
def gated(
    gate,
    up,
    out,
    dim,
    gate_stride,
    up_stride,
    blocks,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of a row of activation(gate) * up."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < dim
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activation(g, KIND)
    tl.store(out + row * dim + at, (value * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward(
    grad_out,
    gate,
    up,
    grad_gate,
    grad_up,
    dim,
    grad_out_stride,
    gate_stride,
    up_stride,
    blocks,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of a row of both gradients."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < dim
    d = tl.load(grad_out + row * grad_out_stride + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activation(g, KIND)
    to = row * dim + at
    tl.store(grad_gate + to, (d * u * slope).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + to, (d * value).to(grad_up.dtype.element_ty), mask=inside)
