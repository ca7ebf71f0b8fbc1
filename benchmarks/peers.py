"""A contest of engines over one model file: who reads a prompt and writes tokens how fast.

Every engine lives in a process of its own for the whole contest and is asked in turn, so that a
machine that slows down half-way treats all alike, and no engine's threads run during another's
turn. All get the same token ids, new ones in every round: some engines remember prompts.
"""

from __future__ import annotations

import importlib.util
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHORT_PROMPT = 8
"""Tokens before a text that is written from almost nothing."""

_PATIENCE = 600.0
_SPECIAL = 64
"""No prompt has a token below this: the special ones are there, and some engines act on them."""

_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


@dataclass(frozen=True)
class Rival:
    """An engine that can take part.

    Args:
        name: what `--rivals` calls it.
        title: its row in the tables.
        engine: its class in `source`.
        module: what must be importable, or else it is not installed.
        install: the command that installs it.
        options: for the class.
        source: the file with the class, as `peers_engines.py`.
    """

    name: str
    title: str
    engine: str
    module: str
    install: str
    options: Mapping[str, str] = field(default_factory=dict)
    source: Path = HERE / "peers_engines.py"

    @property
    def is_exact(self) -> bool:
        """Whether it must write what the model on its definition writes."""
        return self.module == "tilewise" and not self.options


def _ours(name: str, title: str, **options: str) -> Rival:
    return Rival(name, title, "Tilewise", "tilewise", "pip install .", options)


RIVALS = {
    rival.name: rival
    for rival in (
        _ours("tilewise", "tilewise, float32"),
        _ours("tilewise-int8", "tilewise, float32, int8 activations", act="int8"),
        _ours("tilewise-bf16", "tilewise, bfloat16", dtype="bfloat16"),
        _ours(
            "tilewise-bf16-int8",
            "tilewise, bfloat16, int8 activations",
            dtype="bfloat16",
            act="int8",
        ),
        Rival(
            "llama.cpp",
            "llama.cpp",
            "LlamaCpp",
            "llama_cpp",
            # With AMX it crashed on prompts of more than a few tokens (0.3.36).
            f"CMAKE_ARGS=\"-DGGML_NATIVE=ON -DCMAKE_C_FLAGS='{_NO_AMX}' "
            f"-DCMAKE_CXX_FLAGS='{_NO_AMX}'\" pip install llama-cpp-python",
        ),
        Rival(
            "openvino",
            "OpenVINO GenAI",
            "OpenVino",
            "openvino_genai",
            "pip install openvino-genai",
        ),
    )
}


class RivalError(Exception):
    """An engine cannot go on; the message says why in one line."""


# --- one engine -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What an engine did with one prompt, as its worker saw it (`peers_worker.Worker.generate`)."""

    tokens: list[int]
    prompt_tokens: int
    first_seconds: float
    seconds: float
    idle_cpu: float
    resident_bytes: int

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second, until the first new token was known."""
        return self.prompt_tokens / self.first_seconds

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first."""
        return (len(self.tokens) - 1) / (self.seconds - self.first_seconds)


