"""Numbers of rows at which the C++ kernels change their ways; depths that end within a block."""

from __future__ import annotations

import pytest
import torch

from tilewise import native, quantized_matmul
from tilewise.quant import FORMATS, QuantizedTensor, quantize
from tilewise.quant.cases import gguf_weight
from tilewise.testing import HALF_AND_SINGLE, Inputs, assert_agrees, root_mean_square

pytestmark = pytest.mark.skipif(
    native.why_not_cpu() is not None, reason=native.why_not_cpu() or "the C++ kernels are there"
)


def weight_of(name: str, n: int, k: int, **options: object) -> QuantizedTensor:
    if FORMATS[name].is_gguf:
        return gguf_weight(Inputs(), name, n, -(-k // 256) * 256)
    return quantize(Inputs().randn(n, k), name, search="minmax", **options)


def check(x: torch.Tensor, weight: QuantizedTensor, act: str | None) -> None:
    actual = quantized_matmul(x, weight, act=act, backend="cpu")
    expected = quantized_matmul(x, weight, act=act, backend="naive")
    truth = quantized_matmul(x.double(), weight, act=act, backend="naive")
    assert_agrees(actual, expected, truth)


@pytest.mark.parametrize("act", [None, "int8"])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_with_few_and_many_rows(name, dtype, act):
    weight = weight_of(name, 50, 608)
    for rows in (3, 7, 11, 17, 53):
        check(Inputs(dtype).randn(rows, weight.shape[1]), weight, act)


@pytest.mark.parametrize("act", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_of_few_rows_a_float32_result_is_closer_than_rounding_would_leave_it(name, dtype, act):
    weight = weight_of(name, 50, 608)
    for rows in (1, 4):
        x = Inputs(dtype).randn(rows, weight.shape[1])
        actual = quantized_matmul(x, weight, act=act, out_dtype=torch.float32, backend="cpu")
        truth = quantized_matmul(x.double(), weight, act=act, backend="naive")
        rounding = root_mean_square(truth - truth.to(dtype))
        assert (root_mean_square(actual - truth) < rounding / 4).all()


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_fp8_activations_with_few_and_many_rows(dtype, group_size):
    for n, k in ((17, 96), (50, 416), (49, 607)):
        weight = weight_of("fp8", n, k, group_size=group_size)
        for rows in (1, 4, 5, 13, 53):
            check(Inputs(dtype).randn(rows, k), weight, "fp8")


@pytest.mark.parametrize("rows", [2, 6, 20, 60])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e-38, 1e-43])
def test_fp8_activations_that_are_not_finite_or_tiny(bad, group_size, rows):
    weight = weight_of("fp8", 48, 320, group_size=group_size)
    for dtype in (torch.float32, torch.bfloat16):
        x = Inputs(dtype).randn(rows, 320)
        x[1] = 0
        x[1, 7] = bad
        check(x, weight, "fp8")


@pytest.mark.parametrize("act", [None, "int8"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_groups_of_every_size(name, symmetric, group_size, act):
    weight = weight_of(name, 49, 416, group_size=group_size, symmetric=symmetric)
    for dtype in HALF_AND_SINGLE:
        check(Inputs(dtype).randn(13, 416), weight, act)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_more_rows_than_a_pass_takes(dtype):
    check(Inputs(dtype).randn(780, 320), weight_of("int4", 33, 320), None)


@pytest.mark.parametrize("act", [None, "int8"])
def test_zeros_far_from_all_codes(act):
    weight = weight_of("int4", 40, 320)
    weight.zeros[::2] = 250
    check(Inputs(torch.bfloat16).randn(20, 320), weight, act)


@pytest.mark.parametrize("rows", [2, 6, 20, 60, 70])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e-38])
def test_numbers_without_digits(bad, rows):
    """A row that bytes or pairs cannot hold, among others."""
    weight = weight_of("int8", 48, 320)
    for dtype in (torch.float32, torch.bfloat16):
        x = Inputs(dtype).randn(rows, 320)
        x[1] = 0
        x[1, 7] = bad
        check(x, weight, None)


@pytest.mark.parametrize(("name", "act"), [("int4", None), ("fp8", "fp8")])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_the_number_of_threads_does_not_matter(dtype, name, act):
    weight, x = weight_of(name, 336, 320), Inputs(dtype).randn(60, 320)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(quantized_matmul(x, weight, act=act, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
