"""The Triton backend of the fused operations: results allocated, rows laid out, kernels started."""

from __future__ import annotations

from typing import Any

import torch

from tilewise import gpu
from tilewise.fused.operators import (
    GATED_ACTIVATION,
    GATED_ACTIVATION_BACKWARD,
    LAYER_NORM,
    LAYER_NORM_BACKWARD,
    RMS_NORM,
    RMS_NORM_BACKWARD,
    ROTARY_EMBEDDING,
)
from tilewise.fused.rows import empty_like, rows, rows_or_none
from tilewise.fused.tables import RotaryTables

# --- norms ----------------------------------------------------------------------------------------

_LARGEST_ROW = 65536  # elements that a program holds at once
_ELEMENTS_PER_PROGRAM = 1024  # of short rows


def why_not_norm(x: torch.Tensor, *others: Any, **options: Any) -> str | None:
    """Why the Triton kernels cannot take the norm."""
    if x.shape[-1] > _LARGEST_ROW:
        return f"holds rows of up to {_LARGEST_ROW} elements, got {x.shape[-1]}"
    return gpu.why_not(x, dot=False)


def _block(dim: int) -> dict[str, int]:
    """Rows that a program holds at once, and warps that have 8 to 16 elements of them per thread.

    Of rows as short as a head several, or else most threads would wait. How many depends on the
    length alone, and so do the bits of the result.
    """
    block = max(power_of_2(dim), 16)
    group = min(max(_ELEMENTS_PER_PROGRAM // block, 1), _ROWS_PER_PROGRAM)
    return {"GROUP": group, "BLOCK": block, "num_warps": min(max(group * block // 512, 1), 16)}


@RMS_NORM.kernel("triton")
def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> Any:
    return _norm(x, weight, None, eps, residual, centered=False)


@LAYER_NORM.kernel("triton")
def _layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> Any:
    return _norm(x, weight, bias, eps, residual, centered=True)


def _norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    *,
    centered: bool,
) -> Any:
    from tilewise.fused import triton_kernels as kernels

    out = empty_like(x)
    total = x.new_empty(0) if residual is None else empty_like(x)
    dim = x.shape[-1]
    if out.numel() == 0:
        return out, total
    x_rows, residual_rows = rows(x), rows_or_none(residual)
    count, block = out.numel() // dim, _block(dim)
    gpu.launch(
        kernels.norm,
        (-(-count // block["GROUP"]),),
        x_rows,
        residual_rows,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        out,
        total,
        count,
        dim,
        _row_stride(x_rows),
        0 if residual_rows is None else _row_stride(residual_rows),
        eps,
        CENTERED=centered,
        **block,
    )
    return out, total


@RMS_NORM_BACKWARD.kernel("triton")
def _rms_norm_backward(
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> Any:
    return _norm_backward(grad_out, grad_sum, x, weight, eps, centered=False)[:2]


@LAYER_NORM_BACKWARD.kernel("triton")
def _layer_norm_backward(
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> Any:
    return _norm_backward(grad_out, grad_sum, x, weight, eps, centered=True)


_ROWS_PER_PROGRAM = 32
"""How the sum over rows is split is fixed, so that its bits depend on nothing but the input."""


def _norm_backward(
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    centered: bool,
) -> Any:
    from tilewise.fused import triton_kernels as kernels

    dim = x.shape[-1]
    count = x.numel() // dim if dim else 0
    programs = -(-count // _ROWS_PER_PROGRAM)
    grad_x = empty_like(x)
    of_weight, of_bias = (x.new_empty(programs, dim, dtype=torch.float32) for _ in range(2))
    out_rows, sum_rows, x_rows = rows(grad_out), rows_or_none(grad_sum), rows(x)
    gpu.launch(
        kernels.norm_backward,
        (programs,),
        out_rows,
        sum_rows,
        x_rows,
        weight.contiguous(),
        grad_x,
        of_weight,
        of_bias,
        count,
        dim,
        _row_stride(out_rows),
        0 if sum_rows is None else _row_stride(sum_rows),
        _row_stride(x_rows),
        eps,
        ROWS=_ROWS_PER_PROGRAM,
        CENTERED=centered,
        **_block(dim),
    )
    return grad_x, of_weight.sum(0).to(weight.dtype), of_bias.sum(0).to(weight.dtype)


# --- rotary embedding -----------------------------------------------------------------------------

_PAIRS_PER_PROGRAM = 1024


def why_not_rotary(x: torch.Tensor, tables: RotaryTables, positions: torch.Tensor) -> str | None:
    """Why the Triton kernel cannot take the call."""
    if tables.cos.dtype != torch.float32 or tables.sin.dtype != torch.float32:
        return "needs float32 tables"
    if x.shape[-1] > _LARGEST_ROW:
        return f"holds heads of up to {_LARGEST_ROW} elements, got {x.shape[-1]}"
    return gpu.why_not(x, dot=False)


@ROTARY_EMBEDDING.kernel("triton")
def _rotary_embedding(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    inverse: bool,
) -> torch.Tensor:
    from tilewise.fused import triton_kernels as kernels

    out = empty_like(x)
    if out.numel() == 0:
        return out
    tokens = x if x.dim() == 3 else x.reshape(positions.numel(), *x.shape[-2:])
    if tokens.stride(2) != 1:
        tokens = tokens.contiguous()
    count, heads, dim = tokens.shape
    pairs = cos.shape[1]
    pairs_block = power_of_2(pairs)
    heads_block = min(power_of_2(heads), max(_PAIRS_PER_PROGRAM // pairs_block, 1))
    gpu.launch(
        kernels.rotary,
        (count, -(-heads // heads_block)),
        tokens,
        cos.contiguous(),
        sin.contiguous(),
        positions.contiguous(),
        out,
        heads,
        dim,
        pairs,
        cos.shape[0] - 1,
        tokens.stride(0),
        tokens.stride(1),
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        HEADS=heads_block,
        PAIRS=pairs_block,
        REST=power_of_2(dim - 2 * pairs) if dim > 2 * pairs else 0,
        num_warps=min(max(heads_block * pairs_block // 256, 1), 8),
    )
    return out


# --- gated activations ----------------------------------------------------------------------------

_GATED_BLOCK = {"BLOCK": 1024, "num_warps": 4}


def why_not_gated(gate: torch.Tensor, up: torch.Tensor, **options: Any) -> str | None:
    """Why the Triton kernel cannot take the call."""
    return gpu.why_not(gate, dot=False)


@GATED_ACTIVATION.kernel("triton")
def _gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    from tilewise.fused import triton_kernels as kernels

    out = empty_like(gate)
    _launch_gated(kernels.gated, (gate, up), (out,), activation)
    return out


@GATED_ACTIVATION_BACKWARD.kernel("triton")
def _gated_activation_backward(
    grad_out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> Any:
    from tilewise.fused import triton_kernels as kernels

    grads = empty_like(gate), empty_like(up)
    _launch_gated(kernels.gated_backward, (grad_out, gate, up), grads, activation)
    return grads


def _launch_gated(
    kernel: Any, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], kind: str
) -> None:
    count = outputs[0].numel()
    if count == 0:
        return
    # Where no row is cut out of a longer one, all are one row.
    dim = count
    if not all(x.is_contiguous() for x in inputs):
        inputs, dim = tuple(rows(x) for x in inputs), outputs[0].shape[-1]
    strides = [dim if x.is_contiguous() else x.stride(0) for x in inputs]
    blocks = -(-dim // _GATED_BLOCK["BLOCK"])
    grid = (count // dim * blocks,)
    gpu.launch(kernel, grid, *inputs, *outputs, dim, *strides, blocks, KIND=kind, **_GATED_BLOCK)


# --- what they share ------------------------------------------------------------------------------


def power_of_2(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


def _row_stride(x: torch.Tensor) -> int:
    """Elements from a row to the next of what `rows` returned."""
    return x.shape[-1] if x.is_contiguous() else x.stride(0)
