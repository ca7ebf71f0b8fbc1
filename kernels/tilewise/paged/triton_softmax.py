# mypy: allow-untyped-defs
"""The online softmax of paged attention in Triton: keys taken in tile by tile, and its end.

The state is the sums of weights times values, the maximum of the scores and the sum of the weights,
in base 2. Masked keys and slots that nobody has written may hold anything, NaN included.
"""

import triton
import triton.language as tl

from tilewise.paged.triton_rows import all_finite, is_finite, load_parts

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(x):
    """Hyperbolic tangent, as exact for small x as for large."""
    y = x * x
    # x + x^3 P(x^2), P fitted on |x| <= 0.6; beyond, the exponential loses no digits.
    p = -0.0062764 * y + 0.02111624
    p = (p * y - 0.05387515) * y + 0.13332924
    small = x + x * y * (p * y - 0.3333333)
    e = tl.exp2(tl.abs(x) * (2 * LOG2E))
    large = 1 - 2 / (e + 1)
    return tl.where(tl.abs(x) < 0.6, small, tl.where(x < 0, -large, large))


@triton.jit
def attend(
    acc_1,  # (M, V_BLOCK_1) and (M, V_BLOCK_2): sums of weights x values
    acc_2,
    m,  # (M,): maxima of the scores, in units of log 2
    l,  # (M,): sums of the weights
    q_1,  # (M, BLOCK_1) and (M, BLOCK_2)
    q_2,
    begin,  # of the keys, a multiple of N
    end,
    any_begin,  # keys [any_begin, any_end) are seen by some row
    any_end,
    row_begin,  # (M,): keys [row_begin, row_end) are seen by each
    row_end,
    position,  # (M,)
    slope,  # (M,)
    k,  # from here on of the key head at hand
    v,
    k_scale,
    v_scale,
    bias,  # (M,) pointers
    pages,  # numbers of the pages, or where PAGE_SIZE is 0 the only one
    num_pages,
    k_page_stride,
    k_slot_stride,
    v_page_stride,
    v_slot_stride,
    ks_page_stride,
    ks_slot_stride,
    vs_page_stride,
    vs_slot_stride,
    bias_stride,
    score_scale,
    softcap,
    N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIM_1: tl.constexpr,
    BLOCK_1: tl.constexpr,
    DIM_2: tl.constexpr,
    BLOCK_2: tl.constexpr,
    V_DIM_1: tl.constexpr,
    V_BLOCK_1: tl.constexpr,
    V_DIM_2: tl.constexpr,
    V_BLOCK_2: tl.constexpr,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    CODE_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    BIAS: tl.constexpr,
    MASKED: tl.constexpr,  # not all rows see all of these keys
    CAREFUL: tl.constexpr,  # nor do all rows see the same ones
):
    """Take the keys [begin, end) in, tile by tile."""
    for start in range(begin, end, N):
        at = start + tl.arange(0, N)
        if PAGE_SIZE == 0:
            exists = at >= 0
            if MASKED:
                exists = (at >= any_begin) & (at < any_end)
            page = pages.to(tl.int64)
            slot = at.to(tl.int64)
        else:
            if MASKED:
                page = tl.load(
                    pages + at // PAGE_SIZE, mask=(at >= any_begin) & (at < any_end), other=-1
                )
            else:
                page = tl.load(pages + at // PAGE_SIZE)
            exists = (page >= 0) & (page < num_pages)
            page = tl.where(exists, page, 0).to(tl.int64)
            slot = (at % PAGE_SIZE).to(tl.int64)
        k_1, k_2 = load_parts(
            k + page * k_page_stride + slot * k_slot_stride,
            exists,
            DIM_1,
            BLOCK_1,
            DIM_2,
            BLOCK_2,
            FORMAT,
            DTYPE,
        )
        s = tl.dot(q_1, tl.trans(k_1), input_precision=PRECISION)
        if BLOCK_2 > 0:
            s = tl.dot(q_2, tl.trans(k_2), s, input_precision=PRECISION)
        if FORMAT == "float":
            s *= score_scale
        else:
            ks = tl.load(
                k_scale + page * ks_page_stride + slot * ks_slot_stride, mask=exists, other=0.0
            )
            s *= (ks * score_scale)[None, :]
        # Infinity comes from a query or a key that is not finite, which means NaN.
        s += s * 0.0
        visible = exists[None, :]
        if MASKED:
            visible = visible & (at[None, :] >= row_begin[:, None])
            visible = visible & (at[None, :] < row_end[:, None])
        if HAS_SOFTCAP:
            s = softcap * _tanh(s)
        if HAS_ALIBI:
            s -= slope[:, None] * tl.abs(position[:, None] - at[None, :]).to(tl.float32)
        if BIAS != "none":
            b = tl.load(
                bias[:, None] + at[None, :].to(tl.int64) * bias_stride, mask=visible, other=0
            )
            if BIAS == "mask":
                visible = visible & (b != 0)
            else:
                b = b.to(tl.float32)
                visible = visible & (b != float("-inf"))
                s += b
        if HAS_SOFTCAP or HAS_ALIBI or BIAS == "float":
            s *= LOG2E
        s = tl.where(visible, s, float("-inf"))

        new_m = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(new_m == float("-inf"), 0.0, new_m)
        factor = tl.exp2(m - shift)
        p = tl.exp2(s - shift[:, None])
        l = l * factor + tl.sum(p, 1)
        m = new_m

        v_1, v_2 = load_parts(
            v + page * v_page_stride + slot * v_slot_stride,
            exists,
            V_DIM_1,
            V_BLOCK_1,
            V_DIM_2,
            V_BLOCK_2,
            FORMAT,
            DTYPE,
        )
        if FORMAT != "float":
            vs = tl.load(
                v_scale + page * vs_page_stride + slot * vs_slot_stride, mask=exists, other=0.0
            )
        if CAREFUL:
            # 0 x NaN is NaN: a value that is not finite becomes 0, and NaN for those who see it.
            good = tl.full([N], 1, tl.int32)
            if FORMAT == "float" or FORMAT == "fp8":
                good = all_finite(v_1)
                if V_BLOCK_2 > 0:
                    good = tl.minimum(good, all_finite(v_2))
            if FORMAT != "float":
                good = tl.minimum(good, is_finite(vs).to(tl.int32))
                vs = tl.where(good == 1, vs, 0.0)
            v_1 = tl.where((good == 1)[:, None], v_1, 0.0).to(DTYPE)
            if V_BLOCK_2 > 0:
                v_2 = tl.where((good == 1)[:, None], v_2, 0.0).to(DTYPE)
            p = tl.where(visible & (good == 0)[None, :], float("nan"), p)
        if FORMAT != "float":
            # A scale times the largest code is a value's size: the products are as far from the
            # ends of DTYPE's range as the result is.
            p *= (vs * CODE_SCALE)[None, :]
        p = p.to(DTYPE)
        acc_1 = tl.dot(p, v_1, acc_1 * factor[:, None], input_precision=PRECISION)
        if V_BLOCK_2 > 0:
            acc_2 = tl.dot(p, v_2, acc_2 * factor[:, None], input_precision=PRECISION)
    return acc_1, acc_2, m, l


@triton.jit
def normalise(m, l, sink):
    """What to multiply the sums by, and the logarithm of the weights' sum, sink included."""
    top = tl.maximum(m, sink)
    shift = tl.where(top == float("-inf"), 0.0, top)
    factor = tl.exp2(m - shift)
    total = l * factor + tl.exp2(sink - shift)
    divisor = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), (shift + tl.log2(divisor)) * LN2)
    return tl.where(l == 0.0, 0.0, factor / divisor), lse
