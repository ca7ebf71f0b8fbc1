"""Measuring: nothing wrong is timed, rivals take turns, and the clock waits for the GPU."""

import time

import pytest
import torch

from tilewise.benchmarks import measure as measuring
from tilewise.benchmarks import timing
from tilewise.benchmarks.calls import first_head, last_queries, norm, prefill
from tilewise.benchmarks.measure import Bench, Row, compare, measure
from tilewise.benchmarks.models import GPT2
from tilewise.benchmarks.rivals import Rival
from tilewise.benchmarks.timing import clock, rounds_of
from tilewise.benchmarks.workload import Workload
from tilewise.dispatch import OPS, Impl
from tilewise.fused import naive as definition
from tilewise.testing import assert_agrees

NORM = Workload("rms_norm", "small", norm(4, 64))


def slightly_wrong(x, weight, eps=1e-6, *, residual=None):
    return definition.rms_norm(x, weight, eps, residual=residual) * 1.001


def right(x, weight, eps=1e-6, *, residual=None):
    return definition.rms_norm(x, weight, eps, residual=residual)


def objects(*args, **kwargs):
    return "not today"


@pytest.fixture
def add_backend(monkeypatch):
    """Give rms_norm one more backend for a test."""

    def add(fn, **options):
        op = OPS["rms_norm"]
        others = (impl for impl in op.impls if impl.name in ("torch", "naive"))
        monkeypatch.setattr(op, "impls", (Impl("cpu", fn, **options), *others))

    return add


def test_a_wrong_kernel_gets_no_time(add_backend):
    add_backend(slightly_wrong)
    row = measure(NORM, "cpu", seconds=0)
    assert row.seconds is None
    assert row.over_naive is None
    assert row.disagrees
    assert "does not agree: cpu output: row" in row.reason


def test_a_wrong_kernel_is_not_even_called_by_the_timer(add_backend, monkeypatch):
    add_backend(slightly_wrong)
    timed = []
    monkeypatch.setattr(
        measuring, "rounds_of", lambda calls, **_: timed.extend(calls) or {c: [1.0] for c in calls}
    )
    compare(NORM)
    assert timed == ["naive", "torch"]


def test_times_of_a_wrong_kernel_make_no_row(add_backend):
    add_backend(slightly_wrong)
    with pytest.raises(AssertionError, match="cpu output: row"):
        Bench(NORM).row("cpu", times={"cpu": [1.0]})


def test_a_backend_that_objects_has_the_reason_and_no_time(add_backend):
    add_backend(right, why_not=objects)
    row = measure(NORM, "cpu", seconds=0)
    assert (row.seconds, row.reason, row.disagrees) == (None, "not today", False)


def test_a_backend_left_out_of_a_workload_has_the_reason():
    workload = Workload("rms_norm", "small", norm(4, 64), without={"naive": "too large"})
    naive, torch_row = compare(workload, ["naive", "torch"], seconds=0)
    assert (naive.seconds, naive.reason) == (None, "too large")
    assert torch_row.over_naive is None
    assert torch_row.over_torch == 1


def test_a_right_kernel_is_compared_with_naive_and_torch_of_the_same_run(add_backend, monkeypatch):
    add_backend(right)
    times = {"naive": [6.0, 9.0, 6.0], "torch": [4.0, 4.0, 4.0], "cpu": [2.0, 2.0, 7.0]}
    monkeypatch.setattr(measuring, "rounds_of", lambda calls, **_: {c: times[c] for c in calls})
    row = measure(NORM, "cpu")
    assert (row.seconds, row.over_naive, row.over_torch) == (2.0, 3.0, 2.0)
    assert 0 < row.error < 1e-6
    assert 0 < row.agreement <= 1


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend: rms_norm has no 'cuda' implementation"):
        measure(NORM, "cuda")


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = rounds_of(calls, seconds=0, min_rounds=3)
    assert "".join(order) == "abc" * 4  # a warm-up and three rounds
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_rounds_go_on_until_the_time_is_up(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(timing, "clock", lambda: next(now))
    times = rounds_of({"a": lambda: None}, seconds=30, min_rounds=2)
    assert 2 < len(times["a"]) < 20
    assert set(times["a"]) == {1}


def test_the_clock_is_read_after_the_gpu_has_finished(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))
    monkeypatch.setattr(time, "perf_counter", lambda: events.append("read") or 1.5)
    assert clock() == 1.5
    assert events == ["synchronize", "read"]


def test_the_clock_does_not_wake_a_gpu_that_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("synchronized"))
    assert clock() > 0


@pytest.fixture
def add_rival(monkeypatch):
    """Give rms_norm one rival for a test, as if the CPU were a GPU whose clock is made up."""

    def add(prepare, *, why_not=lambda arguments: None, seconds=None, **options):
        seconds = seconds or {}
        rival = Rival("rival", why_not, prepare, **options)
        monkeypatch.setattr(measuring, "rivals_of", lambda op, device: {"rival": rival})
        monkeypatch.setattr(
            Bench,
            "device_times",
            lambda self, names: timing.on_device(
                {name: (lambda name=name: name) for name in names}
            ),
        )
        monkeypatch.setattr(timing, "device_seconds", lambda call: seconds.get(call(), 9.0))

    return add


