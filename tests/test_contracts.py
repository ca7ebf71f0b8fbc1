"""The contracts that every operation keeps on every backend that can run here.

Nothing in this file names an operation: the cases beside each operation and the backends that it
registers decide what is tested, so a backend added later is tested without a new line of test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tilewise import cpu, dispatch, gpu, library, testing
from tilewise.cases import (
    Case,
    all_cases,
    all_operator_calls,
    check_case,
    floor_of,
    leeway_of,
    public_function,
    run_case,
)
from tilewise.testing import Inputs

CASES = all_cases()
POISONED = [case for case in CASES if case.poison]
DIFFERENTIABLE = [case for case in CASES if case.grad]


def _ids(case: Case) -> str:
    return f"{case.op}-{case.id}"


def _on_every_backend(
    cases: list[Case], *, dtypes: bool, without: tuple[str, ...] = ()
) -> pytest.MarkDecorator:
    """Parametrise (case, backend, dtype); one dtype is enough where rounding does not matter."""
    params = []
    for case in cases:
        for backend in dispatch.OPS[case.op].backends:
            if backend in without:
                continue
            for dtype in case.dtypes if dtypes else case.dtypes[:1]:
                name = f"{_ids(case)}-{backend}-{str(dtype).removeprefix('torch.')}"
                params.append(pytest.param(case, backend, dtype, id=name))
    return pytest.mark.parametrize(("case", "backend", "dtype"), params)


@pytest.mark.parametrize("case", CASES, ids=_ids)
def test_a_tensor_without_strides_is_refused_by_name(case: Case) -> None:
    arguments = case.make(Inputs())
    for name, x in arguments.items():
        if not isinstance(x, torch.Tensor) or x.dim() == 0 or x.shape[0] == 0:
            continue
        if x.dtype.itemsize == 1 and x.dtype != torch.bool:  # cannot be made sparse
            continue
        nested = torch.nested.nested_tensor([x[0]]) if x.is_floating_point() and x.dim() > 1 else x
        for other in (x.to_sparse(), *([nested] if nested is not x else [])):
            with pytest.raises(TypeError, match=f"^{name}: must be a strided tensor, got"):
                public_function(case.op)(**arguments | {name: other})


@dataclass
class Call:
    """A case with its arguments, ready to run on one backend."""

    case: Case
    backend: str
    arguments: dict[str, Any]

    def run(self, arguments: dict[str, Any] | None = None, *, grad: bool = False) -> dict[str, Any]:
        chosen = self.arguments if arguments is None else arguments
        return run_case(self.case, chosen, self.backend, grad=grad)


def _call(case: Case, backend: str, dtype: torch.dtype, device: str) -> Call:
    """The call, or a skip with the backend's own reason."""
    arguments = case.make(Inputs(dtype, device))
    reason = dispatch.OPS[case.op].reasons((), arguments)[backend]
    if reason:
        pytest.skip(f"{backend}: {reason}")
    return Call(case, backend, arguments)


