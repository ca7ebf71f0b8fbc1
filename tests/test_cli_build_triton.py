"""`tilewise build --triton`: what it compiles, what it says of it, and what it refuses."""

import importlib.util

import pytest

from tilewise import cases, gpu
from tilewise.cli import build_triton, main, triton_usage
from tilewise.dispatch import OPS
from tilewise.testing import BlankInputs, Inputs

compiles = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or gpu.INTERPRETED,
    reason="needs Triton, and that it was not imported as an interpreter",
)


@pytest.fixture
def one_call(monkeypatch):
    """Only the first call of rms_norm: compiling takes a second."""
    calls = [case for case in cases.all_compiled_calls() if case.op == "rms_norm"]
    monkeypatch.setattr(cases, "all_compiled_calls", lambda: calls[:1])


def test_every_operation_with_triton_kernels_is_compiled():
    with_kernels = {name for name, op in OPS.items() if "triton" in op.backends}
    assert {case.op for case in cases.all_compiled_calls()} == with_kernels


def test_blank_inputs_are_zeros_of_the_right_kind():
    inputs, blank = Inputs(), BlankInputs()
    for make in (
        lambda inputs: inputs.randn(2, 3, scale=3),
        lambda inputs: inputs.rand(2, 3),
        lambda inputs: inputs.randint(4, 9, 2, 3),
    ):
        assert not make(blank).any()
        assert (make(blank).shape, make(blank).dtype) == (make(inputs).shape, make(inputs).dtype)


@compiles
@pytest.mark.parametrize(("target", "others"), [("sm_90", "gfx942"), ("gfx942", "sm_90")])
def test_prints_what_every_kernel_needs(capsys, one_call, target, others):
    assert main(["build", "--triton", target, "--op", "rms_norm", "-q", "-t", "1"]) == 0
    out = capsys.readouterr().out
    assert f"{target}: 4 kernels" in out  # forward and backward, in two dtypes
    assert others not in out
    for word in ("norm", "norm_backward", "bfloat16", "float16"):
        assert word in out.split()


@compiles
@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        ({"spills": 129}, "norm for sm_90: spills 129 bytes per thread, allowed are 128"),
        (
            {"shared": (227 << 10) + 1},
            "norm for sm_90: needs 232449 bytes of shared memory, the chip has 232448",
        ),
        ({"matrix": ()}, "norm for sm_90: multiplies matrices without matrix instructions"),
    ],
)
def test_fails_for_a_kernel_that_is_not_fit(capsys, monkeypatch, one_call, needs, expected):
    used = {"registers": 32, "spills": 128, "shared": 227 << 10, "matrix": ("wgmma",)}
    used["wants_matrix"] = True
    monkeypatch.setattr(triton_usage, "usage", lambda kernel: triton_usage.Usage(**used))
    assert main(["build", "--triton", "sm_90", "-q", "-t", "1"]) == 0
    assert "norm for sm_90:" not in capsys.readouterr().out
    monkeypatch.setattr(triton_usage, "usage", lambda kernel: triton_usage.Usage(**used | needs))
    assert main(["build", "--triton", "sm_90", "-q", "-t", "1"]) == 1
    assert f"wrong {expected}" in capsys.readouterr().out


@compiles
def test_processes_find_what_one_process_finds(capsys):
    printed = []
    for processes in ("1", "2"):
        asked = ["build", "--triton", "sm_90", "gfx942", "--op", "layer_norm", "-q"]
        assert main([*asked, "-t", processes]) == 0
        printed.append(capsys.readouterr().out)
    assert "norm_backward" in printed[0]
    assert printed[0] == printed[1]


def test_says_in_what_kernels_of_a_name_differ():
    import torch

    def compiled(name, **constants):
        return triton_usage.Kernel(name, "sm_90", constants, "", None)

    kernels = [
        compiled("a", x=torch.float16, bias=None, BLOCK=4, num_warps=2),
        compiled("a", x=torch.float16, bias=torch.float32, BLOCK=8, num_warps=2),
        compiled("b", x=torch.float16, BLOCK=16),
    ]
    said = [build_triton.distinguishing(kernel, kernels) for kernel in kernels]
    assert said == ["float16 no bias BLOCK=4", "float16 float32 BLOCK=8", "float16"]


@pytest.mark.parametrize(
    ("module", "name", "value", "message"),
    [
        (importlib.util, "find_spec", lambda name: None, "the package triton is not installed"),
        (gpu, "INTERPRETED", True, "TRITON_INTERPRET=1 is set, so that nothing is compiled"),
    ],
)
def test_refuses_in_one_line(capsys, monkeypatch, module, name, value, message):
    monkeypatch.setattr(module, name, value)
    assert main(["build", "--triton"]) == 2
    assert capsys.readouterr().err == f"tilewise build: --triton: {message}\n"


def test_an_operation_without_triton_kernels(capsys, monkeypatch):
    monkeypatch.setattr(cases, "all_compiled_calls", list)
    assert main(["build", "--triton", "--op", "rms_norm"]) == 2
    assert "--triton: rms_norm has no Triton kernels" in capsys.readouterr().err
