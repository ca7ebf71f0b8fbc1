"""How the package is laid out, installed and imported."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
def wheel(tmp_path_factory) -> list[str]:
    """The names in a wheel built from a clean copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
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
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "-q", "-w", str(folder), str(source)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built).namelist()


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
