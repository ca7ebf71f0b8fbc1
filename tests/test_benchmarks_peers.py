"""The contest with other engines: everyone gets a row, whatever happens to them."""

from __future__ import annotations

import textwrap

import pytest

from tilewise.benchmarks import peers
from tilewise.benchmarks.peers import Contest, Rival, RivalError, Score, run, turns
from tilewise.benchmarks.peers_report import Results, engines_grid

ENGINES = """
import os, time

class Steady:
    version = "1.2"

    def __init__(self, step="1"):
        self.step = int(step)

    def open(self, path, threads, context):
        print("noise on stdout must not reach the pipe")

    def generate(self, prompt, count):
        time.sleep(0.001 * count)
        return [self.step * i for i in range(count)], 0.0005, len(prompt)

class Crashing(Steady):
    def generate(self, prompt, count):
        if len(prompt) > 8:
            print("illegal instruction, says the engine", flush=True)
            os.abort()
        return super().generate(prompt, count)

class Forgetful(Steady):
    def generate(self, prompt, count):
        return list(range(count - 1)), 0.0005, len(prompt)

class Unloadable(Steady):
    def open(self, path, threads, context):
        raise OSError("no such file")
"""


@pytest.fixture
def rival(tmp_path):
    source = tmp_path / "engines.py"
    source.write_text(textwrap.dedent(ENGINES))

    def make(engine, module="json", **options):
        return Rival(engine, engine, engine, module, "pip install x", options, source)

    return make


def contest(tmp_path, **changes):
    defaults = {
        "path": tmp_path / "model.gguf",
        "vocab_size": 1000,
        "threads": 1,
        "prompt": 16,
        "tokens": 4,
        "rounds": 2,
        "question": [70, 71],
        "answer": [0, 1, 5],
        "refuse": lambda tokens: None,
    }
    return Contest(**(defaults | changes))


def test_everyone_has_a_turn_each_round_and_another_begins():
    assert list(turns(["a", "b", "c"], 2)) == [
        *((0, "a"), (0, "b"), (0, "c")),
        *((1, "b"), (1, "c"), (1, "a")),
    ]


def test_prompts_are_the_same_for_all_and_new_in_every_round(tmp_path):
    asked = contest(tmp_path)
    prompts = [tuple(asked.prompt_ids(round, 16)) for round in range(5)]
    assert prompts == [tuple(asked.prompt_ids(round, 16)) for round in range(5)]
    assert len({prompt[:2] for prompt in prompts}) == 5


def test_who_crashes_or_fails_is_reported_and_the_others_go_on(tmp_path, rival):
    rivals = [
        rival("Steady"),
        rival("Crashing"),
        rival("Forgetful"),
        rival("Unloadable"),
        rival("Absent", module="no_such_module"),
    ]
    steady, crashing, forgetful, unloadable, absent = run(contest(tmp_path), rivals)
    assert steady.reason is None
    assert steady.version == "1.2"
    assert steady.same_tokens == 2
    assert len(steady.prompt_rates) == len(steady.short_rates) == len(steady.long_rates) == 2
    assert "crashed (killed by SIGABRT)" in crashing.reason
    assert "illegal instruction" in crashing.reason
    assert forgetful.reason == "wrote 2 tokens, asked for 3"
    assert unloadable.reason == "OSError: no such file"
    assert absent.reason == "not installed: pip install x"


def test_our_own_model_must_write_what_its_definition_does(tmp_path, rival, monkeypatch):
    monkeypatch.setattr(Rival, "is_exact", True)
    asked = contest(tmp_path, refuse=lambda tokens: f"wrong: {tokens}")
    (score,) = run(asked, [rival("Steady", step="2")])
    assert score.reason == "wrong: [0, 2, 4]"
    assert not score.prompt_rates


def test_engines_that_answer_nothing_are_given_up(tmp_path, rival, monkeypatch):
    monkeypatch.setattr(peers, "_PATIENCE", 0.0)
    contestant = peers.Contestant(rival("Steady"))
    try:
        with pytest.raises(RivalError, match="gave no answer"):
            contestant.generate([1], 1)
    finally:
        contestant.close()


def test_the_table_has_every_rate_beside_ours():
    ours = Score("tilewise", "tilewise", "0.1", prompt_rates=[100.0, 300.0, 200.0])
    ours.short_rates, ours.long_rates, ours.same_tokens = [50.0], [40.0], 32
    other = Score("other", "Other", "9", prompt_rates=[100.0], short_rates=[100.0])
    absent = Score("absent", "Absent", reason="not installed: pip install absent")
    results = Results({}, "a model", 512, 128, 3, 32, [ours, other, absent], [])
    grid = engines_grid(results)
    assert grid.rows[0][:3] == ["tilewise 0.1", "200 (100 - 300)", "50.0 (50.0 - 50.0)"]
    assert grid.rows[1][:3] == ["Other 9", "100 (100 - 100), 2.00x", "100 (100 - 100), 0.50x"]
    assert grid.rows[2] == ["Absent", "-", "-", "-", "-", "-"]
    assert "Absent: not installed: pip install absent" in grid.notes