class Contestant:
    """The process in which a rival runs."""

    def __init__(self, rival: Rival) -> None:
        self.rival = rival
        self._connection, theirs = Pipe()
        # Until close(), which a context manager could not span.
        self._output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        command = [sys.executable, HERE / "peers_worker.py", str(theirs.fileno())]
        self._process = subprocess.Popen(
            [*command, rival.source, rival.engine],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()

    def open(self, path: Path, threads: int, context: int) -> dict[str, Any]:
        """Load the model; returns the version and what loading took."""
        options = dict(self.rival.options)
        return self._ask("open", options=options, path=str(path), threads=threads, context=context)

    def generate(self, prompt: Sequence[int], count: int) -> Reading:
        """Let it read a prompt and write `count` tokens.

        Raises:
            RivalError: if it fails, or read or wrote another number of tokens than it was asked to.
        """
        reading = Reading(**self._ask("generate", prompt=list(prompt), count=count))
        if reading.prompt_tokens != len(prompt):
            raise RivalError(f"read {reading.prompt_tokens} of {len(prompt)} prompt tokens")
        if len(reading.tokens) != count:
            raise RivalError(f"wrote {len(reading.tokens)} tokens, asked for {count}")
        return reading

    def _ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(_PATIENCE):
                raise RivalError(f"gave no answer in {_PATIENCE:.0f} s")
            verdict, result = self._connection.recv()
        except (EOFError, OSError):
            raise RivalError(self._last_words()) from None
        if verdict == "failed":
            raise RivalError(result)
        return result

    def _last_words(self) -> str:
        code = self._process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self._output.seek(0)
        lines = [line.strip() for line in self._output if line.strip()]
        return f"crashed ({how})" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.kill()
        self._process.wait()
        self._output.close()


# --- the contest ----------------------------------------------------------------------------------


@dataclass
class Score:
    """What a rival reached.

    Args:
        name, title: of the rival.
        version: of its package.
        reason: why it did not take part, or not to the end.
        prompt_rates: tokens/s of reading the long prompt, one per round.
        short_rates, long_rates: tokens/s of writing after the short and after the long prompt.
        same_tokens: how many tokens of the greedy answer to a question in words are those of the
            model on its definition, before the first that differs.
        load_seconds: to load the file.
        resident_bytes: memory in RAM after the last run, mapped files included.
        library_bytes: of that, what was there before the file was loaded.
        idle_cpu: cores that it kept busy while others were measured, at most.
    """

    name: str
    title: str
    version: str = ""
    reason: str | None = None
    prompt_rates: list[float] = field(default_factory=list)
    short_rates: list[float] = field(default_factory=list)
    long_rates: list[float] = field(default_factory=list)
    same_tokens: int | None = None
    load_seconds: float | None = None
    resident_bytes: int = 0
    library_bytes: int = 0
    idle_cpu: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, the medians included, ready for JSON."""
        medians = {
            f"{name}_rate": statistics.median(rates) if rates else None
            for name, rates in (
                ("prompt", self.prompt_rates),
                ("short", self.short_rates),
                ("long", self.long_rates),
            )
        }
        return asdict(self) | medians


@dataclass(frozen=True)
class Contest:
    """What all engines are asked to do.

    Args:
        path: the GGUF file.
        vocab_size: of its model; prompts are random tokens.
        threads: for each engine.
        prompt: tokens of the long prompt.
        tokens: how many are written after each prompt, the first not counted.
        rounds: how often.
        question: token ids of a text for `Score.same_tokens`.
        answer: what the model on its definition continues it with.
        refuse: why another continuation cannot be an exact engine's; None where it can.
    """

    path: Path
    vocab_size: int
    threads: int
    prompt: int
    tokens: int
    rounds: int
    question: Sequence[int]
    answer: Sequence[int]
    refuse: Callable[[list[int]], str | None]

    def prompt_ids(self, round: int, length: int) -> list[int]:
        """The prompt of that length in a round: the same for all, and no two begin alike."""
        source = random.Random(f"{round} {length}")
        return [source.randrange(_SPECIAL, self.vocab_size) for _ in range(length)]


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name): everyone once a round, each round begun by another."""
    for round in range(rounds):
        first = round % len(names) if names else 0
        for name in (*names[first:], *names[:first]):
            yield round, name


def run(
    contest: Contest, rivals: Sequence[Rival], done: Callable[[str], object] = lambda name: None
) -> list[Score]:
    """Let the rivals run in turn.

    One that is not installed, fails or crashes has a score with the reason; the others go on.

    Args:
        contest: what to do.
        rivals: who; scores come in this order.
        done: called after everyone's every turn with the name, and once for its warm-up.
    """
    scores = {rival.name: Score(rival.name, rival.title) for rival in rivals}
    contestants: dict[str, Contestant] = {}

    def attempt(name: str, act: Callable[[Contestant, Score], None]) -> None:
        try:
            act(contestants[name], scores[name])
        except RivalError as error:
            scores[name].reason = str(error)
            contestants.pop(name).close()
        done(name)

    try:
        for rival in rivals:
            if importlib.util.find_spec(rival.module) is None:
                scores[rival.name].reason = f"not installed: {rival.install}"
                continue
            contestants[rival.name] = Contestant(rival)
            attempt(rival.name, lambda c, score: _warm_up(contest, c, score))
        for round, name in turns(list(contestants), contest.rounds):
            if name in contestants:
                attempt(name, lambda c, score, round=round: _run_round(contest, round, c, score))
    finally:
        for contestant in contestants.values():
            contestant.close()
    return list(scores.values())


def _warm_up(contest: Contest, contestant: Contestant, score: Score) -> None:
    """Load the file, answer the question, and see prompts of both lengths once."""
    longest = max(contest.prompt + contest.tokens, len(contest.question) + len(contest.answer))
    opened = contestant.open(contest.path, contest.threads, longest + 1)
    score.version = opened["version"]
    score.load_seconds, score.library_bytes = opened["load_seconds"], opened["library_bytes"]
    answer = contestant.generate(contest.question, len(contest.answer)).tokens
    differs = [a != b for a, b in zip(answer, contest.answer, strict=True)]
    score.same_tokens = (*differs, True).index(True)
    if contestant.rival.is_exact and (reason := contest.refuse(answer)):
        raise RivalError(reason)
    for length in (SHORT_PROMPT, contest.prompt):
        contestant.generate(contest.prompt_ids(-1, length), 4)


def _run_round(contest: Contest, round: int, contestant: Contestant, score: Score) -> None:
    short = contestant.generate(contest.prompt_ids(round, SHORT_PROMPT), contest.tokens + 1)
    long = contestant.generate(contest.prompt_ids(round, contest.prompt), contest.tokens + 1)
    score.short_rates.append(short.decode_rate)
    score.prompt_rates.append(long.prompt_rate)
    score.long_rates.append(long.decode_rate)
    score.resident_bytes = long.resident_bytes
    # The second request comes right after the first: only the time before that was others'.
    score.idle_cpu = max(score.idle_cpu, short.idle_cpu)
