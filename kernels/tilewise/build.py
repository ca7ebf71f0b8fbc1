"""Compiling the C++ kernels: one library per instruction set, once, into the user's cache folder.

The sources are copied into a folder of their own before they are hashed and compiled, so that what
a library is named after is what it was made of, whatever an editor does meanwhile. Only files whose
content changed are copied, so that ninja compiles only what depends on them. A library gets its
name by a rename, when it is complete.

    ~/.cache/tilewise/avx2-<compiler, flags>/         one folder per tool chain
        csrc/  obj/  build.ninja  build.log  lock
        libtilewise_avx2-<sources, flags, torch>.so

The lock is the operating system's (flock), and compilers inherit it: it ends with the last process
of a build, however that ends. Without a compiler, a library that another compiler built will do.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_TORCH_NEEDED = (2, 11)

_FLAGS = (
    "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
    # Which products become fused multiply-adds is written in the sources: left to the compiler,
    # the bits of a result would depend on its version.
    "-ffp-contract=off",
    # The stable ABI of this PyTorch, which every later one keeps.
    "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*_TORCH_NEEDED),
)  # fmt: skip
# Never -march=native: a library may be built on one machine and used on another.
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")
_AVX512 = (
    *_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mavx512vnni",
    "-mavx512bf16",
    # GCC 12 mistakes the operands that its own avx512fintrin.h leaves undefined on purpose.
    "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option",
)  # fmt: skip
ISA_FLAGS = {
    "amx": (*_AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512": _AVX512,
    "avx2": _AVX2,
}
"""The compiler flags of each instruction set."""

_OPTIMIZE = ("-O3",)
_SANITIZE = (
    "-O1", "-g1", "-fno-omit-frame-pointer", "-Werror",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
)  # fmt: skip
_EMULATE = ("-O1", "-Icsrc/emulated", *_AVX2)
VARIANTS = ("", "sanitized", "emulated")
"""What a library may be other than fast.

`sanitized`: with AddressSanitizer and UndefinedBehaviorSanitizer, for a process that was started
with their runtime (see `make sanitize`). `emulated`: of AVX2 instructions alone, with functions in
the place of all others, so that every instruction set's kernels can be tested on any machine.
"""

_KEPT_LIBRARIES = 8  # per tool chain; whoever edits kernels makes a new one with every edit


class BuildError(RuntimeError):
    """There is no library and none can be built: why, in one line, and what the compiler said."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


class UnknownInstructions(BuildError):
    """The compiler is too old for the instruction set."""


@dataclass(frozen=True)
class Finding:
    """Something that was looked for: what was found (`value`), or why not (`reason`)."""

    name: str
    value: str | None
    reason: str | None = None

    def __str__(self) -> str:
        return self.value if self.value is not None else f"none: {self.reason}"


class Watcher:
    """Whoever wants to see a build go on overrides these. Nothing is called on a cache hit."""

    def waiting(self) -> None:
        """Another process is building in the same folder."""

    def started(self, isa: str, steps: int) -> None:
        """A build of `steps` commands begins."""

    def advanced(self, step: str) -> None:
        """A command of the build is done."""

    def finished(self, seconds: float, warnings: str) -> None:
        """The library is complete."""

    def failed(self, output: str) -> None:
        """There will be none; this is what the compiler said."""


# --- what there is to build with ------------------------------------------------------------------


def version_line(command: list[str]) -> str | None:
    """The first line of `command`'s output that has a version number in it."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = (run.stdout + run.stderr).splitlines()
    return next((line.strip() for line in lines if re.search(r"\d+\.\d+", line)), None)


def _compiler_command() -> list[str]:
    """`CXX`, which may have arguments ("ccache g++"), or the first compiler on the path."""
    named = shlex.split(os.environ.get("CXX", ""))
    for name in named[:1] or ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            return [path, *named[1:]]
    if named:
        raise BuildError(f"CXX is {named[0]}, which is not on the path")
    raise BuildError("no c++, g++ or clang++ on the path and CXX is not set")


@functools.cache
def compiler() -> Finding:
    """The C++ compiler: `CXX`, or the first of c++, g++ and clang++ on the path."""
    try:
        command = _compiler_command()
    except BuildError as error:
        return Finding("compiler", None, str(error))
    version = version_line([*command, "--version"]) or "unknown version"
    return Finding("compiler", f"{shlex.join(command)} ({version})")


def _ninja() -> str:
    try:
        import ninja
    except ImportError:
        path = shutil.which("ninja")
    else:
        path = shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")
    if path is None:
        raise BuildError("ninja is missing: pip install ninja")
    return path


def _torch_folder() -> Path:
    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version < _TORCH_NEEDED:
        needed = ".".join(map(str, _TORCH_NEEDED))
        raise BuildError(f"needs torch >= {needed}, this is {torch.__version__}")
    folder = Path(torch.__file__).parent
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        raise BuildError(f"torch is installed without its C++ headers: {folder}/include")
    return folder


def source_folder() -> Path:
    """Where the C++ and CUDA sources are: in an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parents[1] / "csrc"


