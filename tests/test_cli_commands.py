"""The commands: what they print, where, and their exit status."""

import io
import json
import sys

import pytest
import torch
from model_files import write_llama_gguf

from tilewise import model as models
from tilewise.cli import main
from tilewise.dispatch import BACKENDS, OPS, Impl, requested_backend
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
    assert facts["operations"]["rms_norm"]["cuda"]["reasons"] == [
        "rms_norm has no cuda implementation"
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
    for words in ("native library", "GB/s from", "GFLOP/s", "rms_norm"):
        assert words in out
    assert "cuda: no operation has an implementation in this version" in out
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
    assert {row["backend"] for row in report["rows"]} >= {"naive", "torch"}
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


# --- with a model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The path of a model with random weights."""
    return str(write_llama_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf"))


def test_generate_writes_text_to_stdout_and_speed_to_stderr(tiny, capsys):
    argv = ["generate", "hello", "-m", tiny, "-n", "20", "--temperature", "1"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert " new at " in captured.err
    assert main([*argv, "-q"]) == 0
    assert capsys.readouterr() == (captured.out, "")
    assert main([*argv, "-q", "--seed", "1"]) == 0
    assert capsys.readouterr().out != captured.out


def test_generate_reads_standard_input(tiny, capsys, monkeypatch):
    argv = ["-m", tiny, "-n", "20", "-q"]
    assert main(["generate", "--raw", "hello", *argv]) == 0
    from_argument = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    assert main(["generate", "--raw", *argv]) == 0
    assert capsys.readouterr().out == from_argument


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (None, "standard input is closed"),
        ("\udcff", "text: must be valid Unicode, got '\\udcff' at "),
    ],
)
def test_standard_input_that_is_no_text(tiny, capsys, monkeypatch, command, stdin, message):
    monkeypatch.setattr(sys, "stdin", stdin and io.StringIO(stdin))
    assert main([command, "-m", tiny, "-q"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"tilewise {command}: {message}")
    assert captured.err.count("\n") == 1


def test_the_chat_template_is_used_unless_raw(tiny, capsys):
    argv = ["generate", "hello", "-m", tiny, "-n", "2"]
    assert main(argv) == 0
    asked = capsys.readouterr().err
    assert main([*argv, "--raw"]) == 0
    assert capsys.readouterr().err.split()[0] != asked.split()[0]  # fewer prompt tokens


@pytest.mark.parametrize("ending", ["", "\n", "\nnever read"])
def test_a_conversation_ends_with_its_input_or_an_empty_line(tiny, capsys, monkeypatch, ending):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nworld\n" + ending))
    assert main(["chat", "-m", tiny, "-n", "4"]) == 0
    assert capsys.readouterr().err.count("new at") == 2


def test_ctrl_c_ends_an_answer_and_then_the_conversation(tiny, capsys, monkeypatch):
    lines = iter(["hello"])

    def read(prompt):
        line = next(lines, None)
        if line is None:
            raise KeyboardInterrupt
        return line

    def interrupted(stream):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("tilewise.model.Stream.__next__", interrupted)
    assert main(["chat", "-m", tiny, "-n", "4", "-q"]) == 0


def test_ctrl_c_ends_generate(tiny, capsys, monkeypatch):
    def interrupted(stream):
        raise KeyboardInterrupt

    monkeypatch.setattr("tilewise.model.Stream.__next__", interrupted)
    assert main(["generate", "hello", "-m", tiny, "-n", "4"]) == 130


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-n", "90000"], "max_new_tokens: the model has"),
        (["-n", "0"], "max_new_tokens: must be >= 1, got 0"),
        (["--temperature", "-1"], "temperature"),
        (["--backend", "cuda"], "has no cuda implementation"),
    ],
)
def test_what_cannot_be_generated_is_refused_in_one_line(tiny, capsys, options, message):
    assert main(["generate", "hello", "-m", tiny, "-n", "4", "-q", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_info_about_a_file(tiny, capsys):
    assert main(["info", "-m", tiny]) == 0
    assert "operations per token" in capsys.readouterr().out


def test_bench_of_a_model_prints_llama_bench_rows(tiny, capsys, tmp_path):
    path = tmp_path / "r.json"
    argv = ["bench", "-m", tiny, "-p", "8", "-n", "2", "-r", "3", "-q", "--json", str(path)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "pp8" in out
    assert "tg2" in out
    assert "±" in out
    report = json.loads(path.read_text())
    assert [len(rate["rates"]) for rate in report["model"]] == [3, 3]
    assert report["rows"] == []


def test_a_test_of_no_tokens_is_left_out(tiny, capsys):
    assert main(["bench", "-m", tiny, "-p", "0", "-n", "2", "-r", "1", "-q"]) == 0
    assert "pp" not in capsys.readouterr().out


@pytest.fixture
def other_text_on_auto(monkeypatch):
    """A model that chooses other tokens unless every operation is naive."""
    choose = models.generate._Run._choose

    def wrong(run, logits, sequences):
        return choose(run, logits if requested_backend("sample") == "naive" else -logits, sequences)

    monkeypatch.setattr(models.generate._Run, "_choose", wrong)


def test_a_model_that_says_something_else_is_not_timed(tiny, capsys, other_text_on_auto):
    assert main(["bench", "-m", tiny, "-p", "8", "-n", "2", "-q"]) == 1
    out = capsys.readouterr().out
    assert "wrong tiny on auto: 0 tokens are the same, then no near-tie" in out
    assert "pp8" not in out
