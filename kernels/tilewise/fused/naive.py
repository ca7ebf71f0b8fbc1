"""The definitions of the fused small operations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tilewise.fused.philox import gumbel_noise
from tilewise.fused.tables import RotaryTables


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """float32 for everything narrower, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def divide(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """x / divisor, correctly rounded on every device, so that codes are the same on all of them.

    On a GPU, PyTorch multiplies by the reciprocal of a divisor that is not there. A scale that is
    one step off turns all the ties of its row: with bfloat16 numbers, up to one code in a hundred.
    """
    return x / x.new_full((), divisor)


# --- norms ----------------------------------------------------------------------------------------


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = x / sqrt(mean(x^2) + eps) * weight, of x + residual where one is given."""
    total = x if residual is None else _rounded_sum(x, residual)
    h = total.to(compute_dtype(x))
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight.to(h.dtype)
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), total)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = (x - mean) / sqrt(variance + eps) * weight + bias, of x + residual where one is given."""
    total = x if residual is None else _rounded_sum(x, residual)
    h = total.to(compute_dtype(x))
    h = h - h.mean(-1, keepdim=True)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight.to(h.dtype)
    if bias is not None:
        y = y + bias.to(h.dtype)
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), total)


def _rounded_sum(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The sum is what the next layer's residual is, so it is rounded before it is used."""
    dtype = compute_dtype(x)
    return (x.to(dtype) + residual.to(dtype)).to(x.dtype)


# --- rotary embedding -----------------------------------------------------------------------------


def rotary_embedding(
    x: torch.Tensor, tables: RotaryTables, positions: torch.Tensor
) -> torch.Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for every pair of a head; the rest stays."""
    h = x.to(compute_dtype(x))
    cos, sin = (table.to(h.dtype) for table in rows_at(tables, positions))
    turned, rest = h.tensor_split((2 * cos.shape[-1],), dim=-1)
    if tables.interleaved:
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        a, b = turned.chunk(2, dim=-1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, -1).flatten(-2) if tables.interleaved else torch.cat(pair, -1)
    return torch.cat((turned, rest), -1).to(x.dtype)


def rows_at(tables: RotaryTables, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (..., 1, rotary_dim / 2) at the positions; NaN for one outside the tables."""
    last = tables.cos.shape[0] - 1
    outside = ((positions < 0) | (positions > last))[..., None, None]
    row = positions.clamp(0, last)
    cos, sin = (table[row].unsqueeze(-2) for table in (tables.cos, tables.sin))
    return cos.masked_fill(outside, math.nan), sin.masked_fill(outside, math.nan)


# --- gated activations ----------------------------------------------------------------------------


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    dtype = compute_dtype(gate)
    return (F.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


def geglu(gate: torch.Tensor, up: torch.Tensor, *, approximate: str = "tanh") -> torch.Tensor:
    """gelu(gate) * up."""
    dtype = compute_dtype(gate)
    return (F.gelu(gate.to(dtype), approximate=approximate) * up.to(dtype)).to(gate.dtype)


# --- sampling -------------------------------------------------------------------------------------


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
    """Penalise, scale, filter, and take the largest logit after adding Gumbel noise."""
    batch, vocabulary = logits.shape
    h = logits.to(compute_dtype(logits))
    if previous_tokens is not None:
        h = _penalise(h, _column(repetition_penalty, h), previous_tokens)
    t = _column(temperature, h)
    h = (h / torch.where(t > 0, t, 1)).nan_to_num(-math.inf, torch.finfo(h.dtype).max, -math.inf)
    # The differences are what counts, and near 0 the noise is not rounded away.
    h = h - h.amax(-1, keepdim=True)
    if _is_on(top_k, 0) or _is_on(top_p, 1):
        h = _keep_top(h, _column(top_k, h), _column(top_p, h))
    h = h.masked_fill(h.exp() < _column(min_p, h), -math.inf)  # exp(0) = 1 is the likeliest
    if _is_on(temperature, 0):
        rows = torch.arange(batch, device=h.device)
        noise = gumbel_noise(
            seed,
            rows if sample_ids is None else sample_ids,
            torch.zeros_like(rows) if positions is None else positions,
            vocabulary,
        )
        h = h + torch.where(t > 0, noise, 0)
    return h.argmax(-1)  # the first of equals, and 0 where nothing was above -inf: all is NaN now


def _column(value: float | torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """A parameter as (batch, 1) or (1, 1) in h's dtype, so that a number acts as a tensor would."""
    if isinstance(value, torch.Tensor):
        return value.to(h.dtype)[:, None]
    return torch.full((1, 1), value, dtype=h.dtype, device=h.device)


def _is_on(value: float | torch.Tensor, off: float) -> bool:
    return isinstance(value, torch.Tensor) or value != off


def _penalise(h: torch.Tensor, penalty: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Divide the positive and multiply the negative logits of tokens that have been seen."""
    batch, vocabulary = h.shape
    column = torch.where((tokens >= 0) & (tokens < vocabulary), tokens, vocabulary)
    seen = torch.zeros(batch, vocabulary + 1, dtype=torch.bool, device=h.device)
    seen = seen.scatter(1, column, True)[:, :vocabulary]
    return torch.where(seen, torch.where(h > 0, h / penalty, h * penalty), h)


def _keep_top(h: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """-inf for all but the top_k first, and of those but the fewest that hold top_p together."""
    ordered, order = h.sort(dim=-1, descending=True, stable=True)  # equals: the lower index first
    rank = torch.arange(h.shape[-1], device=h.device)
    ordered = ordered.masked_fill((top_k > 0) & (rank >= top_k), -math.inf)
    before = F.pad(ordered.softmax(-1, dtype=torch.float64).cumsum(-1)[:, :-1], (1, 0))
    ordered = ordered.masked_fill((top_p < 1) & (before >= top_p), -math.inf)
    return torch.empty_like(h).scatter(1, order, ordered)
