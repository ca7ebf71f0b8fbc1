"""Finding native code: each answer is a value or a sentence saying why there is none."""

import pytest

from tilewise import native

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
    [(AVX2, "avx2"), (AVX2 | AVX512, "avx512"), (AVX2 | AVX512 | AMX, "amx")],
)
def test_the_best_instruction_set_is_chosen(machine, flags, expected):
    machine(flags)
    assert native.instruction_set().value == expected


def test_amx_needs_the_operating_system_too(machine):
    machine(AVX2 | AVX512 | AMX, amx_refusal="the kernel refused AMX tile state: no")
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
    machine(AVX2 | AVX512)
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


def test_no_compiler_is_not_an_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    native.compiler.cache_clear()
    try:
        assert native.compiler().value is None
        assert "no c++, g++ or clang++ on the path" in native.compiler().reason
    finally:
        native.compiler.cache_clear()


def test_every_finding_has_a_value_or_a_reason():
    findings = [
        native.instruction_set(),
        native.compiler(),
        native.nvcc(),
        native.gpu(),
        native.triton(),
        native.library(),
    ]
    for found in findings:
        assert (found.value is None) != (found.reason is None), found.name
