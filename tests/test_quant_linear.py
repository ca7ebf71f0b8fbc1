"""Quantized layers in a model: replacing, tying, casting, saving, training adapters beside them."""

import copy
import re
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

from tilewise import native, quantized_matmul
from tilewise.quant import QuantLinear, quantize, quantize_


@pytest.fixture
def model():
    """Layers 0 and 2 share a weight, layer 4 is layer 0 once more, layer 5 stands alone."""
    torch.manual_seed(0)
    first, second = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second, nn.LayerNorm(64), first, nn.Linear(64, 8))


def test_replaces_every_linear_layer_in_place(model):
    before = [layer.weight for layer in (model[0], model[5])]
    bias = model[0].bias
    assert quantize_(model, "int4", group_size=32, symmetric=True) is model
    assert [type(layer).__name__ for layer in model] == [
        *("QuantLinear", "ReLU", "QuantLinear", "LayerNorm", "QuantLinear", "QuantLinear")
    ]
    for layer, weight in zip((model[0], model[5]), before, strict=True):
        expected = quantize(weight, "int4", group_size=32, symmetric=True)
        assert torch.equal(layer.weight.dequantize(), expected.dequantize())
    assert model[0].bias is bias


def test_a_shared_weight_is_quantized_once(model):
    quantize_(model, "nf4")
    assert model[0] is model[4]
    assert model[0] is not model[2]
    assert model[0].data is model[2].data
    assert model[0].scales is model[2].scales


def test_a_layer_is_its_own_model():
    linear = nn.Linear(64, 8).eval()
    layer = quantize_(linear, "int8")
    assert isinstance(layer, QuantLinear)
    assert not layer.training
    x = torch.ones(2, 3, 64)
    assert torch.equal(layer(x), quantized_matmul(x, layer.weight, linear.bias))


@pytest.mark.parametrize("scheme", ["int8", "mxfp4"])
def test_no_other_thread_finds_half_of_a_layout(scheme):
    """Whenever it runs, all parts lie in rows, or all in panels, to which the first call turns."""
    layer = QuantLinear(quantize(torch.randn(40, 64), scheme))
    found = []

    def look(frame, event, arg):
        found.append(layer.weight.is_panels)  # raises where the parts do not fit together
        return look

    sys.settrace(look)
    try:
        layer(torch.ones(2, 64))
    finally:
        sys.settrace(None)
    assert found[-1] == (native.why_not_cpu() is None)
    assert not found[0]


def test_the_filter_decides_by_name_and_layer(model):
    seen = []

    def last_only(name, layer):
        seen.append((name, type(layer)))
        return name == "1.5"

    nested = nn.Sequential(nn.Identity(), model)
    quantize_(nested, "int4", filter=last_only)
    assert seen == [(f"1.{i}", nn.Linear) for i in (0, 2, 4, 5)]
    assert [type(layer) is QuantLinear for layer in model] == [False] * 5 + [True]


