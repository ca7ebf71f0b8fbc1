"""Perplexity and divergence: counted by hand, and what quantization does to them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from model_files import write_llama_gguf

from tilewise.cli import main
from tilewise.model import load
from tilewise.model.layers import set_act
from tilewise.model.quality import (
    bits_per_weight,
    cut,
    dequantized,
    logits_of,
    measure_quality,
    quality_text,
    requantized,
)
from tilewise.quant import QuantLinear


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_llama_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def gpt(path):
    return load(path).gpt


def windows(vocab_size: int, length: int = 16, count: int = 3) -> list[torch.Tensor]:
    ids = torch.randint(vocab_size, (length * count,), generator=torch.Generator().manual_seed(0))
    return cut(ids.tolist(), length)


def test_the_second_half_of_each_window_is_scored(gpt):
    logits = logits_of(gpt, "naive")
    parts = windows(gpt.config.vocab_size)
    own, _ = measure_quality(logits, {}, parts)
    nll = [F.cross_entropy(logits(w)[8:15].double(), w[9:], reduction="none") for w in parts]
    assert own.tokens == 3 * 7
    assert own.perplexity == pytest.approx(float(torch.cat(nll).mean().exp()), rel=1e-9)


def test_a_model_does_not_diverge_from_itself(gpt):
    logits = logits_of(gpt, "naive")
    own, found = measure_quality(logits, {"same": logits}, windows(gpt.config.vocab_size))
    assert abs(found["same"].kl) + abs(own.kl) < 1e-12  # the rounding of float64
    assert found["same"].same_top == 1
    assert found["same"].perplexity == own.perplexity


def test_divergence_is_the_sum_by_hand(gpt):
    p, q = (torch.randn(8, 5, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    _, found = measure_quality(lambda w: p, {"q": lambda w: q}, cut([1, 2, 3, 4] * 2, 8))
    expected = [
        float(F.kl_div(q[i].log_softmax(0), p[i].softmax(0), reduction="sum")) for i in (4, 5, 6)
    ]
    assert found["q"].kl == pytest.approx(sum(expected) / 3, rel=1e-5)
    assert found["q"].same_top == (p[4:7].argmax(-1) == q[4:7].argmax(-1)).float().mean()


def test_rougher_formats_diverge_more(gpt):
    dense = dequantized(gpt)
    models = {scheme: requantized(dense, scheme) for scheme in ("int8", "int4")}
    assert 8 < bits_per_weight(models["int8"]) < 9.5
    assert 4 < bits_per_weight(models["int4"]) < 5.5
    candidates = {name: logits_of(model) for name, model in models.items()}
    candidates["itself"] = logits_of(gpt)
    _, found = measure_quality(
        logits_of(dense, "naive"), candidates, windows(gpt.config.vocab_size, 32)
    )
    assert found["itself"].kl < 1e-8 < found["int8"].kl < found["int4"].kl


@pytest.mark.parametrize("act", ["int8", "fp8"])
def test_rounded_activations_cost_something_and_not_much(gpt, act):
    if act == "fp8":
        gpt = requantized(dequantized(gpt), "fp8")
    exact, rounded = logits_of(gpt), logits_of(gpt)

    def in_mode(window):
        set_act(gpt, act)
        try:
            return rounded(window)
        finally:
            set_act(gpt, None)

    _, found = measure_quality(exact, {act: in_mode}, windows(gpt.config.vocab_size, 32))
    assert 1e-8 < found[act].kl < 0.05


def test_the_output_head_takes_activations_as_they_are(gpt):
    tied, own = copy.deepcopy(gpt), requantized(dequantized(gpt), "int8")
    assert isinstance(own.head, QuantLinear)
    for model, head in ((tied, tied.embedding), (own, own.head)):
        set_act(model, "int8")
        layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
        assert {layer.act for layer in layers if layer is not head} == {"int8"}
        assert head.act is None


def test_a_mode_that_a_layer_does_not_go_with_changes_none(gpt):
    with pytest.raises(ValueError, match="act: 'fp8' needs a weight in format fp8"):
        set_act(gpt, "fp8")
    with pytest.raises(ValueError, match="act: must be None, 'int8' or 'fp8', got 'int4'"):
        set_act(gpt, "int4")
    assert {layer.act for layer in gpt.modules() if isinstance(layer, QuantLinear)} == {None}


def test_windows_do_not_overlap_and_leave_the_rest_out():
    parts = cut(list(range(11)), 5, bos_id=99)
    assert [part.tolist() for part in parts] == [[99, 1, 2, 3, 4], [99, 6, 7, 8, 9]]


@pytest.mark.parametrize(
    ("ids", "window", "message"),
    [([1] * 9, 3, "window: must be at least 4, got 3"), ([1] * 7, 8, "ids: must fill a window")],
)
def test_bad_windows(ids, window, message):
    with pytest.raises(ValueError, match=message):
        cut(ids, window)


def test_the_text_comes_with_the_package():
    text = quality_text()
    assert text.startswith("The Time Traveller")
    assert 3000 < len(text.split()) < 6000


def test_the_command(path, tmp_path, capsys):
    # A model of 256 positions: windows are as long as it takes.
    file = tmp_path / "quality.json"
    arguments = ["--tokens", "600", "--formats", "int8", "--dtypes", "bfloat16"]
    arguments += ["--json", str(file), "--quiet"]
    assert main(["bench", "--quality", "--model", str(path), *arguments]) == 0
    found = json.loads(file.read_text())
    assert abs(found["dequantized, float32, naive"]["kl"]) < 1e-12
    assert found["as loaded"]["kl"] < found["int8"]["kl"]
    assert found["as loaded"]["kl"] < found["as loaded, bfloat16"]["kl"]
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "100"], "--tokens: must be at least"),
        (["--formats", "int5"], "must be some of int8,"),
        (["--dtypes", "float64"], "must be some of bfloat16,float16, or all, got 'float64'"),
    ],
)
def test_bad_options(arguments, message, path, capsys):
    assert main(["bench", "--quality", "--model", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err
