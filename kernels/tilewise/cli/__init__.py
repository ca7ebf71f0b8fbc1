"""The `tilewise` command: info, verify, bench, generate, chat and build.

Every command is a module with `add(commands)`, which declares its options, and a function from
these to an exit status: 0 for success, 1 where something that was checked is wrong, 2 where the
request cannot be carried out as written. What a user can get wrong ends in one line on stderr.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from typing import NoReturn

from tilewise import __version__, dispatch, native
from tilewise.cli import bench, build, chat, info, verify
from tilewise.cli.console import UserError


class _Parser(argparse.ArgumentParser):
    """Errors are one line; usage is for those who ask for help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def refuse(self, unknown: list[str]) -> NoReturn:
        """Name the first argument that nothing takes, and the option that was probably meant."""
        wrong = unknown[0].split("=")[0]
        options = [option for action in self._actions for option in action.option_strings]
        close = difflib.get_close_matches(wrong, options, 1)
        hint = f"did you mean {close[0]}?" if close else f"see {self.prog} --help"
        kind = "option" if wrong.startswith("-") else "argument"
        self.error(f"unknown {kind} {wrong}; {hint}")


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _parse(argv: list[str] | None) -> argparse.Namespace | None:
    """The options of a command; None where no command is given."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-q", "--quiet", action="store_true", help="results only, no progress")
    common.add_argument(
        "-t", "--threads", type=_threads, metavar="N", help="CPU threads (default: torch's choice)"
    )
    parser = _Parser(prog="tilewise", description="Kernels for transformer language models.")
    parser.add_argument("--version", action="version", version=f"tilewise {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for module in (info, verify, bench, chat, build):
        module.add(commands, common)
    options, unknown = parser.parse_known_args(argv)
    if options.command is None:
        if unknown:
            parser.refuse(unknown)
        parser.print_help()
        return None
    if unknown:
        commands.choices[options.command].refuse(unknown)
    return options


def _check_environment() -> None:
    """Refuse a typo in a variable before anything runs."""
    try:
        dispatch.check_environment()
        native.instruction_set()
    except ValueError as error:
        raise UserError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    """Entry point of `tilewise`; returns the exit status."""
    try:
        options = _parse(argv)
    except SystemExit as stop:  # argparse's way to say that all is said
        return int(stop.code or 0)
    if options is None:
        return 0
    try:
        _check_environment()
        if options.threads:
            import torch

            torch.set_num_threads(options.threads)
        return options.run(options)
    except UserError as error:
        print(f"tilewise {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output has had enough; Python must not complain on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
