"""Calls on which every backend of an operation must agree, and how one is held to that.

Each operation's folder has a `cases.py` that lists its own; what is done with them, by tests, by
`tilewise verify` and by compiling ahead of time, is the same for all and is here.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tilewise import gpu
from tilewise.dispatch import Op, find_op
from tilewise.testing import (
    HALF_AND_SINGLE,
    Agreement,
    BlankInputs,
    Inputs,
    Make,
    assert_agrees,
    map_tensors,
    nan_filled_empty,
    root_mean_square,
    to_float64,
)


def _outputs(arguments: dict[str, Any], returned: Any) -> dict[str, torch.Tensor]:
    results = returned if isinstance(returned, tuple) else (returned,)
    return {f"output {i}" if i else "output": result for i, result in enumerate(results)}


@dataclass(frozen=True)
class Case:
    """A call on which every backend of an operation must agree.

    Args:
        op: the operation.
        id: names the case in test ids and tables; unique within the operation.
        make: builds the keyword arguments of the public function.
        dtypes: what to try it in.
        grad: arguments whose gradients are compared as well.
        results: names the results, given the arguments (after the call, so that tensors written
            in place can be results) and what was returned.
        poison: returns the same arguments with NaN wherever a value must not matter.
        floors: `floor` of `assert_agrees` by result name.
    """

    op: str
    id: str
    make: Make
    dtypes: tuple[torch.dtype, ...] = HALF_AND_SINGLE
    grad: tuple[str, ...] = ()
    results: Callable[[dict[str, Any], Any], dict[str, torch.Tensor]] = _outputs
    poison: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    floors: Mapping[str, float] | None = None


_CASE_MODULES = ("attention", "paged", "quant", "fused", "moe")


def all_cases() -> list[Case]:
    """The cases of every operation that ships with the package."""
    cases: list[Case] = []
    for name in _CASE_MODULES:
        cases += importlib.import_module(f"tilewise.{name}.cases").CASES
    return cases


def all_operator_calls() -> list[tuple[str, Callable[[Inputs], tuple[Any, ...]]]]:
    """(registered operator, maker of its arguments without the backend), for `opcheck`."""
    calls = []
    for name in _CASE_MODULES:
        calls += importlib.import_module(f"tilewise.{name}.cases").OPERATOR_CALLS
    return calls


def all_compiled_calls() -> list[Case]:
    """Calls with the shapes of real models, for which kernels are compiled ahead of time.

    Only operations with Triton kernels have any.
    """
    calls: list[Case] = []
    for name in _CASE_MODULES:
        calls += getattr(importlib.import_module(f"tilewise.{name}.cases"), "COMPILED", ())
    return calls


def compile_case(case: Case, targets: Sequence[str], dtype: torch.dtype) -> list[gpu.Compiled]:
    """The Triton kernels of a call and of its gradients, compiled for targets and not run."""
    arguments = case.make(BlankInputs(dtype))
    for name in case.grad:
        arguments[name].requires_grad_()
    compiled = []
    for target in targets:
        with gpu.compiling_for(target) as kernels:
            returned = public_function(case.op)(**arguments, backend="triton")
            results = case.results(arguments, returned).values()
            ends = [result for result in results if result.requires_grad]
            if ends:
                torch.autograd.backward(ends, [torch.zeros_like(end) for end in ends])
        compiled += kernels
    return compiled


def run_case(
    case: Case, arguments: dict[str, Any], backend: str, *, grad: bool = False
) -> dict[str, torch.Tensor]:
    """The named results of a case on one backend, its gradients among them if asked for.

    The arguments are copied first, so that a call that writes in place can be repeated.
    """
    function = functools.partial(public_function(case.op), backend=backend)
    return run_function(case, arguments, function, grad=grad)


def run_function(
    case: Case,
    arguments: dict[str, Any],
    function: Callable[..., Any],
    *,
    grad: bool = False,
    upstream: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """`run_case` of a function that is called like the public one.

    Args:
        upstream: the gradients of the results by name; `upstream_of` their shapes by default.
    """
    arguments = map_tensors(arguments, _copy)
    leaves = {name: arguments[name].requires_grad_() for name in case.grad} if grad else {}
    results = case.results(arguments, function(**arguments))
    if not leaves:
        return {name: result.detach() for name, result in results.items()}
    differentiable = {name: result for name, result in results.items() if result.requires_grad}
    if upstream is None:
        upstream = upstream_of({name: result.shape for name, result in differentiable.items()})
    starts = [
        torch.where(result.isfinite(), upstream[name].to(result), 0.0)
        for name, result in differentiable.items()
    ]
    grads = torch.autograd.grad(list(differentiable.values()), list(leaves.values()), starts)
    results = {name: result.detach() for name, result in results.items()}
    results.update({f"grad {name}": value for name, value in zip(leaves, grads, strict=True)})
    return results


def upstream_of(shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Random gradients of results of these shapes, the same ones every time."""
    inputs = Inputs(torch.float32, "cpu", seed=1)
    return {name: inputs.randn(*shape) for name, shape in shapes.items()}


def _copy(t: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides."""
    if t.is_contiguous():
        return t.detach().clone()
    copy = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    return copy.copy_(t.detach())


def public_function(op: str | Op) -> Callable[..., Any]:
    """The public function of an operation."""
    import tilewise

    return getattr(tilewise, find_op(op.name if isinstance(op, Op) else op).name)


def check_case(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    grad: bool = False,
) -> dict[str, Agreement]:
    """Hold one backend to the agreement rule on one case.

    Returns:
        The worst row of every result.

    Raises:
        AssertionError: where the rule is broken.
        BackendError: where the backend cannot run the case.
    """
    arguments = case.make(Inputs(dtype, device, seed))
    with nan_filled_empty():
        actual = run_case(case, arguments, backend, grad=grad)
    naive = run_case(case, arguments, "naive", grad=grad)
    truth = run_case(case, to_float64(arguments), "naive", grad=grad)
    return {
        name: assert_agrees(
            actual[name],
            naive[name],
            truth[name],
            name=name,
            floor=floor_of(case, name, truth[name]),
            leeway=leeway_of(backend, device),
        )
        for name in truth
    }


def leeway_of(backend: str, device: str | torch.device) -> float:
    """The `leeway` of `assert_agrees` for a backend's results on a device.

    PyTorch's own kernels for GPUs are not ours to improve. Four times the rule still tells a wrong
    result from a coarse one.
    """
    return 4.0 if backend == "torch" and torch.device(device).type == "cuda" else 1.0


def floor_of(case: Case, name: str, truth: torch.Tensor) -> float:
    """The `floor` of `assert_agrees` for one result of a case."""
    if case.floors and name in case.floors:
        return case.floors[name]
    if name.startswith("grad ") and truth.numel():
        # A softmax's gradient is a difference of nearly equal numbers: a row can be zero in truth
        # and, in any kernel, one rounding step of the largest.
        return float(root_mean_square(truth.double()).max())
    return 0.0
