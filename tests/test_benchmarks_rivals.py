"""Rivals: named, refused with a reason, and given the same call. What needs no GPU."""

import importlib.util
import subprocess

import pytest
import torch
import torch.nn.functional as F

import tilewise
from tilewise.benchmarks import host, rivals, rivals_packages
from tilewise.benchmarks.calls import norm, prefill, quantized
from tilewise.benchmarks.models import LLAMA3
from tilewise.quant import baseline
from tilewise.testing import Inputs, assert_agrees, to_float64

SMALL = LLAMA3.replace(heads=4, kv_heads=2)
ATTENTION = ["SDPA flash", "SDPA cuDNN", "SDPA efficient", "FlexAttention", "FlashInfer"]


def arguments_of(make, dtype=torch.bfloat16):
    return make(Inputs(dtype))


def test_every_rival_has_a_name_and_none_is_for_the_cpu():
    assert list(rivals.rivals_of("flash_attention", "cuda")) == ATTENTION
    assert list(rivals.rivals_of("quantized_matmul", "cuda")) == [
        "F.linear",
        "torch int4",
        "torch fp8",
        "GemLite",
    ]
    assert list(rivals.rivals_of("rms_norm", "cuda")) == ["Liger"]
    assert rivals.rivals_of("flash_attention", "cpu") == {}
    assert rivals.rivals_of("sample", "cuda") == {}


@pytest.mark.parametrize(
    ("op", "name", "package"),
    [
        ("paged_attention", "FlashInfer", "flashinfer-python"),
        ("quantized_matmul", "GemLite", "gemlite"),
        ("swiglu", "Liger", "liger-kernel"),
    ],
)
def test_a_missing_package_is_a_reason(op, name, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    rivals_packages._missing.cache_clear()
    rival = rivals.rivals_of(op, "cuda")[name]
    assert rival.why_not({}) == f"the package {package} is not installed"
    rivals_packages._missing.cache_clear()


# --- attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTENTION[:3])
def test_pytorch_says_itself_why_a_kernel_cannot(name):
    """Of tensors on the CPU it says nothing more."""
    if "cuDNN" in name and torch.version.cuda and not torch.cuda.is_available():
        pytest.skip("PyTorch asks the driver, and there is none")
    rival = rivals.rivals_of("flash_attention", "cuda")[name]
    assert rival.why_not(arguments_of(prefill(SMALL, 8))) == "PyTorch refuses it"


def test_the_reasons_that_pytorch_warns_of_are_kept(monkeypatch):
    import warnings

    def refuses(params, debug):
        warnings.warn("Too wide. (Triggered internally at sdp_utils.cpp:1.)", stacklevel=1)
        warnings.warn("Too old.", stacklevel=1)
        return False

    kind = rivals.SDPBackend.FLASH_ATTENTION
    rival = rivals._sdpa("SDPA flash", kind, refuses)
    assert rival.why_not(arguments_of(prefill(SMALL, 8))) == "Too wide; Too old"
    rival = rivals._sdpa("SDPA flash", kind, lambda params, debug: True)
    assert rival.why_not(arguments_of(prefill(SMALL, 8))) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"causal": False, "window": (-1, -1), "sinks": None, "softcap": 0.0}, None),
        ({"window": (8, 0)}, "is compared without window"),
        ({"softcap": 2.0}, "is compared without softcap"),
        ({"sinks": torch.zeros(4)}, "is compared without sinks"),
        ({"k": torch.zeros(1, 9, 2, 128)}, "is compared on causal calls of equal lengths"),
    ],
)
def test_attention_is_compared_where_it_means_the_same(changes, reason):
    assert rivals.plain_attention(arguments_of(prefill(SMALL, 8)) | changes) == reason


@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_by_name_is_the_same_attention(causal):
    """PyTorch has its flash kernel on the CPU too."""
    arguments = arguments_of(prefill(SMALL, 33, causal=causal), torch.float32)
    call = rivals.rivals_of("flash_attention", "cuda")["SDPA flash"].prepare(arguments)
    expected = tilewise.flash_attention(**arguments, backend="naive")
    assert torch.allclose(call(**arguments), expected, atol=1e-5)


