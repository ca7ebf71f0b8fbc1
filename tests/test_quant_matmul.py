"""The product with a quantized weight: order, gradients, rounding x, PyTorch's kernels."""

import gc
import re
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tilewise
from tilewise import BackendError, gpu, native, quantized_matmul
from tilewise.quant import QuantizedTensor, baseline, naive, quantize
from tilewise.quant.cases import gguf_weight
from tilewise.testing import Inputs, assert_agrees

needs_cpu = pytest.mark.skipif(native.why_not_cpu() is not None, reason="no C++ kernels")
needs_scales_per_row = pytest.mark.skipif(
    baseline.why_not_scales_per_row() is not None, reason="PyTorch's fp8 product takes none here"
)
needs_interpreter = pytest.mark.skipif(not gpu.INTERPRETED, reason="no TRITON_INTERPRET")


def weight_of(n=16, k=64, scheme="int4", seed=0, **options):
    weight = Inputs(torch.float32, seed=seed).randn(n, k)
    return quantize(weight, scheme, search="minmax", **options)


# E4M3: a sign, 4 bits of exponent, biased by 7, and 3 behind the point; the code 127 is NaN.
E4M3 = np.array(
    [(c / 8 if c < 8 else 1 + c % 8 / 8) * 2.0 ** (max(c >> 3, 1) - 7) for c in range(127)],
    dtype=np.float32,
)


def nearest_e4m3(value):
    """The nearest of all codes; between two of them the even one."""
    distance = np.abs(E4M3.astype(np.float64) - abs(float(value)))
    code = min(range(127), key=lambda c: (distance[c], c % 2))
    return np.copysign(E4M3[code], value)


def numpy_rounded(x, size, act="int8"):
    """The definition once more, element by element."""
    result = np.empty_like(x)
    largest = np.float32({"int8": 127, "fp8": 448}[act])
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], size):
            group = x[row, start : start + size]
            scale = np.float32(np.abs(group).max()) / largest
            for i, value in enumerate(group):
                code = value / scale if scale else np.float32(0)
                code = np.clip(np.rint(code) if act == "int8" else code, -largest, largest)
                code = code if act == "int8" else nearest_e4m3(code)
                result[row, start + i] = code.astype(np.float32) * scale
    return result


# --- the definition -------------------------------------------------------------------------------


def test_the_order_is_weight_adapter_bias_activation_residual():
    inputs, weight = Inputs(torch.float64), weight_of()
    x, bias, residual = inputs.randn(3, 64), inputs.randn(16), inputs.randn(3, 8)
    a, b = inputs.randn(64, 2), inputs.randn(2, 16)
    y = x @ weight.dequantize(torch.float64).T + x @ a @ b + bias
    expected = F.silu(y[:, :8]) * y[:, 8:] + residual
    actual = quantized_matmul(
        x, weight, bias, activation="swiglu", residual=residual, adapter=(a, b)
    )
    assert_agrees(actual, expected, expected)


def test_low_precision_is_rounded_once():
    inputs, weight = Inputs(torch.float16), weight_of()
    x, bias, residual = inputs.randn(3, 64), inputs.randn(16), inputs.randn(3, 16)
    options = {"bias": bias, "activation": "gelu", "residual": residual}
    widened = {key: t.float() if isinstance(t, torch.Tensor) else t for key, t in options.items()}
    expected = quantized_matmul(x.float(), weight, **widened).half()
    assert torch.equal(quantized_matmul(x, weight, **options), expected)


@pytest.mark.parametrize(
    ("activation", "fn"),
    [
        ("gelu", lambda y: 0.5 * y * (1 + torch.erf(y / 2**0.5))),
        (
            "gelu_tanh",
            lambda y: 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3))),
        ),
        ("silu", lambda y: y / (1 + torch.exp(-y))),
    ],
)
def test_activations_by_their_formulas(activation, fn):
    x, weight = Inputs(torch.float64).randn(5, 64), weight_of()
    expected = fn(x @ weight.dequantize(torch.float64).T)
    assert_agrees(quantized_matmul(x, weight, activation=activation), expected, expected)


@pytest.mark.parametrize("act", [None, "int8"])
def test_gradients_of_everything_but_the_weight(act):
    inputs = Inputs(torch.float64)
    weight = weight_of(6, 32, group_size=32)
    x, *others = (
        inputs.randn(*shape).requires_grad_() for shape in ((2, 32), (6,), (2, 3), (32, 2), (2, 6))
    )

    def call(x, bias, residual, a, b):
        options = {"residual": residual, "adapter": (a, b), "act": act}
        return quantized_matmul(x, weight, bias, activation="swiglu", **options)

    if act is None:
        assert torch.autograd.gradcheck(call, (x, *others))
    else:  # rounding x has no derivative to compare with
        assert torch.autograd.gradcheck(lambda *others: call(x.detach(), *others), others)


