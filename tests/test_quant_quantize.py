"""Quantizing: the search beats min-max, errors are in the expected order, odd weights survive."""

import re

import pytest
import torch

from tilewise.quant import SCHEMES, error_by_format, quantization_error, quantize
from tilewise.quant.packing import E2M1, unpack_nibbles
from tilewise.testing import Inputs

SETTINGS = [
    ("int8", {"group_size": 32}),
    ("int8", {"symmetric": True}),
    ("int4", {"group_size": 32}),
    ("int4", {"group_size": 64, "symmetric": True}),
    ("int4", {"group_size": -1}),
    ("nf4", {"group_size": 32}),
    ("fp8", {"group_size": 64}),
    ("mxfp4", {}),
]


def normal(*shape, scale=1.0, seed=0):
    return Inputs(torch.float32, seed=seed).randn(*shape, scale=scale)


def heavy_tailed(*shape):
    """Normal numbers over uniform ones: a few are far from the rest."""
    inputs = Inputs(torch.float32)
    return inputs.randn(*shape) / (inputs.rand(*shape) + 0.05)


def group_errors(weight, q):
    size = q.group_size if q.group_size > 0 else weight.shape[-1]
    difference = q.dequantize(torch.float64) - weight.double()
    return difference.unflatten(-1, (-1, size)).square().sum(-1)


@pytest.mark.parametrize(("scheme", "options"), SETTINGS)
@pytest.mark.parametrize("make", [normal, heavy_tailed])
def test_the_search_is_never_worse_in_any_group(scheme, options, make):
    weight = make(64, 128)
    plain = group_errors(weight, quantize(weight, scheme, search="minmax", **options))
    searched = group_errors(weight, quantize(weight, scheme, search="mse", **options))
    # The search compares sums rounded to float32; 128 terms cannot be off by more.
    assert (searched <= plain * (1 + 128 * torch.finfo(torch.float32).eps)).all()
    assert searched.sum() < plain.sum()


def test_more_bits_and_smaller_groups_lose_less():
    weight = normal(64, 256)

    def error(scheme, group_size=None, symmetric=True):
        q = quantize(weight, scheme, group_size=group_size, symmetric=symmetric)
        return quantization_error(weight, q)

    falling = [
        error("int4", -1),
        error("int4", 128),
        error("int4", 64),
        error("int4", 32),
        error("int4", 32, symmetric=False),
        error("fp8"),
        error("int8"),
        error("int8", 32),
    ]
    assert falling == sorted(falling, reverse=True)
    assert error("nf4", 64) < error("int4", 64), "nf4 is made for normal weights"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_min_max_is_within_half_a_step(scheme):
    weight = normal(16, 96)
    q = quantize(weight, scheme, group_size=32, symmetric=True, search="minmax")
    largest = weight.unflatten(-1, (3, 32)).abs().amax(-1, keepdim=True)
    error = (q.dequantize() - weight).unflatten(-1, (3, 32)).abs()
    # Half the widest gap between neighbouring levels, over the largest level; mxfp4 clips what
    # lies between 6 and 8 in units of its scale.
    half_gap = {"int8": 1 / 254, "int4": 1 / 14, "nf4": 0.16, "fp8": 1 / 28, "mxfp4": 1 / 4}
    rounding = 2.0**-11  # of the float16 scale
    assert (error <= largest * (half_gap[scheme] + rounding)).all()


def test_min_max_int4_uses_the_extra_code_for_the_larger_side():
    for sign in (1, -1):
        weight = torch.linspace(-0.5, 1.0, 32)[None] * sign
        q = quantize(weight, "int4", group_size=32, symmetric=True, search="minmax")
        assert int(unpack_nibbles(q.data)[0].min()) == 0
        assert q.scales.sign().item() == -sign


def test_mxfp4_rounds_ties_to_even_and_clips():
    values = [4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.9, -0.25, -0.75, -5.0, 0.26, -3.6]
    expected = [4.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 0.0, -1.0, -4.0, 0.5, -4.0]
    weight = torch.tensor([values + [0.0] * 18])
    q = quantize(weight, "mxfp4", search="minmax")
    assert q.scales.tolist() == [[127]]
    assert q.dequantize()[0, : len(values)].tolist() == expected
    assert set(q.dequantize().flatten().tolist()) <= set(E2M1)


