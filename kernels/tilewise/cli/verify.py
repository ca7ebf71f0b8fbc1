"""`tilewise verify`: does every backend agree with the definition on this machine?"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilewise.cli.console import (
    Commands,
    UserError,
    add_backend,
    add_device,
    device_of,
    make_console,
    progress,
)
from tilewise.dispatch import OPS, BackendError

if TYPE_CHECKING:
    from rich.console import Console

    from tilewise.cases import Case

DTYPES = ("float32", "float16", "bfloat16", "float64")


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Declare the command."""
    text = "check every operation on every backend against its definition"
    parser = commands.add_parser(
        "verify", parents=[common], help=text, description=text, allow_abbrev=False
    )
    parser.add_argument("--op", choices=tuple(OPS), metavar="OP", help="only this operation")
    add_backend(parser, None, "only this backend (default: all but naive, which is the definition)")
    parser.add_argument("--dtype", choices=DTYPES, help="only this dtype")
    add_device(parser)
    parser.set_defaults(run=run)


@dataclass
class Verdict:
    """What the cases of one operation, backend and dtype came to."""

    op: str
    backend: str
    dtype: str
    agreed: int = 0
    refused: int = 0
    worst: float = 0.0
    worst_case: str = ""
    failures: list[str] | None = None


def run(options: argparse.Namespace) -> int:
    """Check the cases that the filters leave; 1 if one disagrees."""
    device = device_of(options)
    work = _work(options)
    if not work:
        raise UserError("no case has this operation, backend and dtype")
    verdicts: dict[tuple[str, str, str], Verdict] = {}
    with progress("", len(work), quiet=options.quiet) as advance:
        for case, backend, dtype in work:
            key = (case.op, backend, dtype)
            advance(f"{case.op} {backend} {dtype}", steps=0)
            _check(verdicts.setdefault(key, Verdict(*key)), case, device)
            advance()
    from rich.markup import escape

    console = make_console()
    failures = [line for verdict in verdicts.values() for line in verdict.failures or ()]
    _print_verdicts(list(verdicts.values()), console)
    if options.op in (None, "quantized_matmul") and not options.quiet:
        _print_formats(console)
    for line in failures:
        console.print("[red]wrong[/]", escape(line), soft_wrap=True)
    checked = sum(verdict.agreed for verdict in verdicts.values())
    console.print(f"{checked} calls agree, {len(failures)} do not")
    return 1 if failures else 0


def _work(options: argparse.Namespace) -> list[tuple[Case, str, str]]:
    from tilewise.cases import all_cases

    work = []
    for case in all_cases():
        if options.op not in (None, case.op):
            continue
        for backend in OPS[case.op].backends:
            if options.backend != backend and (options.backend or backend == "naive"):
                continue
            for dtype in case.dtypes:
                name = str(dtype).removeprefix("torch.")
                if options.dtype in (None, name):
                    work.append((case, backend, name))
    return work


def _check(verdict: Verdict, case: Case, device: str) -> None:
    import torch

    from tilewise.cases import check_case

    dtype = getattr(torch, verdict.dtype)
    try:
        results = check_case(case, verdict.backend, dtype, device=device, grad=bool(case.grad))
    except BackendError:
        verdict.refused += 1
    except AssertionError as error:
        verdict.failures = verdict.failures or []
        verdict.failures.append(
            f"{case.op}[{case.id}] on {verdict.backend} in {verdict.dtype}: {error}"
        )
    else:
        verdict.agreed += 1
        worst = max((agreement.ratio for agreement in results.values()), default=0.0)
        if worst >= verdict.worst:
            verdict.worst, verdict.worst_case = worst, case.id


def _print_verdicts(verdicts: list[Verdict], console: Console) -> None:
    from tilewise.benchmarks.report import make_table

    table = make_table("agreement with the definition, as error over allowed error")
    for heading in ("operation", "backend", "dtype"):
        table.add_column(heading, no_wrap=True)
    for heading in ("agree", "refused", "wrong", "worst"):
        table.add_column(heading, justify="right")
    table.add_column("at")
    for verdict in verdicts:
        wrong = len(verdict.failures or ())
        table.add_row(
            verdict.op,
            verdict.backend,
            verdict.dtype,
            str(verdict.agreed),
            str(verdict.refused or ""),
            f"[red]{wrong}[/]" if wrong else "",
            f"{verdict.worst:.2f}" if verdict.agreed else "",
            f"[dim]{verdict.worst_case}[/]",
        )
    console.print(table)
    console.print()


def _print_formats(console: Console) -> None:
    from tilewise.benchmarks.formats import format_errors
    from tilewise.benchmarks.report import make_table

    table = make_table("what the formats themselves lose, on normal weights")
    table.add_column("format", no_wrap=True)
    table.add_column("bits per weight", justify="right")
    table.add_column("relative error", justify="right")
    for result in format_errors():
        table.add_row(result.name, f"{result.bits:.2f}", f"{100 * result.error:.2f}%")
    console.print(table)
    console.print()
