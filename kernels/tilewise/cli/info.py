"""`tilewise info`: what this machine is, what can run on it, and why the rest cannot."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from tilewise.cli.console import MODEL_HELP, Commands, load_model, make_console
from tilewise.dispatch import BACKENDS, OPS

if TYPE_CHECKING:
    from rich.console import Console

    from tilewise.model import Card


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Declare the command."""
    text = "show the machine, its measured ceilings, and what can run on it"
    parser = commands.add_parser(
        "info", parents=[common], help=text, description=text, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "-m",
        "--model",
        metavar="X",
        help=f"show the parameters, FLOPs and KV bytes of this model instead: {MODEL_HELP}, or a "
        "preset such as gpt3-175b, which has no weights",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what was asked for."""
    if options.model:
        return _run_model(options)
    found = facts()
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        _print_facts(found, make_console())
    return 0


# --- the machine ----------------------------------------------------------------------------------


def facts() -> dict[str, Any]:
    """Everything that `tilewise info` knows, ready for JSON."""
    import torch

    from tilewise import build, native
    from tilewise.benchmarks.host import host

    device = "cuda" if torch.cuda.is_available() else "cpu"
    findings = (
        native.instruction_set(),
        build.compiler(),
        native.nvcc(),
        native.gpu(),
        native.triton(),
        native.library(),
    )
    names = ("instruction set", "C++ compiler", "CUDA compiler", "GPU", "Triton", "native library")
    return {
        **host("cpu"),
        "cpu_flags": sorted(native.cpu_flags()),
        "findings": {
            name: {"value": finding.value, "reason": finding.reason}
            for name, finding in zip(names, findings, strict=True)
        },
        "operations": operations(device),
        "operations_device": device,
    }


def operations(device: str) -> dict[str, dict[str, dict[str, Any]]]:
    """For each operation and backend: how many of the test calls it takes, and why not the rest."""
    import torch

    from tilewise.cases import all_cases
    from tilewise.testing import Inputs

    table: dict[str, dict[str, dict[str, Any]]] = {}
    for case in all_cases():
        backends = table.setdefault(case.op, {})
        reasons = OPS[case.op].reasons((), case.make(Inputs(torch.float32, device)))
        for name, reason in reasons.items():
            entry = backends.setdefault(name, {"runs": 0, "calls": 0, "reasons": []})
            entry["calls"] += 1
            if reason is None:
                entry["runs"] += 1
            elif reason not in entry["reasons"]:
                entry["reasons"].append(reason)
    return table


_SHOWN_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512vbmi", "avx512_vnni", "avx512_bf16", "amx_bf16",
)  # fmt: skip


def _print_facts(found: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    grid.add_row("versions", ", ".join(f"{k} {v}" for k, v in found["versions"].items()))
    threads = f"{found['cores']} cores, {found['threads']} threads"
    grid.add_row("processor", f"{found['processor']}, {threads}")
    has = [flag for flag in _SHOWN_FLAGS if flag in found["cpu_flags"]]
    grid.add_row("features", " ".join(has) or "none of " + " ".join(_SHOWN_FLAGS))
    for name, finding in found["findings"].items():
        grid.add_row(name, finding["value"] or f"none: {finding['reason']}")
    for name, value in ceiling_lines(found["ceilings"]):
        grid.add_row(name, value)
    console.print(grid)
    console.print()
    _print_operations(found["operations"], found["operations_device"], console)


def ceiling_lines(ceilings: dict[str, Any]) -> list[tuple[str, str]]:
    """The measured ceilings, as (what, how much)."""
    bandwidth = ", ".join(
        f"{rate / 1e9:.3g} GB/s from {int(size) // 2**20} MiB"
        for size, rate in ceilings["read_bandwidth"].items()
    )
    flops = ", ".join(f"{name} {rate / 1e9:.3g}" for name, rate in ceilings["flops"].items())
    return [("reads", bandwidth), ("multiplies", f"{flops} GFLOP/s")]


def _print_operations(
    table: dict[str, dict[str, dict[str, Any]]], device: str, console: Console
) -> None:
    from tilewise.benchmarks.report import make_table

    out = make_table(f"operations on {device}: test calls that a backend takes")
    out.add_column("operation", no_wrap=True)
    for name in BACKENDS:
        out.add_column(name, justify="right")
    for op, backends in table.items():
        cells = []
        for entry in backends.values():
            everything = entry["runs"] == entry["calls"]
            cells.append("all" if everything else f"{entry['runs']} of {entry['calls']}")
            if entry["runs"] == 0:
                cells[-1] = "-"
        out.add_row(op, *cells)
    console.print(out)
    console.print()
    for name in BACKENDS:
        missing = [op for op, backends in table.items() if _has_no_implementation(op, name)]
        if len(missing) == len(table):
            console.print(f"[dim]{name}: no operation has an implementation in this version[/]")
            continue
        for reason, ops in _ops_by_reason(table, name).items():
            which = "every operation" if len(ops) == len(table) else ", ".join(ops)
            line = f"{name}, {which}: {reason}"
            console.print(line, style="dim", markup=False, soft_wrap=True)


def _ops_by_reason(
    table: dict[str, dict[str, dict[str, Any]]], backend: str
) -> dict[str, list[str]]:
    """Why a backend does not take all calls, and the operations of which that is true."""
    found: dict[str, list[str]] = {}
    for op, backends in table.items():
        for reason in backends[backend]["reasons"]:
            if _has_no_implementation(op, backend):
                reason = "no implementation"
            found.setdefault(reason, []).append(op)
    return found


def _has_no_implementation(op: str, backend: str) -> bool:
    return backend not in OPS[op].backends


# --- a model --------------------------------------------------------------------------------------


def _run_model(options: argparse.Namespace) -> int:
    from tilewise.model import PRESETS, card, gpt3_table

    config = PRESETS.get(options.model)
    if config is None:
        config = load_model(options.model).gpt.config
    counted = card(config)
    if options.json:
        print(json.dumps(counted.as_dict() | {"gpt3_table": gpt3_table()}, indent=1))
        return 0
    console = make_console()
    _print_card(options.model, counted, console)
    _print_low_rank(counted, console)
    _print_gpt3(console)
    return 0


def _print_card(name: str, counted: Card, console: Console) -> None:
    from tilewise.benchmarks.report import make_table

    data = counted.as_dict()
    table = make_table(name)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right")
    table.add_column("", style="dim")
    total = counted.parameters
    table.add_row("parameters", _count(total), f"{total:,}")
    for part, parameters in data["parameters_by_part"].items():
        if parameters:
            table.add_row(f"  {part}", _count(parameters), f"{100 * parameters / total:.1f}%")
    if data["active_parameters"] != total:
        table.add_row("  active for a token", _count(data["active_parameters"]))
    context = data["context"]
    table.add_row("operations per token", f"{_count(data['flops_per_token'])}FLOP")
    at_context = f"{_count(data['flops_per_token_at_context'])}FLOP"
    table.add_row(f"  at a context of {context}", at_context)
    for dtype, nbytes in data["kv_bytes_per_token"].items():
        table.add_row(
            f"cache in {dtype}",
            f"{nbytes / 1024:.1f} KiB",
            f"{_bytes(nbytes * context)} at {context}",
        )
    for weight_format, nbytes in data["resident_bytes"].items():
        table.add_row(f"weights in {weight_format}", _bytes(nbytes))
    console.print(table)
    console.print()


def _print_low_rank(counted: Card, console: Console) -> None:
    from tilewise.benchmarks.report import make_table
    from tilewise.model import low_rank

    table = make_table("a matrix as the product of two thin ones")
    table.add_column("matrix", no_wrap=True)
    for heading in ("rank", "parameters", "of", "saved", "breaks even at"):
        table.add_column(heading, justify="right")
    config = counted.config
    for rows, columns in ((config.dim, config.dim), (config.ffn_dim, config.dim)):
        for rank in (config.dim // 16, config.dim // 4):
            factors = low_rank(rows, columns, rank)
            table.add_row(
                f"{rows} x {columns}",
                str(rank),
                _count(factors.parameters),
                _count(factors.full_parameters),
                f"{100 * factors.saved:.1f}%",
                str(factors.break_even),
            )
    console.print(table)
    console.print()


def _print_gpt3(console: Console) -> None:
    from tilewise.benchmarks.report import make_table
    from tilewise.model import gpt3_table

    table = make_table("GPT-3 (arXiv:2005.14165, table 2.1), counted from its shapes")
    rows = gpt3_table()
    for heading in rows[0]:
        table.add_column(
            heading.replace("_", " "), justify="left" if heading == "name" else "right"
        )
    for row in rows:
        table.add_row(*(_count(v) if isinstance(v, int) else str(v) for v in row.values()))
    console.print(table)


def _count(number: float) -> str:
    """To three digits with K, M, G or T."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e5, "K")):
        if number >= limit:
            scale = 1e3 if unit == "K" else limit
            return f"{number / scale:.3g} {unit}"
    return f"{number:g} "


def _bytes(number: float) -> str:
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number / 2**10:.1f} KiB"
