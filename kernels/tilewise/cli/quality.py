"""`tilewise bench --quality`: what quantization costs a model, in perplexity and divergence."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewise.cli.console import (
    UserError,
    load_model,
    make_console,
    progress,
    write_file,
)
from tilewise.quant import SCHEMES

if TYPE_CHECKING:
    import torch

    from tilewise.model import GPT
    from tilewise.model.quality import Logits, Quality

WINDOW = 512
"""Tokens that are read at once; the second half is scored."""

_DTYPES = ("bfloat16", "float16")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that belong to --quality."""
    group = parser.add_argument_group("quality")
    add = group.add_argument
    add(
        "--quality",
        action="store_true",
        help="perplexity and KL divergence of a model from its dequantized weights, nothing else",
    )
    add(
        "--formats",
        type=_some_of(SCHEMES),
        default=[],
        metavar="F,F",
        help=f"its dequantized layers in these formats, too: {', '.join(SCHEMES)}, or all",
    )
    add(
        "--dtypes",
        type=_some_of(_DTYPES),
        default=[],
        metavar="D,D",
        help=f"the model with activations in these dtypes, too: {', '.join(_DTYPES)}, or all",
    )
    add(
        "--tokens",
        type=int,
        default=4096,
        metavar="N",
        help=f"of the text at most (default 4096), in windows of {WINDOW}",
    )


def _some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def names_in(text: str) -> list[str]:
        names = list(known) if text == "all" else text.split(",")
        for name in names:
            if name not in known:
                wanted = f"some of {','.join(known)}, or all"
                raise argparse.ArgumentTypeError(f"must be {wanted}, got {name!r}")
        return names

    return names_in


def run_quality(options: argparse.Namespace, device: str) -> int:
    """Measure and report."""
    from tilewise.benchmarks.report import make_table
    from tilewise.model.load import find
    from tilewise.model.quality import cut, dequantized, logits_of, measure_quality, quality_text

    if options.tokens < WINDOW:
        raise UserError(f"--tokens: must be at least a window, {WINDOW}, got {options.tokens}")
    name = options.model or "smollm2"
    model = load_model(name, device=device)
    if model.tokenizer is None:
        raise UserError(f"--model: {name} has no tokenizer for the text")
    ids = model.tokenizer.encode(quality_text())[: options.tokens]
    windows = cut(ids, min(WINDOW, model.gpt.config.max_positions))
    dense = dequantized(model.gpt)
    loaded = {"as loaded": model.gpt}
    for dtype in options.dtypes:
        loaded[f"as loaded, {dtype}"] = load_model(name, device=device, dtype=dtype).gpt
    candidates, bits = _candidates(loaded, dense, options.formats)
    console = make_console()
    with _llama_cpp(find(name), len(windows[0])) as (llama, reason):
        if llama is not None:
            candidates["llama.cpp, the same file"] = llama
        with progress("", len(windows) * len(candidates), quiet=options.quiet) as advance:
            reference, found = measure_quality(
                logits_of(dense, "naive"), candidates, windows, done=advance
            )
    rows = {"dequantized, float32, naive": reference, **found}
    bits["dequantized, float32, naive"] = 32.0
    table = make_table(f"{model.name}: {reference.tokens} tokens scored")
    for heading in ("model", "bits", "perplexity", "KL divergence", "99 % below", "same top token"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for title, quality in rows.items():
        table.add_row(title, *_cells(quality, bits.get(title)))
    console.print(table)
    console.print(
        "KL divergence: of the next token's distribution from the first row's, in nats, mean and "
        "its standard error; bits: stored per weight of the linear layers",
        style="dim",
    )
    if reason:
        console.print(reason, style="dim", markup=False)
    if options.json:
        text = {title: quality.as_dict() for title, quality in rows.items()}
        write_file(options.json, lambda path: Path(path).write_text(json.dumps(text, indent=1)))
    return 0


def _candidates(
    loaded: Mapping[str, GPT], dense: GPT, formats: list[str]
) -> tuple[dict[str, Logits], dict[str, float]]:
    """The models by title, and their bits per weight."""
    from tilewise.model.layers import set_act
    from tilewise.model.quality import bits_per_weight, logits_of, requantized

    candidates: dict[str, Logits] = {}
    bits = {}

    def add(title: str, model: GPT) -> None:
        acts = (None, "int8", "fp8") if title == "fp8" else (None, "int8")
        for act in acts:
            logits = logits_of(model)

            def in_mode(window: torch.Tensor, logits: Logits = logits, act: Any = act) -> Any:
                set_act(model, act)
                return logits(window)

            mode = f"{title}, act {act}" if act else title
            candidates[mode], bits[mode] = in_mode, bits_per_weight(model)

    for title, gpt in loaded.items():
        add(title, gpt)
    for scheme in formats:
        add(scheme, requantized(dense, scheme))
    return candidates, bits


@contextmanager
def _llama_cpp(path: Path, window: int) -> Iterator[tuple[Logits | None, str]]:
    """llama.cpp's logits for the same file, or why there are none."""
    if importlib.util.find_spec("llama_cpp") is None:
        yield None, "llama.cpp: not installed: pip install llama-cpp-python"
        return
    if path.suffix != ".gguf":
        yield None, "llama.cpp: reads GGUF files only"
        return
    import llama_cpp
    import torch

    model = llama_cpp.Llama(
        str(path), n_ctx=window, n_batch=window, n_ubatch=window, logits_all=True, verbose=False
    )

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        model.reset()
        model.eval(tokens.tolist())
        return torch.from_numpy(model.scores[: len(tokens)].copy())

    try:
        yield logits, ""
    finally:
        model.close()


def _cells(quality: Quality, bits: float | None) -> list[str]:
    return [
        "-" if bits is None else f"{bits:.2f}",
        f"{quality.perplexity:.3f}",
        f"{quality.kl:.5f} +- {quality.kl_error:.5f}",
        f"{quality.kl_p99:.4f}",
        f"{100 * quality.same_top:.1f} %",
    ]
