"""Finding native code: each answer is a value or a sentence saying why there is none."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

import tilewise
from tilewise import build, native

AMX = native.INSTRUCTION_SETS["amx"]
AVX512 = native.INSTRUCTION_SETS["avx512"]
AVX2 = native.INSTRUCTION_SETS["avx2"]


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be an x86-64 machine with these CPU flags."""

    def pretend(flags, *, amx_refusal=None, arch="x86_64"):
        monkeypatch.setattr(native, "cpu_flags", lambda: frozenset(flags))
        monkeypatch.setattr(native, "_amx_refusal", lambda: amx_refusal)
        monkeypatch.setattr(native.platform, "machine", lambda: arch)
        monkeypatch.delenv("TILEWISE_CPU_ISA", raising=False)
        native.instruction_set.cache_clear()

    yield pretend
    native.instruction_set.cache_clear()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(AVX2, "avx2"), (AVX512, "avx512"), (AMX, "amx")],
)
def test_the_best_instruction_set_is_chosen(machine, flags, expected):
    machine(flags)
    assert native.instruction_set().value == expected


def test_amx_needs_the_operating_system_too(machine):
    machine(AMX, amx_refusal="the kernel refused AMX tile state: no")
    assert native.instruction_set().value == "avx512"
    assert native.why_not_instruction_set("amx") == "the kernel refused AMX tile state: no"


def test_a_missing_flag_is_named(machine):
    machine(AVX2 - {"f16c"})
    found = native.instruction_set()
    assert found.value is None
    assert "avx2: the processor lacks f16c" in found.reason
    assert str(found).startswith("none: ")


def test_another_architecture_is_said(machine):
    machine((), arch="aarch64")
    assert native.why_not_instruction_set("avx2") == "needs an x86-64 processor, this is aarch64"


def test_the_environment_forces_one_or_says_why_not(machine, monkeypatch):
    machine(AVX512)
    monkeypatch.setenv("TILEWISE_CPU_ISA", "avx2")
    assert native.instruction_set().value == "avx2"
    for forced, message in [
        ("amx", "TILEWISE_CPU_ISA: amx cannot run here: the processor lacks amx_bf16, "),
        ("sse", "TILEWISE_CPU_ISA: instruction set: must be one of amx, avx512, avx2, got 'sse'"),
    ]:
        monkeypatch.setenv("TILEWISE_CPU_ISA", forced)
        native.instruction_set.cache_clear()
        with pytest.raises(ValueError, match=message):
            native.instruction_set()


def test_every_instruction_set_has_compiler_flags():
    assert list(build.ISA_FLAGS) == list(native.INSTRUCTION_SETS)


# --- the library that calls use -------------------------------------------------------------------


@pytest.fixture
def unasked(monkeypatch, machine):
    """Nobody has asked for the library yet; `load` is a function that tests replace."""
    monkeypatch.setattr(native, "_cpu", None)
    monkeypatch.setattr(native, "_cpu_refusal", None)

    def replace(load, flags=AMX):
        machine(flags)
        monkeypatch.setattr(native, "load", load)

    return replace


def _library(isa):
    return native.Library(isa, Path("somewhere") / isa, native.Operators("tilewise"))


def _fail(isa):
    raise build.BuildError(f"nothing compiles for {isa}")


def test_the_library_is_for_the_best_instruction_set(unasked):
    unasked(_library)
    assert native.why_not_cpu() is None
    assert native.library().value == "somewhere/amx (amx)"


def test_a_compiler_too_old_for_the_best_makes_the_next(unasked, monkeypatch):
    def load(isa):
        if isa == "amx":
            raise build.UnknownInstructions("no amx")
        return _library(isa)

    unasked(load)
    assert native.library().value == "somewhere/avx512 (avx512)"

    monkeypatch.setattr(native, "_cpu", None)
    unasked(load)
    monkeypatch.setenv("TILEWISE_CPU_ISA", "amx")
    assert native.library().reason == "no amx"


