# mypy: allow-untyped-defs
"""Tiles of the attention kernels: rows of a matrix, loaded with pointers or with a descriptor.

A descriptor says where a matrix is, how large and how far apart its rows are. From then on a load
is one instruction of one thread (NVIDIA's TMA, from sm_90 on): the tile goes into shared memory
past the registers, in the order in which matrix instructions want it, and what is outside of the
matrix becomes zeros. Pointers and masks for each element cost a third of the registers and of the
time. A program makes its own descriptors, in a scratch memory of the launch, because a sequence of
a ragged batch ends where no other does.
"""

import triton
import triton.language as tl


@triton.jit
def wide(n):
    """n in 64 bits; n may be a number as well, of a loop that is interpreted, or a length of 1."""
    return tl.zeros([], tl.int64) + n


@triton.jit
def load_rows(
    p, stride, first, count, dim, begin: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Elements [begin, begin + COLUMNS) of rows [first, first + ROWS), zeros from `count` on."""
    rows = tl.arange(0, ROWS)
    columns = begin + tl.arange(0, COLUMNS)
    inside = (first + rows < count)[:, None] & (columns < dim)[None, :]
    at = p + wide(first) * stride + rows[:, None] * stride + columns[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def matrix(
    p, stride, count, dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """What `tile_of` takes tiles of (ROWS, COLUMNS) from: `count` rows of `dim` elements at p."""
    source = p
    if DESCRIPTORS:
        source = tl.make_tensor_descriptor(p, [count, dim], [stride, 1], [ROWS, COLUMNS])
    return source


@triton.jit
def tile_of(
    source, stride, first, count, dim, begin: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Elements [begin, begin + COLUMNS) of rows [first, first + ROWS), zeros outside."""
    if DESCRIPTORS:
        tile = source.load([first, begin])
    else:
        tile = load_rows(source, stride, first, count, dim, begin, ROWS, COLUMNS)
    return tile


@triton.jit
def vector(p, count, SIZE: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """What `part_of` takes parts of SIZE elements from: `count` elements at p."""
    source = p
    if DESCRIPTORS:
        source = tl.make_tensor_descriptor(p, [count], [1], [SIZE])
    return source


@triton.jit
def part_of(source, first, count, SIZE: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Elements [first, first + SIZE), zeros outside."""
    if DESCRIPTORS:
        part = source.load([first])
    else:
        at = first + tl.arange(0, SIZE)
        part = tl.load(source + at, mask=at < count, other=0.0)
    return part


@triton.jit
def finite(x):
    """x with zeros for what is infinite or NaN, and whether each row was all finite."""
    good = tl.abs(x.to(tl.float32)) < float("inf")
    return tl.where(good, x, 0.0).to(x.dtype), tl.min(good.to(tl.int32), 1) > 0
