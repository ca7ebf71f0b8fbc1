"""The agreement rule, and the tools to hold a kernel to it.

A fast kernel may round differently from the naive one, but it may not be worse: both are compared
with the naive operation in float64, and row by row the fast kernel's error must stay within twice
the naive one's plus one rounding step of the result's dtype (four in float32 and float64, where the
kernel's own arithmetic is no finer than its result). Fixed tolerances, by contrast, are either too
loose for short sums or too tight for long ones.

The rule is FlashAttention's ("at most twice the error of the reference in the same dtype"), made
local to a row and given a float64 truth. Used by the tests, the benchmarks, `tilewise verify` and
by whoever writes a kernel of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that a case is tried in unless it says otherwise."""


# --- the rule -------------------------------------------------------------------------------------

_STEPS = {torch.float16: 1, torch.bfloat16: 1}
"""Rounding steps allowed on top. A 16-bit result is rounded once, after sums in float32; a float32
result shows every rounding of the sums themselves, and so their order."""


@dataclass(frozen=True)
class Agreement:
    """How far a result is from the truth at its worst row.

    Args:
        ratio: error over allowed error; at most 1 where they agree.
        row: index of the worst row (all dimensions but the last).
        error, naive_error: root-mean-square difference from the float64 truth in that row.
        allowed: 2 x naive_error + the rounding steps at the row's magnitude.
        relative_error: error over the row's magnitude.
    """

    ratio: float
    row: tuple[int, ...]
    error: float
    naive_error: float
    allowed: float
    relative_error: float


_EXACT = Agreement(0.0, (), 0.0, 0.0, 0.0, 0.0)


def assert_agrees(
    actual: torch.Tensor,
    naive: torch.Tensor,
    truth: torch.Tensor,
    *,
    name: str = "output",
    floor: float = 0.0,
    leeway: float = 1.0,
) -> Agreement:
    """Raise AssertionError unless `actual` is as good as `naive`, judged against `truth`.

    Args:
        actual: the result under test, any shape; the last dimension is a row.
        naive: the naive operation's result in the same dtype.
        truth: the naive operation's result in float64.
        name: what the message calls the result.
        floor: the least magnitude (root mean square) that a rounding step is taken from. 0 means
            the row's own; a row that is small by cancellation needs the scale of what cancelled.
        leeway: what the allowed error is multiplied by; above 1 for kernels that are not ours.

    Returns:
        The worst row, for reports.
    """
    if actual.shape != truth.shape or actual.dtype != naive.dtype:
        raise AssertionError(
            f"{name}: expected {tuple(truth.shape)} {naive.dtype}, "
            f"got {tuple(actual.shape)} {actual.dtype}"
        )
    if actual.numel() == 0:
        return _EXACT
    if not actual.dtype.is_floating_point:
        return _assert_equal(actual, naive, name)
    a, n, t = (x.detach().to("cpu", torch.float64) for x in (actual, naive, truth))
    if a.dim() == 0:
        a, n, t = a[None], n[None], t[None]
    _assert_same_nonfinite(a, t, name)
    finite = t.isfinite()
    a, n, t = (torch.where(finite, x, 0.0) for x in (a, n, t))
    n = torch.where(n.isfinite(), n, t)
    error, naive_error = root_mean_square(a - t), root_mean_square(n - t)
    magnitude = root_mean_square(t)
    steps = _STEPS.get(actual.dtype, 4)
    step = torch.finfo(actual.dtype).eps * magnitude.clamp(min=floor)
    allowed = leeway * (2 * naive_error + steps * step)
    ratio = torch.where(error > 0, error / allowed, 0.0)  # error > 0 = allowed gives inf
    flat = int(ratio.argmax())
    row = _unravel(flat, ratio.shape)
    worst = Agreement(
        ratio=float(ratio[row]),
        row=row,
        error=float(error[row]),
        naive_error=float(naive_error[row]),
        allowed=float(allowed[row]),
        relative_error=float(error[row] / magnitude[row].clamp(min=1e-300)) if error[row] else 0.0,
    )
    if not worst.ratio <= 1:
        rule = (
            f"2 x naive's {worst.naive_error:.3g} + {steps} x one step of {naive.dtype} at "
            f"{float(magnitude[row]):.3g}"
        )
        raise AssertionError(
            f"{name}: row {worst.row} is off by {worst.error:.3g} (rms), allowed "
            f"{worst.allowed:.3g} = {rule if leeway == 1 else f'{leeway:g} x ({rule})'}; "
            f"{int((ratio > 1).sum())} of {ratio.numel()} rows disagree"
        )
    return worst


def _assert_equal(actual: torch.Tensor, expected: torch.Tensor, name: str) -> Agreement:
    different = (actual != expected).nonzero()
    if len(different):
        where = tuple(different[0].tolist())
        raise AssertionError(
            f"{name}: {len(different)} of {actual.numel()} elements differ, first at {where}: "
            f"expected {expected[where].item()}, got {actual[where].item()}"
        )
    return _EXACT


