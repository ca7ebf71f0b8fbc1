"""What the C++ backends of all operations share."""

from __future__ import annotations

import torch

from tilewise import native

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that C++ kernels take; all of them compute in float32."""


def why_not(x: torch.Tensor) -> str | None:
    """Why the C++ kernels cannot take a call whose main tensor is `x`; None where they can."""
    if x.device.type != "cpu":
        return f"needs tensors on the CPU, got {x.device}"
    if x.dtype not in DTYPES:
        return f"computes in float32, got {x.dtype}"
    return native.why_not_cpu()


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """`x` itself, or a copy where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
