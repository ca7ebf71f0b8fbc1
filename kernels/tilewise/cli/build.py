"""`tilewise build`: compile the C++ kernels, or with `--triton` the Triton kernels, beforehand."""

from __future__ import annotations

import argparse
import contextlib
import sys

from tilewise import build, gpu
from tilewise.cli import build_triton, triton_usage
from tilewise.cli.console import Advance, Commands, UserError, count, progress
from tilewise.dispatch import OPS


def add(commands: Commands, common: argparse.ArgumentParser) -> None:
    """Declare the command."""
    text = "compile the C++ kernels now rather than on first use, for every instruction set"
    parser = commands.add_parser(
        "build", parents=[common], help=text, description=text, allow_abbrev=False
    )
    parser.add_argument(
        "--isa",
        choices=tuple(build.ISA_FLAGS),
        help="for this one only (default: all that the compiler knows, whatever runs here)",
    )
    parser.add_argument(
        "--variant",
        choices=build.VARIANTS[1:],
        default="",
        help="for tests: with sanitizers, or of AVX2 instructions alone",
    )
    targets = ", ".join(gpu.TARGETS)
    parser.add_argument(
        "--triton",
        nargs="*",
        metavar="TARGET",
        help="the Triton kernels instead, for these GPUs, and say what they need; fails where that "
        f"is too much (default: {targets})",
    )
    parser.add_argument(
        "--op", choices=tuple(OPS), metavar="OP", help="with --triton: only this operation"
    )
    parser.add_argument(
        "--spill-limit",
        type=count,
        default=triton_usage.SPILL_LIMIT,
        metavar="BYTES",
        help="with --triton: what a thread may spill (default: %(default)s)",
    )
    parser.set_defaults(run=run)


class _Bar(build.Watcher):
    """A build as a progress bar; warnings, which a first use hides, on stderr."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.seconds = 0.0
        self._bar = contextlib.ExitStack()
        self._advance: Advance | None = None

    def waiting(self) -> None:
        if not self.quiet:
            print("waiting for another build in the same folder", file=sys.stderr)

    def started(self, isa: str, steps: int) -> None:
        self._advance = self._bar.enter_context(progress(isa, steps, quiet=self.quiet))

    def advanced(self, step: str) -> None:
        assert self._advance is not None
        self._advance(step)

    def finished(self, seconds: float, warnings: str) -> None:
        self._bar.close()
        self.seconds = seconds
        sys.stderr.write(warnings)

    def failed(self, output: str) -> None:
        self._bar.close()
        sys.stderr.write(output)


def run(options: argparse.Namespace) -> int:
    """Build, and print a line for each instruction set."""
    if options.triton is not None:
        return build_triton.run(options)
    if options.op:
        raise UserError("--op: the C++ kernels are built together; it is for --triton")
    built = 0
    for isa in [options.isa] if options.isa else build.ISA_FLAGS:
        watcher = _Bar(options.quiet)
        try:
            path = build.library(isa, options.variant, watcher=watcher)
        except build.UnknownInstructions as error:
            print(f"{isa:<6}  none: {error}")
            continue
        except build.BuildError as error:
            raise UserError(str(error)) from None
        took = f"built in {watcher.seconds:.1f} s" if watcher.seconds else "was there"
        print(f"{isa:<6}  {path} ({took})", flush=True)
        built += 1
    if built == 0:
        raise UserError("the compiler knows none of the instruction sets")
    return 0
