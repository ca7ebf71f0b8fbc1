"""The order of bytes in which the C++ kernels read weights: panels of 16 rows, words alternating.

Within a panel, the 4-byte words of its rows take turns: word 0 of rows 0 to 15, word 1 of rows 0 to
15, and so on, block by block. A vector register then holds 16 (or 8) rows side by side with 4
consecutive weights of each, as dot products of bytes want them, and no sum ever runs across lanes.
The float16 numbers of GGUF's blocks take turns by themselves. It is a reordering and nothing else:
what is not a whole panel or block is filled up with zeros, and `rows_from_panels` undoes it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tilewise import huge_pages

PANEL_ROWS = 16
_BYTES_AT_ONCE = 2**20

Units = tuple[tuple[int, int], ...]
"""A block as (bytes, bytes that stay together), ...: a float16 number is 2, all else words of 4."""


def panels_from_rows(rows: torch.Tensor, block_bytes: int, units: Units) -> torch.Tensor:
    """uint8 (..., N, bytes of a row) to (..., panels, blocks, 16 * block_bytes)."""
    *batch, n, row_bytes = rows.shape
    shape = (-(-n // PANEL_ROWS), -(-row_bytes // block_bytes), PANEL_ROWS * block_bytes)
    panels = huge_pages.new_empty(rows, (*batch, *shape))
    # A few panels at a time: the copies in between would else take the weight's memory over again.
    count = max(1, _BYTES_AT_ONCE // (shape[1] * shape[2]))
    matrices = math.prod(batch)
    for matrix, out in zip(
        rows.reshape(matrices, n, row_bytes), panels.view(matrices, *shape), strict=True
    ):
        for start in range(0, shape[0], count):
            some = matrix[start * PANEL_ROWS : (start + count) * PANEL_ROWS]
            out[start : start + count] = _panels(some, block_bytes, units)
    return panels


def _panels(rows: torch.Tensor, block_bytes: int, units: Units) -> torch.Tensor:
    rows = F.pad(rows, (0, -rows.shape[-1] % block_bytes, 0, -rows.shape[-2] % PANEL_ROWS))
    # (panels, 16, blocks, block_bytes) -> (panels, blocks, 16, block_bytes)
    blocks = rows.unflatten(0, (-1, PANEL_ROWS)).unflatten(-1, (-1, block_bytes)).transpose(1, 2)
    parts = []
    for part, (size, unit) in zip(_split(blocks, units), units, strict=True):
        # (..., 16, units, unit) -> (..., units, 16, unit)
        parts.append(part.unflatten(-1, (size // unit, unit)).transpose(-3, -2).flatten(-3))
    return torch.cat(parts, dim=-1)


def rows_from_panels(panels: torch.Tensor, units: Units) -> torch.Tensor:
    """uint8 (..., panels, blocks, 16 * block_bytes) to (..., panels * 16, bytes of a row)."""
    whole = tuple((size * PANEL_ROWS, unit) for size, unit in units)
    parts = []
    for part, (size, unit) in zip(_split(panels, whole), units, strict=True):
        part = part.unflatten(-1, (size // unit, PANEL_ROWS, unit))
        parts.append(part.transpose(-3, -2).flatten(-2))  # (..., blocks, 16, size)
    return torch.cat(parts, dim=-1).transpose(-3, -2).flatten(-2).flatten(-3, -2)


def select_rows(panels: torch.Tensor, index: torch.Tensor, units: Units) -> torch.Tensor:
    """Rows by number: (panels, blocks, 16 * block_bytes) and int64 (n,) to (n, bytes of a row)."""
    panel, lane = index // PANEL_ROWS, index % PANEL_ROWS
    whole = tuple((size * PANEL_ROWS, unit) for size, unit in units)
    parts = []
    for part, (size, unit) in zip(_split(panels, whole), units, strict=True):
        part = part.unflatten(-1, (size // unit, PANEL_ROWS, unit))
        parts.append(part[panel, :, :, lane].flatten(-2))  # (n, blocks, size)
    return torch.cat(parts, dim=-1).flatten(-2)


def alternate_groups(parts: torch.Tensor) -> torch.Tensor:
    """Scales or zeros (..., N, groups) to (..., panels, groups, 16)."""
    parts = F.pad(parts, (0, 0, 0, -parts.shape[-2] % PANEL_ROWS))
    return parts.unflatten(-2, (-1, PANEL_ROWS)).transpose(-2, -1).contiguous()


def groups_from_panels(panels: torch.Tensor) -> torch.Tensor:
    """(..., panels, groups, 16) to (..., panels * 16, groups)."""
    return panels.transpose(-2, -1).flatten(-3, -2)


def _split(blocks: torch.Tensor, units: Units) -> tuple[torch.Tensor, ...]:
    return blocks.split([size for size, _ in units], dim=-1)
