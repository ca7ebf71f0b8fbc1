"""`merge_states` with PyTorch's autograd around it: what a compiled backend plugs in."""

from __future__ import annotations

import math
from typing import Any

import torch

from tilewise.attention.operators import MERGE_STATES
from tilewise.library import Saved, needs_grad, once_differentiable


def merge_states(
    backend: str, out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The naive function of this name, by the kernel of `backend`."""
    states = (out_a, lse_a, out_b, lse_b)
    if needs_grad(*states):
        return _MergeStates.apply(backend, *states)
    merged: tuple[torch.Tensor, torch.Tensor] = MERGE_STATES(*states, backend)
    return merged


class _MergeStates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, *states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = MERGE_STATES(*states, backend)
        ctx.save_for_backward(*states, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: Saved, grad_out: torch.Tensor, grad_lse: torch.Tensor
    ) -> tuple[Any, ...]:
        out_a, lse_a, out_b, lse_b, lse = saved
        is_a, is_b = lse_a > -math.inf, lse_b > -math.inf
        weight_a = torch.where(is_a, torch.exp(lse_a - lse), 0)
        weight_b = torch.where(is_b, torch.exp(lse_b - lse), 0)
        a, b = (
            torch.where(saw.unsqueeze(-1), out.to(lse.dtype), 0)
            for saw, out in ((is_a, out_a), (is_b, out_b))
        )
        upstream = grad_out.to(lse.dtype)
        # More weight for one side is less for the other: what counts is how far the two differ.
        shift = weight_a * weight_b * (upstream * (a - b)).sum(-1)
        return (
            None,
            (weight_a.unsqueeze(-1) * upstream).to(out_a.dtype),
            weight_a * grad_lse + shift,
            (weight_b.unsqueeze(-1) * upstream).to(out_b.dtype),
            weight_b * grad_lse - shift,
        )
