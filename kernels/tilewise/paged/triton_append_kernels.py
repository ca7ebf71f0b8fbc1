# mypy: allow-untyped-defs
"""The Triton kernel that writes new tokens to a paged cache: rotation, quantization and scatter.

The bytes are those of the definition (tilewise/paged/kv_formats.py), which takes care to consist of
IEEE operations only. So this is launched without fused multiply-adds, divides as IEEE says, and
rounds by adding and subtracting a number so large that what is left of the sum is an integer.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from tilewise.quant.triton_bytes import to_fp8


@triton.jit
def _round(x):
    """To the nearest integer, ties to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0  # 1.5 x 2^23


@triton.jit
def _load(
    x,
    at,
    inside,
    heads,
    cos,
    sin,
    is_outside,
    PAIRS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
):
    """Elements `at` (BLOCK,) of every head's row (HEADS, 1) pointed to, rotated; in x's dtype.

    cos and sin point to the rows of the token's position; None where there is nothing to rotate. A
    position outside the tables has NaN for both.
    """
    mask = heads & inside[None, :]
    value = tl.load(x + at[None, :], mask=mask, other=0.0)
    if cos is not None:
        # (a, b) -> (a cos - b sin, b cos + a sin)
        if IS_INTERLEAVED:
            is_first = at % 2 == 0
            pair = at // 2
            other = tl.where(is_first, at + 1, at - 1)
        else:
            is_first = at < PAIRS
            pair = tl.where(is_first, at, at - PAIRS)
            other = tl.where(is_first, at + PAIRS, at - PAIRS)
        turns = inside & (at < 2 * PAIRS)
        partner = tl.load(x + other[None, :], mask=mask & turns[None, :], other=0.0)
        c = tl.load(cos + pair, mask=turns, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + pair, mask=turns, other=0.0).to(tl.float32)[None, :]
        c = tl.where(is_outside, float("nan"), c)
        s = tl.where(is_outside, float("nan"), s)
        s = tl.where(is_first[None, :], -s, s)
        turned = value.to(tl.float32) * c + partner.to(tl.float32) * s
        value = tl.where(turns[None, :], turned.to(value.dtype), value)
    return value


@triton.jit
def _scale_of(x, y, LARGEST: tl.constexpr):
    """The scale of rows whose elements are those of x and y, (HEADS,)."""
    x = tl.abs(x)
    y = tl.abs(y)
    largest = tl.maximum(tl.max(x, 1), tl.max(y, 1))
    # A maximum may pass over NaN.
    is_nan = tl.maximum(tl.max((x != x).to(tl.int32), 1), tl.max((y != y).to(tl.int32), 1))
    return tl.where(
        is_nan == 1, float("nan"), tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32))
    )


@triton.jit
def _codes(x, scale, LARGEST: tl.constexpr):
    """Codes (HEADS, BLOCK) before they are rounded; 0 in rows whose scale is not finite."""
    is_finite = tl.abs(scale) < float("inf")
    divisor = tl.where(is_finite & (scale > 0), scale, 1.0)[:, None]
    x = tl.where(is_finite[:, None], x, 0.0)
    # The bounds are for scales so small that they have few bits left.
    x = tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@triton.jit
