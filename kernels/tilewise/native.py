"""What native code this machine can run, and the reason wherever it cannot.

There is one library of C++ kernels per instruction set. Which one is used is decided here, before
anything is loaded; nothing is compiled or loaded at import. Every question is answered with a value
or a sentence, because "why is my kernel not used" is the first thing a user asks.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tilewise import build
from tilewise.build import Finding, version_line

_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2"})
_AVX512 = _AVX2 | {
    "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512_vnni", "avx512_bf16",
}  # fmt: skip
INSTRUCTION_SETS: dict[str, frozenset[str]] = {
    "amx": _AVX512 | {"amx_tile", "amx_bf16", "amx_int8"},
    "avx512": _AVX512,
    "avx2": _AVX2,
}
"""The instruction sets that C++ kernels are built for, best first, and the CPU flags each needs."""

# Linux hands out AMX's 8 KiB of tile state per process, on request.
_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The CPU's feature flags as Linux names them; empty where they cannot be read."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


@functools.cache
def _amx_refusal() -> str | None:
    """Why the operating system does not let this process use AMX tiles; None where it does."""
    if sys.platform != "linux":
        return f"AMX needs Linux to grant tile state, this is {sys.platform}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0:
        return None
    return f"the kernel refused AMX tile state: {os.strerror(ctypes.get_errno())}"


def why_not_instruction_set(name: str) -> str | None:
    """Why this machine cannot run code built for `name`; None where it can.

    Raises:
        ValueError: if `name` is not one of `INSTRUCTION_SETS`.
    """
    if name not in INSTRUCTION_SETS:
        wanted = ", ".join(INSTRUCTION_SETS)
        raise ValueError(f"instruction set: must be one of {wanted}, got {name!r}")
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"needs an x86-64 processor, this is {platform.machine()}"
    missing = INSTRUCTION_SETS[name] - cpu_flags()
    if missing:
        return f"the processor lacks {', '.join(sorted(missing))}"
    return _amx_refusal() if name == "amx" else None


@functools.cache
def instruction_set() -> Finding:
    """The instruction set that C++ kernels use here.

    `TILEWISE_CPU_ISA` names one to use instead of the best.

    Raises:
        ValueError: if `TILEWISE_CPU_ISA` names one that does not exist or cannot run here.
    """
    forced = os.environ.get("TILEWISE_CPU_ISA")
    if forced:
        try:
            reason = why_not_instruction_set(forced)
        except ValueError as error:
            raise ValueError(f"TILEWISE_CPU_ISA: {error}") from None
        if reason:
            raise ValueError(f"TILEWISE_CPU_ISA: {forced} cannot run here: {reason}")
        return Finding(forced, forced)
    reasons = []
    for name in INSTRUCTION_SETS:
        reason = why_not_instruction_set(name)
        if reason is None:
            return Finding(name, name)
        reasons.append(f"{name}: {reason}")
    return Finding("none", None, "; ".join(reasons))


@functools.cache
def nvcc() -> Finding:
    """The CUDA compiler: on the path, or in `CUDA_HOME` or /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    path = shutil.which("nvcc", path=os.pathsep.join(folders))
    if path is None:
        return Finding("nvcc", None, "not on the path nor in CUDA_HOME or /usr/local/cuda")
    release = version_line([path, "--version"])
    return Finding("nvcc", f"{path} ({release or 'unknown version'})")


