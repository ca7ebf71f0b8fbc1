"""The C++ kernels of the fused operations: results allocated, rows laid out, operator called."""

from __future__ import annotations

from typing import Any

import torch

from tilewise import cpu, native
from tilewise.fused.operators import (
    ACTIVATIONS,
    GATED_ACTIVATION,
    GATED_ACTIVATION_BACKWARD,
    LAYER_NORM,
    LAYER_NORM_BACKWARD,
    RMS_NORM,
    RMS_NORM_BACKWARD,
    ROTARY_EMBEDDING,
    SAMPLE,
)
from tilewise.fused.rows import empty_like, rows, rows_or_none
from tilewise.fused.tables import RotaryTables


def why_not_norm(x: torch.Tensor, *others: Any, **options: Any) -> str | None:
    """Why the C++ kernels cannot take the norm."""
    return cpu.why_not(x)


def why_not_gated(gate: torch.Tensor, up: torch.Tensor, **options: Any) -> str | None:
    """Why the C++ kernel cannot take the call."""
    return cpu.why_not(gate)


def why_not_sample(logits: torch.Tensor, **options: Any) -> str | None:
    """Why the C++ kernel cannot take the call."""
    return cpu.why_not(logits)


def why_not_rotary(x: torch.Tensor, tables: RotaryTables, positions: torch.Tensor) -> str | None:
    """Why the C++ kernel cannot take the call."""
    if tables.cos.dtype != torch.float32 or tables.sin.dtype != torch.float32:
        return "needs float32 tables"
    return cpu.why_not(x)


# --- norms ----------------------------------------------------------------------------------------


def rms_norm_plainly(
    backend: str, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
    """What `rms_norm` returns for a plain call; None for any other."""
    operators = cpu.plain_operators("rms_norm", backend, x, weight, optional=(residual,))
    if operators is None or type(eps) is not float or not eps >= 0:
        return None
    out, total = cpu.plainly(
        operators.plain_rms_norm, x, weight, eps, residual, otherwise=(None, None)
    )
    return out if total is None else (out, total)


@RMS_NORM.kernel("cpu")
def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> Any:
    out = empty_like(x)
    total = x.new_empty(0) if residual is None else empty_like(x)
    native.cpu_ops().rms_norm(rows(x), weight.contiguous(), eps, rows_or_none(residual), out, total)
    return out, total


@RMS_NORM_BACKWARD.kernel("cpu")
def _rms_norm_backward(
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> Any:
    grad_x, grad_weight = empty_like(x), empty_like(weight)
    inputs = (rows(grad_out), rows_or_none(grad_sum), rows(x), weight.contiguous())
    native.cpu_ops().rms_norm_backward(*inputs, eps, grad_x, grad_weight)
    return grad_x, grad_weight


@LAYER_NORM.kernel("cpu")
def _layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> Any:
    out = empty_like(x)
    total = x.new_empty(0) if residual is None else empty_like(x)
    bias = None if bias is None else bias.contiguous()
    native.cpu_ops().layer_norm(
        rows(x), weight.contiguous(), bias, eps, rows_or_none(residual), out, total
    )
    return out, total


@LAYER_NORM_BACKWARD.kernel("cpu")
def _layer_norm_backward(
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> Any:
    grads = (empty_like(x), *(empty_like(weight) for _ in range(2)))
    inputs = (rows(grad_out), rows_or_none(grad_sum), rows(x), weight.contiguous())
    native.cpu_ops().layer_norm_backward(*inputs, eps, *grads)
    return grads


# --- rotary embedding -----------------------------------------------------------------------------


def are_plain_tables(tables: RotaryTables) -> bool:
    """Whether these are tables of the usual types; what tensors they are, C++ looks at."""
    return (
        type(tables) is RotaryTables
        and type(tables.interleaved) is bool
        and tables.cos is not None
        and tables.sin is not None
    )


def rotary_embedding_plainly(
    backend: str, x: torch.Tensor, tables: RotaryTables, positions: torch.Tensor
) -> torch.Tensor | None:
    """What `rotary_embedding` returns for a plain call; None for any other."""
    if not are_plain_tables(tables):
        return None
    cos, sin, interleaved = tables
    operators = cpu.plain_operators("rotary_embedding", backend, x, cos, sin, positions)
    if operators is None:
        return None
    out: torch.Tensor | None = cpu.plainly(
        operators.plain_rotary_embedding, x, cos, sin, positions, interleaved
    )
    return out


@ROTARY_EMBEDDING.kernel("cpu")
def _rotary_embedding(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    inverse: bool,
) -> torch.Tensor:
    out = empty_like(x)
    heads = cpu.unit_stride(x if x.dim() == 3 else x.reshape(positions.numel(), *x.shape[-2:]))
    tables = (cos.contiguous(), sin.contiguous(), positions.contiguous())
    native.cpu_ops().rotary_embedding(heads, *tables, interleaved, inverse, out)
    return out


# --- gated activations ----------------------------------------------------------------------------

_ACTIVATION_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


@GATED_ACTIVATION.kernel("cpu")
def _gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    out = empty_like(gate)
    number = _ACTIVATION_NUMBERS[activation]
    native.cpu_ops().gated_activation(rows(gate), rows(up), number, out)
    return out


@GATED_ACTIVATION_BACKWARD.kernel("cpu")
def _gated_activation_backward(
    grad_out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> Any:
    grads = empty_like(gate), empty_like(up)
    inputs = (rows(grad_out), rows(gate), rows(up))
    native.cpu_ops().gated_activation_backward(*inputs, _ACTIVATION_NUMBERS[activation], *grads)
    return grads


# --- sampling -------------------------------------------------------------------------------------


@SAMPLE.kernel("cpu")
def _sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    repetition_penalty: torch.Tensor,
    previous_tokens: torch.Tensor | None,
    *stream: Any,
) -> torch.Tensor:
    tokens = logits.new_empty(logits.shape[0], dtype=torch.int64)
    previous = None if previous_tokens is None else cpu.unit_stride(previous_tokens)
    parameters = (temperature, top_k, top_p, min_p, repetition_penalty)
    native.cpu_ops().sample(cpu.unit_stride(logits), *parameters, previous, *stream, tokens)
    return tokens
