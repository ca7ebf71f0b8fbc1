# mypy: allow-untyped-defs
"""The Triton kernel that rounds rows of x to codes, int8 or float8 E4M3, with a scale per group."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from tilewise.quant.triton_bytes import fp8_values, to_fp8


@triton.jit
def quantize_rows(
    x,
    codes,
    scales,
    sums,
    rounded,
    K,
    groups,
    x_stride,
    ACT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some groups of a row as `naive.quantize_groups` rounds them.

    Writes codes and scales of the groups, and of int8 the sums of codes, or, if `rounded` is there,
    only the values that x is rounded to. A row that is one group (GROUP is -1) takes two passes.

    Args:
        codes: int8; of fp8 its bytes, or the same numbers in float16.
        ACT: "int8" or "fp8".
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    if GROUP > 0:
        group = tl.program_id(1) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = column < K
        h = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        scale = _scale_of(tl.max(tl.abs(h), 1), tl.max(tl.where(h - h == 0, 0, 1), 1), ACT)
        code = _codes_of(h, scale[:, None], ACT)
        if rounded is not None:
            y = (code * scale[:, None]).to(rounded.dtype.element_ty)
            tl.store(rounded + row * K + column, y, mask=inside)
        else:
            at = row * groups + group
            here = codes + row * groups * GROUP + column
            _store_codes(here, code, column < groups * GROUP)
            tl.store(scales + at, scale, mask=group < groups)
            if sums is not None:
                tl.store(sums + at, tl.sum(code, 1).to(tl.int32), mask=group < groups)
    else:
        largest = tl.zeros([BLOCK], tl.float32)
        is_bad = tl.zeros([BLOCK], tl.int32)
        for k in range(0, K, BLOCK):
            column = k + tl.arange(0, BLOCK)
            h = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(h))
            is_bad |= tl.where(h - h == 0, 0, 1)
        scale = _scale_of(tl.max(largest, 0), tl.max(is_bad, 0), ACT)
        total = tl.zeros([BLOCK], tl.int32)
        for k in range(0, K, BLOCK):
            column = k + tl.arange(0, BLOCK)
            h = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)
            code = _codes_of(h, scale, ACT)
            if rounded is not None:
                y = (code * scale).to(rounded.dtype.element_ty)
                tl.store(rounded + row * K + column, y, mask=column < K)
            else:
                _store_codes(codes + row * K + column, code, column < K)
                if sums is not None:
                    total += code.to(tl.int32)
        if rounded is None:
            tl.store(scales + row, scale)
            if sums is not None:
                tl.store(sums + row, tl.sum(total, 0))


@triton.jit
def _scale_of(largest, is_bad, ACT: tl.constexpr):
    """NaN where something was not finite. Only a correctly rounded quotient is the definition's."""
    LARGEST_CODE: tl.constexpr = 127.0 if ACT == "int8" else 448.0
    scale = tl.div_rn(largest, tl.zeros_like(largest) + LARGEST_CODE)
    return tl.where(is_bad != 0, float("nan"), scale)


@triton.jit
def _codes_of(h, scale, ACT: tl.constexpr):
    """Codes as numbers. NaN gives code 0, and the scale says NaN."""
    quotient = tl.div_rn(h, tl.zeros_like(h) + tl.where(scale > 0, scale, 1.0))
    quotient = tl.where(scale == scale, quotient, 0.0)
    if ACT == "int8":
        code = quotient + 12582912.0 - 12582912.0  # 1.5 * 2^23 rounds to even
        return tl.minimum(tl.maximum(code, -127.0), 127.0)
    else:
        tl.static_assert(ACT == "fp8")
        code = to_fp8(tl.minimum(tl.maximum(quotient, -448.0), 448.0))
        return fp8_values(code.to(tl.int32))


@triton.jit
def _store_codes(at, code, mask):
    """Whichever type holds the codes, it holds them exactly."""
    if at.dtype.element_ty == tl.uint8:
        tl.store(at, to_fp8(code), mask=mask)
    else:
        tl.store(at, code.to(at.dtype.element_ty), mask=mask)
