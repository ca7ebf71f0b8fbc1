"""Reports as Markdown: one table of the CPU's results, and on a GPU one per operation.

On a CPU a workload is a row and its backends are columns. On a GPU the rivals are many and not the
same for every operation, so that each of them has a row of its own.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from tilewise.benchmarks.measure import Row
from tilewise.benchmarks.report import (
    Report,
    ReportError,
    busy_time,
    by_workload,
    duration,
    error,
    has_device_times,
    percent,
    rate,
    ratio,
    refusals,
    title,
)
from tilewise.dispatch import BACKENDS

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
"""The lines of a document between which `splice` puts the Markdown."""


def markdown(report: Report) -> str:
    """The machine, the operations, what did not run and why, and the model."""
    on_gpu = has_device_times(report.rows)
    lines = [_machine(report.host), ""]
    if report.rows:
        lines += _per_contestant(report.rows) if on_gpu else _per_workload(report.rows)
    if reasons := refusals(report.rows):
        lines += ["", *(f"- {reason}" for reason in reasons)]
    if report.model:
        lines += ["", *_row("model", "backend", "test", "tokens/s"), *_row(*["---"] * 3, "---:")]
        for result in report.model:
            speed = f"{result.mean:.2f} ± {result.std:.2f}"
            lines += _row(result.model, result.backend, result.test, speed)
    return "\n".join(lines) + "\n"


def _per_workload(rows: list[Row]) -> list[str]:
    backends = [name for name in BACKENDS if any(row.backend == name for row in rows)]
    lines = _row("operation", "workload", *backends, "fastest at", "error")
    lines += _row(*["---"] * 2, *["---:"] * (len(backends) + 2))
    for op, workload, dtype, results in by_workload(rows):
        ran = {row.backend: row for row in results if row.seconds is not None}
        cells = [duration(ran[name].seconds or 0) if name in ran else "-" for name in backends]
        fastest = min(ran.values(), key=lambda row: row.seconds or 0, default=None)
        reached = ("-", "-")
        if fastest is not None:
            reached = (f"{rate(fastest)}, {percent(fastest)}", error(fastest))
        lines += _row(f"`{op}`", title(workload, dtype), *cells, *reached)
    return lines


def _per_contestant(rows: list[Row]) -> list[str]:
    lines = [
        "On GPU: the median time of its work with a cold L2 cache, from which all other figures "
        "are taken (*: with the gaps between its launches, where the call is no CUDA graph). "
        "Wall: with the call's way through Python. Triton: its time over this one. "
        "Ceiling: the least time at the measured ceilings over this one."
    ]
    for op, workloads in groupby(by_workload(rows), lambda group: group[0]):
        headings = ("workload", "", "on GPU", "wall", "rate", "ceiling", "Triton", "error")
        lines += ["", f"### `{op}`", "", *_row(*headings), *_row(*["---"] * 2, *["---:"] * 6)]
        for _, workload, dtype, results in workloads:
            ours = next((row.busy_seconds for row in results if row.backend == "triton"), None)
            for row in results:
                if row.seconds is not None and row.busy_seconds:
                    lines += _row(
                        title(workload, dtype),
                        row.backend,
                        busy_time(row),
                        duration(row.seconds),
                        rate(row),
                        percent(row),
                        ratio(ours / row.busy_seconds) if ours else "",
                        error(row),
                    )
    return lines


def _row(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


def _machine(host: dict[str, Any]) -> str:
    ceilings = host["ceilings"]
    on_gpu = ceilings["device"] != "cpu"
    bandwidth = max(ceilings["read_bandwidth"].items(), key=lambda item: int(item[0]))[1]
    flops = ceilings["flops"]
    where = host["gpu"] if on_gpu else host["processor"]
    versions = host["versions"]
    line = (
        f"{where}, {host['threads']} CPU threads, torch {versions['torch']}; measured "
        f"ceilings: {bandwidth / 1e9:.1f} GB/s from memory, "
    )
    if not on_gpu:
        return f"{line}{flops['float32'] / 1e9:.0f} GFLOP/s in float32."
    line += f"{flops['bfloat16'] / 1e12:.0f} TFLOP/s in bfloat16."
    others = {name: value for name, value in versions.items() if name != "torch"}
    facts = [f"{name} {value}" for name, value in (others | host["gpu_state"]).items()]
    return f"{line} {', '.join(facts)}."


def splice(text: str, table: str) -> str:
    """`text` with `table` between its marker lines.

    Raises:
        ReportError: if the markers are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ReportError(f"no line {BEGIN!r} with a line {END!r} after it")
    return f"{before}{BEGIN}\n{table}{END}{after}"