def halves(arguments):
    """What a rival may do: round more than we do."""
    return lambda x, weight: definition.rms_norm(x.bfloat16(), weight.bfloat16()).float()


def test_a_rival_is_timed_on_the_device_beside_the_backends(add_rival):
    add_rival(halves, seconds={"naive": 3.0, "torch": 1.0, "rival": 2.0})
    rows = {row.backend: row for row in compare(NORM, seconds=0)}
    rival = rows["rival"]
    assert list(rows) == [*Bench(NORM).backends, "rival"]
    assert (rival.device_seconds, rival.busy_seconds) == (2.0, 2.0)
    assert (rival.over_naive, rival.over_torch) == (1.5, 0.5)
    assert 0 < rival.seconds < 1
    assert rival.percent_of_ceiling == pytest.approx(50 * rival.roofline_seconds)
    assert 1e-3 < rival.error < 1e-2


@pytest.mark.parametrize(
    ("prepare", "options", "reason"),
    [
        (halves, {"why_not": lambda arguments: "is not installed"}, "is not installed"),
        (lambda arguments: 1 // 0, {}, "fails with ZeroDivisionError: "),
        (lambda arguments: lambda x, weight: x @ x, {}, "fails with RuntimeError: "),
        (lambda arguments: lambda x, weight: x, {}, "does not agree: rival output: row"),
    ],
)
def test_a_rival_that_cannot_has_its_reason_and_no_time(add_rival, prepare, options, reason):
    add_rival(prepare, **options)
    (row,) = compare(NORM, ["rival"], seconds=0)
    assert row.seconds is None
    assert row.reason.startswith(reason)


def test_a_rival_without_a_backward_pass_is_not_asked_for_one(add_rival):
    add_rival(halves, is_differentiable=False)
    workload = Workload("rms_norm", "small", norm(4, 64), grad=("x",))
    assert measure(workload, "rival", seconds=0).reason == "has no backward pass"


def test_a_gpu_is_timed_in_turns(monkeypatch):
    order = []
    monkeypatch.setattr(timing, "device_seconds", lambda call: call() or float(len(order)))
    times = timing.on_device({name: lambda name=name: order.append(name) for name in "ab"})
    assert "".join(order) == "ababab"
    assert times == {"a": 3.0, "b": 4.0}


@pytest.mark.gpu
def test_a_call_that_waits_for_the_gpu_is_timed_as_it_is():
    x = torch.ones(1000, device="cuda")
    calls = {"waits": lambda: x.sum().item(), "does not": lambda: x * 2}
    with timing.side_stream():
        replays = timing.captured(calls)
        times = timing.on_device(calls | replays)
    assert list(replays) == ["does not"]
    assert all(0 < seconds < 1 for seconds in times.values())
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.randn(9, device="cuda").isfinite().all()  # which a broken capture would spoil


@pytest.mark.gpu
@pytest.mark.parametrize("grad", [(), ("x",)], ids=["forward", "backward"])
def test_calls_are_captured_on_a_gpu(grad):
    workload = Workload("rms_norm", "small", norm(4, 64), torch.float32, "cuda", grad=grad)
    rows = compare(workload, ["naive", "triton"], seconds=0)
    assert [row.captured for row in rows] == [True, True]


def test_nothing_is_timed_on_a_device_that_is_not_there():
    assert Bench(NORM).device_times(["naive"]) == {}


def test_figures_are_work_over_time():
    row = Row(
        op="rms_norm",
        workload="w",
        dtype="float32",
        device="cpu",
        backend="torch",
        flops=3e9,
        bytes=2e9,
        roofline_seconds=0.25,
        compute_bound=False,
        seconds=0.5,
    )
    assert (row.gbytes_per_second, row.tflops, row.percent_of_ceiling) == (4.0, 0.006, 50.0)
    assert Row.from_dict(row.as_dict()) == row


def test_part_of_a_backward_pass_starts_from_the_same_gradient():
    small = GPT2.replace(heads=2, kv_heads=2)
    make = prefill(small, 17, batch=2)
    whole, part = (
        Workload("flash_attention", "small", make, part=part, grad=("q", "k", "v"))
        for part in (None, first_head())
    )
    whole, part = Bench(whole), Bench(part)
    assert part.check("torch").error > 0
    part.check("naive")
    whole.check("naive")
    for name, expected in part._reference[1].items():
        assert torch.allclose(expected, part.workload.part.pick(whole._reference[1][name])), name


def test_part_of_an_attention_call_is_what_it_stands_for():
    small = GPT2.replace(heads=2, kv_heads=2)
    part = last_queries(3)
    bench = Bench(Workload("flash_attention", "small", prefill(small, 17), part=part))
    whole = bench.call("naive")()
    reduced = OPS["flash_attention"](**part.reduce(bench.arguments), backend="naive")
    truth = OPS["flash_attention"](
        **{
            name: value.double() if isinstance(value, torch.Tensor) else value
            for name, value in part.reduce(bench.arguments).items()
        },
        backend="naive",
    )
    assert reduced.shape == (1, 3, 2, 64)
    assert_agrees(part.pick(whole), reduced, truth)