@pytest.mark.parametrize(("scheme", "options"), SETTINGS)
def test_zeros_stay_zero(scheme, options):
    assert torch.equal(
        quantize(torch.zeros(3, 128), scheme, **options).dequantize(), torch.zeros(3, 128)
    )
    half = torch.cat([torch.zeros(3, 128), normal(3, 128)], -1)
    assert not quantize(half, scheme, **options).dequantize()[:, :128].any()


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e5, 1e30])
@pytest.mark.parametrize(("scheme", "options"), SETTINGS)
def test_any_magnitude_is_quantized_equally_well(scheme, options, scale):
    weight = normal(8, 128)
    at_one = quantization_error(weight, quantize(weight, scheme, search="minmax", **options))
    scaled = weight * scale
    error = quantization_error(scaled, quantize(scaled, scheme, search="minmax", **options))
    # A power of two as the scale (mxfp4) may fit up to twice worse at another magnitude.
    assert error <= at_one * (2 if scheme == "mxfp4" else 1.05)


def test_group_scales_are_float16_where_that_holds_them():
    dtypes = {
        scale: quantize(normal(4, 64, scale=scale), "int4", symmetric=True).scales.dtype
        for scale in (1e-6, 1.0, 1e6)
    }
    assert dtypes == {1e-6: torch.float32, 1.0: torch.float16, 1e6: torch.float32}
    assert quantize(normal(4, 64), "int8").scales.dtype == torch.float32


def test_a_tiny_group_among_others_keeps_a_scale():
    weight = torch.cat([normal(4, 32), normal(4, 32, scale=1e-7, seed=1)], -1)
    q = quantize(weight, "int4", group_size=32, symmetric=True)
    assert q.scales.dtype == torch.float16
    assert (q.scales != 0).all()


def test_dtype_strides_and_gradients_of_the_weight_do_not_matter():
    weight = normal(6, 64).bfloat16()
    expected = quantize(weight.float(), "int4").dequantize()
    column_major = weight.T.contiguous().T.requires_grad_()
    assert torch.equal(quantize(column_major, "int4").dequantize(), expected)
    experts = quantize(torch.stack([weight, weight * 2]), "int4")
    assert experts.shape == (2, 6, 64)
    assert torch.equal(experts[0].dequantize(), expected)


def test_a_weight_of_many_chunks_is_quantized_row_by_row():
    weight = normal(700, 256)
    whole = quantize(weight, "int4", search="minmax").dequantize()
    assert torch.equal(whole[650:], quantize(weight[650:], "int4", search="minmax").dequantize())


def test_a_weight_without_rows():
    assert quantize(torch.zeros(0, 64), "int4").dequantize().shape == (0, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": "int3"}, "scheme: must be one of int8, int4, nf4, fp8, mxfp4, got 'int3'"),
        ({"scheme": "Q4_0"}, "scheme: must be one of int8, int4, nf4, fp8, mxfp4, got 'Q4_0'"),
        ({"group_size": 16}, "group_size: must be 64 or 32 or 128 or -1 for int4, got 16"),
        ({"scheme": "mxfp4", "group_size": 64}, "group_size: must be 32 for mxfp4, got 64"),
        ({"group_size": "32"}, "group_size: must be an int, got str"),
        ({"group_size": 32.0}, "group_size: must be an int, got float"),
        ({"symmetric": 1}, "symmetric: must be a bool, got int"),
        ({"search": "best"}, "search: must be 'minmax' or 'mse', got 'best'"),
        ({"weight": torch.ones(64)}, "weight: shape must be (..., N, K) with K > 0, got (64,)"),
        ({"weight": torch.ones(2, 0)}, "weight: shape must be (..., N, K) with K > 0, got (2, 0)"),
        (
            {"weight": torch.ones(2, 64, dtype=torch.int64)},
            "weight: dtype must be float32 or float16 or bfloat16 or float64, got int64",
        ),
        (
            {"weight": torch.full((2, 64), float("nan"))},
            "weight: must be finite, got NaN or infinity",
        ),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        quantize(**({"weight": torch.ones(2, 64)} | change))


def test_quantization_error_is_relative():
    weight = torch.tensor([[3.0, 4.0]])
    q = quantize(torch.tensor([[3.0, 0.0]]), "int8", symmetric=True, search="minmax")
    assert quantization_error(weight, q) == pytest.approx(4 / 5, rel=1e-6)
    with pytest.raises(ValueError, match=re.escape("weight: shape must be (1, 2)")):
        quantization_error(torch.ones(1, 3), q)


def test_the_table_of_errors_covers_every_scheme_both_ways():
    rows = error_by_format(normal(64, 256))
    assert {row.scheme for row in rows} == set(SCHEMES)
    assert [row.bits_per_weight for row in rows] == sorted(
        (row.bits_per_weight for row in rows), reverse=True
    )
    by_setting = {(r.scheme, r.group_size, r.symmetric, r.search): r.relative_error for r in rows}
    for (*setting, search), error in by_setting.items():
        if search == "mse":
            assert error <= by_setting[(*setting, "minmax")]
