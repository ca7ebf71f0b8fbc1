"""Building a library: from tiny sources, with real and with scripted compilers."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tilewise import build
from tilewise.cli import main

SOURCE = """#include "answer.h"
extern "C" __attribute__((visibility("default"))) int tilewise_answer() { return ANSWER; }
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with sources (`csrc`), an empty cache (`cache`) and no CXX."""
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "answer.h").write_text("#define ANSWER 42\n")
    (tmp_path / "csrc" / "cpu" / "answer.cpp").write_text(SOURCE)
    (tmp_path / "csrc" / "other.cpp").write_text("namespace { [[maybe_unused]] int x; }\n")
    monkeypatch.setattr(build, "source_folder", lambda: tmp_path / "csrc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    build.compiler.cache_clear()
    yield tmp_path
    build.compiler.cache_clear()


needs_compiler = pytest.mark.skipif(
    build.compiler().value is None, reason=f"no compiler: {build.compiler().reason}"
)


class Steps(build.Watcher):
    """Remembers what it was told."""

    def __init__(self):
        self.said = []

    def waiting(self):
        self.said.append("waiting")

    def started(self, isa, steps):
        self.said.append(f"started {isa} {steps}")

    def advanced(self, step):
        self.said.append(step)

    def finished(self, seconds, warnings):
        self.said.append("finished")
        self.warnings = warnings

    def failed(self, output):
        self.said.append("failed")
        self.output = output


def compile_now():
    """Build for AVX2; returns the library and the steps that it took."""
    steps = Steps()
    return build.library("avx2", watcher=steps), steps.said


def answer(path):
    """What the library answers, asked in a process of its own."""
    code = f"import ctypes; print(ctypes.CDLL({str(path)!r}).tilewise_answer())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def script(path, text):
    """A program that `text` (sh) describes, to pass for a compiler."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def use_compiler(monkeypatch, command):
    monkeypatch.setenv("CXX", str(command))
    build.compiler.cache_clear()


# --- the cache ------------------------------------------------------------------------------------


@needs_compiler
def test_the_second_time_is_a_hit(place):
    path, steps = compile_now()
    assert steps[0] == "started avx2 3"
    assert sorted(steps[1:3]) == ["csrc/cpu/answer.cpp", "csrc/other.cpp"]
    assert steps[3:] == ["new.so", "finished"]
    assert answer(path) == 42
    assert compile_now() == (path, [])


@needs_compiler
def test_a_changed_header_compiles_what_includes_it(place):
    first, _ = compile_now()
    (place / "csrc" / "answer.h").write_text("#define ANSWER 43\n")
    second, steps = compile_now()
    assert steps == ["started avx2 3", "csrc/cpu/answer.cpp", "new.so", "finished"]
    assert (answer(first), answer(second)) == (42, 43)
    (place / "csrc" / "answer.h").write_text("#define ANSWER 42\n")
    assert compile_now() == (first, [])


@needs_compiler
def test_a_deleted_header_is_not_found_in_the_copy(place):
    compile_now()
    (place / "csrc" / "answer.h").rename(place / "answer.h")
    with pytest.raises(build.BuildError, match=r"answer\.h"):
        compile_now()


def test_the_name_depends_on_everything(place, monkeypatch):
    def name(isa="avx2", variant=""):
        return build._recipe(isa, variant).name

    names = [name(isa, variant) for isa in build.ISA_FLAGS for variant in build.VARIANTS]
    monkeypatch.setattr(build.torch, "__version__", "2.99.0")
    names.append(name())
    (place / "csrc" / "answer.h").rename(place / "csrc" / "renamed.h")
    names.append(name())
    assert len(set(names)) == len(names)


@needs_compiler
def test_another_compiler_builds_in_another_folder(place, monkeypatch):
    path, _ = compile_now()
    use_compiler(monkeypatch, script(place / "c++", real_compiler()))
    other, steps = compile_now()
    assert steps[-1] == "finished"
    assert other.name == path.name
    assert other.parent != path.parent


@needs_compiler
def test_old_libraries_are_deleted_but_not_those_in_use(place):
    paths = []
    for number in range(build._KEPT_LIBRARIES + 2):
        (place / "csrc" / "answer.h").write_text(f"#define ANSWER {number}\n")
        paths.append(compile_now()[0])
        os.utime(paths[-1], (number, number))
        if number == build._KEPT_LIBRARIES - 1:
            (place / "csrc" / "answer.h").write_text("#define ANSWER 0\n")
            assert compile_now() == (paths[0], [])  # a use, which makes it young
    assert [path.exists() for path in paths[:4]] == [True, False, False, True]
    assert len(list(paths[0].parent.glob("*.so"))) == build._KEPT_LIBRARIES


