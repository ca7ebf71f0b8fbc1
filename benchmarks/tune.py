"""Finding launch configurations for the GPU at hand: `tilewise bench --tune`.

A kernel's configuration is judged on all workloads that use it, by the geometric mean of their
times on the device. The search walks: of the neighbours of the best so far, which differ in one
number, it goes to the fastest, until none is faster. Only neighbours that agree with the
definition, as every backend must, are timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tilewise import tuning
from tilewise.benchmarks.measure import Bench
from tilewise.benchmarks.workload import Workload
from tilewise.tuning import Asked

_LARGEST = 256  # of a size
_MOST_WARPS, _MOST_STAGES = 16, 6
_FASTER = 0.98
"""What counts as faster; less is noise, and moves the bits of results for nothing."""


@dataclass(frozen=True)
class Tuned:
    """What was found for one configuration.

    Args:
        name: as kernels ask for it.
        default: the configuration that ships.
        best: the fastest that was found.
        tried: how many others ran and agreed.
        speedup: the time with the default over that with the best.
    """

    name: str
    default: dict[str, int]
    best: dict[str, int]
    tried: int
    speedup: float


def tune(
    workloads: Sequence[Workload], advance: Callable[[str], object] = lambda name: None
) -> Iterator[Tuned]:
    """Walk for every configuration that the Triton kernels of these workloads ask for.

    Args:
        workloads: on one device.
        advance: called with the name of each configuration before its turn.
    """
    users: dict[str, list[Workload]] = {}
    asked: dict[str, Asked] = {}
    for workload in workloads:
        for name, what in _asked_by(workload).items():
            users.setdefault(name, []).append(workload)
            asked[name] = what
    found: dict[str, dict[str, int]] = {}
    for name, what in asked.items():
        advance(name)
        tuned = _walk(name, what, [Bench(workload) for workload in users[name]], found)
        if tuned is not None:
            found[name] = tuned.best
            yield tuned


def _asked_by(workload: Workload) -> dict[str, Asked]:
    bench = Bench(workload)
    if "triton" not in bench.backends or bench.why_not("triton"):
        return {}
    with tuning.trying({}) as asked:
        bench.agreement("triton")
    return asked


def _walk(
    name: str, asked: Asked, benches: list[Bench], others: dict[str, dict[str, int]]
) -> Tuned | None:
    """The walk for one configuration; None if the one that ships does not run itself."""

    def score(configuration: dict[str, int]) -> float | None:
        with tuning.trying(others | {name: configuration}):
            return _score(benches)

    best = default = asked.default._asdict()
    known: dict[tuple[int, ...], float | None] = {tuple(default.values()): score(default)}
    first = fastest = known[tuple(default.values())]
    if first is None or fastest is None:
        return None
    while True:
        here = best
        for neighbour in neighbours(here, asked.sizes):
            key = tuple(neighbour.values())
            if key not in known:
                known[key] = score(neighbour)
            seconds = known[key]
            if seconds is not None and seconds < _FASTER * fastest:
                best, fastest = neighbour, seconds
        if best is here:
            tried = sum(seconds is not None for seconds in known.values()) - 1
            return Tuned(name, default, best, tried, first / fastest)


def neighbours(configuration: dict[str, int], sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """The configurations that differ in one number by one step."""
    steps: list[dict[str, Any]] = []
    for size, smallest in sizes.items():
        for value in (configuration[size] // 2, configuration[size] * 2):
            if smallest <= value <= _LARGEST:
                steps.append({size: value})
    warps, stages = configuration["num_warps"], configuration["num_stages"]
    steps += [{"num_warps": n} for n in (warps // 2, warps * 2) if 1 <= n <= _MOST_WARPS]
    steps += [{"num_stages": n} for n in (stages - 1, stages + 1) if 1 <= n <= _MOST_STAGES]
    return [configuration | step for step in steps]


def _score(benches: list[Bench]) -> float | None:
    """Geometric mean of the workloads' seconds; None where one does not run or not agree."""
    logarithms = []
    for bench in benches:
        try:
            bench.agreement("triton")
            (seconds,) = bench.device_times(["triton"]).values()
        except Exception:  # too much shared memory, what the compiler cannot do, a wrong result
            return None
        logarithms.append(math.log(seconds))
    return math.exp(sum(logarithms) / len(logarithms))
