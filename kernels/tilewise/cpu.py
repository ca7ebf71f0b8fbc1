"""What the C++ backends of all operations share.

On small tensors an eager call takes longer to check, to dispatch and to allocate for in Python than
to compute. So some operations have a C++ operator `plain_*` that does all of it: it is given the
arguments unseen, makes the call if there is nothing special about it, and returns None if there is,
or if something is wrong. Then the ordinary way is taken, which alone can explain and choose. Only
time can tell the two ways apart: a plain operator refuses whatever a check refuses, and the kernel
behind it is the one that the ordinary way would find.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilewise import native
from tilewise.dispatch import OPS, requested_backend, requests
from tilewise.library import is_watched

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that C++ kernels take; all of them compute in float32."""


_TENSORS = (torch.Tensor, torch.nn.Parameter)
"""The types that have no behaviour of their own."""


def why_not(x: torch.Tensor) -> str | None:
    """Why the C++ kernels cannot take a call whose main tensor is `x`; None where they can."""
    return why_not_dtype(x, x.dtype)


def why_not_dtype(x: torch.Tensor, dtype: torch.dtype) -> str | None:
    """The same where the result's dtype is not that of `x`."""
    if x.device.type != "cpu":
        return f"needs tensors on the CPU, got {x.device}"
    if dtype not in DTYPES:
        return f"computes in float32, got {dtype}"
    return native.why_not_cpu()


def plain_operators(
    op: str,
    backend: str,
    *tensors: torch.Tensor,
    optional: tuple[torch.Tensor | None, ...] = (),
) -> native.Operators | None:
    """The C++ operators, where a call with these tensors may be tried on them unchecked.

    It may where the C++ backend comes first and nobody has put another in its place, nobody else
    has to see the call (autograd, a compiler, a subclass), and the library is there.
    """
    if is_watched() or (implemented := OPS[op]).impls is not implemented.own_impls:
        return None
    if backend == "auto" and requests():
        backend = requested_backend(op)
    if backend not in ("auto", "cpu"):
        return None
    is_recorded = torch.is_grad_enabled()
    if optional:
        tensors = (*tensors, *[x for x in optional if x is not None])
    for x in tensors:
        if type(x) not in _TENSORS or not x.is_cpu or (is_recorded and x.requires_grad):
            return None
    return native.loaded_cpu_ops()


def plainly(operator: Callable[..., Any], *args: Any, otherwise: Any = None) -> Any:
    """What a plain operator returns; `otherwise` where a tensor is sparse or nested."""
    try:
        return operator(*args)
    except NotImplementedError:
        return otherwise


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """`x` itself, or a copy where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
