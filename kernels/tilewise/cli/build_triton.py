"""`tilewise build --triton`: compile the Triton kernels, for GPUs that need not be here.

What a kernel needs of a chip is known once it is compiled. Registers that do not suffice are
spilled to memory, which costs speed; shared memory that does not suffice makes the launch fail. So
every kernel is compiled in the configurations that ship, for calls with the shapes of real models,
and judged without being run.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tilewise import gpu
from tilewise.cli.console import UserError, make_console, one_line, progress
from tilewise.dispatch import OPS, BackendError

if TYPE_CHECKING:
    from rich.console import Console

    from tilewise.testing import Case

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
    """

    registers: int
    spills: int
    shared: int
    matrix: tuple[str, ...]


def run(options: argparse.Namespace) -> int:
    """Compile for every target that was asked for; 1 if a kernel needs too much."""
    targets = options.triton or list(gpu.TARGETS)
    for target in targets:
        if target not in gpu.TARGETS:
            known = ", ".join(gpu.TARGETS)
            raise UserError(f"--triton: a target must be one of {known}, got {target!r}")
    if options.isa or options.variant:
        raise UserError("--triton: --isa and --variant are of the C++ kernels")
    if importlib.util.find_spec("triton") is None:
        raise UserError("--triton: the package triton is not installed")
    if gpu.INTERPRETED:
        raise UserError("--triton: TRITON_INTERPRET=1 is set, so that nothing is compiled")
    calls = _calls(options.op)
    if not calls:
        raise UserError(f"--triton: {options.op} has no Triton kernels")
    console = make_console()
    violations = []
    for target in dict.fromkeys(targets):
        found = [(kernel, usage(kernel)) for kernel in _compile(target, calls, options.quiet)]
        _print_table(target, found, console)
        for kernel, used in found:
            for what in _violations(used, target, options.spill_limit):
                violations.append(f"{kernel.kernel} for {target}: {what}")
    for line in violations:
        console.print("[red]too much[/]", line, soft_wrap=True)
    return 1 if violations else 0


# --- the calls ------------------------------------------------------------------------------------


def _calls(op: str | None) -> list[tuple[Case, Any]]:
    """(call, dtype) for everything with Triton kernels."""
    from tilewise.testing import all_compiled_calls

    return [
        (case, dtype)
        for case in all_compiled_calls()
        if op in (None, case.op) and "triton" in OPS[case.op].backends
        for dtype in case.dtypes
    ]


def _compile(target: str, calls: list[tuple[Case, Any]], quiet: bool) -> list[gpu.Compiled]:
    """The kernels of all calls, each different piece of code once."""
    from tilewise.testing import compile_case

    kernels: dict[tuple[str, str], gpu.Compiled] = {}
    with progress(target, len(calls), quiet=quiet) as advance:
        for case, dtype in calls:
            advance(f"{target} {case.op}[{case.id}]", steps=0)
            try:
                compiled = compile_case(case, target, dtype)
            except BackendError as error:
                raise UserError(f"{case.op}[{case.id}]: {one_line(error)}") from None
            for kernel in compiled:
                kernels.setdefault((kernel.kernel, assembly(kernel)), kernel)
            advance()
    return sorted(kernels.values(), key=lambda kernel: kernel.kernel)


# --- what a kernel needs --------------------------------------------------------------------------


def assembly(kernel: gpu.Compiled) -> str:
    """The text that the kernel was assembled from."""
    code = kernel.triton.asm
    return code["ptx"] if "ptx" in code else code["amdgcn"]


def usage(kernel: gpu.Compiled) -> Usage:
    """Read the needs of a kernel from what the compiler left."""
    text = assembly(kernel)
    if "ptx" in kernel.triton.asm:
        registers, spills = _nvidia_usage(kernel.triton.asm["cubin"])
    else:
        registers, spills = _amd_usage(text)
    matrix = tuple(name for name, instruction in _MATRIX_INSTRUCTIONS if instruction in text)
    return Usage(registers, spills, kernel.triton.metadata.shared, matrix)


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


def _violations(used: Usage, target: str, spill_limit: int) -> list[str]:
    violations = []
    if not used.matrix:
        spill_limit = max(spill_limit, FLOAT32_SPILL_LIMIT)
    if used.spills > spill_limit:
        violations.append(f"spills {used.spills} bytes per thread, allowed are {spill_limit}")
    limit = gpu.SHARED_MEMORY[target]
    if used.shared > limit:
        violations.append(f"needs {used.shared} bytes of shared memory, the chip has {limit}")
    return violations


# --- the table ------------------------------------------------------------------------------------


def _print_table(target: str, found: list[tuple[gpu.Compiled, Usage]], console: Console) -> None:
    from rich.markup import escape

    from tilewise.benchmarks.report import make_table

    table = make_table(f"{target}: {len(found)} kernels")
    table.add_column("kernel", no_wrap=True)
    for heading in ("registers", "spills", "shared"):
        table.add_column(heading, justify="right")
    table.add_column("matrix", no_wrap=True)
    table.add_column("compiled for", style="dim")
    for kernel, used in found:
        table.add_row(
            kernel.kernel,
            str(used.registers),
            str(used.spills or ""),
            str(used.shared or ""),
            " ".join(used.matrix),
            escape(distinguishing(kernel, [other for other, _ in found])),
        )
    console.print(table)
    console.print()


def distinguishing(kernel: gpu.Compiled, kernels: list[gpu.Compiled]) -> str:
    """The dtypes of its tensors, and in what else the kernel differs from others of its name."""
    same = [other.constants for other in kernels if other.kernel == kernel.kernel]
    words = []
    for name, value in kernel.constants.items():
        if isinstance(value, torch.dtype):
            words.append(str(value).removeprefix("torch."))
        elif all(name in other and other[name] == value for other in same):
            continue
        else:
            words.append(f"no {name}" if value is None else f"{name}={value}")
    return " ".join(dict.fromkeys(words))
