"""The roofline picture: measured ceilings as lines, measured operations as points below them.

A call's intensity is the arithmetic that it cannot avoid over the bytes that it cannot avoid to
move; a machine can do no better than the lower of its two lines there.

Source: Williams, Waterman and Patterson, Roofline, CACM 2009 (doi:10.1145/1498765.1498785).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tilewise.benchmarks.host import ceilings_of
from tilewise.benchmarks.report import Report, by_workload, flops, title
from tilewise.dispatch import BACKENDS
from tilewise.machine import Ceilings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLORS = dict(zip(BACKENDS, ("#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))
_MARKERS = dict(zip(BACKENDS, "oD^sv", strict=True))
_RIVALS = ("others", "#56B4E9", "x")


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
    _draw_points(axes, groups)
    _draw_key(key, groups)
    ceilings = ceilings_of(report.host)
    _draw_ceilings(axes, ceilings, dtypes, min(intensities) / 3, max(intensities) * 3)
    return figure


def _draw_ceilings(
    axes: Axes, ceilings: Ceilings, dtypes: set[str], left: float, right: float
) -> None:
    tops: dict[float, list[str]] = {}
    for name in sorted(dtypes):
        tops.setdefault(ceilings.flops_of(getattr(torch, name)), []).append(name)
    bandwidths: dict[float, list[str]] = {}
    for size, bandwidth in ceilings.read_bandwidth.items():
        bandwidths.setdefault(bandwidth, []).append(f"{size // 2**20} MiB")
    slopes = {}
    for bandwidth, sizes in bandwidths.items():
        end = min(right, max(tops) / bandwidth)
        (line,) = axes.plot([left, end], [left * bandwidth, end * bandwidth], **_LINE)
        slopes[f"{', '.join(sizes)}: {bandwidth / 1e9:.3g} GB/s"] = line
    start = max(tops) / max(ceilings.read_bandwidth.values())
    for top, names in tops.items():
        axes.plot([min(start, right / 10), right], [top, top], **_LINE)
        axes.annotate(f"{', '.join(names)}: {flops(top)}", (right, top), ha="right", **_LABEL)
    axes.figure.draw_without_rendering()  # lays the axes out, so that labels can follow lines
    for label, line in slopes.items():
        axes.annotate(label, line.get_xydata()[0], rotation=_angle(line), **_LABEL)


_LINE: dict[str, Any] = {"color": "#444444", "linewidth": 1}
_LABEL: dict[str, Any] = {
    "xytext": (0, 3),
    "textcoords": "offset points",
    "rotation_mode": "anchor",
    "fontsize": 7,
    "color": "#444444",
}


def _angle(line: Line2D) -> float:
    """The slope of a straight line on the page, in degrees."""
    (x0, y0), (x1, y1) = line.axes.transData.transform(line.get_xydata())
    return math.degrees(math.atan2(y1 - y0, x1 - x0))


def _draw_points(axes: Axes, groups: list[tuple[Any, ...]]) -> None:
    labelled = set()
    for number, (*_, rows) in enumerate(groups, 1):
        intensity = rows[0].flops / rows[0].bytes
        heights = [row.flops / row.busy_seconds for row in rows]
        axes.plot([intensity] * len(rows), heights, color="#cccccc", linewidth=0.8, zorder=2)
        for row, height in zip(rows, heights, strict=True):
            label, color, marker = _RIVALS
            if row.backend in BACKENDS:
                label = row.backend
                color, marker = _COLORS[label], _MARKERS[label]
            axes.scatter(
                intensity,
                height,
                s=26,
                color=color,
                marker=marker,
                label=None if label in labelled else label,
                zorder=3,
            )
            labelled.add(label)
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
