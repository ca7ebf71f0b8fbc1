# mypy: allow-untyped-defs
"""What the kernels of the attention's backward pass share: sums of rows, a tile's gradients."""

import triton
import triton.language as tl

from tilewise.attention.triton_kernels import LOG2_E, score


@triton.jit
def row_sums(
    grad_out,
    out,
    lse,
    grad_lse,
    shifts,
    delta,
    count,
    heads,
    tokens,
    room,
    dim,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """delta = sum(grad_out * out) - grad_lse of ROWS rows of `count`, and lse in base 2.

    Those come out as (batch, heads, room), so that tokens are contiguous, and the shift of a row
    that sees nothing is 0; all else is contiguous as (batch, tokens, heads, dim).
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = rows < count
    columns = tl.arange(0, BLOCK)
    inside = here[:, None] & (columns < dim)[None, :]
    at = rows[:, None] * dim + columns[None, :]
    o = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(o * g, 1)
    if grad_lse is not None:
        total -= tl.load(grad_lse + rows, mask=here, other=0.0)
    shift = tl.load(lse + rows, mask=here, other=0.0)
    shift = tl.where(shift == float("-inf"), 0.0, shift * LOG2_E)
    token = rows // heads
    to = (token // tokens * heads + rows % heads) * room + token % tokens
    tl.store(delta + to, total, mask=here)
    tl.store(shifts + to, shift, mask=here)


@triton.jit
def tile_gradients(
    rows,
    rows_rest,
    row_values,
    columns,
    columns_rest,
    column_values,
    shift,
    delta,
    queries,
    keys,
    begins,
    ends,
    past,
    scale,
    softcap,
    slope,
    bias,
    bias_stride_q,
    bias_stride_k,
    MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_MASK: tl.constexpr,
    D_REST: tl.constexpr,
):
    """Weights p of a tile, gradients of its scores, and of scaled products of queries and keys.

    Rows are queries and columns are keys, or the other way round, so that whoever multiplies what
    this returns has it in registers as it is; with queries come their grad_out, with keys values.
    """
    dots = tl.dot(rows, tl.trans(columns), input_precision="ieee")
    if D_REST > 0:
        dots = tl.dot(rows_rest, tl.trans(columns_rest), dots, input_precision="ieee")
    s, seen, tanh = score(
        dots, queries, keys, begins, ends, past, scale, softcap, slope, bias, bias_stride_q,
        bias_stride_k, HAS_LEFT, HAS_SOFTCAP, HAS_ALIBI, HAS_BIAS, IS_MASK, MASKED, FOLD=False,
        CHECK=False,
    )  # fmt: skip
    # Of a row that sees what is not finite the log-sum-exp is NaN, and so is all that follows.
    p = tl.exp2(s - shift)
    of_p = tl.dot(row_values, tl.trans(column_values), input_precision="ieee")
    of_s = p * (of_p - delta)
    if MASKED or HAS_BIAS:  # 0 x NaN of a value that is not seen
        p = tl.where(seen, p, 0.0)
        of_s = tl.where(seen, of_s, 0.0)
    of_dots = of_s
    if HAS_SOFTCAP:
        of_dots *= 1.0 - tanh * tanh
        if MASKED or HAS_BIAS:  # as above, of a key
            of_dots = tl.where(seen, of_dots, 0.0)
    return p, of_s, of_dots
