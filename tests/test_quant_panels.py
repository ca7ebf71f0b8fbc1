"""Weights in panels: the same bytes in another order, and the same numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tilewise
from tilewise import native, quantized_matmul
from tilewise.quant import FORMATS, QuantizedTensor, quantize
from tilewise.quant.cases import gguf_weight
from tilewise.quant.native import describe
from tilewise.testing import Inputs, assert_agrees, nan_filled_empty

needs_cpu = pytest.mark.skipif(
    native.why_not_cpu() is not None, reason=native.why_not_cpu() or "the C++ kernels are there"
)


def weight_of(name: str, *shape: int) -> QuantizedTensor:
    form = FORMATS[name]
    if form.is_gguf:
        return gguf_weight(Inputs(), name, *shape)
    weight = Inputs().randn(*shape)
    return quantize(weight, name, group_size=form.group_sizes[-1], search="minmax")


def is_same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    pairs = ((a.data, b.data), (a.scales, b.scales), (a.zeros, b.zeros))
    return all(x is y or torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("n", [1, 16, 50])
def test_rows_come_back_bit_for_bit(name, n):
    weight = weight_of(name, n, 256 if FORMATS[name].is_gguf else 77)
    panels = weight.to_panels()
    assert panels.is_panels
    assert is_same(panels.to_rows(), weight)
    assert torch.equal(panels.dequantize(), weight.dequantize())


def test_large_weights_are_turned_piece_by_piece(monkeypatch):
    weight = weight_of("int4", 3, 100, 77)
    whole = weight.to_panels()
    monkeypatch.setattr(tilewise.quant.panels, "_BYTES_AT_ONCE", 2 * whole.data[0, 0].numel())
    assert is_same(weight.to_panels(), whole)


@pytest.mark.parametrize("name", FORMATS)
def test_panels_take_no_more_memory(name):
    weight = weight_of(name, 64, 1024)
    assert weight.to_panels().nbytes == weight.nbytes


@pytest.mark.parametrize("name", FORMATS)
def test_single_rows(name):
    weight = weight_of(name, 50, 512)
    index = torch.tensor([49, 0, 17, 17])
    expected = weight.dequantize()[index]
    assert torch.equal(weight.select_rows(index).dequantize(), expected)
    assert torch.equal(weight.to_panels().select_rows(index).dequantize(), expected)


@needs_cpu
@pytest.mark.parametrize("name", FORMATS)
def test_kernels_widen_to_the_same_numbers(name):
    weight = weight_of(name, 50, 256 if FORMATS[name].is_gguf else 77)
    begin, end = 5, 49
    with nan_filled_empty():
        out = torch.empty(end - begin, weight.shape[1])
    native.cpu_ops().dequantize(*describe(weight.to_panels()), begin, out)
    assert torch.equal(out, weight.dequantize()[begin:end])


def test_a_stack_is_turned_matrix_by_matrix():
    weight = weight_of("int4", 3, 20, 64)
    panels = weight.to_panels()
    for i in range(3):
        assert torch.equal(panels[i].dequantize(), weight.dequantize()[i])
        assert is_same(panels[i], weight[i].to_panels())


@pytest.mark.parametrize("name", ["int4", "Q4_1"])
def test_checkpoints_hold_rows(name):
    weight = weight_of(name, 20, 64)
    state = weight.to_panels().state_dict()
    assert torch.equal(state["data"], weight.data)
    assert not QuantizedTensor.from_state_dict(state).is_panels


def test_every_backend_takes_panels():
    weight = weight_of("Q4_1", 32, 64)
    x = Inputs(torch.bfloat16).randn(3, 64)
    for backend in ("naive", "torch"):
        expected = quantized_matmul(x, weight, backend=backend)
        actual = quantized_matmul(x, weight.to_panels(), backend=backend)
        assert torch.equal(actual, expected)


def test_panels_of_the_wrong_shape_are_refused():
    panels = weight_of("int4", 20, 64).to_panels()
    with pytest.raises(ValueError, match=r"data: shape must be \(2, 2, 256\) for int4"):
        QuantizedTensor("int4", (20, 64), 64, panels.data[:1], panels.scales, panels.zeros)


def assert_cpu_agrees(weight: QuantizedTensor) -> None:
    x = torch.eye(weight.shape[1])
    expected = quantized_matmul(x, weight, backend="naive")
    assert_agrees(quantized_matmul(x, weight, backend="cpu"), expected, expected.double())


@needs_cpu
@pytest.mark.parametrize("part", ["data", "scales", "zeros"])
def test_a_weight_that_changes_in_place_is_turned_again(part):
    weight = weight_of("int8", 16, 32)
    assert_cpu_agrees(weight)
    getattr(weight, part).mul_(0)
    assert_cpu_agrees(weight)


@needs_cpu
@pytest.mark.parametrize("part", ["data", "scales", "zeros"])
def test_a_weight_of_inference_mode_may_change_in_place(part):
    with torch.inference_mode():
        weight = weight_of("int8", 16, 32)
        assert not weight.data.is_inference(), "it would be turned on every call"
        copies = {name: getattr(weight, name).clone() for name in ("data", "scales", "zeros")}
        weight = dataclasses.replace(weight, **{part: copies[part]})
        assert_cpu_agrees(weight)
        getattr(weight, part).mul_(0)
        assert_cpu_agrees(weight)


@needs_cpu
@pytest.mark.parametrize(
    "change",
    [
        lambda w: {"scales": 2 * w.scales},
        lambda w: {"zeros": None},
        lambda w: {"format": "nf4", "zeros": None},
        lambda w: {"shape": (16, 50)},
    ],
)
def test_weights_may_share_their_data(change):
    weight = quantize(Inputs().randn(16, 64), "int4", group_size=64)
    assert_cpu_agrees(weight)
    assert_cpu_agrees(dataclasses.replace(weight, **change(weight)))