def cache_folder() -> Path:
    """Where libraries are kept: `$XDG_CACHE_HOME/tilewise`, else `~/.cache/tilewise`."""
    named = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(named) if named else Path.home() / ".cache") / "tilewise"
    except RuntimeError:  # no HOME, and a user that no database knows
        raise BuildError("no folder for a cache: set HOME or XDG_CACHE_HOME") from None


def namespace(isa: str, variant: str = "") -> str:
    """Where in `torch.ops` a library registers its operators."""
    return "_".join(filter(None, ("tilewise", isa, variant)))


# --- a library ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recipe:
    """Everything that a library depends on."""

    isa: str
    namespace: str
    flags: tuple[str, ...]
    sources: dict[str, bytes]

    @property
    def name(self) -> str:
        # PyTorch's version, because inline functions of its headers become part of the library.
        digest = _digest(torch.__version__, *self.flags, *self.sources, *self.sources.values())
        return f"lib{self.namespace}-{digest}.so"

    @property
    def objects(self) -> dict[str, str]:
        """The object file of each source that is compiled on its own."""
        return {name: f"obj/{name}.o" for name in self.sources if name.endswith(".cpp")}


def _recipe(isa: str, variant: str) -> _Recipe:
    own = {
        "": (*_OPTIMIZE, *ISA_FLAGS[isa]),
        "sanitized": (*_SANITIZE, *ISA_FLAGS[isa]),
        "emulated": (*_EMULATE, f"-DTILEWISE_EMULATES_{isa.upper()}"),
    }[variant]
    name = namespace(isa, variant)
    flags = (*_FLAGS, *own, f"-DTILEWISE_NAMESPACE={name}")
    folder = source_folder()
    paths = [p for pattern in ("*.h", "*.cpp") for p in folder.rglob(pattern)]
    sources = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(paths)}
    if not sources:
        raise BuildError(f"there are no C++ sources in {folder}")
    return _Recipe(isa, name, flags, sources)


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def library(isa: str, variant: str = "", *, watcher: Watcher | None = None) -> Path:
    """The library for `isa`: from the cache, or built, which takes up to a minute on two cores.

    Args:
        isa: a key of `ISA_FLAGS`; it need not be one that this machine can run.
        variant: one of `VARIANTS`.
        watcher: told how a build goes.

    Raises:
        BuildError: if there is no library and none can be built.
    """
    recipe = _recipe(isa, variant)
    cache = cache_folder()
    found = compiler()
    if found.value is None:
        other = next(cache.glob(f"*/{recipe.name}"), None)
        if other is None:
            raise BuildError(str(found.reason))
        return other
    folder = cache / f"{isa}-{_digest(found.value, *recipe.flags)}"
    target = folder / recipe.name
    try:
        if not target.exists():
            _build_once(recipe, folder, target, watcher or Watcher())
        with contextlib.suppress(OSError):
            os.utime(target)  # the oldest are deleted one day
    except OSError as error:
        raise BuildError(
            f"cannot build in {error.filename or folder}: {error.strerror}; "
            "XDG_CACHE_HOME can name another folder"
        ) from None
    return target


