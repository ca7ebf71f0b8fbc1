"""`tilewise bench`: time the operations against their rivals, and a model in tokens/s."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tilewise.cli import quality
from tilewise.cli.console import (
    MODEL_HELP,
    Commands,
    UserError,
    add_backend,
    add_device,
    count,
    device_of,
    load_model,
    make_console,
    progress,
    refusals,
    write_file,
)
from tilewise.dispatch import OPS

if TYPE_CHECKING:
    from tilewise.benchmarks.measure import Row
    from tilewise.benchmarks.tokens import TokenRate


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Declare the command."""
    text = (
        "time every operation on every backend, each checked first, and a model's tokens per "
        "second; --op alone leaves the model out, --model alone the operations"
    )
    parser = commands.add_parser(
        "bench", parents=[common], help="time operations and a model", description=text
    )
    parser.allow_abbrev = False
    parser.add_argument("--op", choices=tuple(OPS), metavar="OP", help="time this operation only")
    add_backend(parser, None, "only this backend (the model: default auto)")
    add_device(parser)
    parser.add_argument("-m", "--model", metavar="X", help=f"{MODEL_HELP}; default: smollm2")
    for short, name, default, purpose in (
        ("-p", "--prompt", 512, "tokens of the model's prompt, the row pp; 0 leaves it out"),
        ("-n", "--generate", 128, "tokens that the model writes, the row tg; 0 leaves it out"),
        ("-r", "--repetitions", 5, "how often the model's rows are measured"),
    ):
        parser.add_argument(
            short,
            name,
            type=count,
            default=default,
            metavar="N",
            help=f"{purpose} (default: %(default)s)",
        )
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        metavar="S",
        help="to time each workload of an operation (default: 1)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--plot", metavar="PNG", help="draw the roofline of the operations")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="find the fastest launch configurations of the Triton kernels on this GPU instead, "
        "and keep them for all later calls; takes an hour without --op",
    )
    quality.add_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure and report; 1 if a backend does not agree, since it then has no time."""
    from rich.markup import escape

    from tilewise.benchmarks.host import host
    from tilewise.benchmarks.report import Report, print_report

    if options.repetitions < 1:
        raise UserError("--repetitions: must be at least 1")
    for path in (options.json, options.plot):
        if path:
            write_file(path, lambda path: open(path, "a").close())  # not after all that work
    device = device_of(options)
    if options.quality:
        return quality.run_quality(options, device)
    if options.tune:
        return _tune(options, device)
    everything = options.op is None and options.model is None
    rows = _operations(options, device) if everything or options.op else []
    wrong = any(row.disagrees for row in rows)
    console = make_console()
    model = []
    try:
        model = _model(options, device) if everything or options.model else []
    except AssertionError as error:
        console.print("[red]wrong[/]", escape(str(error)), soft_wrap=True)
        wrong = True
    report = Report(host(device), rows, model)
    print_report(report, console)
    if options.json:
        write_file(options.json, report.save)
    if options.plot:
        from tilewise.benchmarks import roofline

        write_file(options.plot, lambda path: roofline.plot(report, path))
    return 1 if wrong else 0


def _operations(options: argparse.Namespace, device: str) -> list[Row]:
    from tilewise.benchmarks.measure import compare
    from tilewise.benchmarks.workloads import all_workloads

    workloads = [w for w in all_workloads(device) if options.op in (None, w.op)]
    backends = None if options.backend is None else [options.backend]
    rows = []
    with progress("", len(workloads), quiet=options.quiet) as advance:
        for workload in workloads:
            advance(f"{workload.op}: {workload.name}", steps=0)
            rows += compare(workload, backends, seconds=options.seconds)
            advance()
    return rows


def _tune(options: argparse.Namespace, device: str) -> int:
    """Find launch configurations, print them and keep them."""
    import torch

    from tilewise import gpu, tuning
    from tilewise.benchmarks.report import make_table, ratio
    from tilewise.benchmarks.tune import tune
    from tilewise.benchmarks.workloads import all_workloads

    reason = gpu.why_not(torch.empty(0, device=device)) if device == "cuda" else "needs a GPU"
    if reason:
        raise UserError(f"--tune: {reason}")
    name = torch.cuda.get_device_name()
    workloads = [w for w in all_workloads(device) if options.op in (None, w.op)]
    table = make_table(f"configurations for {name}")
    for heading in ("", "ships", "is fastest", "of", "speedup"):
        table.add_column(heading, justify="left" if not heading else "right")
    path = tuning.path_for(name)
    with progress("", 0, quiet=options.quiet) as advance:
        for found in tune(workloads, lambda what: advance(what, steps=0)):
            # At once: an hour's work is not lost when it is interrupted.
            path = tuning.save(name, {found.name: found.best})
            ships, fastest = (
                " ".join(f"{key}={value}" for key, value in configuration.items())
                for configuration in (found.default, found.best)
            )
            table.add_row(found.name, ships, fastest, str(found.tried), ratio(found.speedup))
    console = make_console()
    console.print(table)
    console.print(f"kept in {path}", style="dim", markup=False, soft_wrap=True)
    return 0


def _model(options: argparse.Namespace, device: str) -> list[TokenRate]:
    from tilewise.benchmarks.tokens import measure_tokens

    counts = {"pp": options.prompt, "tg": options.generate}
    tests = [f"{kind}{tokens}" for kind, tokens in counts.items() if tokens]
    name = options.model or "smollm2"
    model = load_model(name, device=device)
    runs = len(tests) * (options.repetitions + 1)
    with refusals(), progress(name, runs, quiet=options.quiet) as advance:
        return list(
            measure_tokens(
                model,
                tests,
                backend=options.backend or "auto",
                repetitions=options.repetitions,
                done=advance,
            )
        )
