"""What the C++ backends of all operations share."""

from __future__ import annotations

import torch

from tilewise import native

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that C++ kernels take; all of them compute in float32."""


def why_not(x: torch.Tensor) -> str | None:
    """Why the C++ kernels cannot take a call whose main tensor is `x`; None where they can."""
    return why_not_dtype(x, x.dtype)


def why_not_dtype(x: torch.Tensor, dtype: torch.dtype) -> str | None:
    """The same where the result's dtype is not that of `x`."""
    if x.device.type != "cpu":
        return f"needs tensors on the CPU, got {x.device}"
    if dtype not in DTYPES:
        return f"computes in float32, got {dtype}"
    return native.why_not_cpu()


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """`x` itself, or a copy where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
