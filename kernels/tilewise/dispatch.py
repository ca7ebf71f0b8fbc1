"""Choosing which implementation of an operation runs.

Every operation has a naive implementation in plain PyTorch that *defines* it, and any number of
faster ones. An implementation says in words why it cannot take a call; nothing is tried and caught.
A backend that the caller names either runs or raises `BackendError`: only `auto` may choose.

The idea that the reference is the operation, and that each kernel states its own limits, is from
xformers' operator dispatch and vLLM's IR.
"""

from __future__ import annotations

import contextvars
import inspect
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.autograd import forward_ad

BACKENDS = ("naive", "torch", "triton", "cpu", "cuda")
"""The backend names, the same in the API, the tests, the benchmarks, the CLI and the reports."""

_ELSEWHERE = {"cpu": ("triton", "cuda"), "cuda": ("cpu",)}
"""By device, the backends that are made for another one."""

_EVERY_OP = "*"


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run this call."""


def never(*args: Any, **kwargs: Any) -> str | None:
    """A `why_not` that never objects."""
    return None


_DIFFERENTIATING = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)


def is_transformed() -> bool:
    """Whether a function transform or forward mode, which kernels know nothing of, differentiates.

    Both would take an unknown operator for a constant, and say nothing. Within `vmap` no tensor
    tells whether it needs a gradient outside, so any may where gradients are recorded.
    """
    if forward_ad._current_level >= 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    if torch.is_grad_enabled():
        return True
    stack = torch._C._functorch.get_interpreter_stack()
    return any(level.key() in _DIFFERENTIATING for level in stack)


# A traced transform is in place while it is traced (see `native.why_not_cpu`).
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Impl:
    """One implementation of an operation.

    Args:
        name: one of `BACKENDS`.
        fn: a function with the naive function's signature.
        why_not: takes the same arguments and returns a human-readable reason why `fn` cannot run
            them here, or None. It looks at shapes, dtypes and devices, never at values.
        why_not_auto: the same, for calls that `fn` can run but that `auto` should not give it,
            such as a call in which it would break a contract that the naive function keeps.
        untraceable: why torch.compile cannot trace `fn` without a graph break, if it cannot.
    """

    name: str
    fn: Callable[..., Any]
    why_not: Callable[..., str | None] = never
    why_not_auto: Callable[..., str | None] = never
    untraceable: str | None = None

    def refuses(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """Why `fn` cannot run this call here and now; None where it can."""
        if self.name != "naive" and is_transformed():
            return (
                "torch.func and forward mode can differentiate only the naive function; "
                "vmap under torch.no_grad() differentiates nothing"
            )
        if self.untraceable and torch.compiler.is_compiling():
            return f"torch.compile cannot trace it: {self.untraceable}"
        return self.why_not(*args, **kwargs)


@dataclass(frozen=True)
class Cost:
    """The work that a call cannot avoid.

    Args:
        flops: floating-point operations of the definition, a multiply-add counted as two.
        bytes: bytes that must move between memory and the cores: each input read once and each
            output written once.
        dtype: the dtype of the multiplications, which decides the compute ceiling.
    """

    flops: float
    bytes: float
    dtype: torch.dtype


OPS: dict[str, Op] = {}
"""Every operation by name, in the order of definition."""


class Op:
    """An operation: its naive definition and the implementations that may replace it.

    Args:
        name: the name of the public function.
        naive: the definition, in traceable PyTorch.
        impls: the others, best first; each refuses the devices that it is not for.
        check: called with the arguments of `naive` plus `validate`; raises on bad input.
        cost: called with the arguments of `naive`; returns the unavoidable work.

    Whoever tries a kernel of their own puts it into `impls`; `own_impls` are those it came with.
    """

    def __init__(
        self,
        name: str,
        naive: Callable[..., Any],
        *,
        impls: tuple[Impl, ...] = (),
        check: Callable[..., None],
        cost: Callable[..., Cost],
    ) -> None:
        signature = inspect.signature(naive)
        for impl in impls:
            if impl.name not in BACKENDS:
                raise ValueError(f"{name}: backend must be one of {BACKENDS}, got {impl.name!r}")
            if list(inspect.signature(impl.fn).parameters) != list(signature.parameters):
                raise ValueError(f"{name}: {impl.name} must have the naive function's signature")
        self.name = name
        self.impls = self.own_impls = (*impls, Impl("naive", naive))
        self.check = check
        self.cost = cost
        self.signature = signature
        OPS[name] = self

    @property
    def backends(self) -> tuple[str, ...]:
        """The names of the implementations, best first."""
        return tuple(impl.name for impl in self.impls)

    def backends_on(self, device: str) -> tuple[str, ...]:
        """Those of them that are made for "cpu" or "cuda"."""
        return tuple(name for name in self.backends if name not in _ELSEWHERE[device])

    def __call__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> Any:
        """Run the call on `backend`. The arguments have been checked already."""
        return self.select(backend, args, kwargs).fn(*args, **kwargs)

    def select(self, backend: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Impl:
        """The implementation that runs this call, or `BackendError`."""
        if backend == "auto":
            backend = requested_backend(self.name)
        if backend == "auto":
            # What would refuse for the device alone is not asked: its answer costs a microsecond.
            is_on_cpu = args and isinstance(args[0], torch.Tensor) and args[0].is_cpu
            elsewhere = _ELSEWHERE["cpu"] if is_on_cpu else ()
            for impl in self.impls:
                if (
                    impl.name not in elsewhere
                    and impl.refuses(args, kwargs) is None
                    and (impl.why_not_auto is never or impl.why_not_auto(*args, **kwargs) is None)
                ):
                    return impl
        for impl in self.impls:
            if impl.name == backend and impl.refuses(args, kwargs) is None:
                return impl
        raise BackendError(self._refusal(backend, args, kwargs))

    def reasons(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, auto: bool = False
    ) -> dict[str, str | None]:
        """For each of `BACKENDS`, why it cannot take this call; None where it can.

        With `auto`, reasons for `auto` to pass over a backend that can run count as well.
        """
        reasons: dict[str, str | None] = {}
        for name in BACKENDS:
            reasons[name] = f"{self.name} has no {name} implementation"
        for impl in self.impls:
            reason = impl.refuses(args, kwargs)
            if reason is None and auto:
                reason = impl.why_not_auto(*args, **kwargs)
            reasons[impl.name] = reason
        return reasons

    def _refusal(self, backend: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        if backend not in BACKENDS:
            # A typo in the environment is said by the first call: importing never fails for it.
            name = "TILEWISE_BACKEND" if backend == _ENVIRONMENT else "backend"
            return _unknown(name, backend)
        reasons = self.reasons(args, kwargs)
        lines = [f"{self.name}: backend {backend!r} cannot run this call: {reasons[backend]}"]
        lines += [f"  {name}: {reason or 'can run it'}" for name, reason in reasons.items()]
        return "\n".join(lines)


# --- which backend is asked for -------------------------------------------------------------------


def _unknown(name: str, backend: str) -> str:
    return f"{name}: must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}"


def _check_backend(name: str, backend: str) -> str:
    if backend not in BACKENDS and backend != "auto":
        raise ValueError(_unknown(name, backend))
    return backend


_ENVIRONMENT = os.environ.get("TILEWISE_BACKEND", "")
_FROM_ENVIRONMENT = MappingProxyType({_EVERY_OP: _ENVIRONMENT} if _ENVIRONMENT else {})


def check_environment() -> None:
    """Raise ValueError if `TILEWISE_BACKEND` names no backend."""
    if _ENVIRONMENT:
        _check_backend("TILEWISE_BACKEND", _ENVIRONMENT)


_OVERRIDES: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar(
    "tilewise_backend", default=_FROM_ENVIRONMENT
)


class _Traced(threading.local):
    """A per-thread copy of `_OVERRIDES` that torch.compile can read.

    Dynamo cannot trace `ContextVar.get`, but it guards on the instance attributes of a
    `threading.local`, so that a compiled function is compiled anew under another `use_backend`.
    """

    def __init__(self) -> None:
        self.overrides: Mapping[str, str] = dict(_FROM_ENVIRONMENT)


_TRACED = _Traced()


def requested_backend(op: str) -> str:
    """The backend that `use_backend` or `TILEWISE_BACKEND` asks for, or "auto"."""
    overrides = _TRACED.overrides if torch.compiler.is_compiling() else _OVERRIDES.get()
    if not overrides:
        return "auto"
    return overrides.get(op) or overrides.get(_EVERY_OP, "auto")


def requests() -> Mapping[str, str]:
    """What `use_backend` and `TILEWISE_BACKEND` ask for at the moment, by operation."""
    return _OVERRIDES.get()


@contextmanager
def use_backend(backend: str | None = None, /, **per_op: str) -> Iterator[None]:
    """Ask for a backend within a `with` block.

    The innermost block wins; a thread or an asyncio task sees only its own blocks. An argument
    `backend=` of a call beats this, and this beats the environment variable `TILEWISE_BACKEND`.

    Args:
        backend: for every operation ("auto" undoes an outer request).
        per_op: for single operations: `use_backend("cpu", sample="naive")`.

    Raises:
        ValueError: for a name that is not a backend or not an operation.
    """
    overrides = {} if backend is not None else dict(_OVERRIDES.get())
    if backend is not None:
        overrides[_EVERY_OP] = _check_backend("backend", backend)
    for op, name in per_op.items():
        if op not in OPS:
            raise ValueError(f"{op}: not an operation; there are {', '.join(OPS)}")
        overrides[op] = _check_backend(op, name)
    token = _OVERRIDES.set(overrides)
    traced, _TRACED.overrides = _TRACED.overrides, overrides
    try:
        yield
    finally:
        _TRACED.overrides = traced
        _OVERRIDES.reset(token)


# --- saying what would happen ---------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """What a call would run, and why.

    `reasons` maps each backend to why it was not taken (None: it can run), `isa` is the CPU
    instruction set in use, and `roofline_seconds` the least time that `cost` takes at the measured
    ceilings of the device.
    """

    op: str
    requested: str
    chosen: str | None
    reasons: dict[str, str | None]
    device: str
    isa: str
    cost: Cost
    roofline_seconds: float

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'nothing can run this'} (asked: {self.requested})"]
        for name, reason in self.reasons.items():
            lines.append(f"  {name:<7} {'*' if name == self.chosen else ' '} {reason or 'can run'}")
        lines.append(f"  device {self.device}, CPU instruction set {self.isa}")
        lines.append(
            f"  {self.cost.flops / 1e9:.4g} GFLOP, {self.cost.bytes / 1e6:.4g} MB: "
            f"at least {self.roofline_seconds * 1e6:.4g} us here"
        )
        return "\n".join(lines)


def find_op(op: str | Callable[..., Any]) -> Op:
    """The operation of that name, or of that public function."""
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPS:
        raise ValueError(f"op: must be one of {', '.join(OPS)}, got {name!r}")
    return OPS[name]


def explain(
    op: str | Callable[..., Any], *args: Any, backend: str = "auto", **kwargs: Any
) -> Explanation:
    """Say which implementation a call would run, without running it.

    The first call on a device measures its ceilings, which takes a second or two.

    Args:
        op: a public function, or its name.
        args, kwargs, backend: what the call would be given.

    Raises:
        ValueError, TypeError: where the call itself would.
    """
    from tilewise import machine, native

    found = find_op(op)
    try:
        inspect.signature(found.check).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{found.name}: {error}") from None
    found.check(*args, **kwargs)
    kwargs.pop("validate", None)
    requested = backend if backend != "auto" else requested_backend(found.name)
    reasons = found.reasons(args, kwargs, auto=requested == "auto")
    chosen: str | None
    if requested == "auto":
        chosen = next(name for name in found.backends if reasons[name] is None)
    else:
        chosen = requested if reasons[_check_backend("backend", requested)] is None else None
    cost = found.cost(*args, **kwargs)
    device = next(
        (value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)),
        torch.device("cpu"),
    )
    return Explanation(
        op=found.name,
        requested=requested,
        chosen=chosen,
        reasons=reasons,
        device=str(device),
        isa=native.instruction_set().name,
        cost=cost,
        roofline_seconds=machine.ceilings(device).seconds(cost),
    )