def _assert_same_bits(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        bits, expected_bits = (
            x.contiguous().reshape(-1).view(torch.uint8) for x in (actual[name], value)
        )
        assert torch.equal(bits, expected_bits), f"{name}: the bits differ"


@_on_every_backend(CASES, dtypes=True)
def test_agrees_with_naive(case: Case, backend: str, dtype: torch.dtype, device: str) -> None:
    _call(case, backend, dtype, device)
    check_case(case, backend, dtype, device=device)


@_on_every_backend(DIFFERENTIABLE, dtypes=True)
def test_gradients_agree_with_naive(
    case: Case, backend: str, dtype: torch.dtype, device: str
) -> None:
    _call(case, backend, dtype, device)
    check_case(case, backend, dtype, device=device, grad=True)


# Kernels for 16 bits have ways of their own to load and to multiply.
@_on_every_backend(POISONED, dtypes=True)
def test_what_must_not_matter_may_be_nan(
    case: Case, backend: str, dtype: torch.dtype, device: str
) -> None:
    call = _call(case, backend, dtype, device)
    reason = dispatch.OPS[case.op].reasons((), call.arguments, auto=True)[backend]
    if reason and reason != gpu.why_not_auto():  # an interpreter is held to it like a GPU
        pytest.skip(f"{backend} is never chosen by auto here: {reason}")
    poisoned = case.poison(testing.map_tensors(call.arguments, torch.clone))
    assert any(
        not torch.equal(call.arguments[name], value)
        for name, value in poisoned.items()
        if isinstance(value, torch.Tensor)
    ), "the poison changes nothing"
    clean = call.run(grad=bool(case.grad))
    _assert_same_bits(call.run(poisoned, grad=bool(case.grad)), clean)
    for name, value in clean.items():
        assert not value.isnan().any(), name


@_on_every_backend(CASES, dtypes=False)
def test_any_strides(case: Case, backend: str, dtype: torch.dtype, device: str) -> None:
    call = _call(case, backend, dtype, device)
    cut = testing.strided(call.arguments)
    actual, expected = call.run(cut), call.run()
    truth = run_case(case, testing.to_float64(call.arguments), "naive")
    for name, value in expected.items():
        testing.assert_agrees(
            actual[name],
            value,
            truth[name],
            name=name,
            floor=floor_of(case, name, value),
            leeway=leeway_of(backend, device),
        )


@_on_every_backend(CASES, dtypes=False)
def test_a_call_repeats_exactly(case: Case, backend: str, dtype: torch.dtype, device: str) -> None:
    """The same bits again, under `validate` too, and arguments that are as they were."""
    call = _call(case, backend, dtype, device)
    before = testing.map_tensors(call.arguments, torch.clone)
    # On a GPU, PyTorch's own attention adds up gradients atomically, in whatever order.
    grad = bool(case.grad) and (backend, device) != ("torch", "cuda")
    expected = call.run(grad=grad)
    _assert_same_bits(call.run(grad=grad), expected)
    _assert_same_bits(call.run(call.arguments | {"validate": True}), call.run())
    returned = public_function(case.op)(**call.arguments, backend=backend)
    if returned is not None:  # an operation without a result writes to its arguments
        tensors = {name: x for name, x in before.items() if isinstance(x, torch.Tensor)}
        _assert_same_bits({name: call.arguments[name] for name in tensors}, tensors)


# How PyTorch splits its own products depends on the number of threads, and with it the bits; and
# kernels for GPUs use none of them.
@_on_every_backend(CASES, dtypes=False, without=("naive", "torch", "triton", "cuda"))
def test_any_thread_count_same_bits(
    case: Case, backend: str, dtype: torch.dtype, device: str
) -> None:
    call = _call(case, backend, dtype, device)
    grad = bool(case.grad)
    expected = call.run(grad=grad)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        _assert_same_bits(call.run(grad=grad), expected)
    finally:
        torch.set_num_threads(threads)


def _first_of_each_op(cases: list[Case]) -> list[Case]:
    return list({case.op: case for case in reversed(cases)}.values())


@pytest.mark.parametrize("case", _first_of_each_op(CASES), ids=_ids)
def test_explains_itself(case: Case, device: str) -> None:
    arguments = case.make(Inputs(torch.float32, device))
    said = dispatch.explain(case.op, **arguments)
    assert said.chosen in dispatch.OPS[case.op].backends
    assert said.reasons[said.chosen] is None
    assert set(said.reasons) == set(dispatch.BACKENDS)
    assert said.roofline_seconds > 0
    assert case.op in str(said)
    assert said.chosen in str(said)


@pytest.mark.parametrize("case", _first_of_each_op(CASES), ids=_ids)
def test_a_missing_backend_is_refused_with_every_reason(case: Case, device: str) -> None:
    op = dispatch.OPS[case.op]
    arguments = case.make(Inputs(torch.float32, device))
    reasons = op.reasons((), arguments)
    refused = next((name for name, reason in reasons.items() if reason), None)
    if refused is None:
        pytest.skip("every backend can run this case here")
    with pytest.raises(dispatch.BackendError) as caught:
        public_function(op)(**arguments, backend=refused)
    for name, reason in reasons.items():
        assert f"{name}: {reason or 'can run it'}" in str(caught.value)


# --- PyTorch's machinery --------------------------------------------------------------------------


def _compiled_cases() -> list[Case]:
    """The first two cases of each operation: compiling takes seconds."""
    taken: dict[str, int] = {}
    chosen = []
    for case in CASES:
        taken[case.op] = taken.get(case.op, 0) + 1
        if taken[case.op] <= 2:
            chosen.append(case)
    return chosen


@_on_every_backend(_compiled_cases(), dtypes=False)
def test_compiles_without_a_break(
    case: Case, backend: str, dtype: torch.dtype, device: str
) -> None:
    call = _call(case, backend, dtype, device)
    impl = next(impl for impl in dispatch.OPS[case.op].impls if impl.name == backend)
    if impl.untraceable:
        pytest.skip(f"{backend}: {impl.untraceable}")
    torch.compiler.reset()
    function = torch.compile(
        public_function(case.op), fullgraph=True, dynamic=False, backend="aot_eager"
    )
    arguments = testing.map_tensors(call.arguments, torch.clone)
    compiled = case.results(arguments, function(**arguments, backend=backend))
    truth = run_case(case, testing.to_float64(call.arguments), "naive")
    for name, value in call.run().items():
        testing.assert_agrees(
            compiled[name],
            value,
            truth[name],
            name=name,
            floor=floor_of(case, name, value),
            leeway=leeway_of(backend, device),
        )


@pytest.mark.parametrize("case", _first_of_each_op(DIFFERENTIABLE), ids=_ids)
def test_torch_func_differentiates_the_naive_function(case: Case, device: str) -> None:
    """In both directions; a kernel's result would be a constant to forward mode, without a word."""
    arguments = case.make(Inputs(torch.float32, device))
    name = case.grad[0]
    x = arguments[name]
    expected = run_case(case, arguments, "naive")["output"]

    def loss(x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        returned = public_function(case.op)(**(arguments | {name: x}), backend=backend)
        return case.results(arguments, returned)["output"].sum()

    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf, "naive"), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), grad)
    value, along = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(value, expected.sum())
    torch.testing.assert_close(along, grad.sum(), rtol=1e-4, atol=1e-4)
    for backend in set(dispatch.OPS[case.op].backends) - {"naive"}:
        with pytest.raises(dispatch.BackendError, match=r"torch\.func|needs|computes"):
            torch.func.grad(loss)(x, backend)


