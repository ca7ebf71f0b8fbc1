"""`tilewise generate` and `tilewise chat`: text from a model, as it comes."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, TextIO

from tilewise.cli.console import (
    MODEL_HELP,
    Commands,
    UserError,
    add_backend,
    add_device,
    count,
    device_of,
    load_model,
    one_line,
    refusals,
)
from tilewise.dispatch import use_backend

if TYPE_CHECKING:
    from tilewise.model import Generation, LanguageModel


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Declare both commands."""
    text = "continue or answer a prompt"
    generate = commands.add_parser("generate", parents=[common], help=text, description=text)
    generate.add_argument("prompt", nargs="?", help="text; without it, standard input is read")
    generate.add_argument(
        "--raw", action="store_true", help="continue the text as it is, without the chat template"
    )
    generate.set_defaults(run=run_generate)
    text = "talk to a model; an empty line or Ctrl-D ends it"
    chat = commands.add_parser("chat", parents=[common], help=text, description=text)
    chat.add_argument("--system", metavar="TEXT", help="what the model is told beforehand")
    chat.set_defaults(run=run_chat)
    for parser in (generate, chat):
        parser.allow_abbrev = False
        parser.add_argument(
            "-m",
            "--model",
            default="smollm2",
            metavar="X",
            help=f"{MODEL_HELP} (default: %(default)s)",
        )
        for option, kind, default, metavar, purpose in (
            ("--tokens", count, 256, "N", "write at most so many"),
            ("--temperature", float, 0.0, "T", "0 always takes the likeliest token"),
            ("--top-k", count, 0, "N", "choose among the N likeliest; 0: all"),
            ("--top-p", float, 1.0, "P", "choose among the likeliest that together have P"),
            ("--min-p", float, 0.0, "P", "choose among those with at least P x the likeliest's"),
            ("--repetition-penalty", float, 1.0, "X", "above 1 avoids tokens that came before"),
            ("--seed", count, 0, "N", "of the choice"),
        ):
            parser.add_argument(
                *(("-n",) if option == "--tokens" else ()),
                option,
                type=kind,
                default=default,
                metavar=metavar,
                help=f"{purpose} (default: %(default)s)",
            )
        add_backend(parser, "auto", "for every operation")
        add_device(parser)


def run_generate(options: argparse.Namespace) -> int:
    """Answer one prompt; the text goes to stdout, its speed to stderr."""
    prompt = _standard_input().read() if options.prompt is None else options.prompt
    if not prompt.strip():
        raise UserError("the prompt is empty")
    model = load_model(options.model, device=device_of(options))
    messages = [{"role": "user", "content": prompt}]
    generation = _answer(model, prompt if options.raw else messages, options)
    _print_speed(generation, options)
    return 0


def run_chat(options: argparse.Namespace) -> int:
    """Take turns until there is no more input; Ctrl-C ends an answer, or the conversation."""
    is_asked = _standard_input().isatty()
    model = load_model(options.model, device=device_of(options))
    messages = [{"role": "system", "content": options.system}] if options.system else []
    while True:
        try:
            line = input("> " if is_asked else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if not line:
            return 0
        messages.append({"role": "user", "content": line})
        generation = _answer(model, messages, options, may_stop=True)
        messages.append({"role": "assistant", "content": generation.text})
        _print_speed(generation, options)


def _standard_input() -> TextIO:
    if sys.stdin is None:
        raise UserError("standard input is closed")
    return sys.stdin


def _answer(
    model: LanguageModel,
    prompt: str | list[dict[str, str]],
    options: argparse.Namespace,
    *,
    may_stop: bool = False,
) -> Generation:
    """Print the answer as it is generated."""
    try:
        with refusals(), use_backend(options.backend):
            stream = model.stream(
                prompt if isinstance(prompt, str) else model.chat_ids(prompt),
                options.tokens,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                min_p=options.min_p,
                repetition_penalty=options.repetition_penalty,
                seed=options.seed,
            )
            try:
                for piece in stream:
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                if not may_stop:
                    raise
    except ValueError as error:
        raise UserError(one_line(error)) from None
    print()
    return stream.generation


def _print_speed(generation: Generation, options: argparse.Namespace) -> None:
    if options.quiet:
        return
    timings = generation.timings
    print(
        f"[{timings.prompt_tokens} prompt tokens at {timings.prompt_tokens_per_second:.1f}/s, "
        f"{len(generation.token_ids)} new at {timings.decode_tokens_per_second:.1f}/s, "
        f"first after {timings.first_token_seconds:.2f} s]",
        file=sys.stderr,
    )
