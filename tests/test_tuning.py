"""Tuned configurations: found by walking, kept in a file, and used by the launches that ask."""

import json
from typing import NamedTuple

import pytest
import torch

import tilewise
from tilewise import gpu, tuning
from tilewise.benchmarks import tune as tuner
from tilewise.benchmarks.calls import norm
from tilewise.benchmarks.measure import Bench
from tilewise.benchmarks.workload import Workload
from tilewise.cli import main
from tilewise.dispatch import OPS, Impl
from tilewise.fused import naive as definition

NORMS = [Workload("rms_norm", name, norm(rows, 64)) for name, rows in (("a", 4), ("b", 9))]


class Tile(NamedTuple):
    m: int
    num_warps: int
    num_stages: int


DEFAULT = Tile(32, 4, 2)
CPU = torch.zeros(1)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning._table.cache_clear()
    yield tmp_path / "tilewise" / "tuned"
    tuning._table.cache_clear()


@pytest.fixture
def tunable(monkeypatch):
    """rms_norm on a kernel whose time is made up: best with 128 rows, two warps and one stage."""
    launched = []

    def kernel(x, weight, eps=1e-6, *, residual=None):
        tile = tuning.chosen(x, "norm", DEFAULT, {"m": 32})
        launched.append(tile)
        if tile.num_warps == 8:
            raise RuntimeError("out of resources")
        wrong = 1.01 if tile.m == 256 else 1.0
        return definition.rms_norm(x, weight * wrong, eps, residual=residual)

    op = OPS["rms_norm"]
    others = (impl for impl in op.impls if impl.name in ("torch", "naive"))
    monkeypatch.setattr(op, "impls", (Impl("triton", kernel), *others))
    monkeypatch.setattr(op, "backends_on", lambda device: ("triton", "torch", "naive"))

    def seconds(bench, names):
        bench.call(*names)()
        m, warps, stages = launched[-1]
        return {"triton": 1 / m + warps + stages}

    monkeypatch.setattr(Bench, "device_times", seconds)
    return launched


def test_walks_to_the_fastest_that_runs_and_agrees(tunable):
    named = []
    (found,) = tuner.tune(NORMS, named.append)
    assert named == [found.name] == ["norm"]
    assert found.default == {"m": 32, "num_warps": 4, "num_stages": 2}
    assert found.best == {"m": 32, "num_warps": 1, "num_stages": 1}
    assert found.speedup == pytest.approx((1 / 32 + 6) / (1 / 32 + 2))
    # A gain of less than 2 % is none: m would only move the bits.
    assert {tile.m for tile in tunable} <= {32, 64}
    assert not any(tile.m < 32 for tile in tunable)


def test_what_is_wrong_or_fails_is_never_the_fastest(tunable, monkeypatch):
    def seconds(bench, names):
        bench.call(*names)()
        m, warps, _ = tunable[-1]
        return {"triton": 1000 / m / warps}

    monkeypatch.setattr(Bench, "device_times", seconds)
    (found,) = tuner.tune(NORMS)
    assert (found.best["m"], found.best["num_warps"]) == (128, 4)


def test_a_kernel_that_does_not_run_as_it_ships_is_not_tuned(tunable, monkeypatch):
    monkeypatch.setattr(Bench, "device_times", lambda bench, names: 1 // 0)
    assert list(tuner.tune(NORMS)) == []


def test_neighbours_differ_by_one_step():
    here = {"n": 16, "m": 256, "num_warps": 1, "num_stages": 1}
    assert tuner.neighbours(here, {"n": 16, "m": 16}) == [
        here | {"n": 32},
        here | {"m": 128},
        here | {"num_warps": 2},
        here | {"num_stages": 2},
    ]


# --- the file -------------------------------------------------------------------------------------


def test_what_was_kept_is_read_again(cache):
    path = tuning.save("A GPU/40GB", {"norm": {"m": 64}})
    assert path == cache / "A-GPU-40GB.json"
    tuning.save("A GPU/40GB", {"other": {"m": 16}})
    assert tuning.read("A GPU/40GB") == {"norm": {"m": 64}, "other": {"m": 16}}
    assert tuning.read("Another") == {}
    assert list(cache.iterdir()) == [path]


def test_other_versions_use_what_ships():
    path = tuning.save("GPU", {"norm": {"m": 64}})
    path.write_text(path.read_text().replace(tilewise.__version__, "0.0.1"))
    assert tuning.read("GPU") == {}


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"configurations": {}})])
def test_a_damaged_file_is_named(text):
    path = tuning.save("GPU", {})
    path.write_text(text)
    with pytest.raises(ValueError, match=r"GPU\.json: holds no configurations"):
        tuning.read("GPU")