def _append(
    x,  # (tokens, kv_heads, DIM)
    cache,
    scale,
    token,
    page,
    slot,
    head,
    kv_heads,
    x_token_stride,
    x_head_stride,
    page_stride,
    slot_stride,
    head_stride,
    scale_page_stride,
    scale_slot_stride,
    scale_head_stride,
    cos,
    sin,
    is_outside,
    PAIRS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    FORMAT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some heads of one token, keys or values."""
    heads = (head < kv_heads)[:, None]
    row = x + token * x_token_stride + (head * x_head_stride)[:, None]
    to = cache + page * page_stride + slot * slot_stride + (head * head_stride)[:, None]
    at = tl.arange(0, BLOCK)
    count: tl.constexpr = DIM // 2 if FORMAT == "int4" else DIM  # of what is stored
    inside = at < count
    value = _load(row, at, inside, heads, cos, sin, is_outside, PAIRS, IS_INTERLEAVED)
    mask = heads & inside[None, :]
    if FORMAT == "float":
        tl.store(to + at[None, :], value.to(cache.dtype.element_ty), mask=mask)
    else:
        value = value.to(tl.float32)
        second = value
        if FORMAT == "int4":
            second = _load(
                row, at + count, inside, heads, cos, sin, is_outside, PAIRS, IS_INTERLEAVED
            )
            second = second.to(tl.float32)
        largest: tl.constexpr = 127.0 if FORMAT == "int8" else 448.0 if FORMAT == "fp8" else 7.0
        row_scale = _scale_of(value, second, largest)
        codes = _codes(value, row_scale, largest)
        if FORMAT == "fp8":
            stored = to_fp8(codes)
        elif FORMAT == "int8":
            stored = _round(codes).to(tl.int8)
        else:
            high = _round(_codes(second, row_scale, largest)).to(tl.int32) + 8
            stored = (_round(codes).to(tl.int32) + 8 + high * 16).to(tl.uint8)
        tl.store(to + at[None, :], stored, mask=mask)
        scale_at = page * scale_page_stride + slot * scale_slot_stride + head * scale_head_stride
        tl.store(scale + scale_at, row_scale, mask=head < kv_heads)


@triton.jit
def append_kv(
    k,  # (tokens, kv_heads, DIM)
    v,  # (tokens, kv_heads, V_DIM)
    k_cache,  # (pages, page_size, kv_heads, DIM, or DIM / 2 bytes of int4)
    v_cache,
    k_scale,  # (pages, page_size, kv_heads), or None
    v_scale,
    slots,
    positions,
    cos,  # (table_rows, PAIRS), or None
    sin,
    kv_heads,
    num_slots,
    page_size,
    table_rows,
    slots_stride,
    positions_stride,
    cos_stride,
    sin_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    kc_page_stride,
    kc_slot_stride,
    kc_head_stride,
    vc_page_stride,
    vc_slot_stride,
    vc_head_stride,
    ks_page_stride,
    ks_slot_stride,
    ks_head_stride,
    vs_page_stride,
    vs_slot_stride,
    vs_head_stride,
    PAIRS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    FORMAT: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """HEADS heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token * slots_stride)
    if (slot < 0) | (slot >= num_slots):
        return
    head = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    page = slot // page_size
    slot = slot % page_size
    cos_row = cos
    sin_row = sin
    is_outside = slot < 0  # no
    if cos is not None:
        position = tl.load(positions + token * positions_stride)
        is_outside = (position < 0) | (position >= table_rows)
        position = tl.where(is_outside, 0, position)
        cos_row = cos + position * cos_stride
        sin_row = sin + position * sin_stride
    _append(
        k,
        k_cache,
        k_scale,
        token,
        page,
        slot,
        head,
        kv_heads,
        k_token_stride,
        k_head_stride,
        kc_page_stride,
        kc_slot_stride,
        kc_head_stride,
        ks_page_stride,
        ks_slot_stride,
        ks_head_stride,
        cos_row,
        sin_row,
        is_outside,
        PAIRS,
        IS_INTERLEAVED,
        FORMAT,
        DIM,
        BLOCK,
    )
    _append(
        v,
        v_cache,
        v_scale,
        token,
        page,
        slot,
        head,
        kv_heads,
        v_token_stride,
        v_head_stride,
        vc_page_stride,
        vc_slot_stride,
        vc_head_stride,
        vs_page_stride,
        vs_slot_stride,
        vs_head_stride,
        None,
        None,
        False,
        0,
        False,
        FORMAT,
        V_DIM,
        V_BLOCK,
    )