def test_subclasses_are_left_alone():
    attention = nn.MultiheadAttention(64, 4)
    quantize_(attention, "int4")
    assert not any(isinstance(m, QuantLinear) for m in attention.modules())


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("int4", {}), ("int8", {"symmetric": True}), ("nf4", {}), ("fp8", {}), ("mxfp4", {})],
)
def test_state_dict_round_trip_through_safetensors(scheme, options, tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        return quantize_(nn.Sequential(nn.Linear(70, 16), nn.Linear(16, 8)), scheme, **options)

    stored, loaded = make(0), make(1)
    x = torch.ones(2, 70)
    assert not torch.equal(stored(x), loaded(x))
    safetensors.torch.save_file(stored.state_dict(), tmp_path / "model.safetensors")
    loaded.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert torch.equal(stored(x), loaded(x))


def test_loading_another_format_is_refused():
    int4, nf4 = (
        quantize_(nn.Sequential(nn.ReLU(), nn.Linear(64, 8)), s, symmetric=True, group_size=64)
        for s in ("int4", "nf4")
    )
    message = (
        '1.weight: the layer holds {"format": "int4", "shape": [8, 64], "group_size": 64}, '
        'the state dict {"format": "nf4", "shape": [8, 64], "group_size": 64}'
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        int4.load_state_dict(nf4.state_dict())


@pytest.mark.parametrize("scheme", ["int4", "fp8"])
def test_a_cast_reaches_the_bias_and_not_the_weight(scheme):
    layer = quantize_(nn.Linear(64, 8), scheme)
    before = layer.weight
    for cast in (nn.Module.half, nn.Module.double, lambda m: m.type(torch.bfloat16)):
        cast(layer)
    after = layer.weight
    assert layer.bias.dtype == torch.bfloat16
    assert after.scales.dtype == before.scales.dtype
    assert torch.equal(after.dequantize(), before.dequantize())
    assert layer.to("meta").weight.device.type == "meta"


def test_a_copy_is_independent():
    layer = quantize_(nn.Linear(64, 8), "int4")
    twin = copy.deepcopy(layer)
    twin.data.zero_()
    assert layer.data.any()


def test_an_adapter_trains_in_front_of_quantized_layers(model):
    quantize_(model, "int4")
    adapter = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    x, target = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)), torch.ones(16, 8)
    losses = []
    for _ in range(5):
        loss = (model(adapter(x)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert all(not buffer.requires_grad for buffer in model.buffers())


def test_compiles_without_a_break(model):
    quantize_(model, "int4", group_size=32)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.ones(2, 64)
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_autocast_does_what_it_does_to_a_linear_layer(bias, fullgraph):
    torch.manual_seed(0)
    linear = nn.Linear(64, 8, bias=bias)
    layer = quantize_(copy.deepcopy(linear), "int4")
    bfloat16_bias = linear.bias.bfloat16() if bias else None
    torch.compiler.reset()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if fullgraph else layer
    for x in (torch.randn(3, 64), torch.randn(3, 64).bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
            assert y.dtype == linear(x).dtype
            assert torch.equal(y, quantized_matmul(x.bfloat16(), layer.weight, bfloat16_bias))
            residual = torch.randn(3, 8)
            added = layer.project(x, residual=residual)
        assert torch.equal(added, y + residual)


def test_shapes_without_values():
    layer = quantize_(nn.Linear(64, 8), "int4").to("meta")
    assert layer(torch.empty(3, 64, device="meta")).shape == (3, 8)


def test_int8_activations_are_those_of_the_function():
    weight = quantize(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), "int4")
    bias = torch.ones(8)
    exact, rounded = QuantLinear(weight, bias), QuantLinear(weight, bias, act="int8")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rounded(x), quantized_matmul(x, weight, bias, act="int8"))
    assert not torch.equal(rounded(x), exact(x))
    assert repr(rounded) == repr(exact)[:-1] + ", act=int8)"
    exact.act = "int8"
    assert torch.equal(exact(x), rounded(x))


def test_how_activations_are_taken_is_not_stored():
    weight = quantize(torch.ones(8, 64))
    stored, loaded = QuantLinear(weight, act="int8"), QuantLinear(weight)
    loaded.load_state_dict(stored.state_dict())
    assert loaded.act is None
    assert copy.deepcopy(stored).half().act == "int8"


def test_a_mode_of_activations_that_does_not_exist():
    layer = QuantLinear(quantize(torch.ones(8, 64)), act="int4")
    with pytest.raises(ValueError, match="act: must be None, 'int8' or 'fp8', got 'int4'"):
        layer(torch.ones(64))


def test_fp8_activations_are_for_fp8_weights():
    x, weight = torch.randn(3, 64), torch.ones(8, 64)
    layer = QuantLinear(quantize(weight, "fp8"), act="fp8")
    assert torch.equal(layer(x), quantized_matmul(x, layer.weight, act="fp8"))
    with pytest.raises(ValueError, match="'fp8' needs a weight in format fp8, got one in int8"):
        QuantLinear(quantize(weight, "int8"), act="fp8")(x)


def test_says_what_it_is():
    assert repr(quantize_(nn.Linear(64, 8, bias=False), "int4", group_size=32)) == (
        "QuantLinear(in_features=64, out_features=8, bias=False, format=int4, group_size=32, "
        "bits_per_weight=4.75)"
    )


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (quantize(torch.ones(2, 8, 64)), None, "weight: shape must be (N, K), got (2, 8, 64)"),
        (
            quantize(torch.ones(8, 64)),
            torch.ones(7),
            "bias: shape must be (8,) (weight's N), got (7,)",
        ),
        (torch.ones(8, 64), None, "weight: must be a QuantizedTensor, got Tensor"),
        (quantize(torch.ones(8, 64)), True, "bias: must be a torch.Tensor, got bool"),
    ],
)
def test_parts_that_do_not_fit_are_named(weight, bias, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        QuantLinear(weight, bias)


def test_only_a_model_is_quantized_in_place():
    with pytest.raises(TypeError, match=re.escape("model: must be an nn.Module, got Tensor")):
        quantize_(torch.ones(8, 64))
