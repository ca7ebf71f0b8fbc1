"""Root mean square norm and layer norm, each with an optional residual added first."""

from __future__ import annotations

from functools import partial

import torch

from tilewise import checks, gpu
from tilewise.dispatch import Cost, Impl, Op
from tilewise.fused import autograd, baseline, naive, native, triton


def _check_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> None:
    checks.has_dtype("x", x, checks.FLOATS)
    checks.like("weight", weight, "x", x)
    if x.dim() == 0:
        raise ValueError("x: shape must be (..., dim), got ()")
    checks.has_shape("weight", weight, (x.shape[-1],), "x's last dimension")
    checks.is_number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps: must be >= 0, got {eps}")
    if residual is not None:
        checks.like("residual", residual, "x", x)
        checks.has_shape("residual", residual, tuple(x.shape), "x's shape")


def _bytes(x: torch.Tensor, parameters: int, residual: torch.Tensor | None) -> int:
    passes = 2 if residual is None else 4  # x, y; with a residual also it and the sum
    return (passes * x.numel() + parameters) * x.itemsize


# --- rms_norm -------------------------------------------------------------------------------------


def _check_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
    validate: bool = False,
) -> None:
    _check_norm(x, weight, eps, residual)


def _cost_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
) -> Cost:
    return Cost(4 * x.numel(), _bytes(x, weight.numel(), residual), torch.float32)


_RMS_NORM = Op(
    "rms_norm",
    naive.rms_norm,
    impls=(
        Impl(
            "triton",
            partial(autograd.rms_norm, "triton"),
            triton.why_not_norm,
            gpu.why_not_auto,
        ),
        Impl("cpu", partial(autograd.rms_norm, "cpu"), native.why_not_norm),
        Impl("torch", baseline.rms_norm),
    ),
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
    result = native.rms_norm_plainly(backend, x, weight, eps, residual)
    if result is not None:
        return result
    _check_rms_norm(x, weight, eps, residual=residual, validate=validate)
    return _RMS_NORM(x, weight, eps, residual=residual, backend=backend)


# --- layer_norm -----------------------------------------------------------------------------------


def _check_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    validate: bool = False,
) -> None:
    _check_norm(x, weight, eps, residual)
    if bias is not None:
        checks.like("bias", bias, "x", x)
        checks.has_shape("bias", bias, (x.shape[-1],), "x's last dimension")


def _cost_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
) -> Cost:
    parameters = weight.numel() if bias is None else 2 * weight.numel()
    return Cost(7 * x.numel(), _bytes(x, parameters, residual), torch.float32)


_LAYER_NORM = Op(
    "layer_norm",
    naive.layer_norm,
    impls=(
        Impl(
            "triton",
            partial(autograd.layer_norm, "triton"),
            triton.why_not_norm,
            gpu.why_not_auto,
        ),
        Impl("cpu", partial(autograd.layer_norm, "cpu"), native.why_not_norm),
        Impl("torch", baseline.layer_norm),
    ),
    check=_check_layer_norm,
    cost=_cost_layer_norm,
)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    backend: str = "auto",
    validate: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Bring every row to mean 0 and variance 1, optionally adding a residual first.

    Args:
        x: (..., dim), floating point.
        weight: (dim,), x's dtype.
        bias: (dim,), x's dtype, or None.
        eps: added to the variance, which divides by dim.
        residual: x's shape and dtype; added to x before the norm.
        backend: see `tilewise.use_backend`.
        validate: has nothing more to check here.

    Returns:
        The normed rows, x's shape and dtype; with a residual also x + residual, rounded to x's
        dtype, as the next residual.

    Raises:
        ValueError: for a shape, dtype or device that does not fit.
        BackendError: if the named backend cannot run the call.

    Source: Ba, Kiros and Hinton, Layer Normalization, 2016 (arXiv:1607.06450).
    """
    _check_layer_norm(x, weight, bias, eps, residual=residual, validate=validate)
    return _LAYER_NORM(x, weight, bias, eps, residual=residual, backend=backend)