# --- rounded activations --------------------------------------------------------------------------


def hard_activations():
    """(5, 79): zeros, subnormal numbers, many magnitudes."""
    x = Inputs(torch.float32).randn(5, 79)
    x[0] = 0
    x[1, :5] *= 1e-40
    x[2, 32:64] *= 1e-42
    x[4] *= torch.logspace(-8, 0, 79)
    return x


@pytest.mark.parametrize("act", ["int8", "fp8"])
@pytest.mark.parametrize("size", [32, 64, -1])
def test_activations_are_rounded_as_defined(size, act):
    x = hard_activations()
    expected = numpy_rounded(x.numpy(), 79 if size < 0 else size, act)
    assert np.array_equal(naive.fake_quantize(x, size, act).numpy(), expected)


@pytest.mark.parametrize(
    ("backend", "size"),
    [
        ("naive", 32),
        ("naive", -1),
        pytest.param("torch", -1, marks=needs_scales_per_row),
        *(pytest.param("cpu", size, marks=needs_cpu) for size in (32, -1)),
        *(pytest.param("triton", size, marks=needs_interpreter) for size in (32, -1)),
    ],
)
def test_every_backend_rounds_to_the_same_fp8(backend, size):
    """Times the unit matrix, which fp8 holds exactly. Tiles may lose what is next to nothing."""
    x, eye = hard_activations()[[0, 3, 4]], torch.eye(79)
    weight = quantize(eye, "fp8", group_size=size, search="minmax")
    weight.data[:, :79].copy_(eye)
    weight.scales.fill_(1)
    expected = torch.from_numpy(numpy_rounded(x.numpy(), 79 if size < 0 else size, "fp8"))
    assert torch.equal(quantized_matmul(x, weight, act="fp8", backend=backend), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("act", ["int8", "fp8"])
@pytest.mark.parametrize("size", [32, -1])
def test_activations_have_the_same_codes_on_a_gpu(size, act):
    x = Inputs(torch.bfloat16).randn(100, 4096)  # so coarse that there are ties
    expected = naive.quantize_groups(x, size, act)
    for actual, wanted in zip(naive.quantize_groups(x.cuda(), size, act), expected, strict=True):
        assert torch.equal(actual.cpu(), wanted)


def test_every_fp8_code_and_the_numbers_between():
    """One scale of 1: codes stay as they are, ties go to the even code."""
    between = (E4M3[1:] + E4M3[:-1]) / 2
    even = np.where(np.arange(126) % 2 == 0, E4M3[:-1], E4M3[1:])
    x = torch.from_numpy(np.concatenate([E4M3, between]))
    expected = torch.from_numpy(np.concatenate([E4M3, even]))
    assert torch.equal(naive.fake_quantize(x, -1, "fp8"), expected)
    assert torch.equal(naive.fake_quantize(-x, -1, "fp8"), -expected)
    codes, scale = naive.quantize_groups(x, -1, "fp8")
    assert scale == 1
    assert torch.equal(codes[0], x.to(torch.float8_e4m3fn).float())


def test_fp8_saturates_where_the_scale_is_rounded_down():
    x = torch.tensor([[3000 * 2.0**-149, 2.0**-149]])  # the scale is 6.7 steps, and becomes 7
    x = torch.cat([x, torch.tensor([[600 * 2.0**-149, 2.0**-149]])])  # 1.3 steps, and becomes 1
    codes, scale = naive.quantize_groups(x, -1, "fp8")
    assert (scale.flatten() / 2.0**-149).tolist() == [7, 1]
    assert codes[1, 0, 0] == 448
    assert torch.equal(naive.fake_quantize(x, -1, "fp8")[1, 0], torch.tensor(448 * 2.0**-149))


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: weight_of(16, 64, "int8"), 64),
        (lambda: weight_of(16, 64, "int4", group_size=32), 32),
        (lambda: weight_of(16, 64, "int4", group_size=64), 64),
        (lambda: weight_of(16, 64, "mxfp4"), 32),
        (lambda: gguf_weight(Inputs(), "Q6_K", 16, 256), 32),
    ],
)
def test_int8_activations_share_a_scale_as_the_weight_does(make, size):
    weight = make()
    x = Inputs(torch.float32).randn(4, weight.shape[1])
    rounded = torch.from_numpy(numpy_rounded(x.numpy(), size))
    expected = quantized_matmul(rounded, weight, backend="naive")
    assert torch.equal(quantized_matmul(x, weight, act="int8", backend="naive"), expected)