def _build_once(recipe: _Recipe, folder: Path, target: Path, watcher: Watcher) -> None:
    """Build, or let another process build and share its luck."""
    folder.mkdir(parents=True, exist_ok=True)
    failure = folder / "failure.txt"  # of the last build, if it failed
    with _lock(folder / "lock", watcher) as (lock, waited):
        if target.exists():
            return
        if waited and failure.exists():
            name, reason, output = failure.read_text().split("\n", 2)
            if name == recipe.name:
                raise BuildError(reason, output)
        failure.unlink(missing_ok=True)
        try:
            _build(recipe, folder, target, lock, watcher)
        except BuildError as error:
            failure.write_text(f"{recipe.name}\n{error}\n{error.output}")
            raise
        libraries = sorted(folder.glob("*.so"), key=lambda path: path.stat().st_mtime)
        for path in libraries[:-_KEPT_LIBRARIES]:
            path.unlink()


@contextlib.contextmanager
def _lock(path: Path, watcher: Watcher) -> Iterator[tuple[int, bool]]:
    """Hold the lock on a build folder; yields its file descriptor and whether others had it."""
    import fcntl  # not on Windows, where nothing is built

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            waited = False
        except BlockingIOError:
            watcher.waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
            waited = True
        yield file.fileno(), waited


def _check_flags(recipe: _Recipe) -> None:
    """Refuse flags that the compiler does not know: an old one has no AMX."""
    command = _compiler_command()
    probe = [*command, *recipe.flags, "-x", "c++", "-fsyntax-only", os.devnull]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = (line.strip() for line in done.stderr.splitlines() if "error" in line)
        said = next(errors, f"it ended with status {done.returncode}")
        raise UnknownInstructions(f"{command[0]} cannot compile for {recipe.isa}: {said}")


def _build(recipe: _Recipe, folder: Path, target: Path, lock: int, watcher: Watcher) -> None:
    ninja, torch_folder = _ninja(), _torch_folder()
    _check_flags(recipe)
    started = time.perf_counter()
    watcher.started(recipe.isa, len(recipe.objects) + 1)
    _copy_sources(recipe.sources, folder / "csrc")
    (folder / "build.ninja").write_text(_ninja_file(recipe, torch_folder))
    log = folder / "build.log"
    status, output = _run([ninja, "-C", str(folder)], log, lock, watcher)
    if status:
        watcher.failed(output)
        lines = output.splitlines()
        errors = [line for line in lines if re.search(r"\berror: |undefined reference", line)]
        reason = (errors or lines[-1:] or [f"ninja ended with status {status}"])[0].strip()
        raise BuildError(f"compiling failed: {reason} (everything is in {log})", output)
    os.replace(folder / "new.so", target)
    watcher.finished(time.perf_counter() - started, output)


def _copy_sources(sources: dict[str, bytes], folder: Path) -> None:
    """Make `folder` hold exactly the sources; what is as it should be keeps its time."""
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in sources:
            path.unlink()
    for name, content in sources.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _ninja_file(recipe: _Recipe, torch_folder: Path) -> str:
    def command(*words: str) -> str:
        return shlex.join(words).replace("$", "$$")

    cxx = _compiler_command()
    include = ("-Icsrc", "-isystem", f"{torch_folder}/include")
    # No path to PyTorch goes into the library: the loader finds it by name, already loaded.
    torch_library = (f"-L{torch_folder}/lib", "-ltorch_cpu", "-Wl,-z,defs")
    objects = recipe.objects
    lines = [
        "rule compile",
        f"  command = {command(*cxx, *recipe.flags, *include)} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $in",
        "rule link",
        f"  command = {command(*cxx, *recipe.flags)} -shared -o $out $in {command(*torch_library)}",
        "  description = $out",
        *(f"build {target}: compile csrc/{source}" for source, target in objects.items()),
        f"build new.so: link {' '.join(objects.values())}",
    ]
    return "\n".join(lines) + "\n"


def _run(command: list[str], log: Path, lock: int, watcher: Watcher) -> tuple[int, str]:
    """Run ninja; returns its status and what the compilers said."""
    said = []
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=[lock],
            env=os.environ | {"NINJA_STATUS": "[%f/%t] "},
        ) as ninja,
    ):
        assert ninja.stdout is not None
        for line in ninja.stdout:
            file.write(line)
            step = re.match(r"\[\d+/\d+\] (.*)", line)
            if step:
                watcher.advanced(step.group(1))
            elif not line.startswith("ninja: "):
                said.append(line)
    return ninja.returncode, "".join(said)