class _OnGpu:
    """As much of a tensor on a GPU as a choice looks at."""

    device = torch.device("cuda", 0)


def test_a_launch_on_a_gpu_uses_its_file_and_reads_it_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")
    assert tuning.chosen(_OnGpu(), "norm", DEFAULT, {"m": 16}) == DEFAULT
    path = tuning.save("GPU", {"norm": {"m": 64, "num_stages": 3}})
    assert tuning.chosen(_OnGpu(), "norm", DEFAULT, {"m": 16}) == Tile(64, 4, 3)
    assert tuning.chosen(_OnGpu(), "other", DEFAULT, {"m": 16}) == DEFAULT
    assert tuning.chosen(CPU, "norm", DEFAULT, {"m": 16}) == DEFAULT
    path.unlink()
    assert tuning.chosen(_OnGpu(), "norm", DEFAULT, {"m": 16}) == Tile(64, 4, 3)


# --- the kernels ----------------------------------------------------------------------------------


def _attention(dtype=torch.bfloat16, **options):
    x = torch.zeros(1, 40, 2, 64, dtype=dtype)
    tilewise.flash_attention(x, x, x, **options, backend="triton")


def _product(rows, scheme="int8", dtype=torch.bfloat16):
    weight = tilewise.quantize(torch.ones(64, 256), scheme, search="minmax")
    x = torch.zeros(rows, 256, dtype=dtype)
    tilewise.quantized_matmul(x, weight, backend="triton")


def _decode():
    cache = torch.zeros(2, 16, 2, 64, dtype=torch.bfloat16)
    tilewise.paged_attention(
        torch.zeros(1, 4, 64, dtype=torch.bfloat16),
        cache,
        cache,
        torch.zeros(1, 2, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
        backend="triton",
    )


@pytest.mark.skipif(gpu.INTERPRETED or not gpu._has_triton(), reason="needs Triton's compiler")
@pytest.mark.parametrize(
    ("call", "size"),
    [
        (_attention, "BLOCK_N"),
        (lambda: _product(1, dtype=torch.float32), "BLOCK_N"),
        (lambda: _product(9), "BLOCK_N"),
        (lambda: _product(1, "int4"), "BLOCK_N"),
        (lambda: _product(9, "int4"), "BLOCK_N"),
        (_decode, "N"),
    ],
    ids=["attention", "vector", "matrix", "words", "packed", "paged"],
)
def test_the_kernels_launch_with_what_is_tried(call, size):
    with gpu.compiling_for("sm_90"), tuning.trying({}) as asked:
        call()
    ((name, (default, sizes)),) = asked.items()
    assert "n" in sizes
    tried = {"n": default.n // 2, "num_warps": 2, "num_stages": 1}
    with gpu.compiling_for("sm_90") as kernels, tuning.trying({name: tried}):
        call()
    constants = kernels[0].constants
    assert (constants[size], constants["num_warps"]) == (tried["n"], 2)


@pytest.mark.skipif(gpu.INTERPRETED or not gpu._has_triton(), reason="needs Triton's compiler")
def test_attention_beside_a_bias_is_not_what_was_tuned():
    with gpu.compiling_for("sm_90"), tuning.trying({}) as asked:
        _attention(bias=torch.zeros(1, 1, 40, 40, dtype=torch.bfloat16))
        _attention(softcap=3.0)
    assert asked == {}


def test_tuning_needs_a_gpu(capsys):
    assert main(["bench", "--tune", "--device", "cpu"]) == 2
    assert "--tune: needs a GPU" in capsys.readouterr().err


def test_the_command_prints_and_keeps_what_it_found(tunable, monkeypatch, capsys):
    from tilewise.benchmarks import workloads
    from tilewise.cli import bench

    monkeypatch.setattr(bench, "device_of", lambda options: "cuda")
    monkeypatch.setattr(gpu, "why_not", lambda x: None)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(workloads, "all_workloads", lambda device: NORMS)
    assert main(["bench", "--tune", "-q"]) == 0
    assert tuning.read("GPU") == {"norm": {"m": 32, "num_warps": 1, "num_stages": 1}}
    out = capsys.readouterr().out
    assert "m=32 num_warps=1 num_stages=1" in " ".join(out.split())
    assert "GPU.json" in out
