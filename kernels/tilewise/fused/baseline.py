"""The fused small operations with PyTorch's own kernels: the honest baseline."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tilewise.fused.naive import compute_dtype, rows_at
from tilewise.fused.tables import RotaryTables


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`torch.nn.functional.rms_norm`, after an addition."""
    if residual is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`torch.nn.functional.layer_norm`, after an addition."""
    if residual is None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias, eps), total


def rotary_embedding(
    x: torch.Tensor, tables: RotaryTables, positions: torch.Tensor
) -> torch.Tensor:
    """A product of complex numbers, the only rotation that PyTorch has a kernel for."""
    h = x.to(compute_dtype(x))
    turn = torch.complex(*(table.to(h.dtype) for table in rows_at(tables, positions)))
    turned, rest = h.tensor_split((2 * turn.shape[-1],), dim=-1)
    if tables.interleaved:
        pairs = torch.complex(*turned.unflatten(-1, (-1, 2)).unbind(-1)) * turn
        turned = torch.view_as_real(pairs).flatten(-2)
    else:
        pairs = torch.complex(*turned.chunk(2, dim=-1)) * turn
        turned = torch.cat((pairs.real, pairs.imag), -1)
    return torch.cat((turned, rest), -1).to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Two kernels, with a rounding between them."""
    return F.silu(gate) * up


def geglu(gate: torch.Tensor, up: torch.Tensor, *, approximate: str = "tanh") -> torch.Tensor:
    """Two kernels, with a rounding between them."""
    return F.gelu(gate, approximate=approximate) * up


def sample(
    logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    repetition_penalty: float | torch.Tensor = 1.0,
    previous_tokens: torch.Tensor | None = None,
    seed: int = 0,
    sample_ids: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Greedy: at temperature 0 the largest logit survives every filter."""
    return logits.argmax(-1)
