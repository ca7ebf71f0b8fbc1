"""What a user can get wrong: one clear line, exit status 2, no traceback."""

import os
import subprocess
import sys

import pytest

from tilewise import build, dispatch, native
from tilewise.cli import main


def refusal(capsys, *argv):
    """The one line on stderr of a command that must end with status 2."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1
    return captured.err.strip()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["info", "--jsn"], "tilewise info: unknown option --jsn; did you mean --json?"),
        (["verify", "--ops=x"], "tilewise verify: unknown option --ops; did you mean --op?"),
        (["bench", "--jso", "x"], "tilewise bench: unknown option --jso; did you mean --json?"),
        (
            ["chat", "--temprature", "1"],
            "tilewise chat: unknown option --temprature; did you mean --temperature?",
        ),
        (["build", "--xyz"], "tilewise build: unknown option --xyz; see tilewise build --help"),
        (["build", "it"], "tilewise build: unknown argument it; see tilewise build --help"),
        (["--jsn"], "tilewise: unknown option --jsn; see tilewise --help"),
    ],
)
def test_a_typo_in_an_option(capsys, argv, message):
    assert refusal(capsys, *argv) == message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ifno"], "invalid choice: 'ifno'"),
        (["verify", "--op", "nrm"], "argument --op: invalid choice: 'nrm'"),
        (["verify", "--backend", "auto"], "argument --backend: invalid choice: 'auto'"),
        (["verify", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["bench", "-r", "0"], "--repetitions: must be at least 1"),
        (["bench", "-p", "-3"], "-p"),
        (["bench", "-n", "many"], "must be a whole number, 0 or more, got 'many'"),
        (["info", "--threads", "0"], "must be a positive integer, got '0'"),
        (["generate", " "], "the prompt is empty"),
        (["build", "--isa", "sse"], "argument --isa: invalid choice: 'sse'"),
        (["build", "--op", "moe"], "--op: the C++ kernels are built together; it is for --triton"),
        (["build", "--triton", "sm_1"], "--triton: a target must be one of sm_80, sm_86, sm_90, "),
        (["build", "--triton", "--isa", "avx2"], "--isa and --variant are of the C++ kernels"),
        (["build", "--triton", "--spill-limit", "x"], "must be a whole number, 0 or more, got 'x'"),
    ],
)
def test_a_value_that_makes_no_sense(capsys, argv, message):
    assert message in refusal(capsys, *argv)


@pytest.mark.parametrize(
    "argv",
    [["generate", "hello", "-m"], ["chat", "-m"], ["bench", "-m"], ["info", "-m"]],
    ids=lambda argv: argv[0],
)
@pytest.mark.parametrize("content", [None, b"", b"not a model", b"GGUF\x03\x00\x00\x00\xff"])
def test_a_file_that_is_missing_or_no_model(capsys, tmp_path, argv, content):
    path = tmp_path / "x.gguf"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refusal(capsys, *argv, str(path))


def test_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "tilewise verify: no GPU: " in refusal(capsys, "verify", "--device", "cuda")


def test_nothing_to_build_with(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.compiler.cache_clear()
    try:
        expected = "tilewise build: CXX is no-such-compiler, which is not on the path"
        assert refusal(capsys, "build") == expected
    finally:
        build.compiler.cache_clear()


def test_a_result_that_cannot_be_written(capsys, tmp_path):
    path = tmp_path / "missing" / "r.json"
    for option in ("--json", "--plot"):  # before anything is measured
        message = refusal(capsys, "bench", "--op", "rms_norm", option, str(path))
        assert message == f"tilewise bench: {path}: No such file or directory"


def test_no_command_shows_the_commands(capsys):
    assert main([]) == 0
    assert "generate" in capsys.readouterr().out


def test_a_reader_who_leaves_early_sees_no_traceback():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as gone:
        run = "import sys, tilewise.cli as c; sys.exit(c.main())"
        done = subprocess.run(
            [sys.executable, "-c", run, "info", "--model", "gpt3-175b"],
            stdout=gone,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.stderr == b""


def test_a_typo_in_a_variable(capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "_ENVIRONMENT", "fast")
    assert refusal(capsys, "info").startswith(
        "tilewise info: TILEWISE_BACKEND: must be 'auto' or one of naive, "
    )
    monkeypatch.setattr(dispatch, "_ENVIRONMENT", "")
    monkeypatch.setenv("TILEWISE_CPU_ISA", "sse")
    native.instruction_set.cache_clear()
    try:
        assert "TILEWISE_CPU_ISA: instruction set: must be one of" in refusal(capsys, "verify")
    finally:
        native.instruction_set.cache_clear()