@pytest.mark.parametrize("size", [32, 64, 128, -1])
def test_fp8_activations_share_a_scale_as_the_weight_does(size):
    weight = weight_of(16, 200, "fp8", group_size=size)
    x = Inputs(torch.float32).randn(4, 200)
    rounded = torch.from_numpy(numpy_rounded(x.numpy(), 200 if size < 0 else size, "fp8"))
    expected = quantized_matmul(rounded, weight, backend="naive")
    assert torch.equal(quantized_matmul(x, weight, act="fp8", backend="naive"), expected)


@pytest.mark.parametrize("act", ["int8", "fp8"])
def test_rounded_activations_leave_the_adapter_alone(act):
    inputs, weight = Inputs(torch.float64), weight_of(scheme="fp8")
    x, a, b = inputs.randn(3, 64), inputs.randn(64, 2), inputs.randn(2, 16)
    plain = quantized_matmul(x, weight, act=act)
    expected = plain + x @ a @ b
    assert_agrees(quantized_matmul(x, weight, adapter=(a, b), act=act), expected, expected)


@pytest.mark.parametrize("act", ["int8", "fp8"])
def test_the_gradient_passes_straight_through_the_rounding(act):
    weight = weight_of(scheme="fp8")
    x = Inputs(torch.float32).randn(3, 64).requires_grad_()
    (expected,) = torch.autograd.grad(quantized_matmul(x, weight).sum(), x)
    (actual,) = torch.autograd.grad(quantized_matmul(x, weight, act=act).sum(), x)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("act", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_spoils_its_group_only(bad, act):
    x = torch.ones(2, 64)
    x[0, 3] = bad
    rounded = naive.fake_quantize(x, 32, act)
    assert rounded[0, :32].isnan().all()
    assert torch.equal(rounded[0, 32:], torch.ones(32))
    assert torch.equal(rounded[1], torch.ones(64))


# --- PyTorch's kernels ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "weight", "act", "reason"),
    [
        (torch.float32, {}, None, "PyTorch's kernels are vectorized for bfloat16 only"),
        (torch.bfloat16, {}, "int8", "PyTorch's kernels take no activations in int8"),
        (
            torch.float32,
            {"scheme": "fp8", "group_size": 32},
            "fp8",
            "PyTorch's fp8 product takes a scale per row, not per group",
        ),
        (torch.float64, {"scheme": "fp8"}, "fp8", "adds up in float32, x is in float64"),
        (torch.bfloat16, {"scheme": "nf4"}, None, "PyTorch has no kernel for nf4"),
        (
            torch.bfloat16,
            {"scheme": "int8"},
            None,
            "PyTorch's int8 kernel takes symmetric per-channel weights only",
        ),
        (
            torch.bfloat16,
            {"scheme": "int8", "symmetric": True, "k": 63},
            None,
            "PyTorch's int8 kernel needs K to be a multiple of 16, got 63",
        ),
        (
            torch.bfloat16,
            {"group_size": -1},
            None,
            "PyTorch's int4 kernel takes groups only, not a scale per channel",
        ),
        (torch.bfloat16, {"n": 15}, None, "multiple of 16 and K of the group size, got N 15"),
    ],
)
def test_the_torch_backend_says_why_not(x, weight, act, reason):
    weight = weight_of(**weight)
    x = torch.ones(2, weight.shape[1], dtype=x)
    with pytest.raises(BackendError, match=re.escape(reason)):
        quantized_matmul(x, weight, act=act, backend="torch")


def bfloat16_agrees(x, weight):
    actual = quantized_matmul(x, weight, backend="torch")
    naive_result = quantized_matmul(x, weight, backend="naive")
    assert_agrees(actual, naive_result, quantized_matmul(x.double(), weight, backend="naive"))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_misaligned_tensors_do_not_reach_the_vector_loads(scheme):
    """PyTorch's int8 kernel segfaults on them."""
    weight = weight_of(scheme=scheme, symmetric=True)
    data = torch.empty(weight.data.numel() + 1, dtype=weight.data.dtype)[1:]
    data = data.view(weight.data.shape).copy_(weight.data)
    moved = QuantizedTensor(weight.format, weight.shape, weight.group_size, data, weight.scales)
    x = torch.ones(3 * 64 + 1, dtype=torch.bfloat16)[1:].view(3, 64)
    bfloat16_agrees(x, moved)


