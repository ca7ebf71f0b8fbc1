"""One call to time, and how it is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tilewise.benchmarks.calls import Part
from tilewise.testing import Make


@dataclass(frozen=True)
class Workload:
    """A call to time.

    Args:
        op: the operation.
        name: the model, the phase and the sizes; unique within an operation, dtype and device.
        make: builds the keyword arguments of the public function.
        dtype: of its floating-point tensors.
        device: "cpu" or "cuda".
        part: what to check where the definition is too large to compute in float64.
        without: backends that are not measured here, and why.
        results: names the results for the check, as in `tilewise.cases.Case`; None where they
            are what the call returns.
        grad: arguments whose gradients are computed; if any, the backward pass alone is timed.
        floors: as in `tilewise.cases.Case`.
    """

    op: str
    name: str
    make: Make
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    part: Part | None = None
    without: Mapping[str, str] = field(default_factory=dict)
    results: Callable[[dict[str, Any], Any], dict[str, torch.Tensor]] | None = None
    grad: tuple[str, ...] = ()
    floors: Mapping[str, float] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Unique among all workloads."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {self.name} {dtype} {self.device}"
