"""What the Triton backends share: refusals, launches, and compiling without a GPU."""

import importlib.util
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses import FakeTensorMode

import tilewise
from tilewise import gpu

has_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
compiles = pytest.mark.skipif(
    gpu.INTERPRETED, reason="Triton's interpreter, once chosen, compiles nothing"
)


# --- whether they can run -------------------------------------------------------------------------


@pytest.fixture
def interpreted(monkeypatch):
    """As if TRITON_INTERPRET=1 had been set."""
    monkeypatch.setattr(gpu, "INTERPRETED", True)


def test_refuses_the_cpu(monkeypatch):
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    assert gpu.why_not(torch.zeros(1)) == "needs tensors on a GPU, got cpu"
    assert gpu.why_not_auto(torch.zeros(1)) is None


@has_triton
def test_the_interpreter_takes_the_cpu_but_is_nobodys_choice(interpreted):
    assert gpu.why_not(torch.zeros(1)) is None
    assert gpu.why_not_auto(torch.zeros(1)) == "Triton's interpreter is for tests alone"


@has_triton
def test_the_interpreter_refuses_products_of_bfloat16(interpreted):
    x = torch.zeros(1, dtype=torch.bfloat16)
    assert gpu.why_not(x) == "Triton's interpreter multiplies bfloat16 matrices wrongly"
    assert gpu.why_not(x, dot=False) is None
    assert gpu.why_not(torch.zeros(1), torch.bfloat16) == gpu.why_not(x)


def test_refuses_float64(interpreted):
    assert gpu.why_not(torch.zeros(1).double()) == "computes in float32, got torch.float64"
    assert gpu.why_not(torch.zeros(1), torch.int8) == "computes in float32, got torch.int8"


def test_refuses_other_devices(interpreted):
    assert gpu.why_not(torch.zeros(1, device="meta")) == "needs tensors on a GPU, got meta"


def test_says_that_triton_is_missing(interpreted, monkeypatch):
    monkeypatch.setattr(gpu, "_has_triton", lambda: False)
    assert gpu.why_not(torch.zeros(1)) == "the package triton is not installed"


@has_triton
@pytest.mark.filterwarnings("error:.*lru_cache")  # that Dynamo looks through one
def test_is_asked_while_a_call_is_traced(monkeypatch):
    """On tensors that only say that they are on a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(gpu, "_why_not_gpu", gpu._why_not_gpu.__wrapped__)
    torch.compiler.reset()
    with FakeTensorMode():
        x = torch.empty(3, 16, device="cuda")
        function = torch.compile(tilewise.swiglu, fullgraph=True, backend="aot_eager")
        assert function(x, x, backend="triton").shape == x.shape


@contextmanager
def of_gpu(monkeypatch, hip, capability, answer):
    """A remembered answer, such as `gpu._architecture`, as a machine with this GPU gives it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    answer.cache_clear()
    try:
        yield answer
    finally:
        answer.cache_clear()


@pytest.mark.parametrize(("capability", "refused"), [((7, 5), True), ((8, 0), False)])
def test_refuses_a_gpu_that_is_too_old(monkeypatch, capability, refused):
    with of_gpu(monkeypatch, None, capability, gpu._why_not_gpu) as why_not_gpu:
        reason = why_not_gpu(0)
    expected = "needs compute capability 8.0 or more, this GPU has 7.5"
    assert reason == (expected if refused else None)


@pytest.mark.parametrize(
    ("hip", "capability", "expected"),
    [
        (None, (8, 0), "sm_80"),
        (None, (8, 6), "sm_86"),
        (None, (8, 7), "sm_80"),
        (None, (8, 9), "sm_86"),
        (None, (9, 0), "sm_90"),
        (None, (10, 3), "sm_100"),
        (None, (12, 0), "sm_86"),
        ("6.4", (9, 4), "gfx942"),
    ],
)
def test_the_architecture_that_configurations_are_chosen_by(monkeypatch, hip, capability, expected):
    with of_gpu(monkeypatch, hip, capability, gpu._architecture) as architecture:
        assert architecture(0) == expected


