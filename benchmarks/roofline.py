"""The roofline picture: measured ceilings as lines, measured operations as points below them.

A call's intensity is the arithmetic that it cannot avoid over the bytes that it cannot avoid to
move; a machine can do no better than the lower of its two lines there.

Source: Williams, Waterman and Patterson, Roofline, CACM 2009 (doi:10.1145/1498765.1498785).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewise.benchmarks.host import ceilings_of
from tilewise.benchmarks.report import Report, by_workload, title
from tilewise.dispatch import BACKENDS
from tilewise.machine import Ceilings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLORS = dict(zip(BACKENDS, ("#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))
_MARKERS = dict(zip(BACKENDS, "oD^sv", strict=True))


def plot(report: Report, path: str | Path) -> None:
    """Draw the rows of a report that have a time into a PNG."""
    draw(report).savefig(path, format="png")


def draw(report: Report) -> Figure:
    """The picture: ceilings and points, and beside them a key to the points' numbers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [
        (op, workload, dtype, [row for row in rows if row.seconds and row.flops])
        for op, workload, dtype, rows in by_workload(report.rows)
    ]
    groups = [group for group in groups if group[-1]]
    figure = Figure(figsize=(12, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes, key = figure.subplots(1, 2, width_ratios=(3, 1.35))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="intensity: unavoidable FLOP per unavoidable byte",
        ylabel="FLOP/s",
    )
    axes.set_title(_title(report.host), loc="left", fontsize=10)
    axes.grid(which="major", color="#e8e8e8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

    intensities = [rows[0].flops / rows[0].bytes for *_, rows in groups] or [1.0]
    dtypes = {row.dtype for *_, rows in groups for row in rows} or {"float32"}
    ceilings = ceilings_of(report.host)
    _draw_ceilings(axes, ceilings, dtypes, min(intensities) / 3, max(intensities) * 3)
    _draw_points(axes, groups)
    _draw_key(key, groups)
    return figure


def _draw_ceilings(
    axes: Axes, ceilings: Ceilings, dtypes: set[str], left: float, right: float
) -> None:
    tops = {name: rate for name, rate in ceilings.flops.items() if name in dtypes}
    highest = max(tops.values(), default=ceilings.flops["float32"])
    for size, bandwidth in ceilings.read_bandwidth.items():
        end = min(right, highest / bandwidth)
        axes.plot([left, end], [left * bandwidth, end * bandwidth], color="#444444", linewidth=1)
        axes.annotate(
            f"{size // 2**20} MiB: {bandwidth / 1e9:.3g} GB/s",
            (left, left * bandwidth),
            xytext=(4, 6),
            textcoords="offset points",
            fontsize=7,
            color="#444444",
        )
    start = min(highest / bandwidth for bandwidth in ceilings.read_bandwidth.values())
    for name, top in tops.items():
        axes.plot([min(start, right / 10), right], [top, top], color="#444444", linewidth=1)
        axes.annotate(
            f"{name}: {top / 1e12:.3g} TFLOP/s",
            (right, top),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=7,
            color="#444444",
        )


def _draw_points(axes: Axes, groups: list[tuple[Any, ...]]) -> None:
    labelled = set()
    for number, (*_, rows) in enumerate(groups, 1):
        intensity = rows[0].flops / rows[0].bytes
        heights = [row.flops / row.seconds for row in rows]
        axes.plot([intensity] * len(rows), heights, color="#cccccc", linewidth=0.8, zorder=2)
        for row, height in zip(rows, heights, strict=True):
            axes.scatter(
                intensity,
                height,
                s=26,
                color=_COLORS[row.backend],
                marker=_MARKERS[row.backend],
                label=None if row.backend in labelled else row.backend,
                zorder=3,
            )
            labelled.add(row.backend)
        axes.annotate(
            str(number),
            (intensity, max(heights)),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )
    if labelled:
        axes.legend(loc="lower right", frameon=False, fontsize=8)


def _draw_key(key: Axes, groups: list[tuple[Any, ...]]) -> None:
    key.axis("off")
    lines = []
    last_op = None
    for number, (op, workload, dtype, _) in enumerate(groups, 1):
        if op != last_op:
            lines.append(f"{op}")
            last_op = op
        lines.append(f"   {number:>2}  {title(workload, dtype)}")
    key.text(0, 1, "\n".join(lines), va="top", fontsize=7, linespacing=1.35)


def _title(host: dict[str, Any]) -> str:
    on_gpu = host["ceilings"]["device"] != "cpu"
    where = host["gpu"] if on_gpu else f"{host['processor']}, {host['threads']} threads"
    return f"tilewise on {where}, torch {host['versions']['torch']}: lines are measured ceilings"
