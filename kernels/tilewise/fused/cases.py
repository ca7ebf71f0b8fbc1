"""The calls on which every backend of the fused operations must agree."""

from __future__ import annotations

from typing import Any

from tilewise.testing import Case, Inputs, Make


def _rms_norm(*shape: int, residual: bool = False) -> Make:
    def make(inputs: Inputs) -> dict[str, Any]:
        arguments = {"x": inputs.randn(*shape), "weight": inputs.randn(shape[-1]), "eps": 1e-5}
        if residual:
            arguments["residual"] = inputs.randn(*shape)
        return arguments

    return make


CASES = [
    Case("rms_norm", "rows", _rms_norm(7, 576), grad=("x", "weight")),
    Case("rms_norm", "batch", _rms_norm(2, 3, 127), grad=("x", "weight")),
    Case("rms_norm", "one", _rms_norm(1, 1), grad=("x", "weight")),
    Case("rms_norm", "empty", _rms_norm(0, 64)),
    Case(
        "rms_norm",
        "residual",
        _rms_norm(5, 63, residual=True),
        grad=("x", "weight", "residual"),
    ),
]
