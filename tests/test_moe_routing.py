"""Mixture of experts: the definition in plain loops, isolation of NaN, and bad input by name."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tilewise
from tilewise import dispatch, native
from tilewise.quant.formats import QuantizedTensor
from tilewise.quant.quantizer import quantize
from tilewise.testing import Inputs, assert_agrees, to_float64


def _arguments(tokens=5, dim=16, hidden=8, experts=4, top_k=2, dtype=torch.float32, seed=0):
    inputs = Inputs(dtype, seed=seed)
    return {
        "x": inputs.randn(tokens, dim),
        "router_logits": inputs.randn(tokens, experts),
        "w_gate_up": inputs.randn(experts, 2 * hidden, dim),
        "w_down": inputs.randn(experts, dim, hidden),
        "top_k": top_k,
    }


def _by_token(x, router_logits, w_gate_up, w_down, *, top_k, normalize):
    """Token by token, only the experts that it chose; the routing over Python numbers."""
    rows = []
    for token, logits in zip(x, router_logits.tolist(), strict=True):
        chosen = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:top_k]
        weights = {e: math.exp(logits[e] - max(logits)) for e in range(len(logits))}
        total = sum(weights[e] for e in (chosen if normalize else weights))
        row = torch.zeros_like(token)
        for e in chosen:
            gate, up = (w_gate_up[e] @ token).chunk(2)
            row += weights[e] / total * (w_down[e] @ (gate / (1 + (-gate).exp()) * up))
        rows.append(row)
    return torch.stack(rows)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 6),
    experts=st.integers(1, 5),
    data=st.data(),
    normalize=st.booleans(),
    ties=st.booleans(),
)
def test_is_the_definition_by_token(tokens, experts, data, normalize, ties):
    top_k = data.draw(st.integers(1, experts))
    arguments = _arguments(tokens, 6, 3, experts, top_k, torch.float64)
    if ties:
        arguments["router_logits"] = arguments["router_logits"].round()
    expected = _by_token(**arguments, normalize=normalize)
    actual = tilewise.moe(**arguments, normalize=normalize)
    assert_agrees(actual, expected, expected, floor=float(expected.square().mean().sqrt()) * 8)


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_equal_logits_choose_the_lower_expert(backend):
    arguments = _arguments(experts=5, top_k=2)
    arguments["router_logits"] = torch.tensor([[0.0, 7.0, 7.0, 1.0, 7.0]]).expand(5, 5)
    for name in ("w_gate_up", "w_down"):
        arguments[name][[0, 3, 4]] = math.nan
    assert tilewise.moe(**arguments, backend=backend).isfinite().all()


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_a_nan_token_and_a_nan_router_stay_in_their_rows(backend):
    arguments = _arguments(tokens=6)
    naive = tilewise.moe(**arguments, backend="naive")
    truth = tilewise.moe(**to_float64(arguments), backend="naive")
    arguments["x"][1, 3] = math.nan
    arguments["router_logits"][4, 2] = math.nan
    y = tilewise.moe(**arguments, backend=backend)
    assert y[[1, 4]].isnan().all()
    # Not to the bit: a product may add up differently once the NaN has sent its token elsewhere.
    others = [0, 2, 3, 5]
    assert_agrees(y[others], naive[others], truth[others])


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_a_nan_expert_reaches_only_the_tokens_that_chose_it(backend):
    """In the gradients too: an expert that a token did not choose must not touch it."""
    arguments = _arguments(tokens=6, experts=3, top_k=1)
    arguments["router_logits"] = torch.eye(3)[[0, 1, 2, 1, 0, 2]] * 4

    def run():
        leaves = {
            name: value.clone().requires_grad_()
            for name, value in arguments.items()
            if isinstance(value, torch.Tensor)
        }
        y = tilewise.moe(**arguments | leaves, normalize=False, backend=backend)
        own = torch.tensor([0, 2, 4, 5])  # the tokens of experts 0 and 2
        grads = torch.autograd.grad(y[own].sum(), list(leaves.values()))
        return y[own], grads

    y, grads = run()
    for name in ("w_gate_up", "w_down"):
        arguments[name][1] = math.nan
    poisoned_y, poisoned_grads = run()
    assert torch.equal(poisoned_y, y)
    for name, poisoned, grad in zip(arguments, poisoned_grads, grads, strict=False):
        if name in ("x", "router_logits"):
            poisoned, grad = (g[[0, 2, 4, 5]] for g in (poisoned, grad))
        else:
            poisoned, grad = (g[[0, 2]] for g in (poisoned, grad))
        assert torch.equal(poisoned, grad), name


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_quantized_experts_are_their_dequantized_selves(scheme):
    arguments = _arguments(dim=64, hidden=32)
    quantized = {
        name: quantize(arguments[name], scheme, group_size=32) for name in ("w_gate_up", "w_down")
    }
    dense = {name: weight.dequantize() for name, weight in quantized.items()}
    expected = tilewise.moe(**arguments | dense, backend="naive")
    assert torch.equal(tilewise.moe(**arguments | quantized, backend="naive"), expected)
    one = arguments | {"w_down": quantized["w_down"]}  # the other one stays dense
    dense_one = arguments | {"w_down": dense["w_down"]}
    expected = tilewise.moe(**dense_one, backend="naive")
    assert torch.equal(tilewise.moe(**one, backend="naive"), expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "grouped_mm takes no float64"),
        (
            {"dtype": torch.bfloat16},
            "a rounding to bfloat16 after every product is more than the agreement rule allows",
        ),
        ({"dim": 18}, "grouped_mm needs rows of a multiple of 16 bytes, got 72"),
        ({"hidden": 5}, "grouped_mm needs rows of a multiple of 16 bytes, got 20"),
    ],
)
def test_torch_says_what_it_cannot_multiply(change, reason):
    arguments = _arguments(**change)
    assert dispatch.OPS["moe"].reasons((), arguments)["torch"] == reason
    with pytest.raises(dispatch.BackendError, match=reason):
        tilewise.moe(**arguments, backend="torch")


def test_torch_takes_no_quantized_weights():
    arguments = _arguments()
    op = dispatch.OPS["moe"]
    assert op.reasons((), arguments)["torch"] is None
    quantized = arguments | {"w_down": quantize(arguments["w_down"], "int8", group_size=-1)}
    assert op.reasons((), quantized)["torch"] == "grouped_mm takes no quantized weights"


def _quantized(experts, rows, columns):
    data = torch.zeros(experts, rows, columns, dtype=torch.int8)
    return QuantizedTensor("int8", (experts, rows, columns), -1, data, torch.ones(experts, rows, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x: must be a torch.Tensor, got NoneType"),
        (
            {"x": torch.ones(5, 16).long()},
            "x: dtype must be float32 or float16 or bfloat16 or float64, got int64",
        ),
        ({"x": torch.ones(1, 5, 16)}, "x: shape must be (tokens, dim), got (1, 5, 16)"),
        (
            {"router_logits": torch.ones(5)},
            "router_logits: shape must be (tokens, experts), got (5,)",
        ),
        (
            {"router_logits": torch.ones(4, 4)},
            "router_logits: shape must be (5, 4) (x's tokens), got (4, 4)",
        ),
        (
            {"router_logits": torch.ones(5, 4).long()},
            "router_logits: dtype must be float32 or float16 or bfloat16 or float64, got int64",
        ),
        ({"top_k": 1.0}, "top_k: must be an int, got float"),
        ({"top_k": "2"}, "top_k: must be an int, got str"),
        ({"normalize": 1}, "normalize: must be a bool, got int"),
        ({"top_k": 0}, "top_k: must be from 1 to the number of experts, 4, got 0"),
        ({"top_k": 5}, "top_k: must be from 1 to the number of experts, 4, got 5"),
        (
            {"w_down": [1.0]},
            "w_down: must be a torch.Tensor or a QuantizedTensor, got list",
        ),
        (
            {"w_gate_up": torch.ones(16, 16)},
            "w_gate_up: must have 3 dimensions, got shape (16, 16)",
        ),
        (
            {"w_gate_up": torch.ones(4, 15, 16)},
            "w_gate_up: shape must be (4, 16, 16) (experts, 2 hidden, dim), got (4, 15, 16)",
        ),
        (
            {"w_down": torch.ones(3, 16, 8)},
            "w_down: shape must be (4, 16, 8) (experts, dim, hidden), got (3, 16, 8)",
        ),
        (
            {"w_down": _quantized(4, 15, 8)},
            "w_down: shape must be (4, 16, 8) (experts, dim, hidden), got (4, 15, 8)",
        ),
        (
            {"w_gate_up": torch.ones(4, 16, 16).half()},
            "w_gate_up: dtype must be x's, float32, got float16",
        ),
        (
            {"w_down": torch.ones(4, 16, 8, device="meta")},
            "w_down: must be on the device of x (cpu), got meta",
        ),
        (
            {
                "router_logits": torch.tensor([[0.0] * 4] * 4 + [[0, math.nan, 0, 0]]),
                "validate": True,
            },
            "router_logits: row 4 holds a NaN",
        ),
    ],
)
def test_names_the_bad_argument(change, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        tilewise.moe(**_arguments() | change)
    assert str(caught.value) == message


# --- the router -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["naive", "torch", "auto"])
def test_logits_are_not_rounded_to_what_they_are_computed_from(backend):
    """Two experts that bfloat16 cannot tell apart; the first one would be taken."""
    x = torch.ones(1, 512, dtype=torch.bfloat16)
    weight = torch.ones(2, 512, dtype=torch.bfloat16)
    weight[1, 0] = 1.5
    logits = tilewise.router_logits(x, weight, backend=backend)
    assert logits.dtype == torch.float32
    assert logits.tolist() == [[512.0, 512.5]]
    wide = tilewise.router_logits(x.double(), weight, backend=backend)
    assert wide.dtype == torch.float64


@pytest.mark.skipif(native.why_not_cpu() is not None, reason="no C++ kernels")
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_who_else_is_in_the_batch_does_not_matter(dtype, weight_dtype):
    inputs = Inputs(dtype)
    x, weight = inputs.randn(70, 333), inputs.randn(20, 333, dtype=weight_dtype)
    together = tilewise.router_logits(x, weight, backend="cpu")
    for begin, end in ((0, 1), (69, 70), (2, 4), (5, 8), (1, 18), (30, 70)):
        alone = tilewise.router_logits(x[begin:end], weight, backend="cpu")
        assert torch.equal(together[begin:end], alone)


def test_a_nan_stays_with_its_token_and_its_expert():
    x, weight = Inputs().randn(6, 40), Inputs(seed=1).randn(5, 40)
    x[2, 7] = math.nan
    weight[3, 1] = math.inf
    is_finite = tilewise.router_logits(x, weight).isfinite()
    expected = torch.ones(6, 5, dtype=torch.bool)
    expected[2], expected[:, 3] = False, False
    assert torch.equal(is_finite, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x: must be a torch.Tensor, got NoneType"),
        ({"x": torch.ones(1, 5, 16)}, "x: shape must be (tokens, dim), got (1, 5, 16)"),
        (
            {"x": torch.ones(5, 16).long()},
            "x: dtype must be float32 or float16 or bfloat16 or float64, got int64",
        ),
        ({"weight": [1.0]}, "weight: must be a torch.Tensor, got list"),
        ({"weight": torch.ones(16)}, "weight: shape must be (experts, dim), got (16,)"),
        (
            {"weight": torch.ones(4, 15)},
            "weight: shape must be (4, 16) (experts, x's dim), got (4, 15)",
        ),
        (
            {"weight": torch.ones(4, 16).int()},
            "weight: dtype must be float32 or float16 or bfloat16 or float64, got int32",
        ),
        (
            {"weight": torch.ones(4, 16, device="meta")},
            "weight: must be on the device of x (cpu), got meta",
        ),
        (
            {"weight": torch.tensor([[1.0] * 16, [math.nan] * 16]), "validate": True},
            "weight: row 1 holds a number that is not finite",
        ),
    ],
)
def test_the_router_names_the_bad_argument(change, message):
    arguments = {"x": torch.ones(5, 16), "weight": torch.ones(4, 16)}
    with pytest.raises((TypeError, ValueError)) as caught:
        tilewise.router_logits(**arguments | change)
    assert str(caught.value) == message
