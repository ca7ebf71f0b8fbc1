"""The Triton kernel of `merge_states`. Imported by the first call that launches it.

Source: Ye et al., FlashInfer, 2025 (arXiv:2501.01005), section 2.2.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def merge_states(
    out_a,  # (rows, DIM), as out_b and out
    lse_a,  # (rows,), as lse_b and lse
    out_b,
    lse_b,
    out,
    lse,
    rows,
    a_stride,
    b_stride,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows: each side weighs what its softmax summed to."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    a = tl.load(lse_a + row, mask=here, other=0.0)
    b = tl.load(lse_b + row, mask=here, other=0.0)
    larger = tl.maximum(a, b)  # passes over a NaN, which the sum does not
    shift = tl.where(larger == float("-inf"), 0.0, larger)
    weight_a = tl.exp(a - shift)
    weight_b = tl.exp(b - shift)
    total = weight_a + weight_b
    divisor = tl.where(total == 0.0, 1.0, total)
    log_sum = tl.where(total == 0.0, float("-inf"), shift + tl.log(divisor))
    tl.store(lse + row, log_sum, mask=here)
    # A side that saw nothing may hold anything: weighed with zero, a NaN would stay.
    at = tl.arange(0, BLOCK)
    inside = (at < DIM)[None, :]
    x = tl.load(
        out_a + (row * a_stride)[:, None] + at[None, :],
        mask=(here & (a != float("-inf")))[:, None] & inside,
        other=0.0,
    ).to(tl.float32)
    y = tl.load(
        out_b + (row * b_stride)[:, None] + at[None, :],
        mask=(here & (b != float("-inf")))[:, None] & inside,
        other=0.0,
    ).to(tl.float32)
    merged = x * (weight_a / divisor)[:, None] + y * (weight_b / divisor)[:, None]
    tl.store(
        out + (row * DIM)[:, None] + at[None, :],
        merged.to(out.dtype.element_ty),
        mask=here[:, None] & inside,
    )
