"""The definitions of a product with a quantized weight and of rows of a quantized table."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tilewise.fused.naive import compute_dtype
from tilewise.quant.formats import FORMATS, QuantizedTensor
from tilewise.quant.packing import trim


def quantized_matmul(
    x: torch.Tensor,  # (..., K)
    weight: QuantizedTensor,  # (N, K)
    bias: torch.Tensor | None = None,  # (N,)
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,  # the output's shape
    adapter: tuple[torch.Tensor, torch.Tensor] | None = None,  # (K, r) and (r, N)
    act: str | None = None,
) -> torch.Tensor:
    """activation(x W^T + x A B + bias) + residual, rounded once."""
    dtype = compute_dtype(x)
    h = fake_quantize(x, activation_group(weight)) if act == "int8" else x
    y = F.linear(h.to(dtype), weight.dequantize(dtype))
    return finish(y, x, bias, activation, residual, adapter).to(x.dtype)


def quantized_embedding(
    token_ids: torch.Tensor,  # (...)
    weight: QuantizedTensor,  # (N, K)
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The rows of that number, (..., K)."""
    rows = weight.select_rows(token_ids.flatten()).dequantize(dtype)
    return rows.reshape(*token_ids.shape, weight.shape[1])


def finish(
    y: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
    adapter: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """What follows the product with the weight, in y's dtype and in this order."""
    if adapter is not None:
        a, b = adapter
        y = y + x.to(y.dtype) @ a.to(y.dtype) @ b.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    y = activate(y, activation)
    return y if residual is None else y + residual.to(y.dtype)


def activate(y: torch.Tensor, activation: str | None) -> torch.Tensor:
    """Apply an activation by name; "swiglu" halves the last dimension."""
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if activation == "silu":
        return F.silu(y)
    if activation == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up
    return y


def activation_group(weight: QuantizedTensor) -> int:
    """How many elements of x share a scale under act="int8"; -1 for a whole row."""
    return 32 if FORMATS[weight.format].is_gguf else weight.group_size


def fake_quantize(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """x rounded to int8 codes times one scale per row and group; the gradient passes straight.

    In float32 whatever x's dtype is: scale = max|x| / 127, code = round-half-even(x / scale),
    clamped to +-127, and x becomes code * scale. A group of zeros stays zero; a group with a NaN
    or an infinity becomes NaN.

    Returns:
        x's shape, float32; float64 if x is, which changes only how x = code * scale is rounded.
    """
    k = x.shape[-1]
    size = group_size if group_size > 0 else max(k, 1)
    groups = F.pad(x.float(), (0, -k % size)).unflatten(-1, (-(-k // size), size))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    code = (groups / torch.where(scale == 0, 1.0, scale)).round().clamp(-127, 127)
    dtype = compute_dtype(x)
    rounded = trim((code.to(dtype) * scale.to(dtype)).flatten(-2), k).detach()
    # Straight-through estimator (Bengio et al., 2013, arXiv:1308.3432): x - x is exactly 0.
    return rounded + (x - x.detach()).to(dtype)