def _assert_same_nonfinite(a: torch.Tensor, t: torch.Tensor, name: str) -> None:
    wrong = (a.isfinite() != t.isfinite()) | (t.isinf() & (a != t)) | (t.isnan() & ~a.isnan())
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(wrong.sum())} non-finite elements are wrong, first at {where}: "
            f"expected {t[where].item()}, got {a[where].item()}"
        )


def root_mean_square(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(-1).sqrt()


def _unravel(flat: int, shape: torch.Size) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        flat, i = divmod(flat, size)
        index.append(i)
    return tuple(reversed(index))


# --- inputs ---------------------------------------------------------------------------------------


_MADE_ON_DEVICE = 1 << 24
"""From so many elements on, a tensor for a GPU is made there: in milliseconds, not in seconds."""


class Inputs:
    """Makes reproducible inputs of one dtype, the same numbers on every device.

    But for tensors of 2^24 elements or more on a GPU: those come from a generator there, which has
    other numbers (the same every time), and are drawn in float32.

    Args:
        dtype: of the floating-point tensors that name no other.
        device: where the tensors end up.
        seed: of the generator; every tensor made is different.
    """

    def __init__(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
    ) -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)
        self._on_device: torch.Generator | None = None
        if self.device.type == "cuda":
            self._on_device = torch.Generator(self.device).manual_seed(seed)

    def _source(self, shape: tuple[int, ...]) -> torch.Generator:
        """The generator of a tensor of this shape, on whose device it is made."""
        is_large = math.prod(shape) >= _MADE_ON_DEVICE
        return self._on_device if is_large and self._on_device is not None else self._generator

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Any:
        """A normal tensor with standard deviation `scale`."""
        x = _draw(torch.randn, shape, self._source(shape))
        return x.mul_(scale).to(self.device, dtype or self.dtype)

    def rand(self, *shape: int, dtype: torch.dtype | None = None) -> Any:
        """A uniform tensor in [0, 1)."""
        return _draw(torch.rand, shape, self._source(shape)).to(self.device, dtype or self.dtype)

    def randint(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Any:
        """Integers in [low, high)."""
        source = self._source(shape)
        drawn = torch.int64 if source is self._generator else dtype
        x = torch.randint(low, high, shape, generator=source, device=source.device, dtype=drawn)
        return x.to(self.device, dtype)

    def permutation(self, n: int, dtype: torch.dtype = torch.int64) -> Any:
        """A random order of 0..n-1."""
        return torch.randperm(n, generator=self._generator).to(self.device, dtype)

    def tensor(self, data: Any, dtype: torch.dtype) -> Any:
        """These very numbers."""
        return torch.tensor(data, dtype=dtype, device=self.device)


def _draw(
    sample: Callable[..., torch.Tensor], shape: tuple[int, ...], source: torch.Generator
) -> torch.Tensor:
    dtype = torch.float64 if source.device.type == "cpu" else torch.float32
    return sample(shape, generator=source, device=source.device, dtype=dtype)


class BlankInputs(Inputs):
    """Inputs that are only looked at: zeros, for which no memory is touched until they are read."""

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Any:
        """Zeros."""
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def rand(self, *shape: int, dtype: torch.dtype | None = None) -> Any:
        """Zeros."""
        return self.randn(*shape, dtype=dtype)

    def randint(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Any:
        """Zeros, whatever the limits."""
        return self.randn(*shape, dtype=dtype)


Make = Callable[[Inputs], dict[str, Any]]
"""Builds the keyword arguments of a public function."""


def map_tensors(value: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with `fn` applied to its tensors, through tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return fn(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, fn) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, fn) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, fn) for key, item in value.items()}
    return value


def to_float64(value: Any) -> Any:
    """`value` with its floating-point tensors in float64; storage formats (float8) stay."""
    return map_tensors(
        value,
        lambda t: t.double() if t.dtype.is_floating_point and t.dtype.itemsize > 1 else t,
    )


def strided(value: Any) -> Any:
    """`value` with every tensor cut out of a larger buffer, so that no row follows the last one.

    The last dimension keeps stride 1; the space between is NaN.
    """

    def cut(t: torch.Tensor) -> torch.Tensor:
        if t.dim() < 2 or t.dtype.itemsize == 1:
            return t
        shape = [size + 3 for size in t.shape]
        fill = float("nan") if t.dtype.is_floating_point else 0
        buffer = torch.full(shape, fill, dtype=t.dtype, device=t.device)
        view = buffer[tuple(slice(1, 1 + size) for size in t.shape)]
        view.copy_(t)
        return view

    return map_tensors(value, cut)


@contextmanager
def nan_filled_empty() -> Iterator[None]:
    """Within the block every `torch.empty` is full of NaN (integers: the largest value).

    An element that a kernel forgets to write then fails loudly. This is PyTorch's own fill for
    deterministic mode, so it reaches allocations made in C++ as well.
    """
    was_on = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
