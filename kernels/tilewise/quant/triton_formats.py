# mypy: allow-untyped-defs
"""The quantized formats as Triton reads them: one function per format, chosen by its name.

A tile of a weight is BLOCK_N rows by BLOCK_K columns. Every format's function loads the bytes of
the tile once, as wide as they lie, and unpacks them in registers: the planes of a byte (its two
nibbles, or four pairs of bits) are joined along a new dimension, which moves nothing between
threads. What it returns has the shape (BLOCK_N, runs, weights of a run), K in order.

    codes    int32, not negative: what is stored, plus a constant where it has a sign
    scale    float32 (BLOCK_N, scales), and for GGUF `minimum`, what is added

Rows are clamped by the caller, so that only columns need masks, and only where BLOCK_K does not
divide K (not EVEN). `tilewise.quant.formats` and `blocks` define the formats.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _load(pointers, inside, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=0)


@triton.jit
def _bytes(pointers, inside, EVEN: tl.constexpr):
    return _load(pointers, inside, EVEN).to(tl.int32)


@triton.jit
def _half(pointers, inside, EVEN: tl.constexpr):
    """The float16 at each pointer to a byte; blocks of 18 bytes leave it unaligned."""
    low = _bytes(pointers, inside, EVEN)
    high = _bytes(pointers + 1, inside, EVEN)
    return (low | (high << 8)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _float(codes, zero):
    """codes - zero in float32, exact: 2^23 + code is a float32 whose last bits are the code.

    Conversion instructions run at a quarter of the rate of an OR and a subtraction.
    """
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - (zero + 8388608.0)


@triton.jit
def _two(a, b, BLOCK_N: tl.constexpr, RUNS: tl.constexpr, SIZE: tl.constexpr):
    """(BLOCK_N, RUNS, SIZE) twice, one run of each in turn."""
    both = tl.permute(tl.join(a, b), (0, 1, 3, 2))
    return tl.reshape(both, [BLOCK_N, 2 * RUNS, SIZE])


@triton.jit
def _four(a, b, c, d, BLOCK_N: tl.constexpr, RUNS: tl.constexpr, SIZE: tl.constexpr):
    all_four = tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), (0, 1, 4, 3, 2))
    return tl.reshape(all_four, [BLOCK_N, 4 * RUNS, SIZE])


@triton.jit
def _split_run(values, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same values in runs of SIZE, those that share a scale."""
    return tl.reshape(values, [BLOCK_N, BLOCK_K // SIZE, SIZE])


# --- tilewise's own formats -----------------------------------------------------------------------


@triton.jit
def _byte_codes(
    data, start, k, K, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One byte per weight, 0 to 255."""
    column = k + tl.arange(0, BLOCK_K)
    return _bytes(data + start[:, None] + column[None, :], column[None, :] < K, EVEN)


@triton.jit
def _nibble_codes(
    data,
    start,
    block,
    K,
    AT: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The low and the high nibbles of the 16 bytes from byte AT of every block of 32 weights."""
    number = (block + tl.arange(0, BLOCKS))[None, :, None]
    within = tl.arange(0, 16)[None, None, :]
    at = start[:, None, None] + (number * BLOCK_BYTES + AT + within)
    packed = _bytes(data + at, number * 32 < K, EVEN)
    return packed & 15, packed >> 4


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
        return _load(scales + at, column[None, :] < K, EVEN)


@triton.jit
def _power_of_two(exponent):
    """E8M0: 2^(exponent - 127), of which the least is subnormal in float32; 255 is NaN."""
    e = exponent.to(tl.int32)
    bits = tl.where(e == 0, 0x00400000, tl.where(e == 255, 0x7FC00000, e << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _fp8_values(code):
    """E4M3: its exponent and mantissa are those of a float16 that is 2^8 times smaller."""
    bits = ((code & 0x7F) << 7) | ((code & 0x80) << 8)
    value = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _e2m1_values(code):
    """E2M1: as for E4M3, of a float16 that is 2^14 times smaller."""
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
        low, high = _nibble_codes(data, start, k // 32, K, 0, 16, EVEN, BLOCK_N, BLOCK_K // 32)
        codes = _two(low, high, BLOCK_N, BLOCK_K // 32, 16)
    codes = _split_run(codes, SIZE, BLOCK_N, BLOCK_K)
    if FORMAT == "int8" or FORMAT == "int4":
        ZERO: tl.constexpr = 128 if FORMAT == "int8" else 8
        if FORMAT == "int8":
            codes = codes ^ 128  # two's complement to what lies 128 above
        if zeros is not None:
            zero = _group_scales(zeros, rows, k, K, groups, GROUP, EVEN, BLOCK_K)
            zero = zero.to(tl.float32)
            if FORMAT == "int8":
                zero += ZERO
            values = _float(codes, zero[:, :, None])
        else:
            values = _float(codes, ZERO)
    elif FORMAT == "nf4":
        values = tl.load(codebook + codes).to(tl.float32)
    elif FORMAT == "fp8":
        values = _fp8_values(codes)
    else:
        tl.static_assert(FORMAT == "mxfp4")
        values = _e2m1_values(codes)
    if SCALED:
        scale = _group_scales(scales, rows, k, K, groups, GROUP, EVEN, BLOCK_K)
        if FORMAT == "mxfp4":
            scale = _power_of_two(scale)
        values = values * scale.to(tl.float32)[:, :, None]
    return tl.reshape(values, [BLOCK_N, BLOCK_K])


# --- GGUF: blocks of 32 weights -------------------------------------------------------------------


@triton.jit
def _block_bytes(FORMAT: tl.constexpr):
    if FORMAT == "Q4_0":
        return 18
    elif FORMAT == "Q4_1":
        return 20
    elif FORMAT == "Q5_0":
        return 22
    elif FORMAT == "Q5_1":
        return 24
    else:
        tl.static_assert(FORMAT == "Q8_0")
        return 34


@triton.jit
def block_codes(
    data,
    rows,
    k,
    K,
    row_bytes: tl.constexpr,
    FORMAT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Codes (BLOCK_N, BLOCK_K / 32, 32), scales and minimums (BLOCK_N, BLOCK_K / 32)."""
    HAS_MINIMUM: tl.constexpr = FORMAT == "Q4_1" or FORMAT == "Q5_1"
    BITS: tl.constexpr = 4 if HAS_MINIMUM else 2  # where the fifth bits are, or the codes
    HAS_FIFTH: tl.constexpr = FORMAT == "Q5_0" or FORMAT == "Q5_1"
    CODES: tl.constexpr = BITS + 4 if HAS_FIFTH else BITS
    BLOCKS: tl.constexpr = BLOCK_K // 32
    BYTES: tl.constexpr = _block_bytes(FORMAT)
    start = rows * row_bytes
    number = k // 32 + tl.arange(0, BLOCKS)
    inside = (number * 32 < K)[None, :]
    at = data + start[:, None] + (number * BYTES)[None, :]
    scale = _half(at, inside, EVEN)
    if HAS_MINIMUM:
        minimum = _half(at + 2, inside, EVEN)
    else:
        minimum = tl.zeros([BLOCK_N, BLOCKS], tl.float32)
    if FORMAT == "Q8_0":
        within = tl.arange(0, 32)
        codes = _bytes(at[:, :, None] + (CODES + within)[None, None, :], inside[:, :, None], EVEN)
        codes = codes ^ 128
    else:
        low, high = _nibble_codes(data, start, k // 32, K, CODES, BYTES, EVEN, BLOCK_N, BLOCKS)
        if HAS_FIFTH:
            bits = _bytes(at + BITS, inside, EVEN) | (_bytes(at + BITS + 1, inside, EVEN) << 8)
            bits |= _bytes(at + BITS + 2, inside, EVEN) << 16
            bits |= _bytes(at + BITS + 3, inside, EVEN) << 24
            within = tl.arange(0, 16)[None, None, :]
            low |= ((bits[:, :, None] >> within) & 1) << 4
            high |= ((bits[:, :, None] >> (within + 16)) & 1) << 4
        codes = tl.reshape(_two(low, high, BLOCK_N, BLOCKS, 16), [BLOCK_N, BLOCKS, 32])
    return codes, scale, minimum


@triton.jit
def block_zero(FORMAT: tl.constexpr):
    """The code of 0, above `minimum`."""
    return 8 if FORMAT == "Q4_0" else 16 if FORMAT == "Q5_0" else 128 if FORMAT == "Q8_0" else 0


@triton.jit
def _block_values(
    data,
    rows,
    k,
    K,
    row_bytes: tl.constexpr,
    FORMAT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    codes, scale, minimum = block_codes(data, rows, k, K, row_bytes, FORMAT, EVEN, BLOCK_N, BLOCK_K)
    values = _float(codes, block_zero(FORMAT)) * scale[:, :, None] + minimum[:, :, None]
    return tl.reshape(values, [BLOCK_N, BLOCK_K])


# --- GGUF: blocks of 256 weights, K a multiple of them: no masks ----------------------------------


@triton.jit
def _scale_and_minimum(at, sub):
    """Scale and minimum number `sub` of 8, of 6 bits each, in the 12 bytes from byte 4."""
    first = tl.load(at + 4 + (sub & 3)).to(tl.int32)
    second = tl.load(at + 8 + (sub & 3)).to(tl.int32)
    third = tl.load(at + 12 + (sub & 3)).to(tl.int32)
    is_low = sub < 4
    scale = tl.where(is_low, first & 63, (third & 15) | ((first >> 2) & 48))
    minimum = tl.where(is_low, second & 63, (third >> 4) | ((second >> 2) & 48))
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def _q4_q5_k(data, start, k, FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Chunks of 64 weights: the low and the high nibbles of 32 bytes."""
    FIFTH: tl.constexpr = FORMAT == "Q5_K"
    BYTES: tl.constexpr = 176 if FIFTH else 144
    CODES: tl.constexpr = 48 if FIFTH else 16
    CHUNKS: tl.constexpr = BLOCK_K // 64
    chunk = (k // 64 + tl.arange(0, CHUNKS))[None, :, None]
    within = tl.arange(0, 32)[None, None, :]
    at = data + start[:, None, None] + chunk // 4 * BYTES
    packed = tl.load(at + (CODES + chunk % 4 * 32 + within)).to(tl.int32)
    low, high = packed & 15, packed >> 4
    if FIFTH:
        fifth = tl.load(at + (16 + within)).to(tl.int32) >> (chunk % 4 * 2)
        low |= (fifth & 1) << 4
        high |= (fifth & 2) << 3
    codes = _two(low, high, BLOCK_N, CHUNKS, 32)
    sub = (k // 32 + tl.arange(0, 2 * CHUNKS))[None, :]
    of_sub = data + start[:, None] + sub // 8 * BYTES
    scale, minimum = _scale_and_minimum(of_sub, sub % 8)
    scale *= _half(of_sub, None, True)
    minimum *= _half(of_sub + 2, None, True)
    return _float(codes, 0) * scale[:, :, None] - minimum[:, :, None]


@triton.jit
def _q2_k(data, start, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Chunks of 128 weights: the four pairs of bits of 32 bytes; a scale for each 16 weights."""
    CHUNKS: tl.constexpr = BLOCK_K // 128
    chunk = (k // 128 + tl.arange(0, CHUNKS))[None, :, None]
    within = tl.arange(0, 32)[None, None, :]
    at = data + start[:, None, None] + chunk // 2 * 84
    packed = tl.load(at + (16 + chunk % 2 * 32 + within)).to(tl.int32)
    codes = _four(
        packed & 3, (packed >> 2) & 3, (packed >> 4) & 3, packed >> 6, BLOCK_N, CHUNKS, 32
    )
    codes = _split_run(codes, 16, BLOCK_N, BLOCK_K)
    sub = (k // 16 + tl.arange(0, 8 * CHUNKS))[None, :]
    of_sub = data + start[:, None] + sub // 16 * 84
    both = tl.load(of_sub + sub % 16).to(tl.int32)
    scale = _half(of_sub + 80, None, True) * (both & 15).to(tl.float32)
    minimum = _half(of_sub + 82, None, True) * (both >> 4).to(tl.float32)
    return _float(codes, 0) * scale[:, :, None] - minimum[:, :, None]


@triton.jit
def _q3_k(data, start, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """As Q2_K, with a third bit for each weight, and scales of 6 bits."""
    CHUNKS: tl.constexpr = BLOCK_K // 128
    chunk = (k // 128 + tl.arange(0, CHUNKS))[None, :, None]
    within = tl.arange(0, 32)[None, None, :]
    at = data + start[:, None, None] + chunk // 2 * 110
    packed = tl.load(at + (32 + chunk % 2 * 32 + within)).to(tl.int32)
    third = tl.load(at + within).to(tl.int32) >> (chunk % 2 * 4)
    codes = _four(
        (packed & 3) | ((third & 1) << 2),
        ((packed >> 2) & 3) | ((third & 2) << 1),
        ((packed >> 4) & 3) | (third & 4),
        (packed >> 6) | ((third & 8) >> 1),
        BLOCK_N,
        CHUNKS,
        32,
    )
    codes = _split_run(codes, 16, BLOCK_N, BLOCK_K)
    sub = (k // 16 + tl.arange(0, 8 * CHUNKS))[None, :]
    of_sub = data + start[:, None] + sub // 16 * 110
    number = sub % 16
    low = tl.load(of_sub + (96 + number % 8)).to(tl.int32) >> (number // 8 * 4)
    high = tl.load(of_sub + (104 + number % 4)).to(tl.int32) >> (number // 4 * 2)
    scale = ((low & 15) | ((high & 3) << 4)) - 32
    scale = _half(of_sub + 108, None, True) * scale.to(tl.float32)
    return _float(codes, 4) * scale[:, :, None]


@triton.jit
def _q6_k(data, start, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Chunks of 128 weights: nibbles of 64 bytes, pairs of bits of 32; a scale for each 16."""
    CHUNKS: tl.constexpr = BLOCK_K // 128
    chunk = (k // 128 + tl.arange(0, CHUNKS))[None, :, None]
    within = tl.arange(0, 32)[None, None, :]
    at = data + start[:, None, None] + chunk // 2 * 210
    first = tl.load(at + (chunk % 2 * 64 + within)).to(tl.int32)
    second = tl.load(at + (chunk % 2 * 64 + 32 + within)).to(tl.int32)
    high = tl.load(at + (128 + chunk % 2 * 32 + within)).to(tl.int32)
    codes = _four(
        (first & 15) | ((high & 3) << 4),
        (second & 15) | ((high & 12) << 2),
        (first >> 4) | (high & 48),
        (second >> 4) | ((high & 192) >> 2),
        BLOCK_N,
        CHUNKS,
        32,
    )
    codes = _split_run(codes, 16, BLOCK_N, BLOCK_K)
    sub = (k // 16 + tl.arange(0, 8 * CHUNKS))[None, :]
    of_sub = data + start[:, None] + sub // 16 * 210
    scale = tl.load(of_sub + (192 + sub % 16)).to(tl.int8, bitcast=True).to(tl.float32)
    scale *= _half(of_sub + 208, None, True)
    return _float(codes, 32) * scale[:, :, None]


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
        return _load(data + start[:, None] + column, column < K, EVEN)
    elif FORMAT == "Q4_K" or FORMAT == "Q5_K":
        values = _q4_q5_k(data, start, k, FORMAT, BLOCK_N, BLOCK_K)
        return tl.reshape(values, [BLOCK_N, BLOCK_K])
    elif FORMAT == "Q2_K":
        return tl.reshape(_q2_k(data, start, k, BLOCK_N, BLOCK_K), [BLOCK_N, BLOCK_K])
    elif FORMAT == "Q3_K":
        return tl.reshape(_q3_k(data, start, k, BLOCK_N, BLOCK_K), [BLOCK_N, BLOCK_K])
    elif FORMAT == "Q6_K":
        return tl.reshape(_q6_k(data, start, k, BLOCK_N, BLOCK_K), [BLOCK_N, BLOCK_K])
    else:
        if (
            FORMAT == "Q4_0"
            or FORMAT == "Q4_1"
            or FORMAT == "Q5_0"
            or FORMAT == "Q5_1"
            or FORMAT == "Q8_0"
        ):
            values = _block_values(data, rows, k, K, row_bytes, FORMAT, EVEN, BLOCK_N, BLOCK_K)
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
