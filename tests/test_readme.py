"""The README's examples run as they are printed."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def _example(code: str) -> object:
    needs_model = "tilewise.model" in code
    return pytest.param(code, marks=pytest.mark.model if needs_model else ())


@pytest.mark.parametrize("code", map(_example, EXAMPLES), ids=range(len(EXAMPLES)))
def test_example_runs(code, run_python):
    run_python(code)


def test_there_is_an_example_for_every_user():
    assert len(EXAMPLES) == 3


def test_links_point_to_files():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).resolve().parents[1] / target).exists(), target
