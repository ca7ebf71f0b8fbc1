"""pytest-benchmark, bent to compare rivals: `pytest benchmarks`.

A benchmark is a workload and a backend, or on a GPU a rival; a group is a workload. Nothing is
timed before it has been checked, and naive and torch run once between any two rounds of what is
timed, so that ratios come from one run. `--benchmark-disable` checks and runs every benchmark once
without timing it.
"""

from __future__ import annotations

import functools

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tilewise.benchmarks.host import devices, host, versions
from tilewise.benchmarks.measure import Bench, Row, disagreement
from tilewise.benchmarks.report import Report, print_report
from tilewise.benchmarks.rivals import rivals_of
from tilewise.benchmarks.timing import MAX_ROUNDS, clock
from tilewise.benchmarks.tokens import TokenRate
from tilewise.benchmarks.workload import Workload
from tilewise.benchmarks.workloads import all_workloads
from tilewise.dispatch import OPS

_NOT_RUN = pytest.StashKey[list[Row]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_NOT_RUN] = []
    # The plugin's own table has neither rates nor ceilings nor errors; ours replaces it unless
    # the user asks for something that only that one shows.
    if not (config.option.benchmark_compare or config.option.benchmark_columns):
        config.option.benchmark_quiet = True


# --- what there is to run -------------------------------------------------------------------------


@functools.cache
def _workloads() -> dict[str, Workload]:
    return {workload.id: workload for device in devices() for workload in all_workloads(device)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every `bench_*` the workloads of its module's `OPERATIONS`, each on all that run it."""
    if "workload" not in metafunc.fixturenames:
        return
    params = []
    for id, workload in _workloads().items():
        if workload.op not in metafunc.module.OPERATIONS:
            continue
        marks = [pytest.mark.benchmark(group=id, timer=clock)]
        if workload.device != "cpu":
            marks.append(pytest.mark.gpu)
        backends = reversed(OPS[workload.op].backends_on(workload.device))
        for backend in (*backends, *rivals_of(workload.op, workload.device)):
            params.append(pytest.param(id, backend, marks=marks, id=f"{id}-{backend}"))
    metafunc.parametrize(("workload", "backend"), params)


@functools.lru_cache(maxsize=1)
def _bench(id: str) -> Bench:
    """One at a time: the inputs of some workloads are large."""
    return Bench(_workloads()[id])


# --- running it -----------------------------------------------------------------------------------


@pytest.fixture
def run(benchmark: BenchmarkFixture, pytestconfig: pytest.Config):
    """Check a backend on a workload, then time it beside its rivals."""

    def run(workload: str, backend: str) -> None:
        bench = _bench(workload)
        reason = bench.why_not(backend)
        if reason is None and backend in bench.rivals:  # whose mistakes are no failure of ours
            reason = disagreement(bench, backend)
        if reason is not None:
            if benchmark.enabled:
                pytestconfig.stash[_NOT_RUN].append(bench.row(backend, reason=reason))
            pytest.skip(reason)
        bench.check(backend)
        call = bench.call(backend)
        if benchmark.disabled:
            benchmark.pedantic(call)
            return
        baselines = {name: bench.call(name) for name in bench.baselines(backend)}
        times: dict[str, list[float]] = {name: [] for name in baselines}

        def run_baselines() -> None:
            for name, baseline in baselines.items():
                start = clock()
                baseline()
                times[name].append(clock() - start)

        start = clock()
        run_baselines()
        call()
        round_seconds = clock() - start
        for baseline_times in times.values():
            baseline_times.clear()  # that was the warm-up
        rounds = _rounds(pytestconfig, round_seconds)
        benchmark.pedantic(call, setup=run_baselines, rounds=rounds)
        times[backend] = benchmark.stats.stats.data
        device_times = bench.device_times((*baselines, backend))
        row = bench.row(backend, times=times, device_times=device_times)
        benchmark.extra_info.update(row.as_dict())
        benchmark.extra_info["versions"] = versions()

    return run


def _rounds(config: pytest.Config, round_seconds: float) -> int:
    wanted = int(float(config.option.benchmark_max_time) / round_seconds)
    return min(max(wanted, config.option.benchmark_min_rounds), MAX_ROUNDS)


# --- reporting ------------------------------------------------------------------------------------


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["tilewise"] = host(devices()[-1])


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list, output_json: dict
) -> None:
    output_json["not_run"] = [row.as_dict() for row in config.stash[_NOT_RUN]]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    results = [bench.extra_info for bench in config._benchmarksession.benchmarks]
    rows = [Row.from_dict(info) for info in results if "op" in info]
    model = [TokenRate.from_dict(info) for info in results if "test" in info]
    if rows or model:
        from tilewise.cli.console import make_console

        terminalreporter.section("benchmarks")
        rows += config.stash[_NOT_RUN]
        print_report(Report(host(devices()[-1]), rows, model), make_console())
