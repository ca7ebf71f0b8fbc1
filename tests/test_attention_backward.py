"""Gradients of the C++ kernels over several blocks of queries and keys: cases are too small for it.

Blocks have 96 queries and 192 keys, and threads add to the gradient of one query in turn.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import tilewise
from tilewise import native
from tilewise.cases import Case, check_case, run_case
from tilewise.testing import Inputs

pytestmark = pytest.mark.skipif(native.why_not_cpu() is not None, reason=str(native.why_not_cpu()))

_FLOORS = {"output": 0.5, "grad q": 2.5, "grad k": 2.5, "grad v": 1.25, "grad bias": 2.5}
_EVERYTHING: dict[str, Any] = {
    "causal": True,
    "window": (150, 0),
    "softcap": 5.0,
    "bias": (2, 1, 401),
    "alibi": True,
    "sinks": True,
}


def _case(q_len, k_len, heads, kv_heads, dim, v_dim, **options) -> Case:
    def make(inputs: Inputs) -> dict[str, Any]:
        made = dict(options)
        if "bias" in made:
            made["bias"] = inputs.randn(*made["bias"])
            made["bias"][..., 7] = -math.inf
        if made.pop("alibi", False):
            made["alibi_slopes"] = inputs.rand(heads, dtype=torch.float32) / 16
        if made.pop("sinks", False):
            made["sinks"] = inputs.randn(heads)
        q = inputs.randn(1, q_len, heads, dim)
        k, v = inputs.randn(1, k_len, kv_heads, dim), inputs.randn(1, k_len, kv_heads, v_dim)
        return {"q": q, "k": k, "v": v, "return_lse": True, **made}

    grad = ("q", "k", "v", *(name for name in ("bias", "sinks") if name in options))
    return Case("flash_attention", f"{q_len} x {k_len}", make, grad=grad, floors=_FLOORS)


_CASES = [
    _case(300, 300, 1, 1, 64, 64, causal=True),
    _case(97, 577, 2, 1, 80, 48),
    _case(400, 193, 2, 2, 16, 33, causal=True),
    _case(385, 401, 2, 2, 24, 40, window=(50, 100)),
    _case(211, 401, 2, 1, 40, 24, **_EVERYTHING),
]


_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@_DTYPES
@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.id)
def test_gradients_over_many_blocks_agree(case, dtype):
    check_case(case, "cpu", dtype, grad=True)


@_DTYPES
@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.id)
def test_the_order_of_threads_changes_no_bit(case, dtype):
    """Blocks that finish out of order would, once in some runs: hence the repetition."""
    arguments = case.make(Inputs(dtype))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run_case(case, arguments, "cpu", grad=True)
        for count in (2, 3, 8) * 3:
            torch.set_num_threads(count)
            actual = run_case(case, arguments, "cpu", grad=True)
            for name, value in expected.items():
                assert torch.equal(actual[name], value), (name, count)
    finally:
        torch.set_num_threads(threads)


@_DTYPES
def test_a_batch_row_has_the_gradients_that_it_has_alone(dtype):
    inputs = Inputs(dtype)
    q, k, v, grad = (inputs.randn(3, 250, 2, 24) for _ in range(4))

    def gradients(rows: slice) -> tuple[torch.Tensor, ...]:
        leaves = [x[rows].clone().requires_grad_() for x in (q, k, v)]
        out = tilewise.flash_attention(*leaves, causal=True, backend="cpu")
        return torch.autograd.grad(out, leaves, grad[rows])

    for together, alone in zip(gradients(slice(None)), gradients(slice(1, 2)), strict=True):
        assert torch.equal(together[1:2], alone)


@_DTYPES
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_hidden_row_of_the_same_block_leaks_into_no_gradient(bad, dtype):
    """Some queries of the block see the bad key, and become NaN with what they see."""
    inputs = Inputs(dtype)
    q, k, v = (inputs.randn(1, 250, 1, 16) for _ in range(3))
    k[:, 100], v[:, 120] = bad, bad
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = tilewise.flash_attention(*leaves, window=(20, 20), backend="cpu")
    grad_q, grad_k, grad_v = torch.autograd.grad(out.sum(), leaves)
    assert grad_q[:, 80:141].isnan().all()
    for grad in (grad_q, grad_k, grad_v):
        assert grad[:, :60].isfinite().all()
        assert grad[:, 161:].isfinite().all()
