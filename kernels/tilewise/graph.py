"""Recordings of C++ kernel calls: a function of many small calls, run again without Python.

One step of decoding a small model is hundreds of kernel calls of a few microseconds, and getting to
each of them from Python takes longer than the kernel. As CUDA graphs do on a GPU, `CpuGraph` writes
down which kernels a function would call on which tensors, and calls them one after the other from
C++, on threads that stay awake in between. Nothing is computed while it is written down, so that
Python has the caches to itself meanwhile.

    step()  # once before: weights are laid out for the kernels, tables are made
    graph, logits = CpuGraph.capture(step)
    token_ids.copy_(next_token_ids)
    graph.replay()  # logits has values

The tensors are always the same ones: who wants another result writes other inputs into them. Those
that the function has made and let go of share memory, as they do outside of a recording.

What is not a C++ kernel of ours cannot be recorded, and must not be forgotten either: every
operator that PyTorch runs meanwhile is looked at, and one that computes anything ends the capture.
Exceptions are `x[numbers]`, an embedding and a linear layer of up to four rows: these a kernel of
ours computes then, as exactly, though not with the same last bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from tilewise import cpu, native
from tilewise.dispatch import requests
from tilewise.library import CONTRACTS, Recorder

T = TypeVar("T")

_EMPTY = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
_HARMLESS = frozenset({"detach", "full"})
"""Of these "full" also fills: with a number, which a replay finds there as it was."""


class CaptureError(RuntimeError):
    """A function cannot be recorded; the message says why."""


class CpuGraph:
    """The C++ kernel calls of a function; see `capture`.

    Args:
        rows: as `capture` was told.
        weights: what linear layers and embeddings read that are PyTorch's otherwise.
    """

    def __init__(
        self, ops: native.Operators, number: int, rows: int, weights: list[torch.Tensor]
    ) -> None:
        self._ops, self._number, self.rows = ops, number, rows
        self.weights = weights

    @classmethod
    def capture(cls, function: Callable[[], T], rows: int = 0) -> tuple[CpuGraph, T]:
        """Record the kernel calls of `function`, which are not made.

        Args:
            function: calls C++ kernels on the CPU, and otherwise only makes views and allocates.
                Every number it takes from a tensor would be frozen, so taking one is refused too.
            rows: how many rows (tokens) the function's tensors have, where a replay may want the
                first of them alone. What has that many and is none of them must be full then.

        Returns:
            The recording, and what the function returned: its tensors hold nothing until a replay
            writes to them.

        Raises:
            CaptureError: if it ran anything else; it was stopped there.
        """
        reason = native.why_not_cpu()
        if reason is not None:
            raise CaptureError(reason)
        ops = native.cpu_ops()
        ops.begin_recording(rows)
        is_complete = False
        try:
            with torch.no_grad(), _Watch(ops) as watch:
                result = function()
            is_complete = True
        finally:
            number = ops.end_recording(is_complete)
        return cls(ops, number, rows, watch.weights), result

    def replay(self, times: int = 1, rows: int | None = None) -> None:
        """Make the recorded calls, on the values that their tensors hold now.

        Args:
            times: how often, one run after the other: for calls that write their own next inputs.
            rows: of the rows that the capture was told of, how many of the first there are this
                time; None for all. What the others hold afterwards is undefined.
        """
        self._ops.replay(self._number, times, self.rows if rows is None else rows)

    def __del__(self) -> None:
        self._ops.forget_recording(self._number)


class _Watch(Recorder):
    """Lets views, allocations and our own kernels pass, and looks into those."""

    def __init__(self, ops: native.Operators) -> None:
        super().__init__()
        self.ops = ops
        self.weights: list[torch.Tensor] = []  # of layers that are PyTorch's otherwise

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch asks. To skip what nobody compiles, it would import its compiler: 2 s, 60 MB."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "tilewise":
            with self:
                return CONTRACTS[func._opname]._run(*args)
        if func._opname in _EMPTY:
            made = func(*args, **kwargs)
            return self.ops.recorded_empty_like(made) if made.is_cpu else made
        is_kernel = func.namespace.startswith("tilewise_")
        if is_kernel or func._opname in _HARMLESS or _is_view(func):
            return func(*args, **kwargs)
        substitute = None if kwargs else _SUBSTITUTES.get(func)
        result = None if substitute is None else substitute(self, *args)
        if result is not None:
            return result
        raise CaptureError(f"{func} is computed by PyTorch, and only C++ kernels can be recorded")


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether all results share memory with an argument, and nothing is written."""
    returns = func._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


# --- what PyTorch computes in a model otherwise ours, by our kernels; None where they cannot ------


def _take(
    watch: _Watch, x: torch.Tensor, indices: list[torch.Tensor | None]
) -> torch.Tensor | None:
    """`x[numbers]`."""
    numbers = indices[0] if len(indices) == 1 else None
    return None if numbers is None else _rows(watch, x, numbers, wraps=True)


def _embed(
    watch: _Watch, weight: torch.Tensor, numbers: torch.Tensor, *_: Any
) -> torch.Tensor | None:
    """Rows of an embedding table; the other arguments are for its gradient."""
    if weight.dim() != 2:
        return None
    watch.weights.append(weight)
    return _rows(watch, weight, numbers, wraps=False)


def _rows(
    watch: _Watch, x: torch.Tensor, numbers: torch.Tensor, *, wraps: bool
) -> torch.Tensor | None:
    is_plain = (
        _is_strided(x, numbers)
        and numbers.dtype == torch.int64
        and numbers.dim() == 1
        and numbers.is_contiguous()
        and x.dim() >= 1
        and len(x) > 0
        and x[0].is_contiguous()
    )
    return watch.ops.take_rows(x, numbers, wraps) if is_plain else None


_MOST_ROWS = 4
"""Of x: with more of them PyTorch's product is the faster one."""


def _multiply(
    watch: _Watch, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor | None:
    """A linear layer of a few rows."""
    tensors = [t for t in (x, weight, bias) if t is not None]
    is_plain = (
        _is_strided(*tensors)
        and x.dim() == weight.dim() == 2
        and x.shape[1] == weight.shape[1]
        and len(x) <= _MOST_ROWS
        and x.dtype in cpu.DTYPES
        and all(t.dtype == x.dtype for t in tensors)
        and x.stride(1) == 1
        and weight.is_contiguous()
        and weight.numel() > 0
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
    )
    if not is_plain or not _OURS.issuperset(requests().values()):
        return None
    watch.weights.extend(tensors[1:])
    out = watch.ops.recorded_empty_like(x.new_empty(len(x), len(weight)))
    watch.ops.linear(x, weight, bias, out)
    return out


_OURS = frozenset({"cpu", "auto"})
"""Who asks for other backends does not get our kernels for PyTorch's."""


def _is_strided(*tensors: torch.Tensor) -> bool:
    return all(t.layout == torch.strided and t.is_cpu for t in tensors)


_SUBSTITUTES: dict[Any, Callable[..., torch.Tensor | None]] = {
    torch.ops.aten.index.Tensor: _take,
    torch.ops.aten.embedding.default: _embed,
    torch.ops.aten.linear.default: _multiply,
    # What PyTorch makes of a linear layer, for which it turns the weight.
    torch.ops.aten.mm.default: lambda watch, x, turned: _multiply(watch, x, turned.mT),
    torch.ops.aten.addmm.default: lambda watch, bias, x, turned: _multiply(
        watch, x, turned.mT, bias
    ),
}
