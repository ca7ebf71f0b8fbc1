"""What the Triton backends of all operations share: when they can run, how they are launched.

Three things may stand behind a launch. On a GPU it is a launch. Under Triton's interpreter
(`TRITON_INTERPRET=1`, which Triton reads once, when it is imported) the kernel runs as Python, on
CPU tensors and very slowly: that is how it is tested where there is no GPU. And within
`compiling_for`, kernels are compiled for a GPU that need not be there, and not run at all.

Triton is imported by the first call that needs it, never with tilewise.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run under Triton's interpreter."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that Triton kernels take; all of them compute in float32."""

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
"""What kernels can be compiled for without a GPU: Triton's backend, architecture and warp size."""

SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}
"""Bytes of shared memory that a block of threads can have (AMD: local data share)."""


# --- whether they can run -------------------------------------------------------------------------


def why_not(x: torch.Tensor, dtype: torch.dtype | None = None, *, dot: bool = True) -> str | None:
    """Why Triton kernels cannot take a call whose main tensor is `x`; None where they can.

    Args:
        x: decides the device.
        dtype: what is computed with, if it is not x's.
        dot: whether the kernel multiplies matrices.
    """
    dtype = dtype or x.dtype
    if x.device.type != "cuda" and not (
        x.device.type == "cpu" and (INTERPRETED or _compilation is not None)
    ):
        return f"needs tensors on a GPU, got {x.device}"
    if dtype not in DTYPES:
        return f"computes in float32, got {dtype}"
    if x.device.type == "cpu" and INTERPRETED and dot and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 matrices wrongly"
    return _why_not_here(None if x.device.type == "cpu" else x.device.index or 0)


def why_not_auto(*args: Any, **options: Any) -> str | None:
    """For `Impl.why_not_auto`: the interpreter is for tests, and nobody's choice."""
    return "Triton's interpreter is for tests alone" if INTERPRETED else None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _why_not_gpu(index: int) -> str | None:
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(index)
        if major < 8:
            return f"needs compute capability 8.0 or more, this GPU has {major}.{minor}"
    return None


def _why_not_here(gpu: int | None) -> str | None:
    """What the machine lacks: Triton, or in GPU number `gpu` what Triton kernels need."""
    if not _has_triton():
        return "the package triton is not installed"
    return None if gpu is None else _why_not_gpu(gpu)


# Dynamo looks through `functools.cache` at what it cannot trace; so it is told to ask once, while
# it traces (see `native.why_not_cpu`).
_why_not_here._dynamo_marked_constant = True  # type: ignore[attr-defined]


# --- launching ------------------------------------------------------------------------------------


def architecture(x: torch.Tensor) -> str:
    """A name in `TARGETS`: the one whose instructions and shared memory the GPU of `x` has.

    The interpreter passes for an sm_90, so that it tests what is for that alone.
    """
    if _compilation is not None:
        return _compilation.target
    return "sm_90" if x.device.type == "cpu" else _architecture(x.device.index or 0)


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    # Chips for workstations, of any year, have sm_80's matrix instructions and 99 KB.
    if (major, minor) in ((8, 6), (8, 9)) or major >= 12:
        return "sm_86"
    return "sm_80" if major < 9 else "sm_90" if major < 10 else "sm_100"


def has_descriptors(x: torch.Tensor) -> bool:
    """Whether the GPU of `x` loads tiles by tensor descriptors (`tl.make_tensor_descriptor`).

    Elsewhere Triton makes pointers and masks of them.
    """
    return architecture(x) in ("sm_90", "sm_100")


def multiplies_fp8(x: torch.Tensor) -> bool:
    """Whether the GPU of `x` has matrix instructions for float8 E4M3 as PyTorch has it (e4m3fn).

    AMD's gfx942 has some for another E4M3 (e4m3fnuz), of half the values.
    """
    if _compilation is not None:
        return _compilation.target in ("sm_90", "sm_100")
    return x.device.type == "cuda" and _multiplies_fp8(x.device.index or 0)


@functools.cache
def _multiplies_fp8(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= (8, 9)


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors the device has; results must not depend on it."""
    if device.type == "cpu":
        return 2 if INTERPRETED else 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a `triton.jit` kernel on the device of its first argument.

    Args:
        kernel: a function decorated by `triton.jit`.
        grid: programs in each dimension; where one is 0 there is nothing to do.
        args: of the kernel; the first is a tensor.
        options: its constexpr arguments, `num_warps`, `num_stages`; `enable_fp_fusion=False` keeps
            the compiler from contracting a product and a sum into one FMA. `needs_scratch=True`:
            programs want memory of their own, as those do that make descriptors.
    """
    if 0 in grid:
        return
    needs_scratch = options.pop("needs_scratch", False)
    # Said at every launch: what it is by default changes from one version of Triton to the next.
    options.setdefault("enable_fp_fusion", True)
    if _compilation is not None:
        compiled = kernel.run(*args, grid=grid, warmup=True, **options)
        constants = {
            name: value.dtype if isinstance(value, torch.Tensor) else value
            for name, value in zip(kernel.arg_names, args, strict=False)
            if value is None or isinstance(value, torch.Tensor)
        }
        found = Compiled(kernel.__name__, _compilation.target, constants | options, compiled)
        _compilation.kernels.append(found)
        return
    device = args[0].device
    here = device.type == "cpu" or device.index == torch.cuda.current_device()
    with nullcontext() if here else torch.cuda.device(device):
        if needs_scratch:
            # Triton keeps the allocator in a context variable: a copy leaves the caller's alone.
            copy_context().run(_launch_with_scratch, kernel[grid], device, args, options)
        else:
            kernel[grid](*args, **options)


def _launch_with_scratch(
    run: Any, device: torch.device, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    import triton

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        # Freed before the kernel has run, but only for what comes after it on the stream.
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)
    run(*args, **options)


# --- compiling ahead of time ----------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """A kernel that was compiled.

    Args:
        kernel: its name.
        target: one of `TARGETS`.
        constants: what it was compiled for: the dtypes of its tensors, None for those that are
            missing, its constexpr arguments and options.
        triton: Triton's own object.
    """

    kernel: str
    target: str
    constants: dict[str, Any]
    triton: Any


@dataclass(frozen=True)
class _Compilation:
    target: str
    kernels: list[Compiled]


_compilation: _Compilation | None = None


class _NoDevice:
    """Enough of a Triton driver to compile; Triton asks it for everything about the device."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels by device.
        return hash(self._target)

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(target: str) -> Iterator[list[Compiled]]:
    """Within the block, calls of the Triton backends on CPU tensors compile their kernels only.

    What the calls return is uninitialised. Yields the list that the kernels are appended to.

    Args:
        target: one of `TARGETS`.

    Raises:
        ValueError: for another target.
    """
    global _compilation
    if target not in TARGETS:
        raise ValueError(f"target: must be one of {', '.join(TARGETS)}, got {target!r}")
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    before = (_compilation, driver._active)
    _compilation = _Compilation(target, [])
    driver.set_active(_NoDevice(GPUTarget(*TARGETS[target])))
    try:
        yield _compilation.kernels
    finally:
        _compilation, driver._active = before
