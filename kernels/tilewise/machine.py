"""What this machine is, and what it can do: measured ceilings, not data-sheet numbers.

A kernel is judged against what the same machine reached moments ago with the plainest possible
program: reading a buffer, and multiplying two matrices that fit in the cache.
"""

from __future__ import annotations

import functools
import itertools
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tilewise.dispatch import Cost

_MIB = 2**20
_BUFFER_BYTES = (1 * _MIB, 16 * _MIB, 128 * _MIB, 512 * _MIB)
_GPU_BUFFER_BYTES = 1024 * _MIB  # many times its cache, which benchmarks find cold


@dataclass(frozen=True)
class Ceilings:
    """The measured limits of one device.

    Args:
        device: "cpu" or a CUDA device.
        threads: CPU threads that took part.
        read_bandwidth: bytes/s by the size of the buffer in bytes.
        flops: FLOP/s of a matrix multiplication by dtype name.
    """

    device: str
    threads: int
    read_bandwidth: dict[int, float]
    flops: dict[str, float]

    def bandwidth_at(self, nbytes: float) -> float:
        """The read bandwidth of the largest measured buffer not above `nbytes`, in bytes/s."""
        sizes = [size for size in self.read_bandwidth if size <= nbytes]
        return self.read_bandwidth[max(sizes, default=min(self.read_bandwidth))]

    def flops_of(self, dtype: torch.dtype) -> float:
        """The compute ceiling for `dtype` in FLOP/s.

        A dtype that the device multiplies slowly can be converted to float32 first, so float32's
        ceiling is the least that any narrower one has.
        """
        name = str(dtype).removeprefix("torch.")
        if name == "float64":
            return self.flops[name]
        return max(self.flops.get(name, 0.0), self.flops["float32"])

    def seconds(self, cost: Cost) -> float:
        """The roofline time of `cost`: the larger of its memory and its compute time."""
        memory = cost.bytes / self.bandwidth_at(cost.bytes)
        return max(memory, cost.flops / self.flops_of(cost.dtype))


def seconds_of(
    fn: Callable[[], object], device: torch.device, *, repeats: int = 5, at_least: float = 0.1
) -> float:
    """The least time of one call in seconds, after a warm-up: wall time, or a GPU's own.

    Calls go on for `at_least` seconds: on a busy machine a thread that has lost its core makes
    many short calls in a row look a thousand times slower than they are, and a GPU that was idle
    first raises its clocks.
    """
    time_of = _gpu_seconds if device.type == "cuda" else _wall_seconds
    fn()
    best, began = float("inf"), time.perf_counter()
    while repeats > 0 or time.perf_counter() - began < at_least:
        best = min(best, time_of(fn))
        repeats -= 1
    return best


def _wall_seconds(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def _gpu_seconds(fn: Callable[[], object]) -> float:
    """Between two events on the stream: without the launch, and without waiting for the result."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    fn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def ceilings(device: torch.device | str = "cpu") -> Ceilings:
    """Measure the ceilings of `device`, once per process and thread count."""
    return _ceilings(str(device), torch.get_num_threads())


@functools.lru_cache(maxsize=8)
def _ceilings(device_name: str, threads: int) -> Ceilings:
    device = torch.device(device_name)
    bandwidth = {}
    sizes = (_GPU_BUFFER_BYTES,) if device.type == "cuda" else _BUFFER_BYTES
    for nbytes in sizes:
        buffer = torch.ones(nbytes // 8, dtype=torch.int64, device=device)
        words = buffer.view(torch.float32)
        # Which of the two reductions reads faster depends on the vector width.
        reads: tuple[Callable[[], object], ...] = (buffer.sum, words.sum)
        bandwidth[nbytes] = nbytes / min(seconds_of(read, device) for read in reads)
    # What is read from a large buffer can be read from a small one; a busy machine may say else.
    for small, large in itertools.combinations(sizes, 2):
        bandwidth[small] = max(bandwidth[small], bandwidth[large])
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    flops = {str(dtype).removeprefix("torch."): _matmul_flops(dtype, device) for dtype in dtypes}
    return Ceilings(device_name, threads, bandwidth, flops)


def _matmul_flops(dtype: torch.dtype, device: torch.device) -> float:
    def flops(size: int) -> float:
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        return 2 * size**3 / seconds_of(lambda: a @ b, device)

    if device.type == "cuda":
        return flops(8192 if dtype.itemsize == 2 else 4096)
    if dtype.itemsize > 2:
        return flops(768)
    # Without matrix instructions a 16-bit product on the CPU falls to a scalar loop hundreds of
    # times slower than float32; a small one tells, and spares the wait for a large one.
    small = flops(96)
    return small if small < 5e9 else flops(768)


def processor() -> str:
    """The name of the processor, as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
