# mypy: allow-untyped-defs
"""The quantized formats as Triton reads them: one function per format, chosen by its name.

A tile of a weight is BLOCK_N rows by BLOCK_K columns. Every format's function loads the bytes of
the tile once and unpacks them to the shape (BLOCK_N, runs, weights of a run), K in order. Those of
GGUF files are in `triton_gguf_formats.py`.

    codes    int32, not negative: what is stored, plus a constant where it has a sign
    scale    float32 (BLOCK_N, scales), and for GGUF `minimum`, what is added

Rows are clamped by the caller, so that only columns need masks, and only where BLOCK_K does not
divide K (not EVEN). `tilewise.quant.formats` and `blocks` define the formats.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from tilewise.quant.triton_bytes import (
    fp8_values,
    join_two,
    load,
    load_bytes,
    nibble_codes,
    split_run,
    to_float,
)
from tilewise.quant.triton_gguf_formats import block_values, q2_k, q3_k, q4_q5_k, q6_k


@triton.jit
def _byte_codes(
    data, start, k, K, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One byte per weight, 0 to 255."""
    column = k + tl.arange(0, BLOCK_K)
    return load_bytes(data + start[:, None] + column[None, :], column[None, :] < K, EVEN)


@triton.jit
def _group_scales(
    scales,
    rows,
    k,
    K,
    groups,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What each group, or the part of one within the tile, has: (BLOCK_N, BLOCK_K / its size)."""
    if GROUP < 0:
        return tl.load(scales + rows * groups)[:, None]
    else:
        SIZE: tl.constexpr = min(GROUP, BLOCK_K)
        column = k + tl.arange(0, BLOCK_K // SIZE) * SIZE
        at = rows[:, None] * groups + (column // GROUP)[None, :]
        return load(scales + at, column[None, :] < K, EVEN)


@triton.jit
def _power_of_two(exponent):
    """E8M0: 2^(exponent - 127), of which the least is subnormal in float32; 255 is NaN."""
    e = exponent.to(tl.int32)
    bits = tl.where(e == 0, 0x00400000, tl.where(e == 255, 0x7FC00000, e << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _e2m1_values(code):
    """E2M1: as for E4M3 (`fp8_values`), of a float16 that is 2^14 times smaller."""
    bits = ((code & 7) << 9) | ((code & 8) << 12)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def _own_values(
    data,
    scales,
    zeros,
    codebook,
    rows,
    k,
    K,
    row_bytes: tl.constexpr,
    groups,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(code - zero) * scale, or if not SCALED (code - zero)."""
    SIZE: tl.constexpr = BLOCK_K if GROUP < 0 else min(GROUP, BLOCK_K)
    start = rows * row_bytes
    if FORMAT == "int8" or FORMAT == "fp8":
        codes = _byte_codes(data, start, k, K, EVEN, BLOCK_N, BLOCK_K)
    else:
        low, high = nibble_codes(data, start, k // 32, K, 0, 16, EVEN, BLOCK_N, BLOCK_K // 32)
        codes = join_two(low, high, BLOCK_N, BLOCK_K // 32, 16)
    codes = split_run(codes, SIZE, BLOCK_N, BLOCK_K)
    if FORMAT == "int8" or FORMAT == "int4":
        ZERO: tl.constexpr = 128 if FORMAT == "int8" else 8
        if FORMAT == "int8":
            codes = codes ^ 128  # two's complement to what lies 128 above
        if zeros is not None:
            zero = _group_scales(zeros, rows, k, K, groups, GROUP, EVEN, BLOCK_K)
            zero = zero.to(tl.float32)
            if FORMAT == "int8":
                zero += ZERO
            values = to_float(codes, zero[:, :, None])
        else:
            values = to_float(codes, ZERO)
    elif FORMAT == "nf4":
        values = tl.load(codebook + codes).to(tl.float32)
    elif FORMAT == "fp8":
        values = fp8_values(codes)
    else:
        tl.static_assert(FORMAT == "mxfp4")
        values = _e2m1_values(codes)
    if SCALED:
        scale = _group_scales(scales, rows, k, K, groups, GROUP, EVEN, BLOCK_K)
        if FORMAT == "mxfp4":
            scale = _power_of_two(scale)
        values = values * scale.to(tl.float32)[:, :, None]
    return tl.reshape(values, [BLOCK_N, BLOCK_K])


# --- any format -----------------------------------------------------------------------------------


@triton.jit
def weight_tile(
    data,
    scales,
    zeros,
    codebook,
    rows,
    k,
    K,
    row_bytes: tl.constexpr,
    groups,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Columns k to k + BLOCK_K of some rows of a weight, (BLOCK_N, BLOCK_K); 0 beyond K.

    Args:
        data, scales, zeros: the parts of a `QuantizedTensor` in rows, bytes but for the scales; or
            a plain matrix as data.
        codebook: the 16 values of nf4.
        rows: (BLOCK_N,) int64.
        k: a multiple of BLOCK_K.
        row_bytes, groups: what a row has of data (elements, of a plain matrix) and of scales. The
            first is a constant because it decides how wide a row can be loaded: Triton takes for
            granted no power of two that divides an argument, but 16.
        FORMAT: a name in `tilewise.quant.formats.FORMATS`, or "plain".
        SCALED: False leaves out the scale of a whole row.
        EVEN: whether BLOCK_K divides K.

    Returns:
        float32; of a plain matrix its own dtype.
    """
    start = rows * row_bytes
    if FORMAT == "plain":
        column = (k + tl.arange(0, BLOCK_K))[None, :]
        return load(data + start[:, None] + column, column < K, EVEN)
    elif FORMAT == "Q4_K" or FORMAT == "Q5_K":
        values = q4_q5_k(data, start, k, FORMAT, BLOCK_N, BLOCK_K)
        return tl.reshape(values, [BLOCK_N, BLOCK_K])
    elif FORMAT == "Q2_K":
        return tl.reshape(q2_k(data, start, k, BLOCK_N, BLOCK_K), [BLOCK_N, BLOCK_K])
    elif FORMAT == "Q3_K":
        return tl.reshape(q3_k(data, start, k, BLOCK_N, BLOCK_K), [BLOCK_N, BLOCK_K])
    elif FORMAT == "Q6_K":
        return tl.reshape(q6_k(data, start, k, BLOCK_N, BLOCK_K), [BLOCK_N, BLOCK_K])
    else:
        if (
            FORMAT == "Q4_0"
            or FORMAT == "Q4_1"
            or FORMAT == "Q5_0"
            or FORMAT == "Q5_1"
            or FORMAT == "Q8_0"
        ):
            values = block_values(data, rows, k, K, row_bytes, FORMAT, EVEN, BLOCK_N, BLOCK_K)
        else:
            values = _own_values(
                data,
                scales,
                zeros,
                codebook,
                rows,
                k,
                K,
                row_bytes,
                groups,
                FORMAT,
                GROUP,
                SCALED,
                EVEN,
                BLOCK_N,
                BLOCK_K,
            )
        if not EVEN:  # what pads a row, and what a masked load leaves: 0 - zero
            values = tl.where((k + tl.arange(0, BLOCK_K))[None, :] < K, values, 0.0)
        return values
