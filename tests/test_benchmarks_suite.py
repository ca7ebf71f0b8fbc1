"""`pytest benchmarks`: groups of rivals, checked, with everything in the JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tilewise import native
from tilewise.benchmarks import report as reports
from tilewise.benchmarks import report_markdown

ROOT = Path(__file__).parents[1]
BACKENDS = ("naive", "torch", *(["cpu"] if native.why_not_cpu() is None else []))
"""What can be timed here, the definition first."""


def run_benchmarks(path, *options, **environment):
    """Time a few benchmarks briefly; the JSON goes to `path`."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider"]
    command += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=3"]
    # As a worker of pytest-xdist the plugin would not time anything.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [*command, f"--benchmark-json={path}", *options],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What is printed, and the JSON."""
    path = tmp_path_factory.mktemp("benchmarks") / "r.json"
    done = run_benchmarks(path, "-k", "float32 and (rms_norm and SmolLM2 or sample and top-p)")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, path


WRONG_BACKEND = """
from tilewise.dispatch import OPS, Impl
from tilewise.fused import naive

def wrong(x, weight, eps=1e-6, *, residual=None):
    return naive.rms_norm(x, weight * 1.001, eps, residual=residual)

OPS["rms_norm"].impls = tuple(
    Impl("torch", wrong) if impl.name == "torch" else impl for impl in OPS["rms_norm"].impls
)
"""


def test_a_wrong_kernel_fails_and_leaves_no_time(tmp_path):
    (tmp_path / "wrong_backend.py").write_text(WRONG_BACKEND)
    path = tmp_path / "r.json"
    options = ("-p", "wrong_backend", "-k", "float32 and rms_norm and SmolLM2")
    done = run_benchmarks(path, *options, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "AssertionError: torch output: row" in done.stdout
    timed = [
        benchmark["extra_info"]["backend"]
        for benchmark in json.loads(path.read_text())["benchmarks"]
    ]
    assert timed == [name for name in BACKENDS if name != "torch"]


def test_rivals_are_in_one_group(run):
    data = json.loads(run[1].read_text())
    groups = {}
    for benchmark in data["benchmarks"]:
        groups.setdefault(benchmark["group"], []).append(benchmark["extra_info"]["backend"])
    assert groups["rms_norm SmolLM2 decode float32 cpu"] == list(BACKENDS)


def test_every_benchmark_says_all_about_itself(run):
    data = json.loads(run[1].read_text())
    for benchmark in data["benchmarks"]:
        info = benchmark["extra_info"]
        assert info["seconds"] == benchmark["stats"]["median"]
        assert info["percent_of_ceiling"] > 0
        assert info["gbytes_per_second"] > 0
        assert info["tflops"] is not None
        assert 0 <= info["agreement"] <= 1
        assert info["error"] is not None
        assert info["over_naive"] > 0
        assert {"tilewise", "torch", "python"} <= info["versions"].keys()
        assert "clock" in benchmark["options"]["timer"]


def test_a_backend_that_cannot_run_is_in_the_json_with_its_reason(run):
    data = json.loads(run[1].read_text())
    (row,) = data["not_run"]
    assert (row["op"], row["backend"], row["seconds"]) == ("sample", "torch", None)
    assert "only temperature=0" in row["reason"]


def test_the_terminal_shows_our_table(run):
    assert "ceiling" in run[0]
    assert "sample, torch has no time for" in run[0]


def test_the_json_is_a_report(run):
    report = reports.read(run[1])
    assert {row.backend for row in report.rows} == set(BACKENDS)
    assert "rms_norm" in report_markdown.markdown(report)
