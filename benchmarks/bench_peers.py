"""SmolLM2 on the engines that can run its GGUF file, and one product on PyTorch's kernels:

    pip install 'tilewise[peers]'
    python benchmarks/bench_peers.py --json peers.json --markdown peers.md

Not a pytest benchmark as its neighbours are: the engines run in processes of their own, in turn.
One that is not installed has a row that says how to install it. `--quick` shows in a minute that
everything works; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tilewise.cli.console import UserError, count, make_console, one_line, progress, write_file

if TYPE_CHECKING:
    from tilewise.benchmarks.peers import Contest, Score
    from tilewise.benchmarks.peers_products import Product

TABLES = ("engines", "products")
_QUESTION = "The capital of France is"
_ANSWER_TOKENS = 32


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status, 1 if our exact model does not write what it should."""
    options = _parser().parse_args(argv)
    try:
        return _run(options)
    except UserError as error:
        print(f"bench_peers.py: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from tilewise.benchmarks.peers import RIVALS

    parser = argparse.ArgumentParser(prog="bench_peers.py", description=__doc__.split("\n")[0])
    add = parser.add_argument

    def some(option: str, choices: Iterable[str]) -> None:
        names = list(choices)
        text = f"some of {', '.join(names)}"
        add(option, nargs="+", choices=names, default=names, metavar="NAME", help=text)

    some("--rivals", RIVALS)
    some("--tables", TABLES)
    add("--threads", type=count, metavar="N", help="for everyone (default: the cores)")
    add("--prompt", type=count, default=512, metavar="N", help="tokens to read (default 512)")
    add("--tokens", type=count, default=128, metavar="N", help="tokens to write (default 128)")
    add("--rounds", type=count, default=5, metavar="N", help="of everyone (default 5)")
    add("--seconds", type=float, default=2.0, metavar="S", help="per product (default 2)")
    add("--quick", action="store_true", help="everything once, and little of it")
    add("--json", metavar="FILE", help="write everything as JSON")
    add("--markdown", metavar="FILE", help="write the tables")
    return parser


def cores() -> list[int]:
    """One logical processor of each core that this process may run on."""
    allowed, found = sorted(os.sched_getaffinity(0)), {}
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        found.setdefault(siblings.read_text() if siblings.exists() else cpu, cpu)
    return list(found.values())


def _run(options: argparse.Namespace) -> int:
    from tilewise.benchmarks.host import host
    from tilewise.benchmarks.peers_report import Results, as_markdown, print_results

    if options.quick:
        options.prompt, options.tokens, options.rounds, options.seconds = 32, 8, 1, 0.0
    for name in ("prompt", "tokens", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}: must be at least 1")
    _use_cores(options)
    scores = _engines(options) if "engines" in options.tables else []
    products = _products(options) if "products" in options.tables else []
    results = Results(
        host=host("cpu"),
        model="SmolLM2-135M-Instruct, Q4_1",
        prompt=options.prompt,
        tokens=options.tokens,
        rounds=options.rounds,
        question=_ANSWER_TOKENS,
        scores=scores,
        products=products,
    )
    print_results(results, make_console())
    if options.json:
        text = json.dumps(results.as_dict(), indent=1) + "\n"
        write_file(options.json, lambda path: Path(path).write_text(text))
    if options.markdown:
        write_file(options.markdown, lambda path: Path(path).write_text(as_markdown(results)))
    return 1 if any((score.reason or "").startswith("wrong") for score in scores) else 0


def _use_cores(options: argparse.Namespace) -> None:
    """Keep this process and all that it starts on as many cores as there are to be threads.

    An engine that starts more threads than it was told to gains nothing by it then.
    """
    import torch

    found = cores()
    threads = len(found) if options.threads is None else options.threads
    if not 1 <= threads <= len(found):
        raise UserError(f"--threads: must be 1 to {len(found)}, the cores here, got {threads}")
    options.threads = threads
    os.sched_setaffinity(0, found[:threads])
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def _engines(options: argparse.Namespace) -> list[Score]:
    from tilewise.benchmarks import peers

    contest = _contest(options)
    turns = len(options.rivals) * (options.rounds + 1)
    with progress("", turns, quiet=False) as advance:
        return peers.run(contest, [peers.RIVALS[name] for name in options.rivals], advance)


def _contest(options: argparse.Namespace) -> Contest:
    """What to ask, with the right answer: the model's on its definition."""
    from tilewise.benchmarks.peers import Contest
    from tilewise.dispatch import use_backend
    from tilewise.model import ModelError, greedy_tokens_agree, load
    from tilewise.model.load import find

    try:
        path, model = find("smollm2"), load("smollm2")
    except ModelError as error:
        raise UserError(one_line(error)) from None
    with use_backend("naive"):
        right = model.generate(_QUESTION, _ANSWER_TOKENS, ignore_eos=True)

    def refuse(tokens: list[int]) -> str | None:
        agreement = greedy_tokens_agree(model.gpt, right.prompt_ids, tokens, right.token_ids)
        return None if agreement else f"wrong: {agreement}"

    return Contest(
        path=path,
        vocab_size=model.gpt.config.vocab_size,
        threads=options.threads,
        prompt=options.prompt,
        tokens=options.tokens,
        rounds=options.rounds,
        question=right.prompt_ids,
        answer=right.token_ids,
        refuse=refuse,
    )


def _products(options: argparse.Namespace) -> list[Product]:
    from tilewise.benchmarks.peers_products import ROWS, SHAPES, measure

    shapes = SHAPES[1:] if options.quick else SHAPES
    rows = ROWS[:2] if options.quick else ROWS
    found: list[Product] = []
    with progress("", len(shapes) * len(rows), quiet=False) as advance:
        for outputs, width in shapes:
            for m in rows:
                found += measure(m, outputs, width, seconds=options.seconds)
                advance(f"{m} x {width} x {outputs}")
    return found


if __name__ == "__main__":
    sys.exit(main())
