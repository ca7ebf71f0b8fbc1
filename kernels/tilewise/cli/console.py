"""What the commands share: a console that is plain where nobody watches, and errors in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from tilewise.dispatch import BACKENDS, BackendError

if TYPE_CHECKING:
    from rich.console import Console

    from tilewise.model import LanguageModel

Commands = argparse._SubParsersAction
"""What `add_subparsers` returns; argparse gives its type no public name."""

MODEL_HELP = "smollm2, a .gguf file, or a folder with safetensors"
"""What `--model` takes, for its help."""

_PIPE_WIDTH = 160


class UserError(Exception):
    """The request cannot be carried out; the message says why in one line."""


def make_console(*, stderr: bool = False) -> Console:
    """A console: in a terminal with colour and the terminal's width, else plain and wide."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr,
        highlight=False,
        width=None if stream.isatty() else _PIPE_WIDTH,
    )


class Advance(Protocol):
    """Report progress: one more step done, and what comes next."""

    def __call__(self, description: str | None = None, *, steps: int = 1) -> None: ...


@contextmanager
def progress(title: str, total: int, *, quiet: bool) -> Iterator[Advance]:
    """A progress bar on stderr, gone when done; nothing where quiet or nobody watches."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    console = make_console(stderr=True)
    columns = (BarColumn(24), MofNCompleteColumn(), Remaining(), TextColumn("{task.description}"))
    with Progress(
        *columns, console=console, transient=True, disable=quiet or not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=total)

        def advance(description: str | None = None, *, steps: int = 1) -> None:
            bar.update(task, advance=steps, description=description)

        yield advance


# --- options and errors that several commands share -----------------------------------------------


def count(text: str) -> int:
    """An option's value that is a number of things."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, got {text!r}")
    return int(text)


def add_backend(parser: argparse.ArgumentParser, default: str | None, purpose: str) -> None:
    """The option `--backend`."""
    choices = BACKENDS if default is None else ("auto", *BACKENDS)
    parser.add_argument("--backend", choices=choices, default=default, help=purpose)


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option `--device`; see `device_of`."""
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: the GPU where there is one"
    )


def device_of(options: argparse.Namespace) -> str:
    """The device that was asked for, or the best there is."""
    import torch

    from tilewise import native

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"no GPU: {native.gpu().reason}")
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def load_model(name: str, *, device: str = "cpu", dtype: str = "float32") -> LanguageModel:
    """Load a model; what can be wrong with one is a UserError."""
    import torch

    from tilewise import model

    try:
        return model.load(name, device=device, dtype=getattr(torch, dtype))
    except (OSError, ValueError, ImportError) as error:
        raise UserError(one_line(error)) from None


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error).split("\n")[0] or type(error).__name__


@contextmanager
def refusals() -> Iterator[None]:
    """Turn the refusal of a backend that was asked for by name into a UserError."""
    try:
        yield
    except BackendError as error:
        raise UserError(one_line(error)) from None


def write_file(path: str, write: Callable[[str], object]) -> None:
    """Call `write(path)`; a path that cannot be written is a UserError."""
    try:
        write(path)
    except OSError as error:
        raise UserError(one_line(error)) from None
