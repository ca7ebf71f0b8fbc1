"""The workload table: every operation, nothing twice, and real shapes."""

import pytest
import torch

from tilewise.benchmarks.formats import format_errors
from tilewise.benchmarks.workloads import all_workloads
from tilewise.dispatch import OPS
from tilewise.testing import Inputs


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_operation_has_a_workload_and_none_is_there_twice(device):
    workloads = all_workloads(device)
    assert {workload.op for workload in workloads} == set(OPS)
    assert len({workload.id for workload in workloads}) == len(workloads)
    assert {workload.device for workload in workloads} == {device}


@pytest.mark.parametrize(
    "words",
    [
        ("SmolLM2", "prefill"),
        ("SmolLM2", "decode"),
        ("GPT-2", "prefill"),  # its heads are not grouped; in decoding it adds nothing
        ("Llama-3-8B", "prefill"),
        ("Llama-3-8B", "decode"),
    ],
)
def test_the_models_are_there_in_both_phases(words):
    assert any(all(word in w.name for word in words) for w in all_workloads())


def test_inputs_are_distinct_and_not_zero():
    by_id = {workload.id: workload for workload in all_workloads()}
    arguments = by_id["flash_attention SmolLM2 prefill 512 float32 cpu"].make(Inputs())
    q, k, v = (arguments[name] for name in "qkv")
    assert (q.shape, k.shape) == ((1, 512, 9, 64), (1, 512, 3, 64))
    assert not torch.equal(k, v)
    assert q.std() > 0.9


def test_format_errors_fall_as_bits_rise():
    by_name = {result.name: result for result in format_errors(64, 256)}
    assert by_name["int8 group 64"].error < by_name["int4 group 64"].error
    assert by_name["int4 group 32"].error < by_name["int4 group 128"].error
    assert by_name["int4 group 64"].error < by_name["int4 group 64, min-max"].error
    assert by_name["int4 group 64"].bits == pytest.approx(4 + (16 + 8) / 64)