@functools.cache
def gpu() -> Finding:
    """The GPU that PyTorch sees."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
        return Finding("gpu", f"{name} (compute capability {major}.{minor})")
    if torch.version.cuda is None and torch.version.hip is None:
        return Finding("gpu", None, f"torch {torch.__version__} is built without CUDA and ROCm")
    return Finding("gpu", None, "torch is built for one but sees no device")


@functools.cache
def triton() -> Finding:
    """The installed Triton, found without importing it."""
    from importlib import metadata

    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return Finding("triton", metadata.version(package))
        except metadata.PackageNotFoundError:
            continue
    return Finding("triton", None, "the package triton is not installed")


# --- the C++ kernels ------------------------------------------------------------------------------


class Operators:
    """`torch.ops.tilewise_<isa>` with the overloads looked up once: a call is 1 us shorter."""

    def __init__(self, namespace: str) -> None:
        self._namespace = getattr(torch.ops, namespace)

    def __getattr__(self, name: str) -> Any:
        operator = getattr(self._namespace, name).default
        setattr(self, name, operator)
        return operator


@dataclass(frozen=True)
class Library:
    """A loaded library."""

    isa: str
    path: Path
    ops: Operators


class _Announcement(build.Watcher):
    """A line on stderr: someone's first call takes up to a minute, and they shall know why."""

    def waiting(self) -> None:
        print("tilewise: waiting for another process that builds the C++ kernels", file=sys.stderr)

    def started(self, isa: str, steps: int) -> None:
        text = f"tilewise: building the C++ kernels for {isa}, once, in {build.cache_folder()} ..."
        print(text, end="", file=sys.stderr, flush=True)

    def finished(self, seconds: float, warnings: str) -> None:
        print(f" done in {seconds:.0f} s", file=sys.stderr)

    def failed(self, output: str) -> None:
        print(" failed", *output.splitlines()[-8:], sep="\n  ", file=sys.stderr)


@functools.cache
def load(isa: str, variant: str = "") -> Library:
    """Load the library for one instruction set, built where it is not in the cache.

    Libraries of several instruction sets can be loaded side by side.

    Args:
        isa: one of `INSTRUCTION_SETS` that this machine can run, or any if it is emulated.
        variant: one of `build.VARIANTS`.

    Raises:
        BuildError: if there is no library and none can be built or loaded.
    """
    path = build.library(isa, variant, watcher=_Announcement())
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise build.BuildError(f"{path} cannot be loaded: {error.__cause__ or error}") from None
    return Library(isa, path, Operators(build.namespace(isa, variant)))


def _load_best() -> Library:
    """The library for the best instruction set that both the machine and the compiler know."""
    chosen = instruction_set()
    if chosen.value is None:
        raise build.BuildError(str(chosen.reason))
    if os.environ.get("TILEWISE_CPU_ISA"):
        return load(chosen.value)
    names = list(INSTRUCTION_SETS)
    for name in names[names.index(chosen.value) : -1]:
        with contextlib.suppress(build.UnknownInstructions):
            return load(name)
    return load(names[-1])


# None until the first question; then the library, or why there is none.
_cpu: Library | build.BuildError | None = None
_cpu_refusal: str | None = None


def _find_cpu() -> Library | build.BuildError:
    global _cpu, _cpu_refusal
    if _cpu is None:
        try:
            _cpu = _load_best()
        except build.BuildError as error:
            _cpu, _cpu_refusal = error, str(error)
    return _cpu


def why_not_cpu() -> str | None:
    """Why the C++ kernels cannot be used here; None where they can. Builds them on first use.

    Raises:
        ValueError: if `TILEWISE_CPU_ISA` names what does not exist or cannot run here.
    """
    if _cpu is None:
        _find_cpu()
    return _cpu_refusal


# What `torch.compiler.assume_constant_result` does, without the import of all of torch._dynamo:
# a traced call asks once, while it is traced, and may build then.
why_not_cpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cpu_ops() -> Operators:
    """The operators of the C++ kernels, built on first use.

    Raises:
        BackendError: if they cannot be used here.
    """
    found = _cpu if _cpu is not None else _find_cpu()
    if isinstance(found, Library):
        return found.ops
    from tilewise.dispatch import BackendError

    raise BackendError(f"there are no C++ kernels: {found}")


def loaded_cpu_ops() -> Operators | None:
    """The same where they have been asked for before; builds and loads nothing."""
    return _cpu.ops if isinstance(_cpu, Library) else None


@contextlib.contextmanager
def use_library(loaded: Library) -> Iterator[None]:
    """Let calls in a `with` block, on any thread, run this library; for tests of several."""
    global _cpu, _cpu_refusal
    before = _cpu, _cpu_refusal
    _cpu, _cpu_refusal = loaded, None
    try:
        yield
    finally:
        _cpu, _cpu_refusal = before


def library() -> Finding:
    """The library of C++ kernels that calls use, built on first use, or why there is none."""
    found = _find_cpu()
    if isinstance(found, Library):
        return Finding("native library", f"{found.path} ({found.isa})")
    return Finding("native library", None, str(found))