def test_a_weight_is_repacked_once_and_again_after_a_change():
    weight = weight_of(symmetric=True)
    x = Inputs(torch.bfloat16).randn(3, 64)
    bfloat16_agrees(x, weight)
    packed = baseline._int4_packed(weight)[0]
    assert baseline._int4_packed(weight)[0] is packed
    weight.data.copy_(weight_of(symmetric=True, seed=1).data)
    assert baseline._int4_packed(weight)[0] is not packed
    bfloat16_agrees(x, weight)


def test_repacking_does_not_keep_a_weight_alive():
    weight = weight_of(symmetric=True)
    quantized_matmul(torch.ones(1, 64, dtype=torch.bfloat16), weight, backend="torch")
    watched = weakref.ref(weight.data)
    del weight
    gc.collect()
    assert watched() is None


def test_repacking_works_in_inference_mode():
    with torch.inference_mode():
        bfloat16_agrees(Inputs(torch.bfloat16).randn(3, 64), weight_of(symmetric=True))


# --- errors and cost ------------------------------------------------------------------------------

ONE = torch.ones(2, 64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: must be a torch.Tensor, got list"),
        ({"x": ONE.int()}, ValueError, "x: dtype must be float32 or float16 or bfloat16 or"),
        ({"x": ONE[:, :63]}, ValueError, "x: shape must be (..., 64), weight's K, got (2, 63)"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: shape must be (..., 64), weight's K, got ()"),
        ({"weight": ONE}, TypeError, "weight: must be a QuantizedTensor, got Tensor"),
        (
            {"weight": quantize(torch.ones(3, 16, 64))},
            ValueError,
            "weight: shape must be (N, K), got (3, 16, 64)",
        ),
        (
            {"weight": weight_of().to("meta")},
            ValueError,
            "weight: must be on the device of x (cpu), got meta",
        ),
        (
            {"bias": torch.ones(15)},
            ValueError,
            "bias: shape must be (16,) (weight's N), got (15,)",
        ),
        ({"bias": torch.ones(16).half()}, ValueError, "bias: dtype must be x's, float32, got"),
        (
            {"activation": "relu"},
            ValueError,
            "activation: must be None or one of gelu, gelu_tanh, silu, swiglu, got 'relu'",
        ),
        (
            {"activation": "swiglu", "weight": weight_of(15)},
            ValueError,
            "weight: swiglu needs an even number of rows, got 15",
        ),
        (
            {"activation": "swiglu", "residual": torch.ones(2, 16)},
            ValueError,
            "residual: shape must be (2, 8) (the output's shape), got (2, 16)",
        ),
        (
            {"out_dtype": torch.float16},
            ValueError,
            "out_dtype: must be None, torch.float32 or x's dtype (torch.float32), got torch.flo",
        ),
        ({"act": "int4"}, ValueError, "act: must be None, 'int8' or 'fp8', got 'int4'"),
        (
            {"act": "fp8"},
            ValueError,
            "act: 'fp8' needs a weight in format fp8, got one in int4",
        ),
        (
            {"adapter": ONE},
            TypeError,
            "adapter: must be a pair of tensors (K, r) and (r, N), got Tensor",
        ),
        (
            {"adapter": (torch.ones(63, 2), torch.ones(2, 16))},
            ValueError,
            "adapter[0]: shape must be (64, 2) (weight's K and the rank), got (63, 2)",
        ),
        (
            {"adapter": (torch.ones(64, 2), torch.ones(3, 16))},
            ValueError,
            "adapter[1]: shape must be (2, 16) (the rank and weight's N), got (3, 16)",
        ),
        (
            {"adapter": (torch.ones(64), torch.ones(3, 16))},
            ValueError,
            "adapter[0]: shape must be (K, rank), got (64,)",
        ),
    ],
)
def test_the_bad_argument_is_named(change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        quantized_matmul(**({"x": ONE, "weight": weight_of()} | change))


def test_validate_finds_a_weight_that_is_not_finite():
    weight = weight_of()
    weight.scales[7, 0] = float("inf")
    quantized_matmul(ONE, weight)
    with pytest.raises(ValueError, match="weight: row 7 holds a number that is not finite"):
        quantized_matmul(ONE, weight, validate=True)


def test_the_cost_counts_the_stored_bytes():
    weight = weight_of(16, 64, group_size=32)
    cost = tilewise.explain("quantized_matmul", torch.ones(3, 64).half(), weight).cost
    assert cost.flops == 2 * 3 * 16 * 64
    assert cost.bytes == weight.nbytes + 2 * (3 * 64 + 3 * 16)
    assert cost.dtype == torch.float16
    x = torch.ones(3, 64).half()
    widened = tilewise.explain("quantized_matmul", x, weight, out_dtype=torch.float32).cost
    assert widened.bytes == cost.bytes + 2 * 3 * 16