@pytest.mark.parametrize("case", _first_of_each_op(DIFFERENTIABLE), ids=_ids)
def test_vmap_loses_no_gradient(case: Case, device: str) -> None:
    """Of a tensor from outside, which does not seem to need one inside."""
    arguments = case.make(Inputs(torch.float32, device))
    name = case.grad[0]
    leaf = arguments[name].clone().requires_grad_()
    one = torch.ones(1, device=device)

    def loss(x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        returned = public_function(case.op)(**(arguments | {name: x}), backend=backend)
        return case.results(arguments, returned)["output"].sum()

    (expected,) = torch.autograd.grad(loss(leaf, "naive"), leaf)
    for total in (
        torch.func.vmap(loss)(leaf[None]),
        torch.func.vmap(lambda one: one * loss(leaf))(one),
    ):
        (grad,) = torch.autograd.grad(total.sum(), leaf)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


# That of `moe` writes to what its experts share, which this vmap refuses.
@_on_every_backend(
    [case for case in _first_of_each_op(DIFFERENTIABLE) if case.op != "moe"], dtypes=False
)
def test_a_batch_of_gradients_is_each_of_them(
    case: Case, backend: str, dtype: torch.dtype, device: str
) -> None:
    """`is_grads_batched`, which vectorized Jacobians use, is a vmap of PyTorch's own."""
    call = _call(case, backend, dtype, device)
    leaves = [call.arguments[name].requires_grad_() for name in case.grad]
    returned = public_function(case.op)(**call.arguments, backend=backend)
    out = case.results(call.arguments, returned)["output"]
    upstream = Inputs(torch.float32, device, seed=1).randn(2, *out.shape)
    batched = torch.autograd.grad(out, leaves, upstream, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(out, leaves, row, retain_graph=True) for row in upstream]
    for name, actual, *expected in zip(case.grad, batched, *each, strict=True):
        torch.testing.assert_close(actual, torch.stack(expected), msg=name)


@_on_every_backend(_first_of_each_op(DIFFERENTIABLE), dtypes=False)
def test_a_second_derivative_is_right_or_refused(
    case: Case, backend: str, dtype: torch.dtype, device: str
) -> None:
    """Of a sum, whose gradient by the results is a constant that has no gradient itself."""
    call = _call(case, backend, dtype, device)

    def derivative_of_the_gradient(backend: str) -> list[torch.Tensor]:
        arguments = testing.map_tensors(call.arguments, torch.clone)
        leaves = [arguments[name].requires_grad_() for name in case.grad]
        returned = public_function(case.op)(**arguments, backend=backend)
        results = [x for x in case.results(arguments, returned).values() if x.requires_grad]
        total = sum(torch.where(x.isfinite(), x, 0).sum() for x in results)
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        squares = sum(grad.square().sum() for grad in grads if grad.requires_grad)
        if not isinstance(squares, torch.Tensor):
            return [torch.zeros_like(leaf) for leaf in leaves]
        return list(torch.autograd.grad(squares, leaves, materialize_grads=True))

    expected = derivative_of_the_gradient("naive")
    try:
        actual = derivative_of_the_gradient(backend)
    except RuntimeError as error:
        refused = "cannot be differentiated again" if backend != "torch" else "not implemented"
        if refused not in str(error):
            raise
        return
    for name, a, e in zip(case.grad, actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-3 * float(e.abs().max()), msg=name)


OPERATOR_CALLS = all_operator_calls()
_WHY_NOT = {"cpu": cpu.why_not, "triton": gpu.why_not}


def _runs_here(backend: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a backend's kernels run where the arguments are."""
    if backend not in _WHY_NOT:
        return True
    floats = [x for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point()]
    return _WHY_NOT[backend](floats[0]) is None


@pytest.mark.parametrize(
    ("name", "make"),
    [pytest.param(*call, id=f"{call[0]}-{i}") for i, call in enumerate(OPERATOR_CALLS)],
)
def test_opcheck(name: str, make: Any, device: str) -> None:
    contract = library.CONTRACTS[name]
    for backend in contract.kernels:
        arguments = make(Inputs(torch.float32, device))
        if _runs_here(backend, arguments):
            torch.library.opcheck(contract.op, (*arguments, backend))


def test_every_operator_is_checked() -> None:
    assert {name for name, _ in OPERATOR_CALLS} == set(library.CONTRACTS)


def test_every_operation_has_cases() -> None:
    assert {case.op for case in CASES} == set(dispatch.OPS)
