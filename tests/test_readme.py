"""The README's examples run as they are printed."""

import re
from pathlib import Path

import pytest

from tilewise.dispatch import OPS

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def _example(code: str) -> object:
    needs_model = "tilewise.model" in code
    return pytest.param(code, marks=pytest.mark.model if needs_model else ())


@pytest.mark.parametrize("code", [_example(code) for code in EXAMPLES])
def test_example_runs(code, run_python):
    run_python(code)


def test_there_is_an_example_for_every_user():
    assert len(EXAMPLES) == 3


def test_links_point_to_files():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).resolve().parents[1] / target).exists(), target


def test_the_matrix_is_what_is_registered():
    section = README.split("## Operations and backends")[1].split("\n## ")[0]
    rows = [row.split("|") for row in re.findall(r"^\| (`.*)\|$", section, re.MULTILINE)]
    table = {
        op: ["yes" in cell for cell in cells[:5]]
        for operations, *cells in rows
        for op in re.findall(r"`(\w+)`", operations)
    }
    columns = ("naive", "torch", "cpu", "triton", "cuda")
    assert table == {
        name: [backend in op.backends for backend in columns] for name, op in OPS.items()
    }
