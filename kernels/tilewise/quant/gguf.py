"""Tensors of GGUF files, imported without loss.

Block formats in `FORMATS` keep the file's bytes and are dequantized where they are used. MXFP4
is our `mxfp4` in another order of bytes. Whatever else the `gguf` package can dequantize (IQ*,
TQ*, NVFP4) comes out as a dense float32 tensor: exact, but as large as the unquantized weight.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from tilewise.quant.formats import FORMATS, QuantizedTensor

if TYPE_CHECKING:
    import numpy as np

_DENSE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}


# What is made in inference mode does not count writes to it (see `quant.native.as_panels`).
@torch.inference_mode(False)
def from_gguf(
    data: bytes | bytearray | memoryview | np.ndarray, ggml_type: Any, shape: tuple[int, ...]
) -> QuantizedTensor | torch.Tensor:
    """Import one tensor of a GGUF file.

    Args:
        data: the tensor's bytes, row after row; they are copied, so the file can be closed.
        ggml_type: `gguf.GGMLQuantizationType`, its number, or its name such as "Q4_K".
        shape: rows first, (..., N, K): the reverse of the order in the file.

    Returns:
        A QuantizedTensor for the block formats in `FORMATS` and for MXFP4; a tensor of its own
        dtype for F32, F16, BF16, F64 and the integers; a float32 tensor for every other type that
        the `gguf` package can dequantize.

    Raises:
        ValueError: for a type that cannot be read, a K that is not a whole number of blocks, or a
            wrong number of bytes.

    Source: the GGUF specification and block structures of ggml.
    """
    import gguf
    import numpy as np

    kind = _ggml_type(ggml_type)
    shape = tuple(int(size) for size in shape)
    if any(size < 0 for size in shape):
        raise ValueError(f"shape: sizes must not be negative, got {shape}")
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    k = shape[-1] if shape else 1
    if k % block_size:
        raise ValueError(f"shape: {kind.name} needs K to be a multiple of {block_size}, got {k}")
    if isinstance(data, np.ndarray):
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8).copy()
    else:
        raw = np.frombuffer(data, np.uint8).copy()
    expected = math.prod(shape) // block_size * block_bytes
    if raw.nbytes != expected:
        raise ValueError(
            f"data: {kind.name} of shape {shape} takes {expected} bytes, got {raw.nbytes}"
        )
    row_bytes = k // block_size * block_bytes

    if kind.name in _DENSE:
        return torch.from_numpy(raw).view(_DENSE[kind.name]).reshape(shape)
    if kind.name in FORMATS and len(shape) >= 2:
        rows = torch.from_numpy(raw).reshape(*shape[:-1], row_bytes)
        return QuantizedTensor(kind.name, shape, block_size, rows)
    if kind.name == "MXFP4" and len(shape) >= 2:
        rows = torch.from_numpy(raw).reshape(*shape[:-1], k // block_size, block_bytes)
        codes = rows[..., 1:].flatten(-2).contiguous()
        return QuantizedTensor("mxfp4", shape, block_size, codes, rows[..., 0].contiguous())
    try:
        values = gguf.quants.dequantize(raw.reshape(*shape[:-1], row_bytes), kind)
    except NotImplementedError:
        raise ValueError(
            f"ggml_type: the gguf package {_gguf_version()} cannot dequantize {kind.name}"
        ) from None
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _ggml_type(ggml_type: Any) -> Any:
    from gguf import GGMLQuantizationType

    try:
        if isinstance(ggml_type, str):
            return GGMLQuantizationType[ggml_type]
        return GGMLQuantizationType(ggml_type)
    except (KeyError, ValueError):
        raise ValueError(f"ggml_type: not a type of GGUF: {ggml_type!r}") from None


def _gguf_version() -> str:
    from importlib import metadata

    return metadata.version("gguf")
