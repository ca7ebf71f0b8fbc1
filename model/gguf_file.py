"""Reading a GGUF file: its metadata, and its tensors as mapped bytes.

A header says how long everything in it is, so a damaged one can ask its reader for any amount of
time and memory. Here every length is held against what is left of the file before it is used,
which takes a walk over the whole header; a second reading by `gguf.GGUFReader` would find the same
things (the tests compare the two) in fifty times the time. Types and block sizes are the `gguf`
package's.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .config import ModelError

__all__ = ["GGUFFile", "GGUFTensor", "read_gguf"]

_SCALARS = {  # value type -> little-endian struct code
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_SMALLEST_ENTRY = 12  # bytes of the shortest key-value pair or tensor description


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as stored.

    Args:
        type: number of the ggml type.
        shape: outermost dimension first.
        data: (*shape[:-1], bytes of a row), uint8, mapped from the file and copied on writing.
    """

    type: int
    shape: tuple[int, ...]
    data: np.ndarray


@dataclass(frozen=True)
class GGUFFile:
    """Metadata by key, in which arrays of numbers are ndarrays; tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFFile:
    """Read the header of a GGUF file and map its tensors.

    Raises:
        ModelError: if the file is not GGUF, or is damaged.
    """
    if path.stat().st_size < 24:
        raise ModelError(f"not a GGUF file, it has only {path.stat().st_size} bytes")
    cursor = _Cursor(np.memmap(path, dtype=np.uint8, mode="c"))
    if (magic := bytes(cursor.take(4))) != b"GGUF":
        raise ModelError(f"not a GGUF file, it starts with {magic!r}")
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise ModelError(f"GGUF version must be 2 or 3, got {version}")
    tensor_count, pair_count = cursor.count(_SMALLEST_ENTRY), cursor.count(_SMALLEST_ENTRY)

    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string()
        if key in metadata:
            raise ModelError(f"the key {key!r} occurs twice")
        metadata[key] = cursor.value(cursor.scalar("<I"))
    described = [_describe(cursor) for _ in range(tensor_count)]

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment % 8 or not 8 <= alignment <= 2**16:
        raise ModelError(f"general.alignment must be a multiple of 8, got {alignment}")
    start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    total = 0
    for name, kind, shape, offset in described:
        row = _row_bytes(name, kind, shape[-1])
        size = math.prod(shape[:-1]) * row
        total += size
        if offset % alignment:
            raise ModelError(f"damaged, the tensor {name!r} is not aligned")
        # The total catches tensors that overlap, which would grow when they are loaded.
        if start + offset + size > len(cursor.data) or total > len(cursor.data):
            raise ModelError(
                f"truncated or damaged, the tensor {name!r} ends at byte "
                f"{start + offset + size} of {len(cursor.data)}"
            )
        if name in tensors:
            raise ModelError(f"the tensor {name!r} occurs twice")
        data = cursor.data[start + offset : start + offset + size].reshape(*shape[:-1], row)
        tensors[name] = GGUFTensor(kind, shape, data)
    return GGUFFile(metadata, tensors)


def _describe(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """Name, type, shape and offset of the next tensor."""
    name = cursor.string()
    dims = cursor.scalar("<I")
    if not 1 <= dims <= _MAX_DIMS:
        cursor.damaged(f"the tensor {name!r} has {dims} dimensions")
    shape = tuple(cursor.scalar("<Q") for _ in range(dims))[::-1]
    if 0 in shape:
        cursor.damaged(f"the tensor {name!r} has shape {shape}")
    return name, cursor.scalar("<I"), shape, cursor.scalar("<Q")


def _row_bytes(name: str, kind: int, columns: int) -> int:
    block, size = _block_sizes().get(kind, (0, 0))
    if not block:
        raise ModelError(f"the tensor {name!r} has the unknown type {kind}")
    if columns % block:
        raise ModelError(f"rows of {name!r} have {columns} elements, not blocks of {block}")
    return columns // block * size


@cache
def _block_sizes() -> dict[int, tuple[int, int]]:
    """Elements and bytes of a block by type."""
    import gguf

    return {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


class _Cursor:
    """Reads on from an offset, never past the end."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        self.view = data.data
        self.offset = 0

    def damaged(self, what: str) -> None:
        raise ModelError(f"truncated or damaged near byte {self.offset}, {what}")

    def take(self, size: int) -> memoryview:
        if size > len(self.view) - self.offset:
            self.damaged(f"{size} bytes wanted, {len(self.view) - self.offset} left")
        self.offset += size
        return self.view[self.offset - size : self.offset]

    def scalar(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self, item_bytes: int) -> int:
        """A number of items of at least so many bytes each."""
        count = self.scalar("<Q")
        if count * item_bytes > len(self.view) - self.offset:
            self.damaged(f"{count} items announced, {len(self.view) - self.offset} bytes left")
        return count

    def string(self) -> str:
        try:
            return str(self.take(self.scalar("<Q")), "utf-8")
        except UnicodeDecodeError:
            self.damaged("a string is not UTF-8")
            raise

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.scalar("<I"))
        return self.damaged(f"there is no value type {kind}")

    def array(self, kind: int) -> Any:
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            count = self.count(dtype.itemsize)
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind == _STRING:
            return [self.string() for _ in range(self.count(8))]
        return self.damaged(f"there is no array of type {kind}")  # of arrays: nobody writes them
