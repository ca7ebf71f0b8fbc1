"""From measurements to something to look at: a terminal table, Markdown, a roofline picture.

Reads what `pytest benchmarks --benchmark-json FILE` and `tilewise bench --json FILE` write:

    python benchmarks/report.py FILE [--markdown] [--splice README.md] [--plot PNG]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewise.benchmarks.measure import Row
from tilewise.benchmarks.tokens import TokenRate
from tilewise.dispatch import BACKENDS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


class ReportError(ValueError):
    """A file is not a report, or has no place for one; the message says why in one line."""


@dataclass(frozen=True)
class Report:
    """Results and the machine that they belong to (`tilewise.benchmarks.host.host`)."""

    host: dict[str, Any]
    rows: list[Row]
    model: list[TokenRate]

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "host": self.host,
            "rows": [row.as_dict() for row in self.rows],
            "model": [rate.as_dict() for rate in self.model],
        }

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=1) + "\n")


def read(path: str | Path) -> Report:
    """Read a report in either format.

    Raises:
        ReportError: if the file is missing or holds something else.
    """
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ReportError(f"{path}: not a JSON file") from None
    try:
        if "benchmarks" in data:
            data = _from_pytest(data)
        return Report(
            host=data["host"],
            rows=[Row.from_dict(row) for row in data["rows"]],
            model=[TokenRate.from_dict(rate) for rate in data["model"]],
        )
    except (KeyError, TypeError):
        raise ReportError(f"{path}: not a report of tilewise's benchmarks") from None


def _from_pytest(data: dict[str, Any]) -> dict[str, Any]:
    results = [benchmark["extra_info"] for benchmark in data["benchmarks"]]
    return {
        "host": data["machine_info"]["tilewise"],
        "rows": [info for info in results if "op" in info] + data["not_run"],
        "model": [info for info in results if "test" in info],
    }


# --- numbers for people ---------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Seconds to three digits with a unit."""
    for limit, unit, scale in ((1e-3, "us", 1e6), (1.0, "ms", 1e3)):
        if seconds < limit:
            return f"{_three_digits(seconds * scale)} {unit}"
    return f"{_three_digits(seconds)} s"


def rate(row: Row) -> str:
    """What the ceiling limits: arithmetic or traffic."""
    if row.tflops is None or row.gbytes_per_second is None:
        return ""
    if not row.compute_bound:
        return f"{_three_digits(row.gbytes_per_second)} GB/s"
    return flops(row.tflops * 1e12)


def flops(per_second: float) -> str:
    """FLOP/s to three digits with a unit."""
    if per_second < 0.1e12:
        return f"{_three_digits(per_second / 1e9)} GFLOP/s"
    return f"{_three_digits(per_second / 1e12)} TFLOP/s"


def _three_digits(number: float) -> str:
    if number >= 100:
        return f"{number:.0f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def percent(row: Row) -> str:
    """How much of the measured ceiling is reached."""
    reached = row.percent_of_ceiling
    if reached is None:
        return ""
    return f"{reached:.0f}%" if reached >= 10 else f"{reached:.1f}%"


def ratio(times: float | None) -> str:
    """How many times as fast."""
    return "" if times is None else f"{_three_digits(times)}x"


def error(row: Row) -> str:
    """The relative error of the worst row."""
    if row.error is None:
        return ""
    return "exact" if row.error == 0 else f"{row.error:.1e}"


# --- the terminal ---------------------------------------------------------------------------------


def by_workload(rows: Iterable[Row]) -> Iterator[tuple[str, str, str, list[Row]]]:
    """(operation, workload, dtype, its rows: the definition first, rivals last), in order."""

    def key(row: Row) -> tuple[str, str, str, str]:
        return row.op, row.workload, row.dtype, row.device

    # Stable, so that workloads stay in the order in which they were measured.
    first_seen: dict[tuple[str, ...], int] = {}
    rows = list(rows)
    for row in rows:
        first_seen.setdefault((row.op,), len(first_seen))
        first_seen.setdefault(key(row), len(first_seen))
    rows.sort(
        key=lambda row: (
            first_seen[(row.op,)],
            first_seen[key(row)],
            BACKENDS.index(row.backend) if row.backend in BACKENDS else len(BACKENDS),
        )
    )
    for (op, workload, dtype, _), group in groupby(rows, key):
        yield op, workload, dtype, list(group)


def print_report(report: Report, console: Console) -> None:
    """Print the tables of a report, and why what did not run did not."""
    if report.rows:
        console.print(operations_table(report.rows))
        console.print()
        for line in refusals(report.rows):
            console.print(line, style="dim", markup=False, soft_wrap=True)
        console.print(f"[dim]{_LEGEND}[/]\n")
    if report.model:
        console.print(model_table(report.model))
        console.print()


