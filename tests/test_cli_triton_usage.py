"""What is read from a compiled Triton kernel, without a GPU."""

import importlib.util

import pytest

from tilewise import gpu
from tilewise.cases import all_compiled_calls, compile_case
from tilewise.cli import triton_usage

compiles = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or gpu.INTERPRETED,
    reason="needs Triton, and that it was not imported as an interpreter",
)


@compiles
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_reads_registers_and_spills(target):
    case = next(case for case in all_compiled_calls() if case.op == "rms_norm")
    for kernel in compile_case(case, [target], case.dtypes[0]):
        used = triton_usage.usage(kernel)
        assert 8 <= used.registers <= 255
        assert used.spills == 0
        assert used.matrix == ()


def test_reads_the_metadata_of_amd():
    text = """
    .agpr_count:     4
    .private_segment_fixed_size: 24
    .vgpr_count:     96
    .vgpr_spill_count: 5
"""
    assert triton_usage._amd_usage(text) == (96, 24)


@pytest.mark.parametrize(
    ("product", "expected"),
    [
        ("%d = tt.dot %a, %b, %c : tensor<16x64xbf16> * tensor<64x16xbf16>", True),
        ("%d = tt.dot %a, %b, %c : tensor<16x64xi8> * tensor<64x16xi8>", True),
        ("%d = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<16x64xf32> * tensor", True),
        ("%d = tt.dot %a, %b, %c : tensor<16x64xf32> * tensor<64x16xf32>", False),
        ("%d = arith.addf %a, %b : tensor<16x64xbf16>", False),
    ],
)
def test_knows_what_matrix_instructions_are_for(product, expected):
    assert triton_usage._wants_matrix(f"  {product} loc(#loc1)\n") is expected


@compiles
@pytest.mark.parametrize(("target", "instruction"), [("sm_90", "wgmma"), ("gfx942", "v_mfma")])
def test_finds_the_matrix_instructions(target, instruction):
    case = next(case for case in all_compiled_calls() if case.id == "int8 activations")
    compiled = compile_case(case, [target], case.dtypes[0])
    used = {kernel.name: kernel.usage for kernel in triton_usage.judge(compiled)}
    assert used["matmul_int8"].matrix == (instruction,)
    assert used["matmul_int8"].wants_matrix
    assert not used["quantize_rows"].wants_matrix
