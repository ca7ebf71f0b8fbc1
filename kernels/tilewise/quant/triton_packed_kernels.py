# mypy: allow-untyped-defs
"""The Triton kernels of products with int4 and int8 weights in 16 bits, for NVIDIA's chips.

What a product of a few rows costs is the unpacking: a chip has half as many units for the bits of
an integer as for float32. So codes are never numbers of 32 bits here, but become the mantissas of
floats.

For tensor cores an AND and an OR make two 16-bit floats of two codes, 2^7 + code in bfloat16 and
2^10 + code in float16, and one FMA subtracts what was added and the zero, exactly. Scales multiply
sums, not weights: the sum of each group, in float32. Where many rows share the weight that would
cost more than scaled weights, so there the scale multiplies them, too, in pairs.

One or two rows are multiplied without tensor cores, by float32 of which the code is one byte; what
was added is subtracted from sums of 16 products, as so many times the sum of x.

The trick with the exponent is from Kim et al., Who Says Elephants Can't Run: Bringing Large Scale
MoE Models into Cloud Scale Production, 2022 (arXiv:2211.10017).
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from tilewise.gpu import INTERPRETED
from tilewise.quant.triton_finish_kernels import place, store_or_part


def _assembly(magic: str, subtract: str) -> tl.constexpr:
    """Of two uint16 in $4, the low halves of both bytes ($0, $1) and the high ones; $5 is added."""
    return tl.constexpr(
        f"""{{
        .reg .b32 a, b, c, one;
        mov.b32 one, 0x3F803F80;
        shr.u32 a, $4, 8;
        shr.u32 b, $4, 4;
        shr.u32 c, $4, 12;
        lop3.b32 $0, $4, 0x000F000F, {magic}, 0xEA;
        lop3.b32 $1, a, 0x000F000F, {magic}, 0xEA;
        lop3.b32 $2, b, 0x000F000F, {magic}, 0xEA;
        lop3.b32 $3, c, 0x000F000F, {magic}, 0xEA;
        """
        + "".join(subtract.format(i) for i in range(4))
        + "}"
    )


_BFLOAT16 = _assembly("0x43004300", "fma.rn.bf16x2 ${0}, ${0}, one, $5; ")
_FLOAT16 = _assembly("0x64006400", "add.rn.f16x2 ${0}, ${0}, $5; ")


@triton.jit
def _centred_codes(words, zero, dtype: tl.constexpr):
    """code - zero of the nibbles of uint16, two words at a time: low of each byte, high of each.

    Args:
        zero: int32, of the words' shape.
    """
    if dtype == tl.bfloat16:
        bias = (zero | 0xC300).to(tl.uint16).to(tl.bfloat16, bitcast=True)  # -(2^7 + zero)
        return tl.inline_asm_elementwise(
            _BFLOAT16,
            "=&r,=&r,=&r,=&r,r,r",
            [words, bias],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        bias = (zero | 0xE400).to(tl.uint16).to(tl.float16, bitcast=True)  # -(2^10 + zero)
        return tl.inline_asm_elementwise(
            _FLOAT16,
            "=&r,=&r,=&r,=&r,r,r",
            [words, bias],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def _group_tile(words, zero, dtype: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """One group of each row of the weight, code - zero: (BLOCK_N, GROUP)."""
    RUNS: tl.constexpr = GROUP // 32
    zero = tl.broadcast_to(zero[:, None, None], [BLOCK_N, RUNS, 8])
    low_even, low_odd, high_even, high_odd = _centred_codes(words, zero, dtype)
    low = tl.reshape(tl.join(low_even, low_odd), [BLOCK_N, RUNS, 16])
    high = tl.reshape(tl.join(high_even, high_odd), [BLOCK_N, RUNS, 16])
    return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2)), [BLOCK_N, GROUP])


@triton.jit
def _add_group(
    y, h, words, zero, scale, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr
):
    """y + the product of a group of the weight and of h (GROUP, BLOCK_M)."""
    dtype: tl.constexpr = h.dtype
    w = _group_tile(words, zero, dtype, BLOCK_N, GROUP)
    if SCALED:
        return tl.dot(w * scale.to(dtype)[:, None], h, y)
    else:
        return y + tl.dot(w, h) * scale.to(tl.float32)[:, None]


@triton.jit
def _zeros_of(zeros, rows, groups, at):
    """The zeros of four groups of each row, a byte each."""
    if zeros is not None:
        fours = zeros.to(tl.pointer_type(tl.int32), bitcast=True)
        return tl.load(fours + rows * (groups // 4) + at)
    else:
        return (rows * 0 + 0x08080808).to(tl.int32)


@triton.jit
def matmul_packed(
    x,
    data,
    scales,
    zeros,
    bias,
    residual,
    projected,
    adapter_b,
    out,
    M,
    N,
    K,
    x_stride,
    row_bytes: tl.constexpr,
    groups,
    rank,
    k_per_split,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A tile of the product, as `triton_kernels.matmul` has it.

    Four groups at a time, so that their zeros and scales are loaded in words of 4 and 8 bytes,
    which are copied to shared memory ahead of their use, as the codes are. K is a multiple of
    that; scales are float16.
    """
    PAIR: tl.constexpr = ACTIVATION == "swiglu"
    RUNS: tl.constexpr = GROUP // 32
    OUT = N // 2 if PAIR else N
    n, m = place(M, BLOCK_N, BLOCK_M)
    rows = tl.minimum(n, OUT - 1)
    x_rows = tl.minimum(m, M - 1) * x_stride
    begin = tl.program_id(1) * k_per_split
    words = data.to(tl.pointer_type(tl.uint16), bitcast=True)
    fours = scales.to(tl.pointer_type(tl.int64), bitcast=True)
    y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(begin, min(begin + k_per_split, K), 4 * GROUP):
        four = k // (4 * GROUP)
        zero4 = _zeros_of(zeros, rows, groups, four)
        scale4 = tl.load(fours + rows * (groups // 4) + four)
        up_zero4 = zero4
        up_scale4 = scale4
        if PAIR:
            up_zero4 = _zeros_of(zeros, rows + OUT, groups, four)
            up_scale4 = tl.load(fours + (rows + OUT) * (groups // 4) + four)
        for i in tl.static_range(4):
            column = k + i * GROUP + tl.arange(0, GROUP)
            h = tl.load(x + x_rows[None, :] + column[:, None])
            run = (k // 32 + i * RUNS + tl.arange(0, RUNS))[None, :, None]
            within = run * 8 + tl.arange(0, 8)[None, None, :]
            at = words + (rows * (row_bytes // 2))[:, None, None] + within
            scale = (scale4 >> (16 * i)).to(tl.uint16).to(tl.float16, bitcast=True)
            y = _add_group(
                y, h, tl.load(at), (zero4 >> (8 * i)) & 255, scale, BLOCK_N, GROUP, SCALED
            )
            if PAIR:
                at += OUT.to(tl.int64) * (row_bytes // 2)
                scale = (up_scale4 >> (16 * i)).to(tl.uint16).to(tl.float16, bitcast=True)
                up = _add_group(
                    up, h, tl.load(at), (up_zero4 >> (8 * i)) & 255, scale, BLOCK_N, GROUP, SCALED
                )
    store_or_part(
        y, up, n, m, M, N, bias, residual, projected, adapter_b, rank, out, tl.program_id(1),
        ACTIVATION, SPLITS,
    )  # fmt: skip


def _floats(name: str, selector: str, first: int) -> str:
    """Bytes of a register as float32 of the exponent 2^7, from output `first` on."""
    return "".join(
        f"prmt.b32 ${first + i}, {name}, magic, 0x{selector.format(i)}; " for i in range(4)
    )


# Four bytes in $8: their low halves ($0 to $3) and high ones ($4 to $7), 2^7 + code. A code that
# becomes the third byte of a float32 stands where its 1 is worth 1.
_NIBBLES = tl.constexpr(
    "{ .reg .b32 low, high, magic; mov.b32 magic, 0x43000000; "
    "and.b32 low, $8, 0x0F0F0F0F; shr.u32 high, $8, 4; and.b32 high, high, 0x0F0F0F0F; "
    + _floats("low", "7{}44", 0)
    + _floats("high", "7{}44", 4)
    + "}"
)
# Four signed bytes in $4, as the second byte of a float32: 2^7 + (code + 128) / 256.
_BYTES = tl.constexpr(
    "{ .reg .b32 codes, magic; mov.b32 magic, 0x43000000; xor.b32 codes, $4, 0x80808080; "
    + _floats("codes", "74{}4", 0)
    + "}"
)
_FOUR, _EIGHT = (tl.constexpr((tl.float32,) * n) for n in (4, 8))
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _mantissas(words, FLIP: tl.constexpr, ONE: tl.constexpr):
    """What the assembly makes of four bytes, for the interpreter, which knows none."""
    a, b, c, d = words & 255, (words >> 8) & 255, (words >> 16) & 255, (words >> 24) & 255
    a, b, c, d = a ^ FLIP, b ^ FLIP, c ^ FLIP, d ^ FLIP
    return 128.0 + a * ONE, 128.0 + b * ONE, 128.0 + c * ONE, 128.0 + d * ONE


@triton.jit
def _nibble_floats(words):
    if _INTERPRETED:
        a, b, c, d = _mantissas(words & 0x0F0F0F0F, 0, 1.0)
        e, f, g, h = _mantissas((words >> 4) & 0x0F0F0F0F, 0, 1.0)
        return a, b, c, d, e, f, g, h
    else:
        return tl.inline_asm_elementwise(
            _NIBBLES, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [words], dtype=_EIGHT, is_pure=True,
            pack=1,
        )  # fmt: skip


@triton.jit
def _byte_floats(words):
    if _INTERPRETED:
        return _mantissas(words, 128, 1 / 256)
    else:
        return tl.inline_asm_elementwise(
            _BYTES, "=&r,=&r,=&r,=&r,r", [words], dtype=_FOUR, is_pure=True, pack=1
        )


@triton.jit
def _sixteen_floats(data, rows, chunk, inside, row_bytes: tl.constexpr, FORMAT: tl.constexpr):
    """The codes of chunks of 16 weights as float32, see above: (CHUNKS, BLOCK_N, 2) eight times."""
    words = data.to(tl.pointer_type(tl.int32), bitcast=True)
    CHUNK_WORDS: tl.constexpr = 2 if FORMAT == "int4" else 4
    at = (rows * (row_bytes // 4))[None, :, None] + (chunk * CHUNK_WORDS)[:, None, None]
    at += tl.arange(0, 2)[None, None, :]
    first = tl.load(words + at, mask=inside[:, None, None], other=0)
    if FORMAT == "int4":
        return _nibble_floats(first)
    else:
        second = tl.load(words + at + 2, mask=inside[:, None, None], other=0)
        return _byte_floats(first) + _byte_floats(second)


@triton.jit
def _scale_and_zero(
    scales, zeros, rows, chunk, inside, groups, FORMAT: tl.constexpr, GROUP: tl.constexpr
):
    """What floats of codes are scaled by and less: (CHUNKS, BLOCK_N), or of rows (1, BLOCK_N)."""
    group = rows[None, :]
    is_here = group >= 0
    if GROUP > 0:
        group = group * groups + (chunk // (GROUP // 16))[:, None]
        is_here = inside[:, None]
    scale = tl.load(scales + group, mask=is_here, other=0.0).to(tl.float32)
    zero = tl.zeros([1, 1], tl.float32)
    if zeros is not None:
        zero = tl.load(zeros + group, mask=is_here, other=0).to(tl.float32)
    if FORMAT == "int4":
        return scale, 128.0 + (8.0 if zeros is None else zero)
    else:
        return scale * 256.0, 128.5 + zero / 256.0


@triton.jit
def _fours(x, CHUNKS: tl.constexpr):
    """Every fourth column of (CHUNKS, 8), four times (CHUNKS, 1, 2)."""
    even, odd = tl.split(tl.reshape(x, [CHUNKS, 2, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first[:, None], second[:, None], third[:, None], fourth[:, None]


@triton.jit
def _add_chunks(
    y, x, x_stride, data, scales, zeros, rows, chunk, inside, row_bytes: tl.constexpr, groups, M,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """y (CHUNKS, BLOCK_N, BLOCK_M) + the products of 16 weights each, of one group, with x.

    Chunks come first in all shapes, because Triton deals the first dimension out to threads.
    """
    a, b, c, d, e, f, g, h = _sixteen_floats(data, rows, chunk, inside, row_bytes, FORMAT)
    scale, zero = _scale_and_zero(scales, zeros, rows, chunk, inside, groups, FORMAT, GROUP)
    # Of int4, the low halves of 16 bytes are 16 weights and the high ones the next 16.
    HIGH: tl.constexpr = 16 if FORMAT == "int4" else 8
    column = chunk // 2 * 32 + chunk % 2 * 8 if FORMAT == "int4" else chunk * 16
    column = column[:, None] + tl.arange(0, 8)[None, :]
    for m in tl.static_range(BLOCK_M):
        of_x = x + tl.minimum(m, M - 1).to(tl.int64) * x_stride + column
        low = tl.load(of_x, mask=inside[:, None], other=0.0).to(tl.float32)
        high = tl.load(of_x + HIGH, mask=inside[:, None], other=0.0).to(tl.float32)
        low_1, low_2, low_3, low_4 = _fours(low, CHUNKS)
        high_1, high_2, high_3, high_4 = _fours(high, CHUNKS)
        sums = a * low_1
        sums += b * low_2
        sums += c * low_3
        sums += d * low_4
        sums += e * high_1
        sums += f * high_2
        sums += g * high_3
        sums += h * high_4
        of_m = (tl.sum(sums, 2) - zero * tl.sum(low + high, 1)[:, None]) * scale
        if BLOCK_M == 1:
            y += of_m[:, :, None]
        else:
            y += tl.where(tl.arange(0, BLOCK_M)[None, None, :] == m, of_m[:, :, None], 0.0)
    return y


@triton.jit
def vector_words(
    x,
    data,
    scales,
    zeros,
    bias,
    residual,
    projected,
    adapter_b,
    out,
    M,
    N,
    K,
    x_stride,
    row_bytes: tl.constexpr,
    groups,
    rank,
    k_per_split,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """All of the few rows of x without tensor cores, so that no thread waits for another.

    A thread takes 16 weights at a time, of one group: it loads them with one instruction, sums up
    codes times x, and scales that sum. What threads have summed up meets at the end.
    """
    PAIR: tl.constexpr = ACTIVATION == "swiglu"
    OUT = N // 2 if PAIR else N
    CHUNKS: tl.constexpr = BLOCK_K // 16
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M).to(tl.int64)
    rows = tl.minimum(n, OUT - 1)
    begin = tl.program_id(1) * k_per_split
    y = tl.zeros([CHUNKS, BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([CHUNKS, BLOCK_N, BLOCK_M], tl.float32)
    for k in range(begin, min(begin + k_per_split, K), BLOCK_K):
        chunk = k // 16 + tl.arange(0, CHUNKS)
        inside = tl.full([CHUNKS], 1, tl.int1) if EVEN else chunk * 16 < K
        y = _add_chunks(
            y, x, x_stride, data, scales, zeros, rows, chunk, inside, row_bytes, groups, M, FORMAT,
            GROUP, BLOCK_M, CHUNKS,
        )  # fmt: skip
        if PAIR:
            up = _add_chunks(
                up, x, x_stride, data, scales, zeros, rows + OUT, chunk, inside, row_bytes, groups,
                M, FORMAT, GROUP, BLOCK_M, CHUNKS,
            )  # fmt: skip
    store_or_part(
        tl.sum(y, 0), tl.sum(up, 0), n, m, M, N, bias, residual, projected, adapter_b, rank, out,
        tl.program_id(1), ACTIVATION, SPLITS,
    )  # fmt: skip
