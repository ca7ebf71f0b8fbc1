"""The Triton backend of `merge_states`."""

from __future__ import annotations

from typing import Any

import torch

from tilewise import gpu
from tilewise.attention.operators import MERGE_STATES

_TILE = 4096  # elements that a program merges


def why_not_merge_states(out_a: torch.Tensor, *others: Any, **named: Any) -> str | None:
    """Why the Triton kernel cannot take the call."""
    if out_a.shape[-1] > 16 * _TILE:
        return f"holds rows of up to {16 * _TILE} elements, got {out_a.shape[-1]}"
    return gpu.why_not(out_a, dot=False)


@MERGE_STATES.kernel("triton")
def _merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from tilewise.attention import triton_merge_kernels as kernels

    out, lse = out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)
    dim = out_a.shape[-1]
    rows = lse.numel()
    if rows == 0:
        return out, lse
    a, b = (_rows(x, rows) for x in (out_a, out_b))
    block = 1 << max(dim - 1, 0).bit_length()
    block_rows = max(_TILE // block, 1)
    gpu.launch(
        kernels.merge_states,
        (-(-rows // block_rows),),
        a,
        lse_a.contiguous(),
        b,
        lse_b.contiguous(),
        out,
        lse,
        rows,
        a.stride(0),
        b.stride(0),
        DIM=dim,
        BLOCK=block,
        ROWS=block_rows,
        num_warps=4 if block <= _TILE else 16,
    )
    return out, lse


def _rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """(rows, dim) with any stride between the rows."""
    x = x.reshape(rows, x.shape[-1])
    return x if x.shape[-1] == 1 or x.stride(1) == 1 else x.contiguous()
