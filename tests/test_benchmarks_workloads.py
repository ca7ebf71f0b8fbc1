"""The workload table: every operation, nothing twice, and real shapes."""

import pytest
import torch

from tilewise.benchmarks.calls import first_requests, shared_prefix_decode
from tilewise.benchmarks.formats import format_errors
from tilewise.benchmarks.measure import Bench
from tilewise.benchmarks.models import GPT2
from tilewise.benchmarks.workload import Workload
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


@pytest.mark.parametrize(
    ("op", "words"),
    [
        *(
            ("flash_attention", ("D128", "causal", size, phase))
            for size in ("4 x 4096", "2 x 8192")
            for phase in ("", "backward")
        ),
        *(("paged_attention", ("16 x 16384", pages)) for pages in ("pages of 16", "pages of 1")),
        ("flash_attention", ("16 x 16384", "contiguous")),
        ("paged_attention", ("128 x 32768", "prefix")),
        *(("quantized_matmul", (f" {m} x", "int4")) for m in (1, 16, 64, 256, 1024, 4096)),
    ],
)
def test_the_shapes_that_others_report_are_timed_on_a_gpu(op, words):
    names = [w.name for w in all_workloads("cuda") if w.op == op]
    assert any(all(word in name for word in words) for name in names)


def test_requests_of_one_prefix_share_its_pages():
    make = shared_prefix_decode(GPT2, 40, 20, batch=3)
    arguments = make(Inputs())
    table = arguments["block_table"]
    assert table.shape == (3, 3 + 2)
    assert (table[:, :3] == table[0, :3]).all()
    assert table[:, 3:].unique().numel() == 6
    assert arguments["cache_seqlens"].tolist() == [3 * 16 + 20] * 3
    bench = Bench(Workload("paged_attention", "w", make, part=first_requests(2)))
    assert bench.check("torch").ratio <= 1
    tokens = 3 * 16 + 3 * 20  # every page of the prefix moves once
    assert bench.cost.bytes == pytest.approx(tokens * 2 * 12 * 64 * 4, rel=0.1)


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