def test_flex_attention_is_the_same_attention(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    arguments = arguments_of(prefill(SMALL, 33), torch.float32)
    call = rivals.rivals_of("flash_attention", "cuda")["FlexAttention"].prepare(arguments)
    expected = tilewise.flash_attention(**arguments, backend="naive")
    assert torch.allclose(call(**arguments), expected, atol=1e-5)


def test_flashinfers_page_table():
    table = torch.tensor([[5, 6, 7], [1, -1, -1], [-1, -1, -1], [2, 3, -1]], dtype=torch.int32)
    seqlens = torch.tensor([9, 4, 0, 5], dtype=torch.int32)
    ends, pages, last = rivals_packages.paged_indices(table, seqlens, 4)
    assert ends.tolist() == [0, 3, 4, 4, 6]
    assert pages.tolist() == [5, 6, 7, 1, 2, 3]
    assert last[[0, 1, 3]].tolist() == [1, 4, 1]
    assert {x.dtype for x in (ends, pages, last)} == {torch.int32}


# --- matrix multiplications -----------------------------------------------------------------------


def test_the_product_with_the_weight_in_16_bits():
    arguments = arguments_of(quantized(3, 64, 32, "int4"))
    call = rivals.rivals_of("quantized_matmul", "cuda")["F.linear"].prepare(arguments)
    expected = F.linear(arguments["x"], arguments["weight"].dequantize().bfloat16())
    assert torch.equal(call(**arguments), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_scales_of_torch_int4_mean_our_weights(symmetric):
    weight = arguments_of(quantized(1, 256, 8, "int4", symmetric=symmetric))["weight"]
    factor, offset = rivals.torch_int4_scales(weight).float().unbind(-1)  # (groups, N)
    codes = rivals.unpack_nibbles(weight.data).float().unflatten(1, (4, 64))
    ours = weight.dequantize().unflatten(1, (4, 64))
    theirs = (codes - 8) * factor.T[..., None] + offset.T[..., None]
    assert (theirs - ours).abs().max() < 0.01 * ours.abs().max()


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (quantized(1, 256, 32, "int8"), {}, "takes int4 in groups"),
        (quantized(1, 256, 32, "int4", group_size=-1), {}, "takes int4 in groups"),
        (
            quantized(1, 64, 32, "int4"),
            {},
            "needs N to be a multiple of 8 and K of 128, got 32 and 64",
        ),
        (quantized(1, 256, 32, "int4"), {"activation": "silu"}, "is compared without activation"),
        (quantized(1, 256, 32, "int4"), {}, None),
    ],
)
def test_what_torch_int4_takes(make, options, reason):
    rival = rivals.rivals_of("quantized_matmul", "cuda")["torch int4"]
    assert rival.why_not(arguments_of(make) | options) == reason


@pytest.mark.skipif(
    baseline.why_not_scales_per_row() is not None, reason="PyTorch's fp8 product takes none here"
)
def test_torch_fp8_rounds_as_ours_does():
    arguments = arguments_of(quantized(5, 64, 32, "fp8", act="fp8"))
    rival = rivals.rivals_of("quantized_matmul", "cuda")["torch fp8"]
    assert rival.why_not(arguments) is None
    expected = tilewise.quantized_matmul(**arguments, backend="naive")
    truth = tilewise.quantized_matmul(**to_float64(arguments), backend="naive")
    assert_agrees(rival.prepare(arguments)(**arguments), expected, truth)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (quantized(1, 64, 32, "fp8"), "takes fp8 by fp8, with a scale per row"),
        (
            quantized(1, 64, 32, "fp8", act="fp8", group_size=32),
            "takes fp8 by fp8, with a scale per row",
        ),
        (
            quantized(1, 63, 32, "fp8", act="fp8"),
            "needs N and K to be multiples of 16, got 32 and 63",
        ),
    ],
)
def test_what_torch_fp8_takes(make, reason):
    rival = rivals.rivals_of("quantized_matmul", "cuda")["torch fp8"]
    assert rival.why_not(arguments_of(make)) == reason


def test_liger_is_compared_with_and_without_a_residual():
    for residual in (False, True):
        arguments = arguments_of(norm(4, 64, residual=residual))
        assert rivals_packages._why_not_norm(arguments) is None
    assert rivals_packages._why_not_layer_norm(arguments) is not None


# --- the machine ----------------------------------------------------------------------------------


def test_the_state_of_a_gpu_is_what_nvidia_smi_says(monkeypatch, tmp_path):
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\necho "$@" > "$0.arguments"\necho "1.2, 3 MHz, 4, 5, 6 W, 7, 8"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    state = host.nvidia_smi("ab-cd")
    assert (state["driver_version"], state["clocks.sm"], state["power.draw"]) == (
        "1.2",
        "3 MHz",
        "6 W",
    )
    asked = (tmp_path / "nvidia-smi.arguments").read_text()
    assert "--id=GPU-ab-cd" in asked
    assert "driver_version,clocks.sm" in asked


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.CalledProcessError(9, "x")])
def test_without_nvidia_smi_the_state_is_unknown(monkeypatch, error):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr(subprocess, "run", fails)
    assert host.nvidia_smi("ab") == {}
    assert host.gpu_state("cpu") == {}
