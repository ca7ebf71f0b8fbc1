"""`tilewise build`: compile the native kernels ahead of time."""

from __future__ import annotations

import argparse

from tilewise import native
from tilewise.cli.console import Commands, UserError


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Declare the command."""
    text = "compile the C++ and CUDA kernels now rather than on first use"
    commands.add_parser("build", parents=[common], help=text, description=text, allow_abbrev=False)
    commands.choices["build"].set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """There is nothing to compile yet, and no success to report."""
    raise UserError(f"nothing to build: {native.library().reason}")
