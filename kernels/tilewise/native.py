"""What native code this machine can run and build, and the reason wherever it cannot.

The C++ and CUDA sources are compiled once per instruction set and chosen here, before anything is
loaded; nothing in this file compiles or loads at import. Every question is answered with a value
and a sentence, because "why is my kernel not used" is the first thing a user asks.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

INSTRUCTION_SETS: dict[str, frozenset[str]] = {
    "amx": frozenset({"amx_tile", "amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"}),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
}
"""The instruction sets that C++ kernels are built for, best first, and the CPU flags each needs."""

# Linux hands out AMX's 8 KiB of tile state per process, on request.
_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


@dataclass(frozen=True)
class Finding:
    """Something that was looked for: what was found (`value`), or why not (`reason`)."""

    name: str
    value: str | None
    reason: str | None = None

    def __str__(self) -> str:
        return self.value if self.value is not None else f"none: {self.reason}"


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


def _version(command: list[str]) -> str | None:
    """The first line of `command`'s output that has a version number in it."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = (run.stdout + run.stderr).splitlines()
    return next((line.strip() for line in lines if re.search(r"\d+\.\d+", line)), None)


@functools.cache
def compiler() -> Finding:
    """The C++ compiler: `CXX`, or the first of c++, g++ and clang++ on the path."""
    for candidate in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        path = shutil.which(candidate) if candidate else None
        if path:
            version = _version([path, "--version"])
            return Finding("compiler", f"{path} ({version or 'unknown version'})")
    return Finding("compiler", None, "no c++, g++ or clang++ on the path and CXX is not set")


@functools.cache
def nvcc() -> Finding:
    """The CUDA compiler: on the path, or in `CUDA_HOME` or /usr/local/cuda."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    path = shutil.which("nvcc", path=os.pathsep.join(folders))
    if path is None:
        return Finding("nvcc", None, "not on the path nor in CUDA_HOME or /usr/local/cuda")
    release = _version([path, "--version"])
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


def source_folder() -> Path:
    """Where the C++ and CUDA sources are: beside `kernels/` in a checkout."""
    return Path(__file__).resolve().parents[2] / "csrc"


@functools.cache
def library() -> Finding:
    """The native library, or why there is none."""
    sources = source_folder()
    if not any(sources.glob("*.cpp")):
        return Finding("native library", None, "this version has no C++ sources to build")
    if compiler().value is None:
        return Finding("native library", None, str(compiler().reason))
    return Finding("native library", None, "not built; `tilewise build` builds it")
