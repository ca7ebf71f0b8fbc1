"""The definitions of a product with a quantized weight and of rows of a quantized table."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tilewise.fused.naive import compute_dtype, divide
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
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """activation(x W^T + x A B + bias) + residual, rounded once."""
    dtype = compute_dtype(x)
    h = x if act is None else fake_quantize(x, activation_group(weight), act)
    y = F.linear(h.to(dtype), weight.dequantize(dtype))
    return finish(y, x, bias, activation, residual, adapter).to(result_dtype(x, out_dtype))


def result_dtype(x: torch.Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """What a product of x is rounded to."""
    return x.dtype if out_dtype is None or x.dtype == torch.float64 else out_dtype


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


LARGEST_CODE = {"int8": 127.0, "fp8": 448.0}
"""What x may be rounded to by `act`, and the largest code: of int8, or of float8 E4M3."""


def activation_group(weight: QuantizedTensor) -> int:
    """How many elements of x share a scale where `act` rounds them; -1 for a whole row."""
    return 32 if FORMATS[weight.format].is_gguf else weight.group_size


def quantize_groups(
    x: torch.Tensor, group_size: int, act: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of x and one scale per row and group, in float32 whatever x's dtype is.

    scale = max|x| / largest code, code = x / scale rounded to the nearest code, ties to even,
    clamped to +-largest. A group of zeros has scale 0; one with a NaN or an infinity codes or a
    scale that make it NaN.

    Returns:
        (..., groups, group size), the last group filled up with zeros, and (..., groups, 1).
    """
    k, largest = x.shape[-1], LARGEST_CODE[act]
    size = group_size if group_size > 0 else max(k, 1)
    groups = F.pad(x.float(), (0, -k % size)).unflatten(-1, (-(-k // size), size))
    scale = divide(groups.abs().amax(-1, keepdim=True), largest)
    code = groups / torch.where(scale == 0, 1.0, scale)
    if act == "int8":
        return code.round().clamp(-largest, largest), scale
    return code.clamp(-largest, largest).to(torch.float8_e4m3fn).float(), scale


def fake_quantize(x: torch.Tensor, group_size: int, act: str) -> torch.Tensor:
    """x rounded to codes times one scale per row and group; the gradient passes straight.

    Returns:
        x's shape, float32; float64 if x is, which changes only how x = code * scale is rounded.

    Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022 (arXiv:2209.05433) for "fp8".
    """
    dtype = compute_dtype(x)
    code, scale = quantize_groups(x, group_size, act)
    rounded = trim((code.to(dtype) * scale.to(dtype)).flatten(-2), x.shape[-1]).detach()
    # Straight-through estimator (Bengio et al., 2013, arXiv:1308.3432): x - x is exactly 0.
    return rounded + (x - x.detach()).to(dtype)
