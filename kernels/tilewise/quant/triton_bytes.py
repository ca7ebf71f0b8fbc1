# mypy: allow-untyped-defs
"""The bytes of a quantized weight in Triton: loaded as wide as they lie, unpacked in registers.

The planes of a byte (its two nibbles, or four pairs of bits) are joined along a new dimension,
which moves nothing between threads.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def load(pointers, inside, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=0)


@triton.jit
def load_bytes(pointers, inside, EVEN: tl.constexpr):
    return load(pointers, inside, EVEN).to(tl.int32)


@triton.jit
def load_half(pointers, inside, EVEN: tl.constexpr):
    """The float16 at each pointer to a byte; blocks of 18 bytes leave it unaligned."""
    low = load_bytes(pointers, inside, EVEN)
    high = load_bytes(pointers + 1, inside, EVEN)
    return (low | (high << 8)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def to_float(codes, zero):
    """codes - zero in float32, exact: 2^23 + code is a float32 whose last bits are the code.

    Conversion instructions run at a quarter of the rate of an OR and a subtraction.
    """
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - (zero + 8388608.0)


@triton.jit
def join_two(a, b, BLOCK_N: tl.constexpr, RUNS: tl.constexpr, SIZE: tl.constexpr):
    """(BLOCK_N, RUNS, SIZE) twice, one run of each in turn."""
    both = tl.permute(tl.join(a, b), (0, 1, 3, 2))
    return tl.reshape(both, [BLOCK_N, 2 * RUNS, SIZE])


@triton.jit
def join_four(a, b, c, d, BLOCK_N: tl.constexpr, RUNS: tl.constexpr, SIZE: tl.constexpr):
    all_four = tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), (0, 1, 4, 3, 2))
    return tl.reshape(all_four, [BLOCK_N, 4 * RUNS, SIZE])


@triton.jit
def split_run(values, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same values in runs of SIZE, those that share a scale."""
    return tl.reshape(values, [BLOCK_N, BLOCK_K // SIZE, SIZE])


@triton.jit
def nibble_codes(
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
    packed = load_bytes(data + at, number * 32 < K, EVEN)
    return packed & 15, packed >> 4


# --- float8 E4M3 ----------------------------------------------------------------------------------


@triton.jit
def to_fp8(x):
    """|x| <= 448 as the bytes of float8 e4m3, to nearest even."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Subnormal numbers are multiples of 2^-9, the spacing of float32 from 2^14 on: adding rounds.
    small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    return (sign | tl.where(tl.abs(x) < 0.015625, small, normal)).to(tl.uint8)


@triton.jit
def fp8_values(code):
    """Bytes in float32: exponent and mantissa are those of a float16 that is 2^8 times smaller."""
    bits = ((code & 0x7F) << 7) | ((code & 0x80) << 8)
    value = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)
