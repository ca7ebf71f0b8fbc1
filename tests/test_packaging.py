"""How the package is laid out, installed and imported."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tilewise import build

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "gguf",
    "jinja2",
    "matplotlib",
    "rich",
    "safetensors",
    "tokenizers",
    "transformers",
    "triton",
)


def test_kernels_is_a_bare_source_root():
    """A package called `kernels` would hide Hugging Face's, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "__init__.py").exists()


def test_transformers_imports_from_the_repository_root():
    code = "from transformers.models.llama.modeling_llama import LlamaForCausalLM as m; print(m)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM" in done.stdout


def test_importing_costs_only_torch(run_python):
    """Nothing heavy is loaded and nothing is written, built or measured."""
    done = run_python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import tilewise\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})\n"
    )
    loaded = set(done.stdout.split())
    assert "tilewise" in loaded
    assert not loaded & set(HEAVY)


def test_every_public_name_exists_and_is_documented():
    import tilewise

    for name in tilewise.__all__:
        value = getattr(tilewise, name)
        if callable(value):
            assert value.__doc__, name
            assert value.__module__.startswith("tilewise."), name


def test_every_operation_is_public():
    import tilewise
    from tilewise.dispatch import OPS

    assert set(OPS) <= set(tilewise.__all__)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A clean copy of the sources."""
    source = tmp_path_factory.mktemp("checkout")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout.split()  # fmt: skip
    if not files:
        pytest.skip("not a git checkout")
    for name in files:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="module")
def wheel_file(checkout, tmp_path_factory) -> Path:
    """A wheel built from a source distribution, so that both must be complete."""
    folder = tmp_path_factory.mktemp("wheel")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (source,) = folder.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "-q", "-w", str(folder), str(source)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(wheel_file) -> list[str]:
    """The names in the wheel."""
    return zipfile.ZipFile(wheel_file).namelist()


def test_the_wheel_holds_one_package(wheel):
    tops = {name.split("/")[0] for name in wheel if ".dist-info/" not in name}
    assert tops == {"tilewise"}


def test_the_wheel_holds_every_source_file(wheel):
    for source, target in [
        (ROOT / "kernels" / "tilewise", "tilewise"),
        (ROOT / "model", "tilewise/model"),
        (ROOT / "benchmarks", "tilewise/benchmarks"),
    ]:
        for path in source.rglob("*.py"):
            assert f"{target}/{path.relative_to(source).as_posix()}" in wheel
    assert "tilewise/py.typed" in wheel
    assert "tilewise/model/the_time_machine.txt" in wheel


def test_an_installed_package_builds_from_its_own_sources(wheel_file, tmp_path, run_python):
    """The C++ sources in the wheel are found there, and are those of the checkout."""
    zipfile.ZipFile(wheel_file).extractall(tmp_path / "installed")
    code = (
        "from tilewise import build; print(build.source_folder(), build._recipe('avx2', '').name)"
    )
    folder, name = run_python(code, PYTHONPATH=str(tmp_path / "installed")).stdout.split()
    assert folder == str(tmp_path / "installed" / "tilewise" / "csrc")
    assert name == build._recipe("avx2", "").name
