# mypy: allow-untyped-defs
"""The formats of GGUF files as Triton reads them: blocks that hold their scales beside their codes.

What a function returns has the shape (BLOCK_N, runs, weights of a run), K in order.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from tilewise.quant.triton_bytes import (
    join_four,
    join_two,
    load_bytes,
    load_half,
    nibble_codes,
    split_run,
    to_float,
)

# --- GGUF: blocks of 32 weights -------------------------------------------------------------------


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
    CODE_BYTES: tl.constexpr = 32 if FORMAT == "Q8_0" else 16
    BYTES: tl.constexpr = CODES + CODE_BYTES
    start = rows * row_bytes
    number = k // 32 + tl.arange(0, BLOCKS)
    inside = (number * 32 < K)[None, :]
    at = data + start[:, None] + (number * BYTES)[None, :]
    scale = load_half(at, inside, EVEN)
    if HAS_MINIMUM:
        minimum = load_half(at + 2, inside, EVEN)
    else:
        minimum = tl.zeros([BLOCK_N, BLOCKS], tl.float32)
    if FORMAT == "Q8_0":
        within = tl.arange(0, 32)
        codes = load_bytes(
            at[:, :, None] + (CODES + within)[None, None, :], inside[:, :, None], EVEN
        )
        codes = codes ^ 128
    else:
        low, high = nibble_codes(data, start, k // 32, K, CODES, BYTES, EVEN, BLOCK_N, BLOCKS)
        if HAS_FIFTH:
            bits = load_bytes(at + BITS, inside, EVEN) | (
                load_bytes(at + BITS + 1, inside, EVEN) << 8
            )
            bits |= load_bytes(at + BITS + 2, inside, EVEN) << 16
            bits |= load_bytes(at + BITS + 3, inside, EVEN) << 24
            within = tl.arange(0, 16)[None, None, :]
            low |= ((bits[:, :, None] >> within) & 1) << 4
            high |= ((bits[:, :, None] >> (within + 16)) & 1) << 4
        codes = tl.reshape(join_two(low, high, BLOCK_N, BLOCKS, 16), [BLOCK_N, BLOCKS, 32])
    return codes, scale, minimum


@triton.jit
def block_zero(FORMAT: tl.constexpr):
    """The code of 0, above `minimum`."""
    return 8 if FORMAT == "Q4_0" else 16 if FORMAT == "Q5_0" else 128 if FORMAT == "Q8_0" else 0


@triton.jit
def block_values(
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
    values = to_float(codes, block_zero(FORMAT)) * scale[:, :, None] + minimum[:, :, None]
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
def q4_q5_k(data, start, k, FORMAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
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
    codes = join_two(low, high, BLOCK_N, CHUNKS, 32)
    sub = (k // 32 + tl.arange(0, 2 * CHUNKS))[None, :]
    of_sub = data + start[:, None] + sub // 8 * BYTES
    scale, minimum = _scale_and_minimum(of_sub, sub % 8)
    scale *= load_half(of_sub, None, True)
    minimum *= load_half(of_sub + 2, None, True)
    return to_float(codes, 0) * scale[:, :, None] - minimum[:, :, None]


@triton.jit
def q2_k(data, start, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Chunks of 128 weights: the four pairs of bits of 32 bytes; a scale for each 16 weights."""
    CHUNKS: tl.constexpr = BLOCK_K // 128
    chunk = (k // 128 + tl.arange(0, CHUNKS))[None, :, None]
    within = tl.arange(0, 32)[None, None, :]
    at = data + start[:, None, None] + chunk // 2 * 84
    packed = tl.load(at + (16 + chunk % 2 * 32 + within)).to(tl.int32)
    codes = join_four(
        packed & 3, (packed >> 2) & 3, (packed >> 4) & 3, packed >> 6, BLOCK_N, CHUNKS, 32
    )
    codes = split_run(codes, 16, BLOCK_N, BLOCK_K)
    sub = (k // 16 + tl.arange(0, 8 * CHUNKS))[None, :]
    of_sub = data + start[:, None] + sub // 16 * 84
    both = tl.load(of_sub + sub % 16).to(tl.int32)
    scale = load_half(of_sub + 80, None, True) * (both & 15).to(tl.float32)
    minimum = load_half(of_sub + 82, None, True) * (both >> 4).to(tl.float32)
    return to_float(codes, 0) * scale[:, :, None] - minimum[:, :, None]


@triton.jit
def q3_k(data, start, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """As Q2_K, with a third bit for each weight, and scales of 6 bits."""
    CHUNKS: tl.constexpr = BLOCK_K // 128
    chunk = (k // 128 + tl.arange(0, CHUNKS))[None, :, None]
    within = tl.arange(0, 32)[None, None, :]
    at = data + start[:, None, None] + chunk // 2 * 110
    packed = tl.load(at + (32 + chunk % 2 * 32 + within)).to(tl.int32)
    third = tl.load(at + within).to(tl.int32) >> (chunk % 2 * 4)
    codes = join_four(
        (packed & 3) | ((third & 1) << 2),
        ((packed >> 2) & 3) | ((third & 2) << 1),
        ((packed >> 4) & 3) | (third & 4),
        (packed >> 6) | ((third & 8) >> 1),
        BLOCK_N,
        CHUNKS,
        32,
    )
    codes = split_run(codes, 16, BLOCK_N, BLOCK_K)
    sub = (k // 16 + tl.arange(0, 8 * CHUNKS))[None, :]
    of_sub = data + start[:, None] + sub // 16 * 110
    number = sub % 16
    low = tl.load(of_sub + (96 + number % 8)).to(tl.int32) >> (number // 8 * 4)
    high = tl.load(of_sub + (104 + number % 4)).to(tl.int32) >> (number // 4 * 2)
    scale = ((low & 15) | ((high & 3) << 4)) - 32
    scale = load_half(of_sub + 108, None, True) * scale.to(tl.float32)
    return to_float(codes, 4) * scale[:, :, None]


@triton.jit
def q6_k(data, start, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Chunks of 128 weights: nibbles of 64 bytes, pairs of bits of 32; a scale for each 16."""
    CHUNKS: tl.constexpr = BLOCK_K // 128
    chunk = (k // 128 + tl.arange(0, CHUNKS))[None, :, None]
    within = tl.arange(0, 32)[None, None, :]
    at = data + start[:, None, None] + chunk // 2 * 210
    first = tl.load(at + (chunk % 2 * 64 + within)).to(tl.int32)
    second = tl.load(at + (chunk % 2 * 64 + 32 + within)).to(tl.int32)
    high = tl.load(at + (128 + chunk % 2 * 32 + within)).to(tl.int32)
    codes = join_four(
        (first & 15) | ((high & 3) << 4),
        (second & 15) | ((high & 12) << 2),
        (first >> 4) | (high & 48),
        (second >> 4) | ((high & 192) >> 2),
        BLOCK_N,
        CHUNKS,
        32,
    )
    codes = split_run(codes, 16, BLOCK_N, BLOCK_K)
    sub = (k // 16 + tl.arange(0, 8 * CHUNKS))[None, :]
    of_sub = data + start[:, None] + sub // 16 * 210
    scale = tl.load(of_sub + (192 + sub % 16)).to(tl.int8, bitcast=True).to(tl.float32)
    scale *= load_half(of_sub + 208, None, True)
    return to_float(codes, 32) * scale[:, :, None]
