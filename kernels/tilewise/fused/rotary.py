"""Rotary position embedding: pairs of elements of every head are turned by their position."""

from __future__ import annotations

from functools import partial

import torch

from tilewise import checks, gpu
from tilewise.dispatch import Cost, Impl, Op
from tilewise.fused import autograd, baseline, naive, native, triton
from tilewise.fused.tables import RotaryTables


def check_tables(
    name: str, tables: RotaryTables, x_name: str, x: torch.Tensor, positions: torch.Tensor
) -> None:
    """Raise unless the tables and positions fit x (..., heads, dim)."""
    if not isinstance(tables, RotaryTables):
        raise TypeError(f"{name}: must be RotaryTables, got {type(tables).__name__}")
    for part in ("cos", "sin"):
        table = getattr(tables, part)
        checks.has_dtype(f"{name}.{part}", table, (torch.float32, torch.float64))
        checks.has_dims(f"{name}.{part}", table, "max_positions rotary_dim/2")
        checks.on_device_of(f"{name}.{part}", table, x_name, x)
    checks.is_bool(f"{name}.interleaved", tables.interleaved)
    checks.has_shape(f"{name}.sin", tables.sin, tuple(tables.cos.shape), "that of cos")
    if tables.cos.shape[0] == 0:
        raise ValueError(f"{name}.cos: must have at least one position, got none")
    if 2 * tables.cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"{name}.cos: rotary_dim must be <= {x_name}'s head_dim, {x.shape[-1]}, "
            f"got {2 * tables.cos.shape[1]}"
        )
    checks.has_dtype("positions", positions, (torch.int64,))
    checks.on_device_of("positions", positions, x_name, x)
    checks.has_shape(
        "positions", positions, tuple(x.shape[:-2]), f"{x_name} without heads and head_dim"
    )


def validate_positions(positions: torch.Tensor, tables: RotaryTables) -> None:
    """Raise if a position is not in the tables; reads the values."""
    outside = ((positions < 0) | (positions >= tables.cos.shape[0])).nonzero()
    if len(outside):
        where = tuple(outside[0].tolist())
        raise ValueError(
            f"positions: must be from 0 to {tables.cos.shape[0] - 1}, the table's last, "
            f"got {positions[where].item()} at {where}"
        )


def _check(
    x: torch.Tensor, tables: RotaryTables, positions: torch.Tensor, *, validate: bool = False
) -> None:
    checks.has_dtype("x", x, checks.FLOATS)
    if x.dim() < 2:
        raise ValueError(f"x: shape must be (..., heads, head_dim), got {tuple(x.shape)}")
    check_tables("tables", tables, "x", x, positions)
    if validate:
        validate_positions(positions, tables)


def _cost(x: torch.Tensor, tables: RotaryTables, positions: torch.Tensor) -> Cost:
    pairs = tables.cos.shape[1]
    rows = positions.numel() * 2 * pairs * tables.cos.itemsize
    flops = 6 * pairs * (x.numel() // max(x.shape[-1], 1))
    return Cost(flops, 2 * x.numel() * x.itemsize + rows + 8 * positions.numel(), torch.float32)


def _why_not_auto(x: torch.Tensor, tables: RotaryTables, positions: torch.Tensor) -> str | None:
    if not tables.interleaved:
        return "gathering the two halves into complex numbers is slower than naive"
    if torch.compiler.is_compiling():
        return "Inductor cannot fuse complex products"
    return None


_ROTARY_EMBEDDING = Op(
    "rotary_embedding",
    naive.rotary_embedding,
    impls=(
        Impl(
            "triton",
            partial(autograd.rotary_embedding, "triton"),
            triton.why_not_rotary,
            gpu.why_not_auto,
        ),
        Impl("cpu", partial(autograd.rotary_embedding, "cpu"), native.why_not_rotary),
        Impl("torch", baseline.rotary_embedding, why_not_auto=_why_not_auto),
    ),
    check=_check,
    cost=_cost,
)


def rotary_embedding(
    x: torch.Tensor,
    tables: RotaryTables,
    positions: torch.Tensor,
    *,
    backend: str = "auto",
    validate: bool = False,
) -> torch.Tensor:
    """Turn pairs of elements of every head by an angle that grows with the position.

    A position outside the tables gives NaN in the turned part of its heads, on every backend:
    nothing outside the tables is read, and the mistake shows.

    Args:
        x: (..., heads, head_dim), floating point: queries or keys, before attention.
        tables: from `rotary_tables`. Where rotary_dim < head_dim the rest passes through.
        positions: (...) int64, x's shape without heads and head_dim.
        backend: see `tilewise.use_backend`.
        validate: check that every position is in the tables.

    Returns:
        x's shape and dtype.

    Raises:
        ValueError: for a shape, dtype or device that does not fit; with `validate` for a position.
        TypeError: if `tables` is not `RotaryTables`.
        BackendError: if the named backend cannot run the call.

    Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021
    (arXiv:2104.09864); partial rotation as in GPT-J and GPT-NeoX.
    """
    if not validate:
        out = native.rotary_embedding_plainly(backend, x, tables, positions)
        if out is not None:
            return out
    _check(x, tables, positions, validate=validate)
    return _ROTARY_EMBEDDING(x, tables, positions, backend=backend)