@pytest.mark.parametrize(
    ("hip", "capability", "expected"),
    [
        (None, (8, 6), False),
        (None, (8, 9), True),
        (None, (9, 0), True),
        (None, (12, 0), True),
        ("6.4", (9, 4), False),
    ],
)
def test_which_gpus_multiply_fp8(monkeypatch, hip, capability, expected):
    with of_gpu(monkeypatch, hip, capability, gpu._multiplies_fp8) as multiplies_fp8:
        assert multiplies_fp8(0) == expected


# --- launching ------------------------------------------------------------------------------------


class _Kernel:
    """Counts its launches."""

    __name__ = "kernel"

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launched.append((grid, args, options))


@pytest.mark.parametrize("grid", [(0,), (3, 0), (0, 0, 1)])
def test_an_empty_grid_is_not_launched(grid):
    kernel = _Kernel()
    gpu.launch(kernel, grid, torch.zeros(1))
    assert kernel.launched == []


def test_fusion_into_fma_is_asked_for_or_not_but_never_left_open():
    kernel = _Kernel()
    x = torch.zeros(1)
    gpu.launch(kernel, (1,), x, 2, BLOCK=4)
    gpu.launch(kernel, (1,), x, 2, enable_fp_fusion=False)
    assert kernel.launched == [
        ((1,), (x, 2), {"BLOCK": 4, "enable_fp_fusion": True}),
        ((1,), (x, 2), {"enable_fp_fusion": False}),
    ]


# --- compiling ahead of time ----------------------------------------------------------------------


def _norm(dtype=torch.float16):
    x = torch.zeros(4, 64, dtype=dtype)
    return tilewise.rms_norm(x, x[0], backend="triton")


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match=r"target: must be one of sm_80, .*, got 'sm_1'"):
        gpu.compiling_for("sm_1").__enter__()
    assert gpu._compilation is None


def test_the_shared_memory_of_every_target_is_known():
    assert gpu.SHARED_MEMORY.keys() == gpu.TARGETS.keys()


@has_triton
@compiles
def test_kernels_are_compiled_without_a_gpu():
    x = torch.zeros(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with gpu.compiling_for("sm_90") as kernels:
            assert gpu.architecture(x) == "sm_90"
            assert gpu.why_not(x) is None
            _norm()
            gpu.launch(None, (0,), x)
    (compiled,) = kernels
    assert (compiled.kernel, compiled.target) == ("norm", "sm_90")
    assert compiled.constants["x"] == torch.float16
    assert compiled.constants["residual"] is None
    assert compiled.constants["CENTERED"] is False
    assert "sm_90" in compiled.triton.asm["ptx"]


@has_triton
@compiles
@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        ("sm_80", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"),
        ("sm_90", "k32.f32.e4m3.e4m3"),
        ("sm_100", "kind::f8f6f4"),
        ("gfx942", "x16_f16"),
    ],
)
def test_fp8_codes_reach_the_instructions_for_them(target, instruction):
    """Those of fp8, or where there are none those of float16, which holds the codes."""
    x = torch.zeros(16, 256, dtype=torch.bfloat16)
    weight = tilewise.quantize(torch.ones(64, 256), "fp8")
    with gpu.compiling_for(target) as kernels:
        tilewise.quantized_matmul(x, weight, act="fp8", backend="triton")
    rounding, product = kernels
    assert (rounding.kernel, product.kernel) == ("quantize_rows", "matmul_fp8")
    code = product.triton.asm
    assert instruction in (code["ptx"] if "ptx" in code else code["amdgcn"])


@has_triton
@compiles
def test_compiling_restores_what_was_before():
    from triton.runtime.driver import driver

    before = driver._active
    with gpu.compiling_for("sm_80") as outer:
        with gpu.compiling_for("gfx942") as inner:
            _norm()
        assert gpu.architecture(torch.zeros(1)) == "sm_80"
        _norm()
    assert [compiled.target for compiled in inner + outer] == ["gfx942", "sm_80"]
    with pytest.raises(RuntimeError, match="stop"), gpu.compiling_for("sm_80"):
        raise RuntimeError("stop")
    assert driver._active is before
    assert gpu._compilation is None
    with pytest.raises(tilewise.BackendError, match="needs tensors on a GPU"):
        _norm()
