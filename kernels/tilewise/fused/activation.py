"""Gated activations: the elementwise middle of a feed-forward layer."""

from __future__ import annotations

from functools import partial

import torch

from tilewise import checks, gpu
from tilewise.dispatch import Cost, Impl, Op
from tilewise.fused import autograd, baseline, naive, native, triton

_APPROXIMATE = ("tanh", "none")


def _check_swiglu(gate: torch.Tensor, up: torch.Tensor, *, validate: bool = False) -> None:
    checks.has_dtype("gate", gate, checks.FLOATS)
    checks.like("up", up, "gate", gate)
    checks.has_shape("up", up, tuple(gate.shape), "gate's shape")


def _check_geglu(
    gate: torch.Tensor, up: torch.Tensor, *, approximate: str = "tanh", validate: bool = False
) -> None:
    _check_swiglu(gate, up)
    if approximate not in _APPROXIMATE:
        raise ValueError(f"approximate: must be 'tanh' or 'none', got {approximate!r}")


def _cost_swiglu(gate: torch.Tensor, up: torch.Tensor) -> Cost:
    return Cost(5 * gate.numel(), 3 * gate.numel() * gate.itemsize, torch.float32)


def _cost_geglu(gate: torch.Tensor, up: torch.Tensor, *, approximate: str = "tanh") -> Cost:
    return Cost(10 * gate.numel(), 3 * gate.numel() * gate.itemsize, torch.float32)


def _why_not_auto(gate: torch.Tensor, up: torch.Tensor, *, approximate: str = "tanh") -> str | None:
    if gate.dtype == torch.float16:
        return "the activation alone is rounded to float16, which has few bits left below 6e-5"
    return None


_SWIGLU = Op(
    "swiglu",
    naive.swiglu,
    impls=(
        Impl(
            "triton",
            partial(autograd.swiglu, "triton"),
            triton.why_not_gated,
            gpu.why_not_auto,
        ),
        Impl("cpu", partial(autograd.swiglu, "cpu"), native.why_not_gated),
        Impl("torch", baseline.swiglu, why_not_auto=_why_not_auto),
    ),
    check=_check_swiglu,
    cost=_cost_swiglu,
)
_GEGLU = Op(
    "geglu",
    naive.geglu,
    impls=(
        Impl(
            "triton",
            partial(autograd.geglu, "triton"),
            triton.why_not_gated,
            gpu.why_not_auto,
        ),
        Impl("cpu", partial(autograd.geglu, "cpu"), native.why_not_gated),
        Impl("torch", baseline.geglu, why_not_auto=_why_not_auto),
    ),
    check=_check_geglu,
    cost=_cost_geglu,
)


def swiglu(
    gate: torch.Tensor, up: torch.Tensor, *, backend: str = "auto", validate: bool = False
) -> torch.Tensor:
    """silu(gate) * up, where silu(x) = x / (1 + exp(-x)).

    Args:
        gate: any shape, floating point.
        up: gate's shape and dtype. Both may be halves of one projection (`chunk(2, -1)`).
        backend: see `tilewise.use_backend`.
        validate: has nothing more to check here.

    Returns:
        gate's shape and dtype, rounded once.

    Raises:
        ValueError: for a shape, dtype or device that does not fit.
        BackendError: if the named backend cannot run the call.

    Source: Shazeer, GLU Variants Improve Transformer, 2020 (arXiv:2002.05202).
    """
    _check_swiglu(gate, up, validate=validate)
    return _SWIGLU(gate, up, backend=backend)


def geglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    approximate: str = "tanh",
    backend: str = "auto",
    validate: bool = False,
) -> torch.Tensor:
    """gelu(gate) * up.

    Args:
        gate: any shape, floating point.
        up: gate's shape and dtype. Both may be halves of one projection (`chunk(2, -1)`).
        approximate: "none" for gelu(x) = x * P(N(0, 1) < x), "tanh" for the approximation that
            GPT-2 and Gemma were trained with.
        backend: see `tilewise.use_backend`.
        validate: has nothing more to check here.

    Returns:
        gate's shape and dtype, rounded once.

    Raises:
        ValueError: for a shape, dtype, device or `approximate` that does not fit.
        BackendError: if the named backend cannot run the call.

    Source: Shazeer, GLU Variants Improve Transformer, 2020 (arXiv:2002.05202); Hendrycks and
    Gimpel, Gaussian Error Linear Units, 2016 (arXiv:1606.08415).
    """
    _check_geglu(gate, up, approximate=approximate, validate=validate)
    return _GEGLU(gate, up, approximate=approximate, backend=backend)
