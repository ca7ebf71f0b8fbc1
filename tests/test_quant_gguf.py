"""GGUF tensors: bit for bit what the gguf package makes of them, and errors for broken ones."""

import re

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import _type_traits

from tilewise.quant import FORMATS, QuantizedTensor, from_gguf

READABLE = [*_type_traits, GGMLQuantizationType.F32, GGMLQuantizationType.F16]
LAZY = {name for name, form in FORMATS.items() if form.is_gguf} | {"MXFP4"}


def finite_blocks(kind, count):
    """Random bytes, less the blocks whose scale they made infinite or NaN: (bytes, values)."""
    _, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (4 * count, nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(raw, kind)
    keep = np.isfinite(values).all(-1).nonzero()[0][:count]
    assert len(keep) == count
    return raw[keep], values[keep].astype(np.float32)


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_dequantizes_bit_for_bit_as_the_gguf_package(kind):
    raw, values = finite_blocks(kind, 84)
    shape = (7, 12 * gguf.GGML_QUANT_SIZES[kind][0])
    imported = from_gguf(raw.tobytes(), kind, shape)
    assert isinstance(imported, QuantizedTensor) == (kind.name in LAZY)
    dense = imported.dequantize() if isinstance(imported, QuantizedTensor) else imported.float()
    assert dense.shape == shape
    assert np.array_equal(dense.numpy().view(np.int32), values.reshape(shape).view(np.int32))


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.is_gguf])
def test_keeps_the_bytes_of_the_file(name):
    kind = GGMLQuantizationType[name]
    raw, _ = finite_blocks(kind, 6)
    shape = (3, 2 * gguf.GGML_QUANT_SIZES[kind][0])
    imported = from_gguf(raw, kind, shape)
    assert imported.data.numpy().tobytes() == raw.tobytes()
    assert imported.nbytes == raw.nbytes


def test_experts_keep_their_dimension():
    raw, values = finite_blocks(GGMLQuantizationType.Q6_K, 12)
    imported = from_gguf(raw, "Q6_K", (3, 4, 256))
    assert np.array_equal(imported[1].dequantize().numpy(), values[4:8])


@pytest.mark.parametrize("kind", ["Q4_K", 12, GGMLQuantizationType.Q4_K])
def test_a_type_goes_by_name_number_or_enum(kind):
    assert from_gguf(bytes(144), kind, (1, 256)).format == "Q4_K"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("F64", np.float64), ("F16", np.float16), ("I8", np.int8), ("I32", np.int32)],
)
def test_plain_types_keep_their_dtype(name, dtype):
    values = np.arange(6, dtype=dtype).reshape(2, 3)
    imported = from_gguf(values, name, (2, 3))
    assert imported.numpy().dtype == dtype
    assert np.array_equal(imported.numpy(), values)


def test_a_scalar_and_an_empty_tensor():
    assert from_gguf(np.float32(3).tobytes(), "F32", ()).item() == 3
    assert from_gguf(b"", "Q8_0", (0, 32)).dequantize().shape == (0, 32)


def test_the_import_does_not_look_at_the_buffer_again():
    raw = bytearray(34)
    imported = from_gguf(raw, "Q8_0", (1, 32))
    raw[:] = b"\xff" * 34
    assert torch.equal(imported.dequantize(), torch.zeros(1, 32))


def test_mxfp4_reads_exponent_255_as_nan_as_the_mx_specification_says():
    raw = bytes([255, *([0x22] * 16)])
    assert from_gguf(raw, "MXFP4", (1, 32)).dequantize().isnan().all()


@pytest.mark.parametrize(
    ("data", "kind", "shape", "message"),
    [
        (bytes(33), "Q8_0", (1, 32), "data: Q8_0 of shape (1, 32) takes 34 bytes, got 33"),
        (bytes(288), "Q4_K", (1, 256), "data: Q4_K of shape (1, 256) takes 144 bytes, got 288"),
        (bytes(10), "F32", (3,), "data: F32 of shape (3,) takes 12 bytes, got 10"),
        (bytes(34), "Q8_0", (1, 31), "shape: Q8_0 needs K to be a multiple of 32, got 31"),
        (bytes(66), "IQ2_XXS", (2, 128), "shape: IQ2_XXS needs K to be a multiple of 256, got 128"),
        (bytes(34), "Q8_0", (-1, 32), "shape: sizes must not be negative, got (-1, 32)"),
        (bytes(34), "Q9_0", (1, 32), "ggml_type: not a type of GGUF: 'Q9_0'"),
        (bytes(34), 999, (1, 32), "ggml_type: not a type of GGUF: 999"),
        (bytes(40), "Q8_1", (1, 32), "cannot dequantize Q8_1"),
    ],
)
def test_malformed_data_is_named(data, kind, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_gguf(data, kind, shape)
