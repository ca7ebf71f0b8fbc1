"""The definitions of the fused small operations."""

from __future__ import annotations

import torch


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """float32 for everything narrower, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = x / sqrt(mean(x^2) + eps) * weight, of x + residual where one is given."""
    h = x.to(compute_dtype(x))
    if residual is not None:
        # The sum is what the next layer's residual is, so it is rounded before it is used.
        total = (h + residual.to(h.dtype)).to(x.dtype)
        h = total.to(h.dtype)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight.to(h.dtype)
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), total)
