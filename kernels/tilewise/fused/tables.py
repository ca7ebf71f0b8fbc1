"""The cosines and sines of rotary position embedding, and the ways to stretch them.

Pair i of a head turns by `position * base^(-2i / rotary_dim)`. The angles are computed in float64:
a float32 product at position 100,000 is off by up to 0.004 radians before any cosine is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from tilewise import checks


class RotaryTables(NamedTuple):
    """What every position turns by.

    Args:
        cos, sin: (max_positions, rotary_dim / 2) float32.
        interleaved: whether pair i is elements (2i, 2i + 1), as in GPT-J and in Meta's own Llama
            files, or (i, i + rotary_dim / 2), as in GPT-NeoX and Hugging Face's Llama.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every frequency is divided by `factor`.

    Source: Chen et al., Extending Context Window of Large Language Models via Positional
    Interpolation, 2023 (arXiv:2306.15595).
    """

    factor: float

    def __post_init__(self) -> None:
        _at_least_one("factor", self.factor)

    def scale(self, frequencies: torch.Tensor) -> torch.Tensor:
        """The stretched frequencies, in radians per position."""
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch: slow pairs as in `LinearScaling`, fast ones untouched, a blend between.

    Args:
        factor: what the slow frequencies are divided by.
        low_freq_factor: a pair with fewer turns than this within the original context is slow.
        high_freq_factor: a pair with more turns than this is fast.
        original_max_positions: the context that the model was first trained on.

    Source: Grattafiori et al., The Llama 3 Herd of Models, 2024 (arXiv:2407.21783), and `rope_type`
    "llama3" of the published configurations.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        _at_least_one("factor", self.factor)
        checks.is_number("low_freq_factor", self.low_freq_factor)
        checks.is_number("high_freq_factor", self.high_freq_factor)
        checks.is_integer("original_max_positions", self.original_max_positions)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "low_freq_factor: must be above 0 and below high_freq_factor "
                f"({self.high_freq_factor}), got {self.low_freq_factor}"
            )
        if self.original_max_positions < 1:
            raise ValueError(
                f"original_max_positions: must be >= 1, got {self.original_max_positions}"
            )

    def scale(self, frequencies: torch.Tensor) -> torch.Tensor:
        """The stretched frequencies, in radians per position."""
        turns = self.original_max_positions * frequencies / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        fast = ((turns - self.low_freq_factor) / span).clamp(0, 1)
        return frequencies * (fast + (1 - fast) / self.factor)


RotaryScaling: TypeAlias = LinearScaling | Llama3Scaling


def rotary_tables(
    rotary_dim: int,
    max_positions: int,
    *,
    base: float = 10000.0,
    scaling: RotaryScaling | None = None,
    interleaved: bool = False,
    device: torch.device | str | None = None,
) -> RotaryTables:
    """Tabulate the rotations of positions 0 to max_positions - 1.

    Args:
        rotary_dim: how many elements of a head are turned; even.
        max_positions: number of rows.
        base: of the geometric series of frequencies ("theta" in the configurations).
        scaling: `LinearScaling` or `Llama3Scaling`.
        interleaved: which elements make a pair, see `RotaryTables`.
        device: of the tables.

    Returns:
        The tables; angles and functions in float64, rounded once to float32.

    Raises:
        ValueError: for a size or a base that makes no sense.

    Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021
    (arXiv:2104.09864).
    """
    checks.is_integer("rotary_dim", rotary_dim)
    checks.is_integer("max_positions", max_positions)
    checks.is_number("base", base)
    checks.is_bool("interleaved", interleaved)
    if scaling is not None and not isinstance(scaling, (LinearScaling, Llama3Scaling)):
        wanted = "None, LinearScaling or Llama3Scaling"
        raise TypeError(f"scaling: must be {wanted}, got {type(scaling).__name__}")
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim: must be even and >= 2, got {rotary_dim}")
    if max_positions < 1:
        raise ValueError(f"max_positions: must be >= 1, got {max_positions}")
    if not base > 0:
        raise ValueError(f"base: must be > 0, got {base}")
    pairs = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device)
    frequencies = base ** (-pairs / rotary_dim)
    if scaling is not None:
        frequencies = scaling.scale(frequencies)
    positions = torch.arange(max_positions, dtype=torch.float64, device=device)
    angles = torch.outer(positions, frequencies)
    return RotaryTables(angles.cos().float(), angles.sin().float(), interleaved)


def _at_least_one(name: str, value: float) -> None:
    checks.is_number(name, value)
    if not value >= 1:
        raise ValueError(f"{name}: must be >= 1, got {value}")