_LEGEND = (
    "on GPU: the median time of its work, with a cold L2 cache; rates are taken from it "
    "(*: with the gaps between its launches, where the call is no CUDA graph); "
    "ceiling: the least time at this machine's measured ceilings over the time taken; "
    "vs naive, torch: their time over this one, taken in turn in one run; "
    "error: relative, of the worst row, against float64; float32 unless named otherwise"
)


def operations_table(rows: Iterable[Row]) -> Table:
    """A line per operation, one per workload below it, and one per backend below that."""
    rows = list(rows)
    on_gpu = has_device_times(rows)
    table = make_table("operations")
    table.add_column("", overflow="fold")
    for heading in ("time", *["on GPU"] * on_gpu, *_FIGURES):
        table.add_column(heading, justify="right", no_wrap=True)
    for op, workloads in groupby(by_workload(rows), lambda group: group[0]):
        if table.row_count:
            table.add_row()
        table.add_row(f"[bold]{op}[/]")
        for _, workload, dtype, results in workloads:
            table.add_row(f" {title(workload, dtype)}")
            for row in results:
                table.add_row(f"  [dim]{row.backend}[/]", *_cells(row, on_gpu))
    return table


_FIGURES = ("rate", "ceiling", "vs naive", "vs torch", "error")


def has_device_times(rows: Iterable[Row]) -> bool:
    """Whether any row was timed on a GPU."""
    return any(row.device_seconds is not None for row in rows)


def busy_time(row: Row) -> str:
    """`Row.busy_seconds`, with a star where it is a GPU's and the host's gaps are in it."""
    return f"{duration(row.busy_seconds or 0)}{'*' if row.captured is False else ''}"


def title(workload: str, dtype: str) -> str:
    """A workload's name, with its dtype where that is not float32."""
    return workload if dtype == "float32" else f"{workload}, {dtype}"


def _cells(row: Row, on_gpu: bool) -> list[str]:
    if row.seconds is None:
        return ["[red]wrong[/]" if row.disagrees else "[dim]did not run[/]"]
    over_naive = "" if row.backend == "naive" else ratio(row.over_naive)
    over_torch = "" if row.backend == "torch" else ratio(row.over_torch)
    times = [duration(row.seconds)]
    if on_gpu:
        times.append("" if row.device_seconds is None else busy_time(row))
    return [*times, rate(row), percent(row), over_naive, over_torch, error(row)]


def refusals(rows: Iterable[Row]) -> list[str]:
    """One line for each different reason why a backend has no time."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.reason is not None:
            reasons.setdefault((row.op, row.backend, row.reason), []).append(row.workload)
    return [
        f"{op}, {backend} has no time for {'; '.join(workloads)}: {reason}"
        for (op, backend, reason), workloads in reasons.items()
    ]


def model_table(rates: list[TokenRate]) -> Table:
    """The model: tokens per second, mean and standard deviation over the repetitions."""
    table = make_table("model")
    for heading in ("model", "size", "backend", "device", "threads", "test"):
        table.add_column(heading)
    table.add_column("tokens/s", justify="right")
    for rate in rates:
        table.add_row(
            rate.model,
            f"{rate.weight_bytes / 2**20:.0f} MiB",
            rate.backend,
            rate.device,
            str(rate.threads),
            rate.test,
            f"{rate.mean:.2f} ± {rate.std:.2f}",
        )
    return table


def make_table(title: str) -> Table:
    """An empty table in the house style."""
    from rich.table import Table

    return Table(
        title=f"[bold]{title}[/]",
        title_justify="left",
        box=None,
        header_style="dim",
        pad_edge=False,
    )


# --- the script -----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python benchmarks/report.py`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__.split("\n")[0])
    parser.add_argument("file", help="JSON of `pytest benchmarks` or of `tilewise bench`")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--splice", metavar="FILE", help="put the Markdown into this document")
    parser.add_argument("--plot", metavar="PNG", help="draw the roofline")
    options = parser.parse_args(argv)
    from tilewise.benchmarks.report_markdown import markdown, splice

    try:
        report = read(options.file)
        if options.splice:
            document = Path(options.splice)
            document.write_text(splice(document.read_text(), markdown(report)))
        if options.plot:
            from tilewise.benchmarks import roofline

            roofline.plot(report, options.plot)
    except (ReportError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    if options.markdown:
        print(markdown(report), end="")
    elif not (options.splice or options.plot):
        from tilewise.cli.console import make_console

        print_report(report, make_console())
    return 0


if __name__ == "__main__":
    # As a script this file is not the module that the others import, nor are its exceptions theirs.
    from tilewise.benchmarks import report as module

    sys.exit(module.main())
