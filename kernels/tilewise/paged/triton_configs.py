"""How attention over a cache is cut into Triton programs, by what shared memory has room for."""

from __future__ import annotations

from typing import NamedTuple


def power_of_two(n: int) -> int:
    return max(1 << (n - 1).bit_length(), 16)


_SHARED_MEMORY = {"sm_80": 160, "sm_86": 96, "sm_90": 220, "sm_100": 220, "gfx942": 64}
"""KB that a program may use."""


class Config(NamedTuple):
    """How a launch is cut: rows and keys of a tile, and what Triton needs to know."""

    m: int
    n: int
    num_warps: int
    num_stages: int


def choose_config(
    architecture: str,
    m: int,
    row: int,
    stored_row: int,
    q_row: int,
    *,
    is_small: bool,
    is_paged: bool,
    has_bias: bool,
) -> Config:
    """The most keys per tile, and the most tiles in flight, that shared memory has room for.

    Args:
        architecture: one of `gpu.TARGETS`.
        m: rows of a block.
        row: bytes of one key and its value as multiplied.
        stored_row: bytes of the same as they lie in the cache.
        q_row: bytes of one query.
        is_small: whether the launch is for requests of few rows, which is bound by memory.
        is_paged: whether the keys lie in pages.
        has_bias: whether a tile of scores has one of biases beside it.
    """
    if architecture == "sm_90" and is_small and m == 16 and row == 512 and not has_bias:
        return _measured(stored_row, is_paged=is_paged)
    available = _SHARED_MEMORY[architecture] * 1024
    if m >= 64:
        available -= m * q_row
    if is_small and row <= 1024:
        available //= 2  # two programs at a time
    # A tile that is not multiplied as it was loaded needs room twice.
    converted = row if stored_row != row or m >= 64 else 0
    # Of the stages one multiplies, and half of the others are for looking up the pages.
    stages = (2, 1) if architecture == "gfx942" else (5, 3) if row <= 1024 else (3,)
    # Registers are what runs out first.
    is_crowded = row >= 1024 or has_bias
    is_crowded |= architecture in ("sm_80", "sm_100") and m >= 64 and stored_row != row
    is_crowded |= architecture == "sm_86" and m >= 64
    n, num_stages = next(
        (
            (n, num_stages)
            for n in ((32,) if is_crowded else (64, 32))
            for num_stages in stages
            if n * (max((num_stages - 1) // 2, 1) * stored_row + converted) <= available
        ),
        (16, 1),
    )
    is_wide = row > 1024 or m * max(row, 512) > 64 * 512
    return Config(m, n, 8 if is_wide else 4, num_stages)


def _measured(stored_row: int, *, is_paged: bool) -> Config:
    """The fastest on an H200, for heads of 128 in 16 bits; half as large, stored in 8 or 4."""
    if stored_row < 512:
        return Config(16, 128, 4, 3)
    return Config(16, 32, 4, 5 if is_paged else 3)
