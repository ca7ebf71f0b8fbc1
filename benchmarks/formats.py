"""What a format costs in bits and in accuracy, apart from any kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import tilewise
from tilewise.testing import Inputs


@dataclass(frozen=True)
class FormatError:
    """How well a format stores a normally distributed weight matrix.

    Args:
        name: the format and how it was made.
        bits: per weight, scales and zero points included.
        error: root mean square of the difference over that of the weights.
    """

    name: str
    bits: float
    error: float


_WAYS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("int8 per channel", "int8", {"group_size": -1}),
    ("int8 group 64", "int8", {"group_size": 64}),
    ("fp8 group 64", "fp8", {"group_size": 64}),
    ("int4 per channel", "int4", {"group_size": -1}),
    ("int4 group 128", "int4", {"group_size": 128}),
    ("int4 group 64", "int4", {"group_size": 64}),
    ("int4 group 64, min-max", "int4", {"group_size": 64, "search": "minmax"}),
    ("int4 group 64, symmetric", "int4", {"group_size": 64, "symmetric": True}),
    ("int4 group 32", "int4", {"group_size": 32}),
    ("nf4 group 64", "nf4", {"group_size": 64}),
    ("mxfp4 group 32", "mxfp4", {"group_size": 32}),
)


def format_errors(rows: int = 256, width: int = 1024) -> list[FormatError]:
    """Store one matrix in every format that `quantize` makes, most bits first."""
    weight = Inputs().randn(rows, width)
    norm = weight.double().norm()
    results = []
    for name, scheme, options in _WAYS:
        packed = tilewise.quantize(weight, scheme, **options)
        difference = packed.dequantize(torch.float64) - weight.double()
        bits = 8 * packed.nbytes / weight.numel()
        results.append(FormatError(name, bits, float(difference.norm() / norm)))
    return sorted(results, key=lambda result: (-result.bits, result.error))
