"""The clocks: what a caller waits for, and what the GPU alone is busy with.

Rivals are timed in turn, round by round, so that a machine that slows down or wakes up half-way
treats all of them alike; ratios are ratios of medians from one run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

MIN_ROUNDS = 3
MAX_ROUNDS = 500

Calls = Mapping[str, Callable[[], object]]
"""What is timed, by name."""

_TURNS = 3
_WARM_UP, _REPEAT = 10, 50  # milliseconds in each turn


def clock() -> float:
    """Seconds now, read when every GPU that this process uses has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def rounds_of(
    calls: Calls, *, seconds: float, min_rounds: int = MIN_ROUNDS
) -> dict[str, list[float]]:
    """Time the calls in turn for about `seconds`; returns every call's times in seconds."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = clock()
    for done in range(MAX_ROUNDS):
        if done >= min_rounds and clock() - start > seconds:
            break
        for name, call in calls.items():
            before = clock()
            call()
            times[name].append(clock() - before)
    return times


def device_seconds(call: Callable[[], object]) -> float:
    """Median seconds between a call's first and last work on the GPU, its L2 cache cold before.

    Where a call does not keep the GPU busy, because its launches come too slowly, the gaps count.
    """
    from triton.testing import do_bench

    milliseconds: float = do_bench(call, warmup=_WARM_UP, rep=_REPEAT, return_mode="median")
    return milliseconds / 1e3


def on_device(calls: Calls) -> dict[str, float]:
    """`device_seconds` of every call: the median of a few turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_TURNS):
        for name, call in calls.items():
            times[name].append(device_seconds(call))
    return {name: statistics.median(seconds) for name, seconds in times.items()}
