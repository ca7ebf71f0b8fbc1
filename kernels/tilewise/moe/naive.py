"""The definition of a mixture-of-experts layer and its router: every expert sees every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tilewise.fused.naive import compute_dtype
from tilewise.quant.formats import QuantizedTensor


def moe(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    w_gate_up: torch.Tensor | QuantizedTensor,
    w_down: torch.Tensor | QuantizedTensor,
    *,
    top_k: int,
    normalize: bool = True,
) -> torch.Tensor:
    """y = sum over the chosen experts, in ascending order, of weight * down(silu(gate) * up)."""
    h = x.to(compute_dtype(x))
    weights, chosen = route(router_logits.to(h.dtype), top_k, normalize)
    y = torch.zeros_like(h)
    for expert in range(router_logits.shape[1]):
        is_chosen = chosen == expert  # (tokens, top_k)
        absent = ~is_chosen.any(-1, keepdim=True)
        # 0 x NaN is NaN: so that neither a token nor an expert reaches the other where it was not
        # chosen, each product is cut off on both sides, which also cuts its gradient.
        gate_up = h.masked_fill(absent, 0) @ _dense(w_gate_up[expert], h.dtype).mT
        gate, up = gate_up.masked_fill(absent, 0).chunk(2, dim=-1)
        out = (F.silu(gate) * up) @ _dense(w_down[expert], h.dtype).mT
        weight = torch.where(is_chosen, weights, 0).sum(-1, keepdim=True)
        y = y + weight * out.masked_fill(absent, 0)
    return y.to(x.dtype)


def router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x weight^T, as precise as it is computed."""
    dtype = compute_dtype(x)
    return x.to(dtype) @ weight.to(dtype).mT


def route(
    router_logits: torch.Tensor, top_k: int, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and indices (tokens, top_k) of the chosen experts, the likeliest first.

    Of equal logits the lower index comes first.
    """
    chosen = router_logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = router_logits.softmax(-1).gather(-1, chosen)
    return (weights / weights.sum(-1, keepdim=True) if normalize else weights), chosen


def _dense(weight: torch.Tensor | QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.dequantize(dtype) if isinstance(weight, QuantizedTensor) else weight.to(dtype)
