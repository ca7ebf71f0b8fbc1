"""The commands: what they print, where, and their exit status."""

import io
import json
import sys

import pytest
import torch

from tilewise.cli import main
from tilewise.dispatch import BACKENDS, OPS, Impl
from tilewise.fused import naive


@pytest.fixture(scope="module")
def facts():
    """What `info --json` prints."""
    out, sys.stdout = sys.stdout, io.StringIO()
    try:
        assert main(["info", "--json"]) == 0
        return json.loads(sys.stdout.getvalue())
    finally:
        sys.stdout = out


def test_info_knows_every_operation_and_backend(facts):
    assert facts["operations"].keys() == OPS.keys()
    for backends in facts["operations"].values():
        assert tuple(backends) == BACKENDS
        assert backends["naive"]["runs"] == backends["naive"]["calls"] > 0
    assert facts["operations"]["rms_norm"]["triton"]["reasons"] == [
        "rms_norm has no triton implementation"
    ]


def test_info_gives_a_value_or_a_reason_for_everything(facts):
    names = {"instruction set", "C++ compiler", "CUDA compiler", "GPU", "Triton", "native library"}
    assert facts["findings"].keys() == names
    for finding in facts["findings"].values():
        assert finding["value"] or finding["reason"]
    assert all(rate > 0 for rate in facts["ceilings"]["flops"].values())
    assert facts["versions"]["torch"] == torch.__version__


def test_info_in_words(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for words in ("native library", "no C++ sources", "GB/s from", "GFLOP/s", "rms_norm"):
        assert words in out
    assert "triton: no operation has an implementation in this version" in out
    assert "\x1b" not in out  # no colours where nobody watches


def test_info_about_gpt3_has_the_papers_numbers(capsys):
    assert main(["info", "--model", "gpt3-175b"]) == 0
    out = capsys.readouterr().out
    assert "175 G" in out
    assert "breaks even at" in out
    assert main(["info", "--model", "gpt3-175b", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["parameters"] == pytest.approx(175e9, rel=0.01)
    assert card["parameters_by_part"]["embedding"] == pytest.approx(0.6e9, rel=0.05)


def test_verify_passes_and_shows_the_worst_rows(capsys):
    assert main(["verify", "--op", "rms_norm", "--dtype", "float32", "-q"]) == 0
    out = capsys.readouterr().out
    assert "rms_norm" in out
    assert "float32" in out
    assert "float16" not in out
    assert "naive" not in out
    assert ", 0 do not" in out


def test_verify_shows_what_the_formats_lose(capsys):
    assert main(["verify", "--op", "quantized_matmul", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "int4 group 64, min-max" in out
    assert "mxfp4" in out


def test_verify_fails_for_a_wrong_kernel(capsys, monkeypatch):
    def wrong(x, weight, eps=1e-6, *, residual=None):
        return naive.rms_norm(x, weight * 1.01, eps, residual=residual)

    op = OPS["rms_norm"]
    monkeypatch.setattr(op, "impls", (Impl("cpu", wrong), *op.impls))
    argv = ["verify", "--op", "rms_norm", "--backend", "cpu", "--dtype", "float32"]
    assert main(argv) == 1
    out = capsys.readouterr().out
    assert "wrong rms_norm[rows] on cpu in float32: output: row" in out


def test_verify_counts_what_a_backend_refuses(capsys):
    assert main(["verify", "--op", "sample", "--backend", "torch", "--dtype", "float32"]) == 0
    assert "refused" in capsys.readouterr().out


def test_bench_of_one_operation(capsys, tmp_path):
    argv = ["bench", "--op", "rms_norm", "--seconds", "0", "-q"]
    files = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    assert main(argv + files) == 0
    assert "SmolLM2 decode" in capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert {row["op"] for row in report["rows"]} == {"rms_norm"}
    assert {row["backend"] for row in report["rows"]} == {"naive", "torch"}
    assert report["model"] == []
    assert (tmp_path / "r.png").stat().st_size > 0


def test_bench_of_one_backend(capsys):
    assert main(["bench", "--op", "rms_norm", "--backend", "torch", "--seconds", "0", "-q"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.strip().startswith("torch") for line in lines)
    assert not any(line.strip().startswith("naive ") for line in lines)


def test_bench_fails_for_a_wrong_kernel(capsys, monkeypatch):
    def wrong(x, weight, eps=1e-6, *, residual=None):
        return naive.rms_norm(x, weight * 1.01, eps, residual=residual)

    op = OPS["rms_norm"]
    monkeypatch.setattr(op, "impls", (Impl("cpu", wrong), *op.impls))
    assert main(["bench", "--op", "rms_norm", "--seconds", "0", "-q"]) == 1
    assert "does not agree" in capsys.readouterr().out


def test_threads_are_set(capsys):
    before = torch.get_num_threads()
    try:
        assert main(["verify", "--op", "swiglu", "--dtype", "float32", "-q", "-t", "1"]) == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# --- with the real model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    from tilewise import model

    try:
        return model.find("smollm2")
    except model.ModelError as error:
        pytest.skip(str(error))


@pytest.mark.model
def test_generate_writes_text_to_stdout_and_speed_to_stderr(smollm2, capsys):
    assert main(["generate", "Say hello.", "-n", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "3 new at" in captured.err
    assert main(["generate", "Say hello.", "-n", "3", "-q"]) == 0
    assert capsys.readouterr() == (captured.out, "")


@pytest.mark.model
def test_generate_reads_standard_input(smollm2, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("The capital of France is"))
    assert main(["generate", "--raw", "-n", "2", "-q"]) == 0
    assert "Paris" in capsys.readouterr().out


@pytest.mark.model
def test_a_conversation_ends_with_its_input(smollm2, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nAnd?\n"))
    assert main(["chat", "-n", "2", "-q"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.split()) >= 2
    assert captured.err == ""


@pytest.mark.model
def test_a_prompt_that_leaves_no_room_is_refused(smollm2, capsys):
    assert main(["generate", "Hi", "-n", "9000", "-q"]) == 2
    assert "max_new_tokens: the model has 8192 positions" in capsys.readouterr().err


@pytest.mark.model
def test_a_backend_that_no_operation_has_is_refused(smollm2, capsys):
    assert main(["generate", "Hi", "-n", "2", "-q", "--backend", "triton"]) == 2
    captured = capsys.readouterr()
    assert "has no triton implementation" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.model
def test_bench_of_a_model_prints_llama_bench_rows(smollm2, capsys, tmp_path):
    path = tmp_path / "r.json"
    argv = ["bench", "-m", "smollm2", "-p", "8", "-n", "2", "-r", "2", "-q", "--json", str(path)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "pp8" in out
    assert "tg2" in out
    assert "±" in out
    report = json.loads(path.read_text())
    assert [len(rate["rates"]) for rate in report["model"]] == [2, 2]
    assert report["rows"] == []
