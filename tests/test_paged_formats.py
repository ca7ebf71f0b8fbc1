"""How keys and values are stored: what is exact, and by how much the rest may be off."""

import math

import pytest
import torch

from tilewise.paged.kv_formats import LARGEST_CODE, QUANTIZED, decode, encode
from tilewise.testing import Inputs

FORMATS = pytest.mark.parametrize("format", list(QUANTIZED))

# float32 rounds the scale, the quotient, the product and the code's distance from the value.
ROUNDINGS = 4 * 2**-24


def all_codes(format):
    """Every value that a code can stand for, as one row."""
    if format == "fp8":
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        return codes[codes.isfinite()]
    largest = int(LARGEST_CODE[QUANTIZED[format]])
    return torch.cat([torch.arange(-largest, largest + 1), torch.zeros(1)])


@FORMATS
@pytest.mark.parametrize("scale", [1.0, 2.0**-9, 2.0**20])
def test_what_a_code_stands_for_survives(format, scale):
    x = all_codes(format) * scale
    codes, scales = encode(x, QUANTIZED[format])
    assert scales == scale
    assert torch.equal(decode(codes, scales), x)


@pytest.mark.gpu
@FORMATS
def test_the_bytes_are_the_same_on_a_gpu(format):
    x = Inputs(torch.bfloat16).randn(500, 64)  # so coarse that there are ties
    expected = encode(x, QUANTIZED[format])
    for actual, wanted in zip(encode(x.cuda(), QUANTIZED[format]), expected, strict=True):
        assert torch.equal(actual.cpu().view(torch.uint8), wanted.view(torch.uint8))


@FORMATS
def test_error_is_half_a_step(format):
    x = Inputs().randn(500, 64)
    codes, scale = encode(x, QUANTIZED[format])
    error = (decode(codes, scale) - x).abs()
    largest = x.abs().amax(-1, keepdim=True)
    if format == "fp8":
        # Three bits behind the leading one: half a step is 1/16 of the value; below 2^-6 the steps
        # are 2^-9.
        half_a_step = (x.abs() / 16).maximum(scale[:, None] * 2**-10)
    else:
        half_a_step = (largest / LARGEST_CODE[QUANTIZED[format]] / 2).expand_as(x)
    assert (error <= half_a_step + ROUNDINGS * largest).all()
    assert (error > 0.9 * half_a_step).any()


@FORMATS
def test_a_row_of_zeros_has_scale_zero(format):
    codes, scale = encode(torch.zeros(2, 8), QUANTIZED[format])
    assert torch.equal(scale, torch.zeros(2))
    assert torch.equal(decode(codes, scale), torch.zeros(2, 8))


@FORMATS
@pytest.mark.parametrize("largest", [1e-45, 1.4e-44, 2.66e-43, 9.4e-43, 1e-40, 3e38])
def test_the_ends_of_the_number_range_stay_within_the_largest_magnitude(format, largest):
    x = torch.tensor([largest, -largest, 0.0, largest / 2])
    values = decode(*encode(x, QUANTIZED[format]))
    assert values.isfinite().all()
    assert ((values - x).abs() <= largest).all()


@FORMATS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_nan_throughout(format, bad):
    x = Inputs().randn(3, 8)
    expected = decode(*encode(x, QUANTIZED[format]))
    x[1, 5] = bad
    values = decode(*encode(x, QUANTIZED[format]))
    assert values[1].isnan().all()
    assert torch.equal(values[[0, 2]], expected[[0, 2]])


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_encoded_as_the_same_numbers_in_float32(format, dtype):
    x = Inputs(dtype).randn(5, 8)
    for half, single in zip(
        encode(x, QUANTIZED[format]), encode(x.float(), QUANTIZED[format]), strict=True
    ):
        assert torch.equal(half.view(torch.uint8), single.view(torch.uint8))


def test_int4_puts_the_second_half_into_the_high_nibbles():
    codes, scale = encode(torch.tensor([7.0, -7.0, 0.0, 1.0, 2.0, -3.0]), torch.uint8)
    low, high = (15, 1, 8), (9, 10, 5)  # code + 8
    assert codes.tolist() == [lo + 16 * hi for lo, hi in zip(low, high, strict=True)]
    assert scale == 1


def test_int8_rounds_to_the_nearest_and_ties_to_even():
    codes, _ = encode(torch.tensor([127.0, 0.5, 1.5, 2.4, 2.6, -0.5, -1.5, -126.6]), torch.int8)
    assert codes.tolist() == [127, 0, 2, 2, 3, 0, -2, -127]