# --- several processes, and dead ones -------------------------------------------------------------

BUILD = """
import sys, pathlib
from tilewise import build
from tilewise.cli import main
build.source_folder = lambda: pathlib.Path(sys.argv[1])
class Watcher(build.Watcher):
    def waiting(self): print("waiting", flush=True)
    def started(self, isa, steps): print("started", flush=True)
try:
    print(build.library("avx2", watcher=Watcher()))
except build.BuildError as error:
    print(error)
"""


def start_build(place, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(place / "csrc")],
        stdout=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def slow_compiler(place, then):
    """A compiler that starts to write and waits for a go; it logs how many files it compiles."""
    text = f"""case "$*" in *" -c "*)
  for output; do :; done  # the last argument
  echo "half of a file" > "$output"
  echo x >> {place}/compiled
  touch {place}/started
  while [ ! -e {place}/go ]; do sleep 0.05; done;;
esac
{then}"""
    return script(place / "c++", text)


def real_compiler():
    return f'exec {build._compiler_command()[0]} "$@"'


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def until_waiting(process):
    assert process.stdout.readline() == "waiting\n"


@needs_compiler
def test_two_processes_share_one_build(place, monkeypatch):
    use_compiler(monkeypatch, slow_compiler(place, real_compiler()))
    one = start_build(place)
    wait_for(place / "started")
    two = start_build(place)
    until_waiting(two)
    (place / "go").touch()
    assert one.communicate(timeout=60)[0].splitlines()[0] == "started"
    assert "started" not in two.communicate(timeout=60)[0]
    assert len((place / "compiled").read_text().split()) == 2  # one for each source


def test_two_processes_share_one_failure(place, monkeypatch):
    use_compiler(monkeypatch, slow_compiler(place, """case "$*" in *" -c "*) exit 1;; esac"""))
    one = start_build(place)
    wait_for(place / "started")
    two = start_build(place)
    until_waiting(two)
    compiled = (place / "compiled").read_text()
    (place / "go").touch()
    first, second = (process.communicate(timeout=60)[0] for process in (one, two))
    assert first.splitlines()[-1] == second.splitlines()[-1]
    assert "compiling failed" in second
    assert (place / "compiled").read_text() == compiled
    # Whoever comes later tries again: what was wrong may have been a full disk.
    with pytest.raises(build.BuildError):
        compile_now()
    assert len((place / "compiled").read_text()) > len(compiled)


@needs_compiler
@pytest.mark.parametrize("whole_group", [True, False], ids=["with-compilers", "python-alone"])
def test_a_killed_build_is_taken_over(place, monkeypatch, whole_group):
    """Its lock dies with it, or with the last of its compilers."""
    use_compiler(monkeypatch, slow_compiler(place, real_compiler()))
    killed = start_build(place, start_new_session=True)
    wait_for(place / "started")
    if whole_group:
        os.killpg(killed.pid, signal.SIGKILL)
    else:
        killed.kill()
    killed.wait()
    (place / "go").touch()
    path, steps = compile_now()
    assert steps[-1] == "finished"
    assert answer(path) == 42


# --- what can be wrong ----------------------------------------------------------------------------


def test_no_compiler(place, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.BuildError, match=r"no c\+\+, g\+\+ or clang\+\+ on the path"):
        compile_now()
    use_compiler(monkeypatch, "no-such-compiler -O3")
    with pytest.raises(build.BuildError, match="CXX is no-such-compiler, which is not on the path"):
        compile_now()


@needs_compiler
def test_without_a_compiler_an_earlier_build_serves(place, monkeypatch):
    path, _ = compile_now()
    monkeypatch.setenv("PATH", "")
    build.compiler.cache_clear()
    assert compile_now() == (path, [])


@needs_compiler
def test_an_error_in_the_sources_is_quoted(place):
    (place / "csrc" / "cpu" / "answer.cpp").write_text("int x = nothing;\n")
    steps = Steps()
    with pytest.raises(build.BuildError) as caught:
        build.library("avx2", watcher=steps)
    reason = str(caught.value)
    assert "\n" not in reason
    assert re.search(r"csrc/cpu/answer.cpp:1:9: error: .*declared", reason)
    (log,) = (place / "cache").rglob("build.log")
    assert str(log) in reason
    assert "nothing" in log.read_text()
    assert steps.said[-1] == "failed"
    assert "nothing" in steps.output
    assert not list((place / "cache").rglob("*.so"))


@needs_compiler
def test_a_missing_function_fails_when_linking_not_when_loading(place):
    (place / "csrc" / "other.cpp").write_text("void f(); void g() { f(); }\n")
    with pytest.raises(build.BuildError, match=r"undefined reference to `f\(\)'"):
        compile_now()


