"""One matrix product with a quantized weight: ours beside PyTorch's kernels.

PyTorch has `_weight_int4pack_mm_for_cpu`, `_weight_int8pack_mm`, `_scaled_mm` of fp8 by fp8, and a
product with the weight as it was before it was quantized, in bfloat16 or float32. Which of these
two is faster depends on the processor; the faster one is what every time is compared with.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from tilewise.benchmarks.calls import first_rows, quantized
from tilewise.benchmarks.measure import Bench
from tilewise.benchmarks.timing import clock, rounds_of
from tilewise.benchmarks.workload import Workload
from tilewise.quant import baseline
from tilewise.quant.cases import gguf_weight
from tilewise.testing import Inputs, Make

ROWS = (1, 16, 64, 512)
SHAPES = ((4096, 4096), (1536, 576), (576, 1536))
"""(outputs, width): Llama-3-8B's attention, and SmolLM2's feed-forward network."""

_CHECKED_ROWS = 16
_SLOW_SECONDS = 2.0
"""What takes longer is timed once: some processors have no instructions for some dtypes."""


@dataclass(frozen=True)
class Product:
    """How fast one way of multiplying was.

    Args:
        rows, outputs, width: x is (rows, width), the weight (outputs, width).
        way: who multiplies, and by what.
        dtype: of x.
        reason: why it was not timed.
        backend: where it is ours, the backend that `auto` took.
        seconds: median time of a call.
        bytes: of x, the weight and the result: each moved once.
    """

    rows: int
    outputs: int
    width: int
    way: str
    dtype: str
    reason: str | None = None
    backend: str | None = None
    seconds: float | None = None
    bytes: float = 0.0

    @property
    def gbytes_per_second(self) -> float | None:
        """Traffic that the call cannot avoid, over its time, in GB/s."""
        return self.bytes / self.seconds / 1e9 if self.seconds else None

    @property
    def tflops(self) -> float | None:
        """A multiply-add counted as two."""
        work = 2 * self.rows * self.outputs * self.width
        return work / self.seconds / 1e12 if self.seconds else None

    @property
    def is_dense(self) -> bool:
        """Whether the weight was not quantized."""
        return self.way == DENSE

    def as_dict(self) -> dict[str, Any]:
        """Everything, derived figures included, ready for JSON."""
        return asdict(self) | {
            "gbytes_per_second": self.gbytes_per_second,
            "tflops": self.tflops,
        }


# --- the ways to multiply -------------------------------------------------------------------------

DENSE = "torch linear"

_TORCH = {
    "int4 g64": "torch int4pack g64",
    "int8": "torch int8pack",
    "fp8, act fp8": "torch scaled_mm fp8",
}


def _makes(rows: int, outputs: int, width: int) -> dict[str, Make]:
    """The calls of `quantized_matmul`, by what they multiply with."""

    def q4_1(inputs: Inputs) -> dict[str, Any]:
        weight = gguf_weight(inputs, "Q4_1", outputs, width)
        return {"x": inputs.randn(rows, width), "weight": weight}

    makes = {
        "int4 g64": quantized(rows, width, outputs, "int4"),
        "int8": quantized(rows, width, outputs, "int8", group_size=-1, symmetric=True),
        "Q4_1": q4_1,
        "fp8": quantized(rows, width, outputs, "fp8"),
        "fp8, act fp8": quantized(rows, width, outputs, "fp8", act="fp8"),
    }
    rounded = {
        f"{title}, act int8": lambda inputs, make=makes[title]: make(inputs) | {"act": "int8"}
        for title in ("int4 g64", "Q4_1")
    }
    return makes | rounded


def _torch_call(bench: Bench) -> Callable[[], object]:
    """PyTorch's kernel alone, without our checks and dispatch around it."""
    x, weight = bench.arguments["x"], bench.arguments["weight"]
    if weight.format == "fp8":
        return lambda: baseline.scaled_product(x, weight)
    if weight.format == "int8":
        codes, scales = baseline._aligned(weight.data), weight.scales.flatten().bfloat16()
        return lambda: torch._weight_int8pack_mm(x, codes, scales)
    packed, scales = baseline._int4_packed(weight)
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, weight.group_size, scales)


def _ways(
    rows: int, outputs: int, width: int, dtype: torch.dtype
) -> Iterator[tuple[Product, Callable[[], object] | None]]:
    """Every way with its call, checked; without a call where it cannot run or is wrong."""
    name = str(dtype).removeprefix("torch.")

    def product(way: str, **more: Any) -> Product:
        return Product(rows, outputs, width, way, name, **more)

    inputs = Inputs(dtype)
    x, dense = inputs.randn(rows, width), inputs.randn(outputs, width, scale=width**-0.5)
    moved = (rows * (width + outputs) + outputs * width) * dtype.itemsize
    yield product(DENSE, bytes=moved), lambda: F.linear(x, dense)

    part = first_rows(_CHECKED_ROWS)
    for title, make in _makes(rows, outputs, width).items():
        bench = Bench(Workload("quantized_matmul", title, make, dtype, part=part))
        wanted = {f"tilewise {title}": "auto"}
        if title in _TORCH and dtype == torch.bfloat16:
            wanted[_TORCH[title]] = "torch"
        for way, backend in wanted.items():
            more: dict[str, Any] = {"bytes": bench.cost.bytes}
            call = bench.call("auto") if backend == "auto" else None
            try:
                if backend == "auto":
                    more["backend"] = bench.op.select("auto", (), bench.arguments).name
                bench.check(backend)
            except (AssertionError, RuntimeError) as error:
                yield product(way, reason=str(error).split("\n")[0], **more), None
            else:
                yield product(way, **more), call or _torch_call(bench)


def measure(rows: int, outputs: int, width: int, *, seconds: float = 1.0) -> list[Product]:
    """Time all ways to make one product, in turn, those that agree with the definition.

    Args:
        rows, outputs, width: the shape.
        seconds: how long to time all of them together.
    """
    ways = [
        way
        for dtype in (torch.bfloat16, torch.float32)
        for way in _ways(rows, outputs, width, dtype)
    ]
    calls = {(product.way, product.dtype): call for product, call in ways if call is not None}
    times = {}
    with torch.no_grad():
        for key, call in list(calls.items()):
            started = clock()
            call()
            if (once := clock() - started) > _SLOW_SECONDS:
                times[key] = [once]
                del calls[key]
        times |= rounds_of(calls, seconds=seconds)
    return [
        replace(product, seconds=statistics.median(times[key]))
        if (key := (product.way, product.dtype)) in times
        else product
        for product, _ in ways
    ]
