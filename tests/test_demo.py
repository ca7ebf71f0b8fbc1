"""The parts of the demo; the whole of it is `make demo`."""

import io

import pytest
from rich.console import Console

from tilewise import demo
from tilewise.dispatch import OPS, Impl


def test_the_demo_measures_every_operation_once():
    assert {workload.op for workload in demo.demo_workloads()} == set(OPS)
    assert len(demo.demo_workloads()) == len(OPS)


def test_a_backend_that_nothing_has_is_named_once():
    lines = demo.missing_backends()
    assert "triton did not run: this version has no implementation for it" in lines


def test_a_backend_that_some_operations_lack_is_named_with_them(monkeypatch):
    op = OPS["rms_norm"]
    monkeypatch.setattr(op, "impls", (Impl("triton", op.impls[-1].fn), *op.impls))
    (line,) = [line for line in demo.missing_backends() if line.startswith("triton")]
    assert line.endswith("not implemented")
    assert "rms_norm" not in line
    assert "swiglu" in line


@pytest.mark.model
def test_both_settings_answer_alike_and_are_timed():
    from tilewise import model as models

    try:
        lm = models.load("smollm2")
    except models.ModelError as error:
        pytest.skip(str(error))
    console = Console(file=io.StringIO())
    answers = [demo.answer(lm, backend, 3, console) for backend in demo.SETTINGS]
    assert demo.compare_answers(lm, *answers)
    assert all(len(answer.token_ids) == 3 for answer in answers)
    assert answers[0].text in console.file.getvalue()
    for answer in answers:
        assert answer.bytes_per_token > 90e6  # the file's weights at least
        assert answer.bandwidth_utilisation > 0
        assert answer.seconds_per_token == pytest.approx(1 / answer.decode_tokens_per_second)
