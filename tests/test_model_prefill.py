"""Prompts that are recorded and replayed: the same logits as the model's own."""

from __future__ import annotations

import gguf
import pytest
import torch
from model_files import write_llama_gguf

import tilewise
from tilewise import native
from tilewise.model import GPT, GPTConfig, LanguageModel, load
from tilewise.model.layers import put
from tilewise.model.prefill import Prefill
from tilewise.paged import PagedKVCache

pytestmark = pytest.mark.skipif(
    native.why_not_cpu() is not None, reason=native.why_not_cpu() or "the C++ kernels are there"
)

TYPES = gguf.GGMLQuantizationType
FILES = {
    "v as q and k": {"v_type": TYPES.Q4_1},
    "v of its own type": {"v_type": TYPES.Q8_0},
    "experts": {"experts": 4},
}


def heads_with_norms() -> GPT:
    """As Qwen3 has them, quantized here."""
    config = GPTConfig(
        vocab_size=97,
        max_positions=128,
        layers=2,
        dim=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        ffn_dim=96,
        qk_norm=True,
        tied_embeddings=False,
    )
    torch.manual_seed(0)
    gpt = tilewise.quantize_(GPT(config).requires_grad_(False), group_size=32)
    put(gpt, "embedding", {"weight": [tilewise.quantize(gpt.embedding.weight, "int8")]})
    return gpt


@pytest.fixture(scope="module", params=[*FILES, "heads with norms"])
def gpt(tmp_path_factory, request) -> GPT:
    """A model whose every weight is quantized but for norms and routers."""
    if request.param == "heads with norms":
        return heads_with_norms()
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return load(write_llama_gguf(path, **FILES[request.param])).gpt


CALLS = [[13, 20], [1, 1], [2, 30], [31, 1], [16, 16], [1, 7]]
"""How many tokens of each of two sequences."""


def scored(gpt: GPT, size: int = 2) -> tuple[list[torch.Tensor], Prefill]:
    config = gpt.config
    cache = PagedKVCache(config.layers, 60, 3, config.kv_heads, config.head_dim)
    sequences = [cache.add_sequence() for _ in range(size)]
    prefill = Prefill(gpt, cache, size, 33)
    generator = torch.Generator().manual_seed(0)
    logits = []
    for counts in CALLS:
        parts = [
            torch.randint(config.vocab_size, (count,), generator=generator).tolist()
            for count in counts[:size]
        ]
        logits.append(prefill(sequences, parts).clone())
    return logits, prefill


@pytest.mark.parametrize("size", [1, 2])
def test_replayed_prompts_are_the_models_own(gpt, monkeypatch, replays, size):
    scored(gpt, size)  # the model's first run prepares what is not recorded
    replays.clear()
    actual, prefill = scored(gpt, size)
    assert prefill.why_not_recorded is None
    assert replays == [(1, sum(counts[:size])) for counts in CALLS]
    monkeypatch.setattr(Prefill, "_record", lambda self: None)
    expected, _ = scored(gpt, size)
    assert len(replays) == len(CALLS)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_the_tokens_of_a_call_are_all_that_is_computed(gpt):
    """Nothing is written for those of longer calls before, neither in the cache nor beyond it."""
    scored(gpt)
    config = gpt.config
    cache = PagedKVCache(config.layers, 12, 4, config.kv_heads, config.head_dim)
    sequence, prefill = cache.add_sequence(), Prefill(gpt, cache, 1, 16)
    prefill([sequence], [list(range(16))])
    assert prefill.has_recording
    for layer in range(config.layers):
        cache.layer(layer).k.fill_(7)
    prefill([sequence], [[1, 2, 3]])
    for layer in range(config.layers):
        rows = (cache.layer(layer).k.flatten(0, 1) != 7).any(-1).any(-1)
        assert rows.nonzero().flatten().tolist() == [16, 17, 18]


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 512])
def test_prompts_in_chunks_give_what_the_model_gives(gpt, monkeypatch, replays, chunk_size):
    """Also where there are as many prompts as a chunk has tokens."""
    prompts = [[5], [9], [3, 14, 15, 9, 2, 6, 5], [8]]
    lm = LanguageModel(gpt)
    lm.generate(prompts, 1)
    actual = lm.generate(prompts, 3, chunk_size=chunk_size, ignore_eos=True)
    again = lm.generate(prompts, 3, chunk_size=chunk_size, ignore_eos=True)
    assert any(rows is not None for _, rows in replays)
    monkeypatch.setattr(Prefill, "_record", lambda self: None)
    expected = LanguageModel(gpt).generate(prompts, 3, chunk_size=chunk_size, ignore_eos=True)
    for results in (actual, again):
        assert [r.token_ids for r in results] == [r.token_ids for r in expected]


@pytest.mark.parametrize(("prompts", "tokens"), [(1, 4), (2, 8), (4, 16), (4, 4)])
def test_heads_of_all_prompts_may_be_as_many_as_the_tokens_of_a_call(monkeypatch, prompts, tokens):
    """Those behind the last layer's keys are of the prompts, however few tokens there are."""
    gpt = heads_with_norms()
    config = gpt.config
    assert prompts * config.heads % tokens == 0

    def scored() -> torch.Tensor:
        cache = PagedKVCache(config.layers, 20, 4, config.kv_heads, config.head_dim)
        sequences = [cache.add_sequence() for _ in range(prompts)]
        prefill, logits = Prefill(gpt, cache, prompts, tokens), []
        for extra in (0, tokens - prompts, (tokens - prompts) // 2):
            parts = [[3 + i] * (1 + extra * (i == 0)) for i in range(prompts)]
            logits.append(prefill(sequences, parts).clone())
        return torch.cat(logits)

    scored()
    actual = scored()
    monkeypatch.setattr(Prefill, "_record", lambda self: None)
    assert torch.equal(actual, scored())


def test_more_tokens_than_a_recording_has_are_computed_all_the_same(gpt, replays):
    lm, prompt = LanguageModel(gpt), [1 + i % 60 for i in range(gpt.config.max_positions - 2)]
    expected = lm.generate(prompt, 1).token_ids
    lm.generate(prompt[:9], 1)
    replays.clear()
    lm.generate(prompt[:9], 1, chunk_size=1 << 40)
    assert len(replays) == 1
    cache = PagedKVCache(gpt.config.layers, 60, 16, gpt.config.kv_heads, gpt.config.head_dim)
    prefill = Prefill(gpt, cache, 1, 5)
    logits = prefill([cache.add_sequence()], [prompt])
    assert len(replays) == 1
    assert int(logits.argmax()) == expected[0]


def test_a_model_that_cannot_be_recorded_says_why(tmp_path):
    gpt = load(write_llama_gguf(tmp_path / "plain.gguf", quantized=False)).gpt
    logits, prefill = scored(gpt)
    assert "aten.mm" in prefill.why_not_recorded
    assert all(x.isfinite().all() for x in logits)
