"""Timing an operation, and only ever a right one.

No time is taken before the very call that is timed has been held to the agreement rule: a wrong
kernel can be arbitrarily fast.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from tilewise import machine
from tilewise.benchmarks.rivals import Function, rivals_of
from tilewise.benchmarks.timing import captured, on_device, rounds_of, side_stream
from tilewise.benchmarks.workload import Workload
from tilewise.cases import Case, floor_of, leeway_of, public_function, run_function, upstream_of
from tilewise.dispatch import OPS, Cost
from tilewise.testing import Agreement, Inputs, assert_agrees, to_float64

_BASELINES = ("naive", "torch")
_WRONG = "does not agree: "

_RIVALS_ERROR = 0.02
"""A rival is judged as if the definition itself were off by this much. It keeps another rule than
ours, if any; a layout that was misunderstood is off by far more."""


# --- a result -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What one backend did with one workload.

    Args:
        op, workload, dtype, device, backend: what ran; `backend` may be a rival's name.
        flops, bytes: the work that the call cannot avoid (`tilewise.dispatch.Cost`).
        roofline_seconds: the least time for that work at the measured ceilings of the device.
        compute_bound: whether it is the compute ceiling that sets that time.
        seconds: median time of a call; None if it did not run, for the given `reason`.
        spread: half the distance between the quartiles, in seconds.
        device_seconds: median time of the GPU's work with a cold cache; None on the CPU.
        captured: whether that is of a CUDA graph, the GPU's work alone; a call that cannot be
            captured has the gaps between its launches in it.
        error: relative error of the worst row against float64.
        agreement: error over allowed error at the worst row; at most 1.
        over_naive, over_torch: their time over ours in the same run, where they ran; on a GPU
            that of its work.
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
    device_seconds: float | None = None
    captured: bool | None = None
    error: float | None = None
    agreement: float | None = None
    over_naive: float | None = None
    over_torch: float | None = None

    @property
    def busy_seconds(self) -> float | None:
        """What rates are taken from: the time of the GPU's work, or of the whole call."""
        return self.seconds if self.device_seconds is None else self.device_seconds

    @property
    def gbytes_per_second(self) -> float | None:
        """Unavoidable traffic over time, in GB/s."""
        return self.bytes / self.busy_seconds / 1e9 if self.busy_seconds else None

    @property
    def tflops(self) -> float | None:
        """Unavoidable work over time, in TFLOP/s."""
        return self.flops / self.busy_seconds / 1e12 if self.busy_seconds else None

    @property
    def disagrees(self) -> bool:
        """Whether there is no time because the result was wrong."""
        return self.reason is not None and self.reason.startswith(_WRONG)

    @property
    def percent_of_ceiling(self) -> float | None:
        """How much of the measured roofline is reached, in percent."""
        return 100 * self.roofline_seconds / self.busy_seconds if self.busy_seconds else None

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
    """A workload made real: its arguments, the truth, and a call for every contestant.

    The truth is computed once and shared by the backends and rivals that are compared.
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
        self.rivals = rivals_of(workload.op, workload.device)
        self._functions: dict[str, Function] = {}
        self._failures: dict[str, str | None] = {}
        self._captured: set[str] = set()
        self._checked: dict[str, Agreement] = {}
        self._reference: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None = None

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that the operation has, the definition first."""
        return tuple(reversed(self.op.backends_on(self.workload.device)))

    @property
    def contestants(self) -> tuple[str, ...]:
        """All that are compared: the backends, and then the rivals."""
        return (*self.backends, *self.rivals)

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

    def why_not(self, name: str) -> str | None:
        """Why a contestant is not measured on this workload; None where it is."""
        if name not in self.rivals:
            return self.op.reasons((), self.arguments)[name] or self.workload.without.get(name)
        rival = self.rivals[name]
        if self.workload.grad and not rival.is_differentiable:
            return "has no backward pass"
        return rival.why_not(self.arguments) or self._failure(name)

    def _failure(self, name: str) -> str | None:
        """How a rival fails if it does: its errors are not ours, and the others go on."""
        if name not in self._failures:
            try:
                self.call(name)()
                self._failures[name] = None
            except Exception as error:
                message = str(error).strip().partition("\n")[0]
                self._failures[name] = f"fails with {type(error).__name__}: {message}"
        return self._failures[name]

    def _function(self, name: str) -> Function:
        """What is called: the public function on a backend, or a rival's, prepared once."""
        if name not in self.rivals:
            return functools.partial(public_function(self.op), backend=name)
        if name not in self._functions:
            self._functions[name] = self.rivals[name].prepare(self.arguments)
        return self._functions[name]

    def call(self, name: str) -> Callable[[], object]:
        """The call that is timed: the public function, checks and dispatch included.

        With `Workload.grad` it is the backward pass, which starts from a forward pass made here.
        """
        function, arguments = self._function(name), self.arguments
        if self.workload.grad:
            leaves = [arguments[name].detach().requires_grad_() for name in self.workload.grad]
            named = dict(zip(self.workload.grad, leaves, strict=True))
            out = function(**arguments | named)
            upstream = Inputs(out.dtype, out.device, seed=1).randn(*out.shape)
            return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)

        def call() -> object:
            with torch.no_grad():
                return function(**arguments)

        return call

    def check(self, name: str) -> Agreement:
        """Hold a contestant to the agreement rule on the very call that is timed.

        Where the definition is too large to compute in float64, only the results that
        `Workload.part` picks are compared.

        Raises:
            AssertionError: where the rule is broken.
        """
        if name not in self._checked:
            self._checked[name] = self.agreement(name)
        return self._checked[name]

    def agreement(self, name: str) -> Agreement:
        """`check`, every time anew."""
        part = self.workload.part
        actual = self._results(self.arguments, self._function(name))
        if self._reference is None:
            self._reference = self._define({key: x.shape for key, x in actual.items()})
        if part is not None:
            actual = {key: part.pick(result) for key, result in actual.items()}
        naive, truth = self._reference
        if name in self.rivals:
            naive = {key: (x * (1 + _RIVALS_ERROR)).to(naive[key]) for key, x in truth.items()}
        agreements = [
            assert_agrees(
                actual[key],
                naive[key],
                truth[key],
                name=f"{name} {key}",
                floor=floor_of(self.case, key, truth[key]),
                leeway=leeway_of(name, self.device),
            )
            for key in truth
        ]
        return max(agreements, key=lambda agreement: agreement.ratio)

    def _define(
        self, shapes: Mapping[str, torch.Size]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The definition's results in the workload's dtype and in float64, or a part of them.

        Args:
            shapes: of the whole results, whose random gradients the part's are taken from.
        """
        naive, part, arguments = self._function("naive"), self.workload.part, self.arguments
        upstream = None
        if part is not None:
            arguments = part.reduce(arguments)
            outputs = {key: shape for key, shape in shapes.items() if not key.startswith("grad ")}
            if self.workload.grad:
                upstream = {key: part.pick(grad) for key, grad in upstream_of(outputs).items()}
        return (
            self._results(arguments, naive, upstream),
            self._results(to_float64(arguments), naive, upstream),
        )

    def _results(
        self,
        arguments: dict[str, Any],
        function: Function,
        upstream: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        grad = bool(self.workload.grad)
        return run_function(self.case, arguments, function, grad=grad, upstream=upstream)

    def baselines(self, name: str) -> list[str]:
        """The backends that a contestant is compared with in every run, itself left out."""
        return [
            baseline
            for baseline in _BASELINES
            if baseline != name and baseline in self.backends and self.why_not(baseline) is None
        ]

    def device_times(self, names: Iterable[str]) -> dict[str, float]:
        """Seconds of the GPU's work for each of the names, timed in turn; none on the CPU."""
        if self.device.type != "cuda":
            return {}
        with side_stream():
            calls = {name: self.call(name) for name in names}
            replays = captured(calls)
            self._captured = set(replays)
            return on_device(calls | replays)

    def row(
        self,
        name: str,
        *,
        times: Mapping[str, list[float]] | None = None,
        device_times: Mapping[str, float] | None = None,
        reason: str | None = None,
    ) -> Row:
        """The result of a contestant, from times taken in turn or with why there are none.

        Raises:
            AssertionError: for times of one that does not agree.
        """
        ceilings = machine.ceilings(self.device)
        roofline = ceilings.seconds(self.cost)
        compute = self.cost.flops / ceilings.flops_of(self.cost.dtype)
        measured: dict[str, Any] = {}
        if times is not None:
            agreement = self.check(name)
            medians = {other: statistics.median(taken) for other, taken in times.items()}
            compared = device_times or medians
            measured = {
                "seconds": medians[name],
                "spread": _half_quartile_range(times[name]),
                "device_seconds": device_times[name] if device_times else None,
                "captured": name in self._captured if device_times else None,
                "error": agreement.relative_error,
                "agreement": agreement.ratio,
            }
            for baseline in _BASELINES:
                if baseline in compared:
                    measured[f"over_{baseline}"] = compared[baseline] / compared[name]
        return Row(
            op=self.op.name,
            workload=self.workload.name,
            dtype=str(self.workload.dtype).removeprefix("torch."),
            device=str(self.device),
            backend=name,
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
    """Check the contestants of a workload, then time those that agree, in turn.

    Args:
        workload: what to run.
        backends: some of the contestants; all by default. `naive` and `torch` are timed in any
            case, since the others are compared with them.
        seconds: how long to time all of them together.

    Returns:
        One row per contestant, the definition first; one that cannot run or does not agree has a
        row with the reason and no time.
    """
    bench = Bench(workload)
    wanted = [name for name in bench.contestants if backends is None or name in backends]
    refused: dict[str, str] = {}
    for name in dict.fromkeys((*wanted, *_BASELINES)):
        reason = bench.why_not(name) or disagreement(bench, name)
        if reason is not None:
            refused[name] = reason
    names = [name for name in dict.fromkeys((*_BASELINES, *wanted)) if name not in refused]
    times: dict[str, list[float]] = {}
    device_times: dict[str, float] = {}
    if set(wanted) & set(names):
        times = rounds_of({name: bench.call(name) for name in names}, seconds=seconds)
        device_times = bench.device_times(names)
    return [
        bench.row(name, reason=refused[name])
        if name in refused
        else bench.row(name, times=times, device_times=device_times)
        for name in wanted
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


def disagreement(bench: Bench, name: str) -> str | None:
    """How a contestant breaks the agreement rule; None if it does not."""
    try:
        bench.check(name)
    except AssertionError as error:
        return f"{_WRONG}{error}"
    return None
