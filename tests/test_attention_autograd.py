"""The autograd function that a compiled backend plugs into, driven by the naive kernels."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tilewise import dispatch, library
from tilewise.attention import autograd, cases, cost, naive
from tilewise.testing import Inputs

CASES = [
    case
    for case in cases.CASES
    if case.op != "merge_states" and case.id in ("causal", "everything", "sinks", "bias", "mask")
]


def _both(case):
    """The naive function and the same through operators, with this case's arguments."""
    arguments = case.make(Inputs(torch.float64)) | {"return_lse": True}
    for name in case.grad:
        arguments[name].requires_grad_()
    direct = getattr(naive, case.op)(**arguments)
    through = partial(getattr(autograd, case.op), "naive")(**arguments)
    return arguments, direct, through


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.id}")
@pytest.mark.parametrize("results", [(0,), (1,), (0, 1)], ids=["out", "lse", "both"])
def test_gradients_are_those_of_the_naive_function(case, results):
    arguments, direct, through = _both(case)
    leaves = [arguments[name] for name in case.grad]
    inputs = Inputs(torch.float64)
    upstream = [inputs.randn(*direct[i].shape) for i in results]
    expected, actual = (
        torch.autograd.grad([both[i] for i in results], leaves, upstream, allow_unused=True)
        for both in (direct, through)
    )
    for i in (0, 1):
        assert torch.equal(through[i], direct[i])
    for name, a, e in zip(case.grad, actual, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if e is None else e, msg=name)


@pytest.mark.parametrize("name", ["q", "k", "v", "sinks", "bias"])
def test_a_single_input_may_need_a_gradient(name):
    case = next(case for case in CASES if case.id == "everything")
    arguments = case.make(Inputs(torch.float64))
    leaf = arguments[name].requires_grad_()
    grads = []
    for function in (partial(autograd.flash_attention, "naive"), naive.flash_attention):
        out, lse = function(**arguments)
        grads += torch.autograd.grad(out.sum() + lse[:, 5:].sum(), leaf)
    torch.testing.assert_close(*grads)


def test_no_gradient_no_autograd_function():
    q = torch.randn(1, 3, 2, 8)
    assert autograd.flash_attention("naive", q, q, q).grad_fn is None
    with torch.no_grad():
        leaf = q.requires_grad_()
        assert autograd.flash_attention("naive", leaf, leaf, leaf).grad_fn is None


def test_compiles_without_a_break_forward_and_backward():
    q = torch.randn(1, 3, 2, 8, requires_grad=True)
    cu_seqlens = torch.tensor([0, 1, 3], dtype=torch.int32)

    def loss(q):
        dense = autograd.flash_attention("naive", q, q, q, causal=True)
        ragged = autograd.flash_attention_varlen("naive", q[0], q[0], q[0], cu_seqlens, cu_seqlens)
        return (dense * ragged).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(q), q)
    (actual,) = torch.autograd.grad(compiled(q), q)
    torch.testing.assert_close(actual, expected)


def test_works_within_a_dispatch_mode():
    q = torch.randn(1, 3, 2, 8, requires_grad=True)
    expected = torch.autograd.grad(autograd.flash_attention("naive", q, q, q).sum(), q)
    with FlopCounterMode(display=False):
        actual = torch.autograd.grad(autograd.flash_attention("naive", q, q, q).sum(), q)
    assert torch.equal(actual[0], expected[0])


def test_is_a_backend_with_the_naive_signature():
    for name in ("flash_attention", "flash_attention_varlen"):
        impl = dispatch.Impl("cpu", partial(getattr(autograd, name), "naive"))
        op = dispatch.OPS[name]
        try:
            dispatch.Op(name, getattr(naive, name), impls=(impl,), check=op.check, cost=op.cost)
        finally:
            dispatch.OPS[name] = op


def test_a_backend_without_kernels_says_so():
    q = torch.zeros(1, 3, 2, 8)
    with pytest.raises(dispatch.BackendError, match="flash_attention: no kernel 'cuda' is"):
        autograd.flash_attention("cuda", q, q, q)


def test_every_attention_operator_has_a_naive_kernel():
    for name in (
        "flash_attention",
        "flash_attention_backward",
        "flash_attention_varlen",
        "flash_attention_varlen_backward",
        "merge_states",
    ):
        assert "naive" in library.CONTRACTS[name].kernels


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (2, -1), (-1, 1), (9, 9)])
@pytest.mark.parametrize(("q_len", "k_len"), [(0, 3), (3, 0), (1, 7), (7, 7), (5, 9), (9, 5)])
def test_cost_counts_the_pairs_that_see_each_other(q_len, k_len, window, causal):
    distance, exists = naive.place_dense(q_len, k_len, torch.device("cpu"))
    expected = int(naive.in_sight(distance, exists, causal, window).sum())
    assert cost.visible_pairs(q_len, k_len, causal=causal, window=window) == expected


def test_cost_of_a_ragged_call_is_the_sum_of_its_sequences():
    inputs = Inputs()
    q, k, v = inputs.randn(9, 4, 8), inputs.randn(12, 2, 8), inputs.randn(12, 2, 16)
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 3, 9], [0, 7, 12]))
    ragged = cost.cost_flash_attention_varlen(q, k, v, cu_q, cu_k, causal=True)
    dense = [
        cost.cost_flash_attention(q[None, a:b], k[None, c:d], v[None, c:d], causal=True)
        for (a, b), (c, d) in (((0, 3), (0, 7)), ((3, 9), (7, 12)))
    ]
    assert ragged.flops == sum(c.flops for c in dense)
    assert ragged.bytes == sum(c.bytes for c in dense)
