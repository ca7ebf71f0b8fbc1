"""The tables of `bench_peers.py`, for the terminal and in Markdown: the same cells twice."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tilewise.benchmarks.peers import SHORT_PROMPT, Score
from tilewise.benchmarks.peers_products import Product
from tilewise.benchmarks.report import Report, duration, flops, make_table, ratio
from tilewise.benchmarks.report_markdown import markdown

if TYPE_CHECKING:
    from rich.console import Console

_BUSY = 0.05
"""Cores that an engine may use while it is not its turn before it is said."""


@dataclass(frozen=True)
class Results:
    """All that was measured.

    Args:
        host: the machine (`tilewise.benchmarks.host.host`).
        model: the name of the file.
        prompt, tokens, rounds, question: what engines were asked, as in `peers.Contest`.
        scores: of the engines, ours first.
        products: single matrix products.
    """

    host: dict[str, Any]
    model: str
    prompt: int
    tokens: int
    rounds: int
    question: int
    scores: list[Score]
    products: list[Product]

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return vars(self) | {
            "scores": [score.as_dict() for score in self.scores],
            "products": [product.as_dict() for product in self.products],
        }


@dataclass(frozen=True)
class Grid:
    """A table before it is drawn.

    Args:
        title: above it.
        headings: of its columns.
        rows: as many cells each.
        notes: lines below it.
    """

    title: str
    headings: list[str]
    rows: list[list[str]]
    notes: list[str]


def grids(results: Results) -> list[Grid]:
    """The tables that there are results for."""
    found = [engines_grid(results)] if results.scores else []
    return found + products_grids(results.products)


# --- engines --------------------------------------------------------------------------------------


def engines_grid(results: Results) -> Grid:
    """One row per engine, and every engine's rate beside our first row's."""
    columns = ("prompt_rates", "short_rates", "long_rates")
    base = next((score for score in results.scores if score.prompt_rates), None)
    rows = [
        [
            f"{score.title} {score.version}".strip(),
            *(_rate_cell(score, base, column) for column in columns),
            _memory(score),
            "-" if score.same_tokens is None else f"{score.same_tokens}",
        ]
        for score in results.scores
    ]
    headings = [
        "engine",
        f"prompt of {results.prompt}, tokens/s",
        f"writing {results.tokens} after {SHORT_PROMPT}",
        f"writing {results.tokens} after {results.prompt}",
        "memory (libraries)",
        f"same of {results.question}",
    ]
    notes = [f"{score.title}: {score.reason}" for score in results.scores if score.reason]
    notes += [
        f"{score.title} kept {score.idle_cpu:.2f} cores busy while others were measured"
        for score in results.scores
        if score.idle_cpu > _BUSY
    ]
    if base is not None:
        notes.append(
            f"tokens/s: median (least - most) of {results.rounds}; x: {base.title}'s rate over it. "
            "memory: resident after the last run, mapped files included, and of it what the "
            "imported libraries took. same: tokens of a greedy answer before the first that "
            "differs from the naive model's"
        )
    return Grid(results.model, headings, rows, notes)


def _rate_cell(score: Score, base: Score | None, column: str) -> str:
    rates = getattr(score, column)
    if not rates:
        return "-"
    median = statistics.median(rates)
    cell = f"{_rate(median)} ({_rate(min(rates))} - {_rate(max(rates))})"
    if base is None or score is base:
        return cell
    return f"{cell}, {ratio(statistics.median(getattr(base, column)) / median)}"


def _rate(tokens_per_second: float) -> str:
    digits = 0 if tokens_per_second >= 100 else 1
    return f"{tokens_per_second:,.{digits}f}"


def _memory(score: Score) -> str:
    if not score.resident_bytes:
        return "-"
    return f"{score.resident_bytes / 1e6:.0f} MB ({score.library_bytes / 1e6:.0f})"


# --- products -------------------------------------------------------------------------------------


def products_grids(products: Iterable[Product]) -> list[Grid]:
    """One table per weight: one row per way to multiply, one column per number of rows of x."""
    found = []
    ordered = sorted(products, key=_shape)  # stable: the ways stay in their order
    for (outputs, width), group in groupby(ordered, _shape):
        of_weight = list(group)
        counts = sorted({product.rows for product in of_weight})
        ways: dict[tuple[str, str], dict[int, Product]] = {}
        for product in of_weight:
            ways.setdefault((product.way, product.dtype), {})[product.rows] = product
        dense = {
            rows: min(
                (p.seconds for p in of_weight if p.rows == rows and p.is_dense and p.seconds),
                default=None,
            )
            for rows in counts
        }
        rows = [
            [_way_title(by_rows), *(_product_cell(by_rows.get(m), dense[m]) for m in counts)]
            for by_rows in ways.values()
        ]
        notes = dict.fromkeys(
            f"{product.way}, {product.dtype}: {product.reason}"
            for product in of_weight
            if product.reason
        )
        headings = ["x times a weight", *(f"{m} row{'s' * (m > 1)} of x" for m in counts)]
        found.append(Grid(f"weight {outputs} x {width}", headings, rows, list(notes)))
    if found:
        found[-1].notes.append(
            "x: the time of the faster torch linear over it; (backend) is what auto took. GB/s: x, "
            "weight and result moved once; FLOP/s: 2 x rows x outputs x width"
        )
    return found


def _shape(product: Product) -> tuple[int, int]:
    return product.outputs, product.width


def _way_title(by_rows: dict[int, Product]) -> str:
    first = next(iter(by_rows.values()))
    backends = dict.fromkeys(p.backend for p in by_rows.values() if p.backend)
    return f"{first.way}, {first.dtype}" + (f" ({', '.join(backends)})" if backends else "")


def _product_cell(product: Product | None, dense: float | None) -> str:
    if product is None or product.seconds is None:
        return "-"
    gbytes, tflops = product.gbytes_per_second or 0.0, product.tflops or 0.0
    # One row is bound by reading the weight, many are bound by arithmetic.
    reached = f"{gbytes:.1f} GB/s" if product.rows == 1 else flops(tflops * 1e12)
    compared = f", {ratio(dense / product.seconds)}" if dense else ""
    return f"{duration(product.seconds)}{compared}, {reached}"


# --- drawing --------------------------------------------------------------------------------------


def print_results(results: Results, console: Console) -> None:
    """Print the tables."""
    console.print(_machine(results), soft_wrap=True, markup=False)
    for grid in grids(results):
        table = make_table(grid.title)
        for column, heading in enumerate(grid.headings):
            table.add_column(heading, justify="right" if column else "left", overflow="fold")
        for row in grid.rows:
            table.add_row(*row)
        console.print()
        console.print(table)
        for note in grid.notes:
            console.print(note, style="dim", markup=False, soft_wrap=True)


def as_markdown(results: Results) -> str:
    """The tables in Markdown, below the machine that they belong to."""
    lines = [_machine(results)]
    for grid in grids(results):
        lines += ["", f"{grid.title}:", "", _line(grid.headings)]
        lines.append(_line(["---", *["---:"] * (len(grid.headings) - 1)]))
        lines += [_line(row) for row in grid.rows]
        if grid.notes:
            lines += ["", *(f"- {note}" for note in grid.notes)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _machine(results: Results) -> str:
    return markdown(Report(results.host, [], [])).strip()
