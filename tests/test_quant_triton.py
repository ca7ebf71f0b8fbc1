"""The Triton kernels of quantized weights where the cases do not reach: large products, splits."""

import pytest
import torch

from tilewise import gpu, moe, quantized_embedding, quantized_matmul
from tilewise.quant import triton_configs as configs
from tilewise.quant.cases import gguf_weight
from tilewise.quant.formats import FORMATS
from tilewise.quant.quantizer import quantize
from tilewise.testing import Inputs, assert_agrees, to_float64


def _agrees(arguments):
    actual = quantized_matmul(**arguments, backend="triton")
    naive = quantized_matmul(**arguments, backend="naive")
    truth = quantized_matmul(**to_float64(arguments), backend="naive")
    assert_agrees(actual, naive, truth)


def _arguments(device, dtype, m, n, k, scheme="int4", **options):
    inputs = Inputs(dtype, device)
    if FORMATS[scheme].is_gguf:
        weight = gguf_weight(inputs, scheme, n, k)
    else:
        weight = quantize(inputs.randn(n, k, scale=0.1, dtype=torch.float32), scheme, **options)
    return inputs, {"x": inputs.randn(m, k, scale=0.05), "weight": weight}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scheme", ["int4", "int8", "Q6_K", "Q4_0"])
@pytest.mark.parametrize("m", [1, 3, 17])
def test_k_split_among_programs(m, scheme, dtype, on):
    """Parts with everything after them, swiglu's halves among it."""
    inputs, arguments = _arguments(on, dtype, m, 48, 2304, scheme)
    tile = configs.tile_for(arguments["x"], m)
    assert configs.splits_of(m, 2304, tile.k, 2, configs.config(arguments["x"]).programs) > 1
    arguments["bias"] = inputs.randn(48)
    arguments["adapter"] = (inputs.randn(2304, 3, scale=0.1), inputs.randn(3, 48))
    arguments["activation"] = "swiglu"
    arguments["residual"] = inputs.randn(m, 24)
    _agrees(arguments)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("scheme", "act"),
    [("int4", None), ("int4", "int8"), ("fp8", "fp8"), ("nf4", None), ("Q4_K", None)],
)
def test_a_weight_unpacked_as_a_whole(scheme, act, after, on, monkeypatch):
    chosen = configs.config(torch.empty(0, device=on))._replace(whole=8)
    monkeypatch.setattr(configs, "config", lambda x: chosen)
    inputs, arguments = _arguments(on, torch.float16, 9, 37, 256, scheme)
    arguments["act"] = act
    if after:
        arguments["bias"], arguments["activation"] = inputs.randn(37), "gelu"
    _agrees(arguments)


def test_the_gradient_by_a_whole_weight(on, monkeypatch):
    chosen = configs.config(torch.empty(0, device=on))._replace(whole=8)
    monkeypatch.setattr(configs, "config", lambda x: chosen)
    _, arguments = _arguments(on, torch.float16, 9, 37, 100)

    def grad(arguments, backend):
        x = arguments["x"].clone().requires_grad_()
        quantized_matmul(x, arguments["weight"], backend=backend).sum().backward()
        return x.grad

    truth = grad(to_float64(arguments), "naive")
    assert_agrees(grad(arguments, "triton"), grad(arguments, "naive"), truth)


@pytest.mark.parametrize("scheme", ["int8", "Q4_K", "Q4_1"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [2, 7])
def test_int8_activations_that_are_not_finite(scheme, bad, m, on):
    """What is not finite makes its own row NaN, where a code could not say it."""
    _, arguments = _arguments(on, torch.float32, m, 40, 256, scheme)
    arguments["x"][1, 33] = bad
    out = quantized_matmul(**arguments, act="int8", backend="triton")
    assert out[1].isnan().all()
    assert out[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [2, 7])
def test_fp8_activations_that_are_not_finite(bad, m, group_size, dtype, on):
    _, arguments = _arguments(on, dtype, m, 40, 100, "fp8", group_size=group_size)
    arguments["x"][1, 33] = bad
    out = quantized_matmul(**arguments, act="fp8", backend="triton")
    assert out[1].isnan().all()
    assert out[0].isfinite().all()


@pytest.mark.skipif(
    not gpu.INTERPRETED, reason="a GPU has its own way to multiply fp8, tested above"
)
@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("k", [320, 77])
def test_fp8_codes_as_tensor_cores_take_them(k, group_size, architecture, on, monkeypatch):
    """In the interpreter, which multiplies fp8 exactly: what is loaded, not how it is added up."""
    monkeypatch.setattr(gpu, "multiplies_fp8", lambda x: True)
    monkeypatch.setattr(gpu, "architecture", lambda x: architecture)
    inputs, arguments = _arguments(on, torch.float16, 9, 38, k, "fp8", group_size=group_size)
    arguments |= {"act": "fp8", "activation": "swiglu", "bias": inputs.randn(38)}
    _agrees(arguments)


def test_a_nan_in_the_weight_stays_in_its_row(on):
    _, arguments = _arguments(on, torch.float32, 17, 40, 100, "int8", group_size=32)
    arguments["weight"].scales[5, 1] = float("nan")
    out = quantized_matmul(**arguments, backend="triton")
    assert out[:, 5].isnan().all()
    assert out[:, torch.arange(40) != 5].isfinite().all()


@pytest.mark.parametrize("scheme", ["fp8", "mxfp4", "nf4"])
def test_every_code(scheme, on):
    """All codes with all scales that the format can hold, bit for bit but for the sign of zero."""
    weight = quantize(torch.randn(32, 32), scheme, group_size=32).to(on)
    codes = torch.arange(32 * weight.data.shape[1]) % 256
    weight.data.copy_(codes.to(torch.uint8).view(weight.data.shape).view(weight.data.dtype))
    if scheme == "mxfp4":
        weight.scales.copy_((torch.arange(32) * 8).view(32, 1))
        weight.scales[-1] = 255
        weight.scales[-2] = 254
    rows = torch.arange(32, device=on)
    actual = quantized_embedding(rows, weight, backend="triton")
    expected = quantized_embedding(rows, weight, backend="naive")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_a_token_out_of_range_reads_nothing(on):
    weight = quantize(torch.randn(5, 64)).to(on)
    rows = torch.tensor([4, 5, -1, 0], device=on)
    out = quantized_embedding(rows, weight, backend="triton")
    assert out.isnan().all(-1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("tokens", [1, 33])
def test_experts_of_many_tokens_and_few(tokens, on):
    """All tokens to one expert, others to none: tiles of one expert follow each other."""
    inputs = Inputs(torch.float32, on)
    arguments = {
        "x": inputs.randn(tokens, 40),
        "router_logits": inputs.randn(tokens, 6),
        "w_gate_up": inputs.randn(6, 48, 40, scale=0.2),
        "w_down": inputs.randn(6, 40, 24, scale=0.2),
        "top_k": 2,
    }
    arguments["router_logits"][:, 4] = 9
    arguments["router_logits"][:, 1] = -99
    truth = moe(**to_float64(arguments), backend="naive")
    naive = moe(**arguments, backend="naive")
    assert_agrees(moe(**arguments, backend="triton"), naive, truth)