def test_no_library_is_not_an_error_until_it_is_asked_for_by_name(unasked):
    unasked(_fail)
    assert native.why_not_cpu() == "nothing compiles for amx"
    assert native.library().reason == "nothing compiles for amx"
    x, weight = torch.ones(2, 3), torch.ones(3)
    assert tilewise.rms_norm(x, weight).shape == x.shape
    with pytest.raises(tilewise.BackendError, match="nothing compiles for amx"):
        tilewise.rms_norm(x, weight, backend="cpu")
    with pytest.raises(tilewise.BackendError, match="nothing compiles for amx"):
        native.cpu_ops()


def test_the_answer_is_kept(unasked):
    asked = []

    def load(isa):
        asked.append(isa)
        _fail(isa)

    unasked(load)
    for _ in range(3):
        assert native.why_not_cpu() == "nothing compiles for amx"
    assert asked == ["amx"]


def test_no_known_processor_needs_no_compiler(unasked):
    unasked(_fail, flags=())
    assert "avx2: the processor lacks avx2, " in native.why_not_cpu()


@pytest.mark.parametrize("load", [_library, _fail])
def test_a_traced_function_asks_while_it_is_traced(unasked, load):
    unasked(load)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def traced(x):
        return x + 1 if native.why_not_cpu() is None else x - 1

    assert traced(torch.zeros(())) == (1 if load is _library else -1)


def test_a_library_that_does_not_load(tmp_path, monkeypatch):
    broken = tmp_path / "libtilewise_avx2.so"
    broken.write_bytes(b"half of a library")
    monkeypatch.setattr(build, "library", lambda isa, variant, watcher: broken)
    native.load.cache_clear()
    with pytest.raises(build.BuildError, match=r"libtilewise_avx2\.so cannot be loaded: .+"):
        native.load("avx2")


def test_a_block_may_use_another_library(unasked):
    unasked(_fail)
    with native.use_library(_library("avx2")):
        assert native.why_not_cpu() is None
        assert native.library().value == "somewhere/avx2 (avx2)"
    assert native.why_not_cpu() == "nothing compiles for amx"


needs_library = pytest.mark.skipif(
    native.why_not_cpu() is not None, reason=f"no C++ kernels: {native.why_not_cpu()}"
)


@needs_library
def test_a_library_serves_any_pytorch():
    """It finds PyTorch loaded, by name: no path to one is in it, and only the stable ABI's C."""
    path = native.load(native.instruction_set().value).path
    dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True)
    assert "libtorch_cpu.so" in dynamic.stdout
    assert "RPATH" not in dynamic.stdout
    assert "RUNPATH" not in dynamic.stdout
    names = subprocess.run(
        ["nm", "-DC", "--undefined-only", path], capture_output=True, text=True, check=True
    ).stdout.split()
    foreign = [name for name in names if name.startswith(("at::", "c10::", "torch::"))]
    assert foreign == []


@needs_library
def test_the_first_use_says_what_takes_so_long(run_python, tmp_path):
    """And importing builds nothing."""
    code = """
import pathlib, sys, tilewise
from tilewise import build, native
build.source_folder = lambda: pathlib.Path("csrc")
native.instruction_set = lambda: build.Finding("avx2", "avx2")
print(pathlib.Path("cache").exists(), native.why_not_cpu())
"""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "empty.cpp").touch()
    first, second = (run_python(code, XDG_CACHE_HOME=str(tmp_path / "cache")) for _ in range(2))
    assert first.stdout == "False None\n"
    said = r"tilewise: building the C\+\+ kernels for avx2, once, in .*/cache.* done in \d+ s\n"
    assert re.fullmatch(said, first.stderr)
    assert second.stdout == "True None\n"
    assert second.stderr == ""


def test_every_finding_has_a_value_or_a_reason():
    findings = [
        native.instruction_set(),
        build.compiler(),
        native.nvcc(),
        native.gpu(),
        native.triton(),
        native.library(),
    ]
    for found in findings:
        assert (found.value is None) != (found.reason is None), found.name
