"""Tensors as compiled kernels take and return them."""

from __future__ import annotations

import torch


def rows(x: torch.Tensor) -> torch.Tensor:
    """`x` as the kernels take rows: contiguous, or (rows, dim) with any stride between the rows."""
    if x.is_contiguous():
        return x
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """Uninitialised and contiguous; half the price of `x.new_empty(x.shape)`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def rows_or_none(x: torch.Tensor | None) -> torch.Tensor | None:
    """The same for a tensor that may be missing."""
    return None if x is None else rows(x)
