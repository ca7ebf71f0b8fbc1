"""The operations as PyTorch sees them: one `torch.ops.tilewise.*` per contract.

PyTorch's own compiler, autograd and CUDA graphs cannot look inside a hand-written kernel, so a
kernel reaches them as a registered operator with a fixed number of outputs and a *fake* function
that says their shapes, dtypes and strides. All backends of an operation share one operator, which
takes the backend's name as its last argument; they can be told apart only where real tensors are.

`define` + `impl` costs 1.5-1.7 us a call; `torch.library.custom_op` costs 8-11, so it is not used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from tilewise.dispatch import BackendError

# Tuples and lists are of numbers: no operator takes several tensors as one argument.
_PLAIN = frozenset(
    {torch.Tensor, torch.nn.Parameter, torch.dtype, type(None), bool, int, float, str, tuple, list}
)

# Not functorch's: PyTorch's older vmap, in which `is_grads_batched` runs backward functions.
_VMAP_MODE: Any = torch._C._parse_dispatch_key("VmapMode")
_is_batch = torch._C._dispatch_tls_is_dispatch_key_included

_LIBRARY = torch.library.Library("tilewise", "FRAGMENT")

CONTRACTS: dict[str, Contract] = {}
"""Every registered operator by name."""


class Contract:
    """A registered operator and the kernels behind it.

    Args:
        name: the operator becomes `torch.ops.tilewise.<name>`.
        schema: arguments and results in PyTorch's schema language, without the backend:
            `"(Tensor x, float eps) -> Tensor"`. Written-to tensors are marked `Tensor(a!)`.
        fake: takes the schema's arguments as fake tensors and returns empty results.
    """

    def __init__(self, name: str, schema: str, fake: Callable[..., Any]) -> None:
        arguments, results = _split(schema)
        _LIBRARY.define(f"{name}({arguments}, str backend) -> {results}")
        _LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")

        def fake_without_backend(*args: Any) -> Any:
            return fake(*args[:-1])

        torch.library.register_fake(f"tilewise::{name}", fake_without_backend, lib=_LIBRARY)
        self.name = name
        self.kernels: dict[str, Callable[..., Any]] = {}
        # Bound once: the lookups torch.ops -> tilewise -> name cost more than the call.
        self.op = getattr(torch.ops.tilewise, name).default
        CONTRACTS[name] = self

    def kernel(self, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: register a function of the schema's arguments as `backend`'s kernel."""

        def register(fn: Callable[..., Any]) -> Callable[..., Any]:
            self.kernels[backend] = fn
            return fn

        return register

    def __call__(self, *args: Any) -> Any:
        """Call the operator; past PyTorch's dispatcher where nobody would look at the call.

        The way through the dispatcher and back into Python costs 2 us, as much as a small kernel.
        Compilers, dispatch modes, function transforms and tensor subclasses do look.
        """
        if is_watched() or _is_batch(_VMAP_MODE) or not _PLAIN.issuperset(map(type, args)):
            return self.op(*args)
        kernel = self.kernels.get(args[-1])
        return kernel(*args[:-1]) if kernel is not None else self._run(*args)

    def _run(self, *args: Any) -> Any:
        *arguments, backend = args
        kernel = self.kernels.get(backend)
        if kernel is None:
            known = ", ".join(self.kernels) or "none"
            raise BackendError(f"{self.name}: no kernel {backend!r} is registered, only {known}")
        return kernel(*arguments)


def is_watched() -> bool:
    """Whether a compiler, a dispatch mode or a function transform looks at what operators run.

    A recorder does not: our own kernels tell it of themselves.
    """
    return (
        torch.compiler.is_compiling()
        or (torch._C._len_torch_dispatch_stack() > 0 and not _is_only_recorded())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


class Recorder(TorchDispatchMode):
    """A dispatch mode that need not see the operators of this library; see `tilewise.graph`."""


def _is_only_recorded() -> bool:
    return torch._C._len_torch_dispatch_stack() == 1 and isinstance(
        torch._C._get_dispatch_stack_at(0), Recorder
    )


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether PyTorch would record a gradient for a call with these tensors."""
    if torch.is_grad_enabled():
        for x in tensors:  # a generator for any() would cost more than the rest
            if x is not None and x.requires_grad:
                return True
    return False


Saved: TypeAlias = tuple[Any, ...]
"""What `ctx.save_for_backward` was given, tensors and None."""


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the `backward` of an autograd function whose kernels have no second derivative.

    It is given `ctx.saved_tensors` as its second argument: checkpointing lets them be read once.

    PyTorch's own decorator refuses a second derivative only where `grads` need one, and cuts the
    way to what was saved: the Hessian of a sum would be zero, without a word.
    """

    @functools.wraps(backward)
    def call(ctx: Any, *grads: torch.Tensor | None) -> Any:
        saved = ctx.saved_tensors
        with torch.no_grad():
            results = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():
            return results
        sources = [x for x in (*grads, *saved) if x is not None and x.requires_grad]
        refuse = torch._C._functions.DelayedError(_ONCE, len(results) + len(sources))
        return refuse(*results, *sources)[: len(results)]

    return call


_ONCE = (
    b"tilewise: the gradients of this backend cannot be differentiated again, those of naive can: "
    b"backend='naive', or with tilewise.use_backend('naive')"
)


def _split(schema: str) -> tuple[str, str]:
    arguments, results = schema.rsplit("->", 1)
    arguments = arguments.strip()
    if not (arguments.startswith("(") and arguments.endswith(")")):
        raise ValueError(f"schema: expected '(...) -> ...', got {schema!r}")
    return arguments[1:-1], results.strip()
