"""Gated activations: their values, the baseline's limits, and bad input by name."""

import math

import pytest
import torch

import tilewise
from tilewise import dispatch
from tilewise.testing import assert_agrees

POINTS = [-20.0, -3.0, -0.5, 0.0, 0.25, 1.0, 4.0, 30.0]


def _silu(x):
    return x / (1 + math.exp(-x))


def _gelu(x):
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def _gelu_tanh(x):
    return x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize(
    ("activation", "options", "formula"),
    [
        (tilewise.swiglu, {}, _silu),
        (tilewise.geglu, {"approximate": "none"}, _gelu),
        (tilewise.geglu, {"approximate": "tanh"}, _gelu_tanh),
        (tilewise.geglu, {}, _gelu_tanh),
    ],
)
def test_follows_the_formula(activation, options, formula, backend):
    gate = torch.tensor(POINTS, dtype=torch.float64)
    up = torch.linspace(-2, 3, len(POINTS), dtype=torch.float64)
    truth = torch.tensor([formula(x) for x in POINTS], dtype=torch.float64) * up
    actual = activation(gate, up, backend=backend, **options)
    # Beyond 5 the two terms of gelu cancel, so a row is judged by its largest element.
    assert_agrees(actual, truth, truth)


@pytest.mark.parametrize(
    ("activation", "options", "gate"),
    [(tilewise.swiglu, {}, -16.0), (tilewise.geglu, {"approximate": "none"}, -4.5)],
)
def test_float16_is_rounded_once_by_auto(activation, options, gate):
    """The activation alone is below float16's normal range here, where it has few bits left."""
    gate = torch.tensor([[gate]], dtype=torch.float16)
    up = torch.tensor([[1001.0]], dtype=torch.float16)
    assert dispatch.find_op(activation).select("auto", (gate, up), options).name != "torch"
    naive, truth = (
        activation(gate.to(dtype), up.to(dtype), backend="naive", **options)
        for dtype in (torch.float32, torch.float64)
    )
    assert_agrees(activation(gate, up, **options), naive.half(), truth)
    with pytest.raises(AssertionError, match="is off by"):
        assert_agrees(activation(gate, up, backend="torch", **options), naive.half(), truth)


@pytest.mark.parametrize("activation", [tilewise.swiglu, tilewise.geglu])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": 1.0}, "gate: must be a torch.Tensor, got float"),
        (
            {"gate": torch.ones(2, 4, dtype=torch.int64)},
            "gate: dtype must be float32 or float16 or bfloat16 or float64, got int64",
        ),
        ({"up": torch.ones(2, 4).half()}, "up: dtype must be gate's, float32, got float16"),
        ({"up": torch.ones(4)}, "up: shape must be (2, 4) (gate's shape), got (4,)"),
        (
            {"up": torch.ones(2, 4, device="meta")},
            "up: must be on the device of gate (cpu), got meta",
        ),
    ],
)
def test_names_the_bad_argument(activation, change, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        activation(**{"gate": torch.ones(2, 4), "up": torch.ones(2, 4)} | change)
    assert str(caught.value) == message


def test_geglu_names_a_bad_approximation():
    with pytest.raises(ValueError, match=r"^approximate: must be 'tanh' or 'none', got 'erf'$"):
        tilewise.geglu(torch.ones(2), torch.ones(2), approximate="erf")
