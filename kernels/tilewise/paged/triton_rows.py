# mypy: allow-untyped-defs
"""Rows of a cache as Triton reads and writes them: a run or two of elements, or their codes.

Tiles have powers of two of columns; a row of 96, 192 or 576 elements is two runs of different
sizes, and the codes of int4 come in two halves anyway.
"""

import triton
import triton.language as tl


@triton.jit
def is_finite(x):
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def all_finite(x):
    """(rows,): 1 for a row of which every element is finite, else 0."""
    return tl.min(is_finite(x).to(tl.int32), 1)


@triton.jit
def load_row(base, exists, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK): DIM elements from every base on, zeros behind and where no row exists."""
    at = tl.arange(0, BLOCK)
    mask = exists[:, None]
    if DIM < BLOCK:
        mask = mask & (at < DIM)[None, :]
    return tl.load(base[:, None] + at[None, :], mask=mask, other=0)


@triton.jit
def _from_fp8(x):
    """float8 e4m3, in bytes, as float16, divided by 256.

    Moved to the place of float16's exponent and mantissa the bits mean just that, subnormal numbers
    included. All chips can do this; few have an instruction for it.
    """
    bits = (x & 0x7F).to(tl.uint16)
    bits = tl.where(bits == 0x7F, 0x7E00, bits << 7)
    bits = (bits | ((x & 0x80).to(tl.uint16) << 8)).to(tl.uint16)
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def load_parts(
    base,
    exists,
    DIM_1: tl.constexpr,
    BLOCK_1: tl.constexpr,
    DIM_2: tl.constexpr,
    BLOCK_2: tl.constexpr,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Both parts of rows of a cache, (rows, BLOCK_1) and (rows, BLOCK_2), in DTYPE.

    Codes are not multiplied by their scale. Without a second part it repeats the first.
    """
    x = load_row(base, exists, DIM_1, BLOCK_1)
    y = x
    if FORMAT == "int4":
        y = (x >> 4).to(tl.int8) - 8
        x = (x & 15).to(tl.int8) - 8
    elif BLOCK_2 > 0:
        y = load_row(base + DIM_1, exists, DIM_2, BLOCK_2)
    if FORMAT == "fp8":
        x = _from_fp8(x)
        y = _from_fp8(y)
    return x.to(DTYPE), y.to(DTYPE)


@triton.jit
def store_row(base, x, here, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of `load_row`."""
    at = tl.arange(0, BLOCK)
    mask = here[:, None]
    if DIM < BLOCK:
        mask = mask & (at < DIM)[None, :]
    tl.store(base[:, None] + at[None, :], x.to(base.dtype.element_ty), mask=mask)
