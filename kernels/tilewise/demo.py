"""The whole path in two minutes: `python -m tilewise.demo [--json FILE] [--plot PNG]`.

A real model answers a question twice, once with every operation on its naive definition and once
with every operation on the best backend of this machine, and must say the same. Then every
operation is checked and timed on every backend, against what the machine was measured to be able
to do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewise.cli.console import (
    UserError,
    add_device,
    device_of,
    load_model,
    make_console,
    progress,
    write_file,
)
from tilewise.dispatch import BACKENDS, OPS, use_backend

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

    from tilewise.benchmarks.measure import Row
    from tilewise.benchmarks.workload import Workload
    from tilewise.model import GreedyAgreement, LanguageModel

QUESTION = "What is a kernel in computing? Answer in one sentence."
SETTINGS = {"naive": "every operation on its definition", "auto": "every operation on its best"}


@dataclass(frozen=True)
class Answer:
    """What the model said with one backend setting, and how fast.

    Args:
        backend: "naive" or "auto".
        text, token_ids: the answer.
        prompt_tokens: of the question, chat template included.
        prompt_tokens_per_second: reading the question.
        decode_tokens_per_second: writing the answer.
        first_token_seconds: from the question to the first token.
        seconds_per_token: between one token and the next.
        bytes_per_token: weights and cache that a token reads at least.
        bandwidth_utilisation: those bytes over the time of a token, as a fraction of the read
            bandwidth measured at that size.
    """

    backend: str
    text: str
    token_ids: list[int]
    prompt_tokens: int
    prompt_tokens_per_second: float
    decode_tokens_per_second: float
    first_token_seconds: float
    seconds_per_token: float
    bytes_per_token: int
    bandwidth_utilisation: float


def main(argv: list[str] | None = None) -> int:
    """Entry point of the demo; returns the exit status, 1 if anything disagrees."""
    parser = argparse.ArgumentParser(prog="python -m tilewise.demo", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON")
    parser.add_argument("--plot", metavar="PNG", help="draw the roofline")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="of an answer, at most")
    add_device(parser)
    options = parser.parse_args(argv)
    console = make_console()
    try:
        return run(load_model("smollm2", device=device_of(options)), console, options)
    except UserError as error:
        print(f"tilewise.demo: {error}", file=sys.stderr)
        return 2


def run(model: LanguageModel, console: Console, options: argparse.Namespace) -> int:
    """Show everything on `console`."""
    from tilewise.benchmarks import roofline
    from tilewise.benchmarks.host import host
    from tilewise.benchmarks.report import Report, print_report

    started = time.perf_counter()
    device = model.gpt.device.type
    machine = host(device)
    _print_machine(machine, console)

    _heading(console, f"{model.name} answers")
    console.print(f"[bold]{QUESTION}[/]\n")
    answers = [answer(model, backend, options.tokens, console) for backend in SETTINGS]
    agreement = compare_answers(model, *answers)
    console.print(f"{'[green]agree[/]' if agreement else '[red]disagree[/]'}: {agreement}\n")
    console.print(_speed_table(answers))

    _heading(console, "Every operation on every backend")
    rows = list(measure_operations(console, device))
    report = Report(machine, rows, [])
    print_report(report, console)
    for line in missing_backends():
        console.print(f"[dim]{line}[/]", soft_wrap=True)

    results = {
        "question": QUESTION,
        "answers": [asdict(result) for result in answers],
        "agreement": asdict(agreement),
        **report.as_dict(),
        "missing": missing_backends(),
    }
    if options.json:
        text = json.dumps(results, indent=1) + "\n"
        write_file(options.json, lambda path: Path(path).write_text(text))
    if options.plot:
        write_file(options.plot, lambda path: roofline.plot(report, path))
    written = " and ".join(path for path in (options.json, options.plot) if path)
    seconds = time.perf_counter() - started
    console.print(f"\n{seconds:.0f} s" + (f", written to {written}" if written else ""))
    return 0 if agreement and not any(row.disagrees for row in rows) else 1


# --- the model ------------------------------------------------------------------------------------


def answer(model: LanguageModel, backend: str, tokens: int, console: Console) -> Answer:
    """Let the model answer on one backend setting, printing the text as it comes."""
    from tilewise import machine
    from tilewise.benchmarks.tokens import bytes_per_token

    console.print(f"[dim]{backend}: {SETTINGS[backend]}[/]")
    with use_backend(backend):
        stream = model.stream(model.chat_ids([{"role": "user", "content": QUESTION}]), tokens)
        for piece in stream:
            console.print(piece, end="", markup=False, soft_wrap=True)
    console.print("\n")
    generation = stream.generation
    timings = generation.timings
    nbytes = bytes_per_token(model.gpt, timings.prompt_tokens + len(generation.token_ids) // 2)
    rate = timings.decode_tokens_per_second
    bandwidth = machine.ceilings(model.gpt.device).bandwidth_at(nbytes)
    return Answer(
        backend=backend,
        text=generation.text,
        token_ids=generation.token_ids,
        prompt_tokens=timings.prompt_tokens,
        prompt_tokens_per_second=timings.prompt_tokens_per_second,
        decode_tokens_per_second=rate,
        first_token_seconds=timings.first_token_seconds,
        seconds_per_token=timings.seconds_per_output_token,
        bytes_per_token=nbytes,
        bandwidth_utilisation=nbytes * rate / bandwidth,
    )


def compare_answers(model: LanguageModel, naive: Answer, best: Answer) -> GreedyAgreement:
    """Whether two answers are the same, or part where two tokens are all but equally likely."""
    from tilewise.model import greedy_tokens_agree

    prompt = model.chat_ids([{"role": "user", "content": QUESTION}])
    return greedy_tokens_agree(model.gpt, prompt, best.token_ids, naive.token_ids)


def _speed_table(answers: Sequence[Answer]) -> Table:
    from tilewise.benchmarks.report import duration, make_table

    table = make_table("the answers' speed")
    table.add_column("", no_wrap=True)
    for result in answers:
        table.add_column(result.backend, justify="right", no_wrap=True)
    lines = {
        "prompt": [f"{a.prompt_tokens_per_second:.1f} tokens/s" for a in answers],
        "decoding": [f"{a.decode_tokens_per_second:.1f} tokens/s" for a in answers],
        "time to first token": [duration(a.first_token_seconds) for a in answers],
        "time per output token": [duration(a.seconds_per_token) for a in answers],
        "read per token": [f"{a.bytes_per_token / 1e6:.0f} MB" for a in answers],
        "of the read bandwidth": [f"{100 * a.bandwidth_utilisation:.1f}%" for a in answers],
    }
    for name, cells in lines.items():
        table.add_row(name, *cells)
    return table


# --- the operations -------------------------------------------------------------------------------


def demo_workloads(device: str) -> list[Workload]:
    """The first workload of each operation and dtype."""
    from tilewise.benchmarks.workloads import all_workloads

    first: dict[tuple[str, torch.dtype], Workload] = {}
    for workload in all_workloads(device):
        first.setdefault((workload.op, workload.dtype), workload)
    return list(first.values())


def measure_operations(console: Console, device: str) -> Iterator[Row]:
    """Check and time every operation on every backend that it has."""
    from tilewise.benchmarks.measure import compare

    workloads = demo_workloads(device)
    with progress("", len(workloads), quiet=not console.is_terminal) as advance:
        for workload in workloads:
            advance(f"{workload.op}: {workload.name}", steps=0)
            yield from compare(workload, seconds=0.5)
            advance()


def missing_backends() -> list[str]:
    """What did not run because nobody has written it, one line for each set of operations."""
    missing: dict[tuple[str, ...], list[str]] = {}
    for backend in BACKENDS:
        ops = tuple(name for name, op in OPS.items() if backend not in op.backends)
        if ops:
            missing.setdefault(ops, []).append(backend)
    return [
        f"{' and '.join(backends)} did not run "
        f"{'any operation' if len(ops) == len(OPS) else ' and '.join(ops)}: "
        "this version has no implementation"
        for ops, backends in missing.items()
    ]


# --- the machine ----------------------------------------------------------------------------------


def _print_machine(machine: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    from tilewise.cli.info import ceiling_lines

    _heading(console, "The machine and what it was just measured to do")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    grid.add_row("processor", f"{machine['processor']}, {machine['threads']} threads")
    if machine["gpu"]:
        grid.add_row("GPU", machine["gpu"])
    grid.add_row("versions", ", ".join(f"{k} {v}" for k, v in machine["versions"].items()))
    for name, value in ceiling_lines(machine["ceilings"]):
        grid.add_row(name, value)
    console.print(grid)


def _heading(console: Console, text: str) -> None:
    console.print()
    if console.is_terminal:
        console.rule(f"[bold]{text}[/]", align="left", style="dim")
    else:
        console.print(text.upper())


if __name__ == "__main__":
    sys.exit(main())
