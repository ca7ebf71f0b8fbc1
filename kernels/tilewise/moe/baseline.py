"""A mixture-of-experts layer with PyTorch's own products: the honest baseline."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tilewise.fused.naive import compute_dtype
from tilewise.moe.naive import route
from tilewise.quant.formats import QuantizedTensor


def why_not(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    w_gate_up: torch.Tensor | QuantizedTensor,
    w_down: torch.Tensor | QuantizedTensor,
    *,
    top_k: int,
    normalize: bool = True,
) -> str | None:
    """Why grouped_mm cannot run this call."""
    if isinstance(w_gate_up, QuantizedTensor) or isinstance(w_down, QuantizedTensor):
        return "grouped_mm takes no quantized weights"
    if x.dtype == torch.float64:
        return "grouped_mm takes no float64"
    if x.dtype != torch.float32:
        name = str(x.dtype).removeprefix("torch.")
        return f"a rounding to {name} after every product is more than the agreement rule allows"
    for size in (x.shape[1], w_down.shape[2]):
        if size % 4:
            return f"grouped_mm needs rows of a multiple of 16 bytes, got {4 * size}"
    return None


def moe(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    *,
    top_k: int,
    normalize: bool = True,
) -> torch.Tensor:
    """Sort the tokens by expert, `torch.nn.functional.grouped_mm`, and put them back."""
    weights, chosen = route(router_logits.to(x.dtype), top_k, normalize)
    order = chosen.flatten().argsort(stable=True)  # (tokens * top_k,)
    experts = torch.arange(w_gate_up.shape[0], device=x.device)[:, None]
    ends = (chosen.flatten() <= experts).sum(1, dtype=torch.int32)
    # A copy per choice: the gradient of x[order // top_k] would be summed by atomic additions.
    rows = x.repeat_interleave(top_k, dim=0)[order]
    gate, up = F.grouped_mm(rows, w_gate_up.contiguous().mT, offs=ends).chunk(2, dim=-1)
    out = F.grouped_mm(F.silu(gate) * up, w_down.contiguous().mT, offs=ends)
    out = out[order.argsort()].unflatten(0, chosen.shape)
    return (weights[..., None] * out).sum(1)


def router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.linear`, on numbers that are as wide as the result."""
    dtype = compute_dtype(x)
    return F.linear(x.to(dtype), weight.to(dtype))
