"""`tilewise build --triton`: compile the Triton kernels, for GPUs that need not be here.

What a kernel needs of a chip is known once it is compiled. Registers that do not suffice are
spilled to memory, which costs speed; shared memory that does not suffice makes the launch fail. So
every kernel is compiled in the configurations that ship, for calls with the shapes of real models,
and judged without being run.

Nearly all of the time is spent within the compiler, which uses one core: calls are shared out among
processes.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import torch

from tilewise import gpu
from tilewise.cli.console import UserError, make_console, one_line, progress
from tilewise.cli.triton_usage import Kernel, judge, violations
from tilewise.dispatch import OPS, BackendError

if TYPE_CHECKING:
    from rich.console import Console

    from tilewise.cases import Case


def run(options: argparse.Namespace) -> int:
    """Compile for every target that was asked for; 1 if a kernel is not fit."""
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
    if not _calls(options.op):
        raise UserError(f"--triton: {options.op} has no Triton kernels")
    targets = list(dict.fromkeys(targets))
    processes = options.threads or torch.get_num_threads()
    kernels = _compile(options.op, targets, processes, options.quiet)
    console = make_console()
    found = []
    for target in targets:
        of_target = [kernel for kernel in kernels if kernel.target == target]
        _print_table(target, of_target, console)
        for kernel in of_target:
            for what in violations(kernel.usage, target, options.spill_limit):
                found.append(f"{kernel.name} for {target}: {what}")
    for line in found:
        console.print("[red]wrong[/]", line, soft_wrap=True)
    return 1 if found else 0


# --- the calls ------------------------------------------------------------------------------------


def _calls(op: str | None) -> list[tuple[Case, Any]]:
    """(call, dtype) for everything with Triton kernels."""
    from tilewise.cases import all_compiled_calls

    return [
        (case, dtype)
        for case in all_compiled_calls()
        if op in (None, case.op) and "triton" in OPS[case.op].backends
        for dtype in case.dtypes
    ]


def _compile(op: str | None, targets: list[str], processes: int, quiet: bool) -> list[Kernel]:
    """The kernels of all calls, each different piece of code once."""
    calls = _calls(op)
    judged: dict[tuple[str, str, str], Kernel] = {}
    with progress("compiling", len(calls), quiet=quiet) as advance:
        compiled = _in_processes(min(processes, len(calls)), op, len(calls), targets)
        for (case, _), kernels in zip(calls, compiled, strict=True):
            for kernel in kernels:
                judged.setdefault((kernel.target, kernel.name, kernel.digest), kernel)
            advance(f"{case.op}[{case.id}]")
    return sorted(judged.values(), key=lambda kernel: kernel.name)


def _in_processes(
    processes: int, op: str | None, count: int, targets: list[str]
) -> Iterator[list[Kernel]]:
    """`_compile_call` of every number below `count`, in order; in this process if one is enough."""
    arguments = (repeat(op), range(count), repeat(targets))
    if processes == 1:
        yield from map(_compile_call, *arguments)
        return
    # A fork would have the locks of this process's threads, but not the threads that open them.
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as executor:
        try:
            yield from executor.map(_compile_call, *arguments)
        except BrokenProcessPool:
            message = "--triton: a compiling process was killed; with -t there are fewer of them"
            raise UserError(message) from None
        finally:
            executor.shutdown(cancel_futures=True)


def _compile_call(op: str | None, number: int, targets: list[str]) -> list[Kernel]:
    """The kernels of one call, named by its number: what makes its inputs cannot be sent."""
    from tilewise.cases import compile_case

    case, dtype = _calls(op)[number]
    try:
        return judge(compile_case(case, targets, dtype))
    except BackendError as error:
        raise UserError(f"{case.op}[{case.id}]: {one_line(error)}") from None


# --- the table ------------------------------------------------------------------------------------


def _print_table(target: str, kernels: list[Kernel], console: Console) -> None:
    from rich.markup import escape

    from tilewise.benchmarks.report import make_table

    table = make_table(f"{target}: {len(kernels)} kernels")
    table.add_column("kernel", no_wrap=True)
    for heading in ("registers", "spills", "shared"):
        table.add_column(heading, justify="right")
    table.add_column("matrix", no_wrap=True)
    table.add_column("compiled for", style="dim")
    for kernel in kernels:
        used = kernel.usage
        table.add_row(
            kernel.name,
            str(used.registers),
            str(used.spills or ""),
            str(used.shared or ""),
            " ".join(used.matrix),
            escape(distinguishing(kernel, kernels)),
        )
    console.print(table)
    console.print()


def distinguishing(kernel: Kernel, kernels: list[Kernel]) -> str:
    """The dtypes of its tensors, and in what else the kernel differs from others of its name."""
    same = [other.constants for other in kernels if other.name == kernel.name]
    words = []
    for name, value in kernel.constants.items():
        if isinstance(value, torch.dtype):
            words.append(str(value).removeprefix("torch."))
        elif all(name in other and other[name] == value for other in same):
            continue
        else:
            words.append(f"no {name}" if value is None else f"{name}={value}")
    return " ".join(dict.fromkeys(words))
