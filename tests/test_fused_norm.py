"""The norms: bad input is named, and a residual is what the next layer gets."""

import pytest
import torch

import tilewise

NORMS = (tilewise.rms_norm, tilewise.layer_norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1.0]}, "x: must be a torch.Tensor, got list"),
        (
            {"x": torch.ones(2, 8, dtype=torch.int32)},
            "x: dtype must be float32 or float16 or bfloat16 or float64, got int32",
        ),
        ({"x": torch.tensor(1.0)}, "x: shape must be (..., dim), got ()"),
        (
            {"weight": torch.ones(7)},
            "weight: shape must be (8,) (x's last dimension), got (7,)",
        ),
        (
            {"weight": torch.ones(8, dtype=torch.float16)},
            "weight: dtype must be x's, float32, got float16",
        ),
        (
            {"weight": torch.ones(8, device="meta")},
            "weight: must be on the device of x (cpu), got meta",
        ),
        (
            {"residual": torch.ones(3, 8)},
            "residual: shape must be (2, 8) (x's shape), got (3, 8)",
        ),
        (
            {"residual": torch.ones(2, 8, dtype=torch.float64)},
            "residual: dtype must be x's, float32, got float64",
        ),
    ],
)
def test_a_norm_names_the_bad_argument(norm, change, message):
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(8)} | change
    with pytest.raises((TypeError, ValueError)) as caught:
        norm(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.ones(7), "bias: shape must be (8,) (x's last dimension), got (7,)"),
        (torch.ones(8).half(), "bias: dtype must be x's, float32, got float16"),
    ],
)
def test_layer_norm_names_a_bad_bias(bias, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        tilewise.layer_norm(torch.ones(2, 8), torch.ones(8), bias)
    assert str(caught.value) == message


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_the_norm_is_of_the_rounded_sum(norm, backend):
    # 256 + 1 rounds back to 256 in bfloat16: the first row is constant, and in the second the small
    # element is 1/256 of the large one, not 1/257.
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.bfloat16)
    residual = torch.tensor([[256.0, 256.0], [256.0, 1.0]], dtype=torch.bfloat16)
    weight = torch.ones(2, dtype=torch.bfloat16)
    normed, total = norm(x, weight, eps=1e-5, residual=residual, backend=backend)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, norm(total, weight, eps=1e-5, backend=backend))
    unrounded = norm(x.float() + residual.float(), weight.float(), eps=1e-5, backend="naive")
    assert not torch.equal(normed, unrounded.bfloat16())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("eps", "message"),
    [
        ("1e-6", "eps: must be a number, got str"),
        (None, "eps: must be a number, got NoneType"),
        (torch.tensor(1e-6), "eps: must be a number, got Tensor"),
        (-1.0, "eps: must be >= 0, got -1.0"),
        (float("nan"), "eps: must be >= 0, got nan"),
    ],
)
def test_a_norm_names_a_bad_eps(norm, eps, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        norm(torch.ones(2, 8), torch.ones(8), eps=eps)
    assert str(caught.value) == message