@needs_compiler
def test_warnings_are_passed_on(place):
    (place / "csrc" / "other.cpp").write_text("namespace { int unused; }\n")
    steps = Steps()
    build.library("avx2", watcher=steps)
    assert "-Wunused-variable" in steps.warnings


def test_a_compiler_too_old_for_the_instructions(place, monkeypatch):
    said = "c++: error: unrecognized option '-mamx-tile'"
    text = f"""case "$*" in *-mamx*) echo "{said}" >&2; exit 1;; esac"""
    use_compiler(monkeypatch, script(place / "c++", text))
    with pytest.raises(build.UnknownInstructions, match=r"for amx: .*error: unrecognized option"):
        build.library("amx")


def test_a_cache_that_cannot_be_written(place, monkeypatch):
    (place / "file").touch()  # a folder without permission to write would not stop root
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "file"))
    use_compiler(monkeypatch, script(place / "c++", ""))
    message = f"cannot build in {place}/file/tilewise/avx2-.*: Not a directory; XDG_CACHE_HOME can"
    with pytest.raises(build.BuildError, match=message):
        compile_now()


def test_an_old_torch_or_one_without_headers(place, monkeypatch):
    use_compiler(monkeypatch, script(place / "c++", ""))
    monkeypatch.setattr(build.torch, "__version__", "2.10.1+cu130")
    with pytest.raises(build.BuildError, match=r"needs torch >= 2.11, this is 2\.10\.1\+cu130"):
        compile_now()
    monkeypatch.setattr(build.torch, "__version__", "3.0.0a0")
    monkeypatch.setattr(build.torch, "__file__", str(place / "__init__.py"))
    with pytest.raises(build.BuildError, match=r"installed without its C\+\+ headers"):
        compile_now()


def test_no_ninja(place, monkeypatch):
    use_compiler(monkeypatch, script(place / "c++", ""))
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(build.BuildError, match="ninja is missing: pip install ninja"):
        compile_now()


def test_no_sources_and_no_home(place, monkeypatch):
    monkeypatch.setattr(build, "source_folder", lambda: place / "nothing")
    with pytest.raises(build.BuildError, match=r"there are no C\+\+ sources in .*/nothing"):
        compile_now()

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(build.Path, "home", no_home)
    with pytest.raises(build.BuildError, match="set HOME or XDG_CACHE_HOME"):
        build.cache_folder()


@needs_compiler
def test_names_with_spaces_and_dollars(place, monkeypatch):
    odd = place / "a b$c"
    odd.mkdir()
    script(odd / "c++", real_compiler())
    use_compiler(monkeypatch, f"'{odd}/c++' -DEXTRA='a b'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(odd / "cache"))
    path, _ = compile_now()
    assert answer(path) == 42


# --- tilewise build -------------------------------------------------------------------------------


def test_the_command_builds_for_all_that_the_compiler_knows(place, monkeypatch, capsys):
    no_amx = """case "$*" in *-mamx*) echo "c++: error: what is -mamx-tile?" >&2; exit 1;; esac"""
    link = """for word; do [ "$last" = -o ] && touch "$word"; last=$word; done"""
    use_compiler(monkeypatch, script(place / "c++", f"{no_amx}\n{link}\ntrue"))
    assert main(["build", "--quiet"]) == 0
    captured = capsys.readouterr()
    amx, avx512, avx2 = captured.out.splitlines()
    assert re.fullmatch(r"amx +none: .* cannot compile for amx: .*what is -mamx-tile\?", amx)
    assert re.fullmatch(r"avx512 .*libtilewise_avx512-\w+\.so \(built in .* s\)", avx512)
    assert re.fullmatch(r"avx2 .*libtilewise_avx2-\w+\.so \(built in .* s\)", avx2)
    assert captured.err == ""
    assert main(["build", "--isa", "avx2"]) == 0
    assert capsys.readouterr().out.endswith(".so (was there)\n")
    assert main(["build", "--isa", "amx"]) == 2
    assert "tilewise build: " in capsys.readouterr().err


@needs_compiler
def test_the_command_shows_what_the_compiler_says(place, capsys):
    (place / "csrc" / "other.cpp").write_text("namespace { int unused; }\n")
    assert main(["build", "--isa", "avx2", "--quiet"]) == 0
    assert "-Wunused-variable" in capsys.readouterr().err
    (place / "csrc" / "other.cpp").write_text("int x = nothing;\n")
    assert main(["build", "--isa", "avx2", "--quiet"]) == 2
    assert "tilewise build: compiling failed: csrc/other.cpp:1:9: " in capsys.readouterr().err
