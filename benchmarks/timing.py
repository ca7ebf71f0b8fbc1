"""The clocks: what a caller waits for, and what the GPU alone is busy with.

Rivals are timed in turn, round by round, so that a machine that slows down or wakes up half-way
treats all of them alike; ratios are ratios of medians from one run.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

MIN_ROUNDS = 3
MAX_ROUNDS = 500

Calls = Mapping[str, Callable[[], object]]
"""What is timed, by name."""

_TURNS = 3
_TURN_SECONDS = 0.03
_OTHER_BYTES = 256 << 20  # several times any GPU's L2


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


# --- on a GPU -------------------------------------------------------------------------------------


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@contextmanager
def side_stream() -> Iterator[None]:
    """Within the block, work goes to a stream that can be captured; the default one cannot.

    A backward pass runs on the stream of its forward pass: that has to be made here as well.
    """
    if not torch.cuda.is_initialized():
        yield
        return
    outer, stream = torch.cuda.current_stream(), _side_stream()
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        yield
    outer.wait_stream(stream)


def captured(calls: Calls) -> dict[str, Callable[[], object]]:
    """The replays of those calls that can be captured in a CUDA graph; within `side_stream`.

    A replay is the GPU's work alone, without the host's gaps between launches, which hide what
    small kernels take. The graphs share their memory: each replay overwrites the others' results.
    """
    if not torch.cuda.is_initialized():
        return {}
    pool = torch.cuda.graph_pool_handle()
    graphs = {name: _graph_of(call, pool) for name, call in calls.items()}
    return {name: graph.replay for name, graph in graphs.items() if graph is not None}


def _graph_of(call: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph | None:
    """None for a call that waits for the GPU, or does anything else that a graph cannot hold."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    mode = torch.cuda.get_sync_debug_mode()
    try:
        call()  # compiles
        torch.cuda.synchronize()
        # PyTorch is better asked for what waits than left with a capture that was broken off.
        torch.cuda.set_sync_debug_mode("error")
        call()
        torch.cuda.set_sync_debug_mode(mode)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            call()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return graph


def device_seconds(call: Callable[[], object]) -> float:
    """Median seconds between a call's first and last work on the GPU, its L2 cache cold before.

    Of a replay this is the GPU's time. Where the call itself is timed and does not keep the GPU
    busy, because its launches come too slowly, the gaps count.
    """
    once = _timed(call, 1)
    return statistics.median(_timed(call, min(max(int(_TURN_SECONDS / once[0]), 3), 50)))


@functools.cache
def _other_data() -> torch.Tensor:
    return torch.ones(_OTHER_BYTES // 4, device="cuda")


def _timed(call: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of the repeats, all queued before the first is over.

    Before each the cache is filled with other data that is only read: of what was written, as
    `triton.testing.do_bench` does, the call would pay for the way back to memory.
    """
    pairs = []
    for _ in range(repeats):
        _other_data().sum()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def on_device(calls: Calls) -> dict[str, float]:
    """`device_seconds` of every call: the median of a few turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_TURNS):
        for name, call in calls.items():
            times[name].append(device_seconds(call))
    return {name: statistics.median(seconds) for name, seconds in times.items()}
