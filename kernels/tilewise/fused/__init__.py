"""Fused small operations: norms, rotary embedding, gated activations, sampling.

Each is bound by memory: what fusing saves is a trip of the activations to memory and back.
"""

from __future__ import annotations

import torch

from tilewise import checks
from tilewise.dispatch import Cost, Impl, Op
from tilewise.fused import baseline, naive
from tilewise.library import Contract

__all__ = ["rms_norm"]


def _check_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    validate: bool = False,
) -> None:
    checks.has_dtype("x", x, checks.FLOATS)
    checks.like("weight", weight, "x", x)
    if x.dim() == 0:
        raise ValueError("x: shape must be (..., dim), got ()")
    checks.has_shape("weight", weight, (x.shape[-1],), "x's last dimension")
    if residual is not None:
        checks.like("residual", residual, "x", x)
        checks.has_shape("residual", residual, tuple(x.shape), "x's shape")


def _cost_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
) -> Cost:
    passes = 2 if residual is None else 4
    return Cost(4 * x.numel(), (passes * x.numel() + weight.numel()) * x.itemsize, torch.float32)


_RMS_NORM = Op(
    "rms_norm",
    naive.rms_norm,
    impls=(Impl("torch", baseline.rms_norm),),
    check=_check_rms_norm,
    cost=_cost_rms_norm,
)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    backend: str = "auto",
    validate: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Scale every row to unit root mean square, optionally adding a residual first.

    Args:
        x: (..., dim), floating point.
        weight: (dim,), x's dtype.
        eps: added to the mean square.
        residual: x's shape and dtype; added to x before the norm.
        backend: see `tilewise.use_backend`.
        validate: has nothing more to check here.

    Returns:
        The normed rows, x's shape and dtype; with a residual also x + residual, rounded to x's
        dtype, as the next residual.

    Raises:
        ValueError: for a shape, dtype or device that does not fit.
        BackendError: if the named backend cannot run the call.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv:1910.07467).
    """
    _check_rms_norm(x, weight, eps, residual=residual, validate=validate)
    return _RMS_NORM(x, weight, eps, residual=residual, backend=backend)


# --- the operators behind kernels that PyTorch cannot trace ---------------------------------------


def _fake_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x.new_empty(x.shape if residual is not None else (0,))
    return x.new_empty(x.shape), total


RMS_NORM = Contract(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps, Tensor? residual) -> (Tensor, Tensor)",
    _fake_rms_norm,
)
"""Always two results: without a residual the second is empty."""


@RMS_NORM.kernel("naive")
def _rms_norm_kernel(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    result = naive.rms_norm(x.contiguous(), weight, eps, residual=residual)
    return result if isinstance(result, tuple) else (result, x.new_empty(0))
