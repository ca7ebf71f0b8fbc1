"""The registered operator behind kernels for mixtures of experts that PyTorch cannot trace."""

from __future__ import annotations

from typing import Any

import torch

from tilewise.fused.naive import compute_dtype
from tilewise.library import Contract
from tilewise.moe import naive
from tilewise.quant.formats import QuantizedTensor

Weight = torch.Tensor | QuantizedTensor


def parts_of(weight: Weight) -> tuple[Any, ...]:
    """A weight as the operator takes it."""
    if isinstance(weight, torch.Tensor):
        return ("", weight.shape, 0, weight, None, None)
    parts = (weight.data, weight.scales, weight.zeros)
    return (weight.format, weight.shape, weight.group_size, *parts)


def weight_of(
    format: str,
    shape: list[int],
    group_size: int,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
) -> Weight:
    """The weight that `parts_of` took apart."""
    if not format:
        return data
    return QuantizedTensor(format, tuple(shape), group_size, data, scales, zeros)


def _fake(x: torch.Tensor, *other: object) -> torch.Tensor:
    return x.new_empty(x.shape)


_WEIGHT = "str {0}_format, int[] {0}_shape, int {0}_group_size, Tensor {0}, Tensor? {0}_scales, "
_WEIGHT += "Tensor? {0}_zeros, "

MOE = Contract(
    "moe",
    f"(Tensor x, Tensor router_logits, {_WEIGHT.format('gate_up')}{_WEIGHT.format('down')}"
    "int top_k, bool normalize) -> Tensor",
    _fake,
)
"""A weight is a plain tensor if its format is "", and the parts of a QuantizedTensor otherwise."""


@MOE.kernel("naive")
def _kernel(x: torch.Tensor, router_logits: torch.Tensor, *others: Any) -> torch.Tensor:
    *parts, top_k, normalize = others
    w_gate_up, w_down = weight_of(*parts[:6]), weight_of(*parts[6:])
    return naive.moe(
        x.contiguous(), router_logits, w_gate_up, w_down, top_k=top_k, normalize=normalize
    )


def _fake_router(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=compute_dtype(x))


ROUTER_LOGITS = Contract("router_logits", "(Tensor x, Tensor weight) -> Tensor", _fake_router)

ROUTER_LOGITS.kernel("naive")(naive.router_logits)
