"""Timing an operation, and only ever a right one.

No time is taken before the very call that is timed has been held to the agreement rule: a wrong
kernel can be arbitrarily fast. Rivals are timed in turn, round by round, so that a machine that
slows down or wakes up half-way treats all of them alike; ratios are ratios of medians from one run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from tilewise import machine
from tilewise.benchmarks.workload import Workload
from tilewise.dispatch import OPS, Cost
from tilewise.testing import (
    Agreement,
    Case,
    Inputs,
    assert_agrees,
    floor_of,
    public_function,
    run_case,
    to_float64,
)

MIN_ROUNDS = 3
MAX_ROUNDS = 500
_WRONG = "does not agree: "


def clock() -> float:
    """Seconds now, read when every GPU that this process uses has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def rounds_of(
    calls: Mapping[str, Callable[[], object]], *, seconds: float, min_rounds: int = MIN_ROUNDS
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


# --- a result -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What one backend did with one workload.

    Args:
        op, workload, dtype, device, backend: what ran.
        flops, bytes: the work that the call cannot avoid (`tilewise.dispatch.Cost`).
        roofline_seconds: the least time for that work at the measured ceilings of the device.
        compute_bound: whether it is the compute ceiling that sets that time.
        seconds: median time of a call; None if it did not run, for the given `reason`.
        spread: half the distance between the quartiles, in seconds.
        error: relative error of the worst row against float64.
        agreement: error over allowed error at the worst row; at most 1.
        over_naive, over_torch: their time over ours in the same run, where they ran.
    """

    op: str
    workload: str
    dtype: str
    device: str
    backend: str
    flops: float
    bytes: float
    roofline_seconds: float
    compute_bound: bool
    reason: str | None = None
    seconds: float | None = None
    spread: float | None = None
    error: float | None = None
    agreement: float | None = None
    over_naive: float | None = None
    over_torch: float | None = None

    @property
    def gbytes_per_second(self) -> float | None:
        """Unavoidable traffic over time, in GB/s."""
        return self.bytes / self.seconds / 1e9 if self.seconds else None

    @property
    def tflops(self) -> float | None:
        """Unavoidable work over time, in TFLOP/s."""
        return self.flops / self.seconds / 1e12 if self.seconds else None

    @property
    def disagrees(self) -> bool:
        """Whether there is no time because the result was wrong."""
        return self.reason is not None and self.reason.startswith(_WRONG)

    @property
    def percent_of_ceiling(self) -> float | None:
        """How much of the measured roofline is reached, in percent."""
        return 100 * self.roofline_seconds / self.seconds if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """Everything, derived figures included, ready for JSON."""
        return asdict(self) | {
            "gbytes_per_second": self.gbytes_per_second,
            "tflops": self.tflops,
            "percent_of_ceiling": self.percent_of_ceiling,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Row:
        """The inverse of `as_dict`."""
        return Row(**{field.name: data[field.name] for field in fields(Row)})


# --- a workload on a device -----------------------------------------------------------------------


class Bench:
    """A workload made real: its arguments, the truth, and a call for every backend.

    The truth is computed once and shared by the backends that are compared.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.op = OPS[workload.op]
        self.device = torch.device(workload.device)
        self.arguments = workload.make(Inputs(workload.dtype, self.device))
        self.case = Case(
            workload.op, workload.name, workload.make, grad=workload.grad, floors=workload.floors
        )
        if workload.results is not None:
            self.case = replace(self.case, results=workload.results)
        self._checked: dict[str, Agreement] = {}

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that the operation has, the definition first."""
        return tuple(reversed(self.op.backends_on(self.workload.device)))

    @cached_property
    def cost(self) -> Cost:
        """The work that the call cannot avoid.

        Of attention's backward pass: five products where the forward pass has two, and everything
        that it moves with its gradient.
        """
        cost = self.op.cost(**self.arguments)
        if self.workload.grad:
            cost = replace(cost, flops=2.5 * cost.flops, bytes=2 * cost.bytes)
        return cost

    def why_not(self, backend: str) -> str | None:
        """Why `backend` is not measured on this workload; None where it is."""
        return self.op.reasons((), self.arguments)[backend] or self.workload.without.get(backend)

    def call(self, backend: str) -> Callable[[], object]:
        """The call that is timed: the public function, checks and dispatch included.

        With `Workload.grad` it is the backward pass, which starts from a forward pass made here.
        """
        function = public_function(self.op)
        arguments = self.arguments
        if self.workload.grad:
            leaves = [arguments[name].detach().requires_grad_() for name in self.workload.grad]
            named = dict(zip(self.workload.grad, leaves, strict=True))
            out = function(**arguments | named, backend=backend)
            upstream = torch.randn_like(out)
            return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)

        def call() -> object:
            with torch.no_grad():
                return function(**arguments, backend=backend)

        return call

    def check(self, backend: str) -> Agreement:
        """Hold `backend` to the agreement rule on the very call that is timed.

        Where the definition is too large to compute in float64, only the results that
        `Workload.part` picks are compared.

        Raises:
            AssertionError: where the rule is broken.
        """
        if backend not in self._checked:
            part = self.workload.part
            actual = self._results(self.arguments, backend)
            if part is not None:
                actual = {name: part.pick(result) for name, result in actual.items()}
            naive, truth = self._reference
            agreements = [
                assert_agrees(
                    actual[name],
                    naive[name],
                    truth[name],
                    name=f"{backend} {name}",
                    floor=floor_of(self.case, name, truth[name]),
                )
                for name in truth
            ]
            self._checked[backend] = max(agreements, key=lambda agreement: agreement.ratio)
        return self._checked[backend]

    @cached_property
    def _reference(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        part = self.workload.part
        arguments = part.reduce(self.arguments) if part else self.arguments
        return self._results(arguments, "naive"), self._results(to_float64(arguments), "naive")

    def _results(self, arguments: dict[str, Any], backend: str) -> dict[str, torch.Tensor]:
        return run_case(self.case, arguments, backend, grad=bool(self.workload.grad))

    def rivals(self, backend: str) -> list[str]:
        """The backends that `backend` is compared with, itself left out."""
        return [
            rival
            for rival in ("naive", "torch")
            if rival != backend and rival in self.backends and self.why_not(rival) is None
        ]

    def row(
        self,
        backend: str,
        *,
        times: Mapping[str, list[float]] | None = None,
        reason: str | None = None,
    ) -> Row:
        """The result of `backend`, from times that were taken in turn or with why there are none.

        Raises:
            AssertionError: for times of a backend that does not agree.
        """
        ceilings = machine.ceilings(self.device)
        roofline = ceilings.seconds(self.cost)
        compute = self.cost.flops / ceilings.flops_of(self.cost.dtype)
        measured: dict[str, Any] = {}
        if times is not None:
            agreement = self.check(backend)
            mine = times[backend]
            seconds = statistics.median(mine)
            measured = {
                "seconds": seconds,
                "spread": _half_quartile_range(mine),
                "error": agreement.relative_error,
                "agreement": agreement.ratio,
            }
            for rival in ("naive", "torch"):
                if rival in times:
                    measured[f"over_{rival}"] = statistics.median(times[rival]) / seconds
        return Row(
            op=self.op.name,
            workload=self.workload.name,
            dtype=str(self.workload.dtype).removeprefix("torch."),
            device=str(self.device),
            backend=backend,
            flops=self.cost.flops,
            bytes=self.cost.bytes,
            roofline_seconds=roofline,
            compute_bound=compute >= roofline,
            reason=reason,
            **measured,
        )


def _half_quartile_range(times: list[float]) -> float:
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / 2


# --- measuring ------------------------------------------------------------------------------------


def compare(
    workload: Workload, backends: Iterable[str] | None = None, *, seconds: float = 1.0
) -> list[Row]:
    """Check the backends of a workload, then time those that agree, in turn.

    Args:
        workload: what to run.
        backends: some of the operation's backends; all by default. `naive` and `torch` are timed
            in any case, since the others are compared with them.
        seconds: how long to time all of them together.

    Returns:
        One row per backend, the definition first; a backend that cannot run or does not agree has
        a row with the reason and no time.
    """
    bench = Bench(workload)
    wanted = [name for name in bench.backends if backends is None or name in backends]
    refused: dict[str, str] = {}
    for backend in dict.fromkeys((*wanted, "naive", "torch")):
        reason = bench.why_not(backend) or _disagreement(bench, backend)
        if reason is not None:
            refused[backend] = reason
    calls = {
        backend: bench.call(backend)
        for backend in dict.fromkeys(("naive", "torch", *wanted))
        if backend not in refused
    }
    times = rounds_of(calls, seconds=seconds) if set(wanted) & calls.keys() else {}
    return [
        bench.row(backend, reason=refused[backend])
        if backend in refused
        else bench.row(backend, times=times)
        for backend in wanted
    ]


def measure(workload: Workload, backend: str, *, seconds: float = 1.0) -> Row:
    """Check and time one backend of a workload beside naive and torch.

    Raises:
        ValueError: if the operation has no such backend.
    """
    rows = compare(workload, [backend], seconds=seconds)
    if not rows:
        raise ValueError(f"backend: {workload.op} has no {backend!r} implementation")
    return rows[0]


def _disagreement(bench: Bench, backend: str) -> str | None:
    try:
        bench.check(backend)
    except AssertionError as error:
        return f"{_WRONG}{error}"
    return None
