"""Fused kernels with PyTorch's autograd around them: what a compiled backend plugs in.

`Impl("triton", partial(rms_norm, "triton"), ...)` is a backend of `rms_norm` as soon as the
operators have kernels of that name. The autograd functions are used only where a gradient is
needed: they cost 4 us a call.
"""

from __future__ import annotations

from typing import Any

import torch

from tilewise.fused.operators import (
    GATED_ACTIVATION,
    GATED_ACTIVATION_BACKWARD,
    LAYER_NORM,
    LAYER_NORM_BACKWARD,
    RMS_NORM,
    RMS_NORM_BACKWARD,
    ROTARY_EMBEDDING,
    SAMPLE,
)
from tilewise.fused.tables import RotaryTables
from tilewise.library import Saved, needs_grad, once_differentiable

# --- norms ----------------------------------------------------------------------------------------


def rms_norm(
    backend: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The naive function of this name, by the kernels of `backend`."""
    if needs_grad(x, weight, residual):
        return _Norm.apply(backend, False, x, weight, None, eps, residual)  # type: ignore[no-any-return]
    out, total = RMS_NORM(x, weight, eps, residual, backend)
    return out if residual is None else (out, total)


def layer_norm(
    backend: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The naive function of this name, by the kernels of `backend`."""
    if needs_grad(x, weight, bias, residual):
        return _Norm.apply(backend, True, x, weight, bias, eps, residual)  # type: ignore[no-any-return]
    out, total = LAYER_NORM(x, weight, bias, eps, residual, backend)
    return out if residual is None else (out, total)


class _Norm(torch.autograd.Function):
    """Either norm, `centered` being layer norm."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        centered: bool,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        residual: torch.Tensor | None,
    ) -> Any:
        if centered:
            out, total = LAYER_NORM(x, weight, bias, eps, residual, backend)
        else:
            out, total = RMS_NORM(x, weight, eps, residual, backend)
        ctx.save_for_backward(x if residual is None else total, weight)
        ctx.options = (backend, centered, eps)
        ctx.set_materialize_grads(False)
        return out if residual is None else (out, total)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: Saved, grad_out: torch.Tensor | None, grad_sum: Any = None
    ) -> tuple[Any, ...]:
        x, weight = saved
        backend, centered, eps = ctx.options
        if grad_out is None:
            grad_out = torch.zeros_like(x)
        contract = LAYER_NORM_BACKWARD if centered else RMS_NORM_BACKWARD
        grad_x, grad_weight, *rest = contract(grad_out, grad_sum, x, weight, eps, backend)
        needed = ctx.needs_input_grad
        return (
            None,
            None,
            grad_x if needed[2] else None,
            grad_weight if needed[3] else None,
            rest[0] if needed[4] else None,
            None,
            grad_x if needed[6] else None,
        )


# --- rotary embedding -----------------------------------------------------------------------------


def rotary_embedding(
    backend: str, x: torch.Tensor, tables: RotaryTables, positions: torch.Tensor
) -> torch.Tensor:
    """The naive function of this name, by the kernels of `backend`."""
    if needs_grad(x):
        return _Rotary.apply(backend, x, *tables, positions)  # type: ignore[no-any-return]
    return ROTARY_EMBEDDING(x, tables[0], tables[1], positions, tables[2], False, backend)  # type: ignore[no-any-return]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        interleaved: bool,
        positions: torch.Tensor,
    ) -> Any:
        ctx.save_for_backward(cos, sin, positions)
        ctx.options = (interleaved, backend)
        return ROTARY_EMBEDDING(x, cos, sin, positions, interleaved, False, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Saved, grad_out: torch.Tensor) -> tuple[Any, ...]:
        cos, sin, positions = saved
        interleaved, backend = ctx.options
        grad_x = ROTARY_EMBEDDING(grad_out, cos, sin, positions, interleaved, True, backend)
        return None, grad_x, None, None, None, None


# --- gated activations ----------------------------------------------------------------------------


def swiglu(backend: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The naive function of this name, by the kernels of `backend`."""
    return _gated(gate, up, "silu", backend)


def geglu(
    backend: str, gate: torch.Tensor, up: torch.Tensor, *, approximate: str = "tanh"
) -> torch.Tensor:
    """The naive function of this name, by the kernels of `backend`."""
    return _gated(gate, up, "gelu_tanh" if approximate == "tanh" else "gelu_erf", backend)


def _gated(gate: torch.Tensor, up: torch.Tensor, activation: str, backend: str) -> torch.Tensor:
    if needs_grad(gate, up):
        return _Gated.apply(gate, up, activation, backend)  # type: ignore[no-any-return]
    return GATED_ACTIVATION(gate, up, activation, backend)  # type: ignore[no-any-return]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str, backend: str
    ) -> Any:
        ctx.save_for_backward(gate, up)
        ctx.options = (activation, backend)
        return GATED_ACTIVATION(gate, up, activation, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Saved, grad_out: torch.Tensor) -> tuple[Any, ...]:
        gate, up = saved
        grad_gate, grad_up = GATED_ACTIVATION_BACKWARD(grad_out, gate, up, *ctx.options)
        needed = ctx.needs_input_grad
        return grad_gate if needed[0] else None, grad_up if needed[1] else None, None, None


# --- sampling -------------------------------------------------------------------------------------


def sample(
    backend: str,
    logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    repetition_penalty: float | torch.Tensor = 1.0,
    previous_tokens: torch.Tensor | None = None,
    seed: int = 0,
    sample_ids: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """The naive function of this name, by the kernels of `backend`."""

    def per_row(value: float | torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.to(dtype)
        return torch.full((logits.shape[0],), value, dtype=dtype, device=logits.device)

    return SAMPLE(  # type: ignore[no-any-return]
        logits.detach(),
        per_row(temperature),
        per_row(top_k, torch.int64),
        per_row(top_p),
        per_row(min_p),
        per_row(repetition_penalty),
        previous_tokens,
        seed,
        sample_ids,
        positions,
        backend,
    )
