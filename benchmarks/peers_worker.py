"""One engine in a process of its own, asked over a pipe: `peers_worker.py FD FILE CLASS`.

Never imported by tilewise, and imports nothing of it: see `peers_engines.py`. A request is a pair
(method, keyword arguments); an answer is ("done", result) or ("failed", one line). A crash closes
the pipe, which is an answer too. Everything that is printed goes to stderr, which the asker keeps.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Worker:
    """The requests that a worker understands, for an engine as in `peers_engines.py`."""

    def __init__(self, make_engine: Callable[..., Any]) -> None:
        self._make_engine = make_engine
        self._idle_since = time.perf_counter(), time.process_time()

    def open(self, options: dict[str, Any], **where: Any) -> dict[str, Any]:
        """Import the engine's libraries, then load the model; returns what that took."""
        self._engine = self._make_engine(**options)
        libraries = resident_bytes()
        started = time.perf_counter()
        self._engine.open(**where)
        return {
            "version": self._engine.version,
            "load_seconds": time.perf_counter() - started,
            "library_bytes": libraries,
        }

    def generate(self, prompt: list[int], count: int) -> dict[str, Any]:
        """Read a prompt and write `count` tokens.

        Returns:
            The tokens and the times; `idle_cpu` is how many cores the engine kept busy since its
            last answer, while it was another's turn.
        """
        idle, burnt = (
            now - then
            for now, then in zip(
                (time.perf_counter(), time.process_time()), self._idle_since, strict=True
            )
        )
        started = time.perf_counter()
        tokens, first_seconds, prompt_tokens = self._engine.generate(prompt, count)
        seconds = time.perf_counter() - started
        return {
            "tokens": [int(token) for token in tokens],
            "prompt_tokens": prompt_tokens,
            "first_seconds": first_seconds,
            "seconds": seconds,
            "idle_cpu": burnt / idle,
            "resident_bytes": resident_bytes(),
        }

    def answer(self, method: str, arguments: dict[str, Any]) -> tuple[str, Any]:
        """Carry out a request; an engine's error is its answer."""
        try:
            return "done", getattr(self, method)(**arguments)
        except Exception as error:
            return "failed", f"{type(error).__name__}: {error}".split("\n")[0]
        finally:
            self._idle_since = time.perf_counter(), time.process_time()


def resident_bytes() -> int:
    """Memory of this process that is in RAM, mapped files included; 0 where nobody says."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def main() -> None:
    """Answer requests until the asker hangs up."""
    # An engine that imports a `host` of its own must not get the one beside this file.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if folder != here]
    os.dup2(2, 1)
    descriptor, file, name = sys.argv[1:]
    worker = Worker(runpy.run_path(file)[name])
    with Connection(int(descriptor)) as connection:
        while True:
            try:
                request = connection.recv()
            except EOFError:
                return
            connection.send(worker.answer(*request))


if __name__ == "__main__":
    main()
