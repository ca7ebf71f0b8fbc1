"""The quantized tensor: what its bits mean, how large it is, and how it is stored."""

import re

import numpy as np
import pytest
import safetensors.torch
import torch

from tilewise import build
from tilewise.quant import FORMATS, QuantizedTensor, quantize
from tilewise.quant.cases import gguf_weight
from tilewise.quant.packing import E2M1, NF4, pack_nibbles, unpack_nibbles
from tilewise.testing import Inputs

OWN = [name for name, form in FORMATS.items() if not form.is_gguf]
GGUF = [name for name, form in FORMATS.items() if form.is_gguf]


def some(name, *shape, seed=0, **options):
    """A weight in any format."""
    inputs = Inputs(torch.float32, seed=seed)
    if name in GGUF:
        return gguf_weight(inputs, name, *shape)
    return quantize(inputs.randn(*shape), name, search="minmax", **options)


def nibble(data, n, k):
    byte = int(data[n, k // 32 * 16 + k % 16])
    return byte & 15 if k % 32 < 16 else byte >> 4


# --- bits -----------------------------------------------------------------------------------------


def test_nibbles_round_trip():
    codes = Inputs().randint(0, 16, 3, 96, dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)


@pytest.mark.parametrize("scheme", ["int4", "nf4", "mxfp4"])
def test_byte_b_of_a_block_holds_weights_b_and_b_plus_16(scheme):
    q = some(scheme, 3, 70)
    size = q.group_size
    dense = q.dequantize()
    for n in range(3):
        for k in range(70):
            code, group = nibble(q.data, n, k), (n, k // size)
            if scheme == "int4":
                expected = (code - int(q.zeros[group])) * q.scales[group].float()
            elif scheme == "nf4":
                expected = np.float32(NF4[code]) * q.scales[group].float()
            else:
                expected = E2M1[code] * 2.0 ** (int(q.scales[group]) - 127)
            assert dense[n, k] == expected


@pytest.mark.parametrize(("group_size", "groups"), [(32, 3), (-1, 1)])
def test_int8_is_code_minus_zero_times_scale(group_size, groups):
    q = some("int8", 4, 70, group_size=group_size)
    assert q.scales.shape == q.zeros.shape == (4, groups)
    size = 32 if group_size == 32 else 70
    zeros, scales = (t.float().repeat_interleave(size, 1)[:, :70] for t in (q.zeros, q.scales))
    assert torch.equal(q.dequantize(), (q.data[:, :70].float() - zeros) * scales)


def test_without_zeros_int4_is_centred_on_8():
    data = pack_nibbles(torch.arange(32, dtype=torch.uint8)[None] % 16)
    q = QuantizedTensor("int4", (1, 32), 32, data, torch.ones(1, 1, dtype=torch.float16))
    assert q.dequantize().tolist() == [[float(k % 16 - 8) for k in range(32)]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["int4", "Q4_K"])
def test_other_dtypes_are_float32_rounded_once(name, dtype):
    q = some(name, 5, 256)
    assert torch.equal(q.dequantize(dtype), q.dequantize().to(dtype))


@pytest.mark.parametrize(
    ("scheme", "options", "levels"),
    [
        ("int8", {"symmetric": True}, range(-127, 128)),
        ("int8", {}, range(-100, 156)),
        ("int8", {"group_size": 32, "symmetric": True}, range(-127, 128)),
        ("int4", {"group_size": 32, "symmetric": True}, range(-8, 8)),
        ("int4", {"group_size": 64, "symmetric": True}, range(-7, 9)),
        ("int4", {"group_size": 128}, range(-3, 13)),
        ("int4", {"group_size": -1}, range(16)),
        ("nf4", {"group_size": 64}, NF4),
        ("nf4", {"group_size": -1}, NF4),
        ("mxfp4", {}, E2M1),
        ("fp8", {}, (448, -448, 0, 0.5, -1.75, 2**-9)),
        ("fp8", {"group_size": 32}, (448, -448, 0, 0.5, -1.75, 2**-9)),
    ],
)
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_representable_weights_come_back_exactly(scheme, options, levels, search):
    levels = torch.tensor(levels, dtype=torch.float32)
    size = options.get("group_size", 32 if scheme == "mxfp4" else -1)
    size = 256 if size == -1 else size
    groups = levels[Inputs().randint(0, len(levels), 6, 256 // size, size)]
    groups[..., 0], groups[..., 1] = levels.min(), levels.max()  # the extremes fix the scale
    weight = groups.reshape(6, 256) * 0.0625
    assert torch.equal(quantize(weight, scheme, search=search, **options).dequantize(), weight)


# --- size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "bits"),
    [
        ("int8", {"symmetric": True}, 8 + 32 / 512),
        ("int8", {}, 8 + 40 / 512),
        ("int8", {"group_size": 32, "symmetric": True}, 8.5),
        ("int4", {"group_size": 32}, 4.75),
        ("int4", {"group_size": 32, "symmetric": True}, 4.5),
        ("int4", {"group_size": 64}, 4.375),
        ("int4", {"group_size": 128}, 4.1875),
        ("int4", {"group_size": -1, "symmetric": True}, 4 + 32 / 512),
        ("nf4", {}, 4.25),
        ("fp8", {}, 8 + 32 / 512),
        ("mxfp4", {}, 4.25),
        ("Q4_0", {}, 4.5),
        ("Q4_1", {}, 5.0),
        ("Q5_0", {}, 5.5),
        ("Q5_1", {}, 6.0),
        ("Q8_0", {}, 8.5),
        ("Q2_K", {}, 2.625),
        ("Q3_K", {}, 3.4375),
        ("Q4_K", {}, 4.5),
        ("Q5_K", {}, 5.5),
        ("Q6_K", {}, 6.5625),
    ],
)
def test_bits_per_weight(name, options, bits):
    q = some(name, 4, 512, **options)
    assert q.bits_per_weight == bits
    assert q.nbytes == 4 * 512 * bits / 8


def test_an_unfinished_group_is_stored_in_full_and_hidden():
    q = some("int4", 2, 65, group_size=64)
    assert q.data.shape == (2, 64)
    assert q.scales.shape == (2, 2)
    assert q.dequantize().shape == q.shape == (2, 65)


# --- storage --------------------------------------------------------------------------------------


def assert_same(a, b):
    assert (a.format, a.shape, a.group_size) == (b.format, b.shape, b.group_size)
    for part in ("data", "scales", "zeros"):
        x, y = getattr(a, part), getattr(b, part)
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


@pytest.mark.parametrize("name", list(FORMATS))
def test_safetensors_round_trip(name, tmp_path):
    q = some(name, 3, 256)
    safetensors.torch.save_file(q.state_dict("layer.weight."), tmp_path / "x.safetensors")
    state = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert_same(QuantizedTensor.from_state_dict(state, "layer.weight."), q)


def broken(change):
    state = some("int4", 2, 64).state_dict("w.")
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("w.format"), "w.format: missing from the state dict"),
        (lambda s: s.pop("w.data"), "w.data: missing from the state dict"),
        (lambda s: s.pop("w.scales"), "scales: int4 needs scales of its own"),
        (
            lambda s: s.update({"w.format": torch.zeros(3, dtype=torch.uint8)}),
            "w.format: not a description of a weight",
        ),
        (
            lambda s: s.update({"w.data": s["w.data"][:, :5]}),
            "data: shape must be (2, 32) for int4, got (2, 5)",
        ),
    ],
)
def test_a_broken_state_dict_is_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        QuantizedTensor.from_state_dict(broken(change), "w.")


def test_moves_with_all_its_parts():
    q = some("int4", 2, 64).to("meta")
    assert q.device.type == q.scales.device.type == q.zeros.device.type == "meta"


@pytest.mark.parametrize("name", [*OWN, "Q5_K"])
def test_an_index_takes_one_expert(name):
    q = some(name, 3, 4, 256)
    assert q[2].shape == (4, 256)
    assert torch.equal(q[2].dequantize(), q.dequantize()[2])
    assert q[2].data.data_ptr() == q.data[2].data_ptr()
    assert [e.shape for e in q] == [(4, 256)] * 3


def test_a_single_matrix_has_no_experts():
    message = "a single matrix of shape (2, 64) cannot be indexed"
    with pytest.raises(IndexError, match=re.escape(message)):
        some("int4", 2, 64)[0]


GOOD = {
    "format": "int4",
    "shape": (2, 64),
    "group_size": 32,
    "data": torch.zeros(2, 32, dtype=torch.uint8),
    "scales": torch.zeros(2, 2, dtype=torch.float16),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "int3"}, "format: must be one of int8, int4, nf4, fp8, mxfp4, Q4_0, Q4_1, "),
        ({"shape": (64,)}, "shape: must be (..., N, K), got (64,)"),
        ({"group_size": 48}, "group_size: must be 64 or 32 or 128 or -1 for int4, got 48"),
        ({"data": torch.zeros(2, 32)}, "data: dtype must be uint8 for int4, got float32"),
        (
            {"scales": torch.zeros(2, 2, dtype=torch.float64)},
            "scales: dtype must be float16 or float32 for int4, got float64",
        ),
        (
            {"scales": torch.zeros(2, 1, dtype=torch.float16)},
            "scales: shape must be (2, 2) for int4, got (2, 1)",
        ),
        (
            {"zeros": torch.zeros(2, 2, dtype=torch.int8)},
            "zeros: dtype must be uint8 for int4, got int8",
        ),
        (
            {"format": "nf4", "zeros": torch.zeros(2, 2, dtype=torch.uint8)},
            "zeros: nf4 has no zero points",
        ),
        (
            {"format": "Q4_0", "data": torch.zeros(2, 36, dtype=torch.uint8)},
            "scales: Q4_0 holds no scales of its own",
        ),
        (
            {"format": "Q4_0", "shape": (2, 65)},
            "shape: Q4_0 needs K to be a multiple of 32, got 65",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        QuantizedTensor(**(GOOD | change))


# --- torch.compile --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FORMATS))
def test_traces_without_a_break(name):
    q = some(name, 3, 256)
    torch.compiler.reset()
    compiled = torch.compile(lambda q: q.dequantize(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), q.dequantize())


@pytest.mark.skipif(build.compiler().value is None, reason="TorchInductor needs a C++ compiler")
def test_compiled_code_keeps_to_the_weights_of_an_unfinished_group():
    q = some("int4", 3, 79, group_size=32)
    torch.compiler.reset()
    compiled = torch.compile(lambda q: q.dequantize() * 2, fullgraph=True)
    assert torch.equal(compiled(q), q.dequantize() * 2)


def test_shows_what_it_is_and_not_what_it_holds():
    assert repr(some("int4", 3, 64, group_size=32)) == (
        "QuantizedTensor(format='int4', shape=(3, 64), group_size=32, bits_per_weight=4.75, "
        "device='cpu')"
    )


def test_moves_and_is_not_cast():
    with pytest.raises(TypeError, match=r"device: must be a device, got torch\.float16"):
        some("int4", 3, 64).to(torch.float16)
