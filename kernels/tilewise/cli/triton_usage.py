"""What a compiled Triton kernel needs of a chip, read from what the compiler left, and whether that
is too much. Nothing is run.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewise import gpu
from tilewise.cli.console import UserError, one_line

SPILL_LIMIT = 128
"""Bytes per thread that a kernel may spill unless an option says otherwise."""

FLOAT32_SPILL_LIMIT = 1024
"""The same without matrix instructions, as NVIDIA's chips multiply float32. There the compiler
holds whole tiles of products in registers; such calls are for checking, and are not tuned."""

_MATRIX_INSTRUCTIONS = (
    ("wgmma", "wgmma.mma_async"),
    ("tcgen05", "tcgen05.mma"),
    ("mma.sync", "mma.sync"),
    ("v_mfma", "v_mfma"),
)


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs.

    Args:
        registers: per thread; on AMD vector and accumulation registers together.
        spills: bytes of memory per thread beyond the registers.
        shared: bytes of shared memory per block of threads.
        matrix: the matrix instructions in its code.
        wants_matrix: whether it multiplies matrices of a type that every chip has such
            instructions for: all but float32.
    """

    registers: int
    spills: int
    shared: int
    matrix: tuple[str, ...]
    wants_matrix: bool


@dataclass(frozen=True)
class Kernel:
    """A kernel that was compiled, without its code, so that it can go from process to process.

    Args:
        name: of the function.
        target: one of `gpu.TARGETS`.
        constants: what it was compiled for; see `gpu.Compiled`.
        digest: of its code.
        usage: what it needs.
    """

    name: str
    target: str
    constants: dict[str, Any]
    digest: str
    usage: Usage


def judge(kernels: list[gpu.Compiled]) -> list[Kernel]:
    """What each of the kernels needs, each different piece of code once."""
    judged: dict[tuple[str, str, str], Kernel] = {}
    for kernel in kernels:
        digest = hashlib.sha256(assembly(kernel).encode()).hexdigest()
        key = (kernel.target, kernel.kernel, digest)
        if key not in judged:
            judged[key] = Kernel(
                kernel.kernel, kernel.target, kernel.constants, digest, usage(kernel)
            )
    return list(judged.values())


def assembly(kernel: gpu.Compiled) -> str:
    """The text that the kernel was assembled from."""
    code = kernel.triton.asm
    text: str = code["ptx"] if "ptx" in code else code["amdgcn"]
    return text


def usage(kernel: gpu.Compiled) -> Usage:
    """Read the needs of a kernel from what the compiler left."""
    text = assembly(kernel)
    if "ptx" in kernel.triton.asm:
        registers, spills = _nvidia_usage(kernel.triton.asm["cubin"])
    else:
        registers, spills = _amd_usage(text)
    matrix = tuple(name for name, instruction in _MATRIX_INSTRUCTIONS if instruction in text)
    wants_matrix = _wants_matrix(kernel.triton.asm["ttir"])
    return Usage(registers, spills, kernel.triton.metadata.shared, matrix, wants_matrix)


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes, by NVIDIA's own tool, which Triton's package brings along."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        try:
            done = subprocess.run(
                [tool, "-res-usage", path], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"--triton: {one_line(error)}") from None
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout))
    return int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"])


def _amd_usage(text: str) -> tuple[int, int]:
    """Registers and spilled bytes, from the metadata at the end of the code."""
    numbers = {name: int(n) for name, n in re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", text, re.M)}
    spills = max(4 * numbers["vgpr_spill_count"], numbers["private_segment_fixed_size"])
    # vgpr_count is of both kinds: they are one file of registers on these chips.
    return numbers["vgpr_count"], spills


def _wants_matrix(ttir: str) -> bool:
    """Whether Triton's first form of the code has a product that is not of exact float32."""
    products = re.findall(r" tt\.dot (.*)", ttir)
    return any("xf32> *" not in line or "tf32" in line for line in products)


def violations(used: Usage, target: str, spill_limit: int) -> list[str]:
    """In what a kernel needs too much of a chip, or has missed what the chip is fast at."""
    found = []
    if used.wants_matrix and not used.matrix:
        found.append("multiplies matrices without matrix instructions")
    if not used.wants_matrix:
        spill_limit = max(spill_limit, FLOAT32_SPILL_LIMIT)
    if used.spills > spill_limit:
        found.append(f"spills {used.spills} bytes per thread, allowed are {spill_limit}")
    limit = gpu.SHARED_MEMORY[target]
    if used.shared > limit:
        found.append(f"needs {used.shared} bytes of shared memory, the chip has {limit}")
    return found
