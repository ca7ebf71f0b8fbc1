"""Decoding steps that are recorded and replayed: the same tokens as the model's own."""

from __future__ import annotations

import copy
import math
import re

import gguf
import pytest
import torch
from model_files import write_llama_gguf

import tilewise
from tilewise import native
from tilewise.model import generate, load
from tilewise.model.decode import MOST_STEPS, Decoder, Sampler
from tilewise.model.layers import put
from tilewise.model.recorded import RecordedModel
from tilewise.paged import PagedKVCache

needs_cpu = pytest.mark.skipif(
    native.why_not_cpu() is not None, reason=native.why_not_cpu() or "the C++ kernels are there"
)


TYPES = gguf.GGMLQuantizationType
MODELS = {
    "plain weights": {"quantized": False},
    "v as q and k": {"v_type": TYPES.Q4_1},
    "v of its own type": {"v_type": TYPES.Q8_0},
    "experts": {"experts": 4},
}


@pytest.fixture(scope="module", params=MODELS)
def gpt(tmp_path_factory, request):
    """A model without an operation that is PyTorch's alone."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return load(write_llama_gguf(path, **MODELS[request.param])).gpt


def decoded(gpt, steps: int = 12, size: int = 2) -> tuple[list[torch.Tensor], Decoder]:
    config = gpt.config
    cache = PagedKVCache(config.layers, 40, 3, config.kv_heads, config.head_dim)
    sequences = [cache.add_sequence() for _ in range(size)]
    decoder = Decoder(gpt, cache, size)
    generator = torch.Generator().manual_seed(0)
    logits = []
    for _ in range(steps):
        tokens = torch.randint(config.vocab_size, (size,), generator=generator).tolist()
        logits.append(decoder.step(sequences, tokens).clone())
    return logits, decoder


def same(logits: torch.Tensor, others: torch.Tensor, gpt) -> bool:
    """Whether they are, to the last bit where the linear layers are ours in any case."""
    if isinstance(gpt.embedding, torch.nn.Embedding):
        return torch.allclose(logits, others, rtol=1e-4, atol=1e-4)
    return torch.equal(logits, others)


def started(gpt) -> tuple[Decoder, int]:
    """A decoder that has taken four steps of one sequence, and the sequence."""
    config = gpt.config
    cache = PagedKVCache(config.layers, 8, 4, config.kv_heads, config.head_dim)
    sequence, decoder = cache.add_sequence(), Decoder(gpt, cache, 1)
    for token in range(4):
        decoder.step([sequence], [token])
    return decoder, sequence


@needs_cpu
def test_replayed_steps_are_the_models_own(gpt, monkeypatch):
    actual, decoder = decoded(gpt)
    assert decoder.why_not_recorded is None
    monkeypatch.setattr(Decoder, "_record", lambda self: None)
    expected, _ = decoded(gpt)
    for a, e in zip(actual, expected, strict=True):
        assert same(a, e, gpt)


@needs_cpu
def test_what_the_first_run_of_a_model_prepares_is_not_recorded(gpt):
    gpt._rotary = None
    _, decoder = decoded(gpt, steps=1)
    assert "computed by PyTorch" in decoder.why_not_recorded  # the tables of positions
    gpt._rotary = None
    expected, decoder = decoded(gpt, steps=3)
    assert decoder.why_not_recorded is None
    actual, decoder = decoded(gpt, steps=1)
    assert decoder.why_not_recorded is None
    assert same(actual[0], expected[0], gpt)


def test_another_backend_is_not_recorded(gpt):
    with tilewise.use_backend("naive"):
        logits, decoder = decoded(gpt)
    assert "computed by PyTorch" in decoder.why_not_recorded
    assert all(x.isfinite().all() for x in logits)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_recorded_in_any_dtype(tmp_path, monkeypatch, replays, dtype):
    """Of sequences that are routed apart, and in a cache of their dtype."""
    lm = load(write_llama_gguf(tmp_path / "moe.gguf", experts=8), dtype=dtype)
    prompts = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10], [11]]
    recorded = [g.token_ids for g in lm.generate(prompts, 20, ignore_eos=True)]
    assert sum(times for times, _ in replays) >= 17  # all but the first and up to two attempts
    replays.clear()
    monkeypatch.setattr(RecordedModel, "_record", lambda self: None)
    assert [g.token_ids for g in copy.copy(lm).generate(prompts, 20, ignore_eos=True)] == recorded
    assert not replays


@needs_cpu
@pytest.mark.parametrize(
    ("file", "backends", "what"),
    [
        ({"quantized": False}, {"rms_norm": "naive"}, "aten."),
        ({}, {"router_logits": "torch"}, "aten.(linear|mm|t)"),
        ({}, {"moe": "naive"}, "aten."),
    ],
    ids=["norm", "router", "experts"],
)
def test_experts_that_are_not_recorded_say_why(tmp_path, file, backends, what):
    gpt = load(write_llama_gguf(tmp_path / "moe.gguf", experts=4, **file)).gpt
    with tilewise.use_backend(**backends):
        logits, decoder = decoded(gpt, steps=3)
    assert re.search(f"{what}.*is computed by PyTorch", decoder.why_not_recorded)
    assert all(x.isfinite().all() for x in logits)


@needs_cpu
def test_a_quantized_router_is_recorded_too(tmp_path):
    gpt = load(write_llama_gguf(tmp_path / "moe.gguf", experts=4)).gpt
    expected, _ = decoded(gpt, steps=3)
    for i, block in enumerate(gpt.blocks):
        weight = tilewise.quantize(block.ffn.router.weight, "int8")
        put(gpt, f"blocks.{i}.ffn.router", {"weight": [weight]})
        assert isinstance(block.ffn.router, tilewise.QuantLinear)
    actual, decoder = decoded(gpt, steps=3)
    assert decoder.why_not_recorded is None
    assert not torch.equal(actual[-1], expected[-1])
    torch.testing.assert_close(actual[0], expected[0], atol=0.5, rtol=0.1)


@needs_cpu
@pytest.mark.parametrize(
    "elsewhere",
    [lambda: tilewise.use_backend("naive"), lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["backend", "autocast"],
)
def test_a_recording_is_not_replayed_where_other_kernels_would_run(gpt, monkeypatch, elsewhere):
    decoder, sequence = started(gpt)
    called = []
    monkeypatch.setattr(gpt, "forward", lambda *args: called.append(args) or torch.zeros(1, 1))
    decoder.step([sequence], [4])
    assert not called
    with elsewhere():
        decoder.step([sequence], [5])
    assert called


@needs_cpu
def test_a_recording_is_not_replayed_on_weights_that_were_replaced(gpt):
    gpt = copy.deepcopy(gpt)
    decoder, sequence = started(gpt)
    for parameter in gpt.parameters():
        parameter.data = torch.zeros_like(parameter)
    assert not decoder.step([sequence], [4]).any()  # nothing is left of the last norm


@needs_cpu
def test_a_forward_hook_sees_every_step(gpt):
    decoder, sequence = started(gpt)
    seen = []
    handle = gpt.blocks[0].register_forward_hook(lambda *args: seen.append(args))
    for token in range(4, 8):
        decoder.step([sequence], [token])
    handle.remove()
    assert len(seen) == 4
    assert "hook" in decoder.why_not_recorded


@needs_cpu
def test_sequences_that_end_leave_a_smaller_step(gpt):
    model = tilewise.model.LanguageModel(gpt)
    prompts = [[1, 2, 3], [4, 5], [6]]
    together = model.generate(prompts, 9)
    for prompt, generation in zip(prompts, together, strict=True):
        assert generation.token_ids == model.generate(prompt, 9).token_ids


@needs_cpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.9, "seed": 3},
        {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.5},
        {"temperature": 0.9, "seed": 3, "stop": ["e", "5"]},
    ],
    ids=["greedy", "sampled", "penalty", "stop"],
)
def test_several_steps_at_once_choose_the_same_tokens(tmp_path, monkeypatch, replays, options):
    """Over the ends of pages, and with texts that end between two calls."""
    path = tmp_path / "tiny.gguf"
    write_llama_gguf(path)
    model = load(path)
    monkeypatch.setattr(generate, "_LONGEST_WAIT", math.inf)

    def generated():
        replays.clear()
        return model.generate([[1, 2, 3], [4, 5], [6]], 45, ignore_eos=True, **options)

    at_once = generated()
    assert max(times for times, _ in replays) == MOST_STEPS
    monkeypatch.setattr(generate, "MOST_STEPS", 1)
    one_by_one = generated()
    assert {times for times, _ in replays} == {1}
    for a, b in zip(at_once, one_by_one, strict=True):
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
    if "stop" in options:
        assert len({len(a.token_ids) for a in at_once}) > 1


def test_steps_that_cannot_be_taken_are_refused(gpt):
    cache = PagedKVCache(gpt.config.layers, 4, 4, gpt.config.kv_heads, gpt.config.head_dim)
    sequence = cache.add_sequence()
    with pytest.raises(ValueError, match="sampler: must be there"):
        Decoder(gpt, cache, 1).steps([sequence], [1], 2)
    sampler = Sampler(1, 16, "cpu", {"repetition_penalty": 1})
    with pytest.raises(ValueError, match=f"count: must be from 1 to {MOST_STEPS}, got 9"):
        Decoder(gpt, cache, 1, sampler).steps([sequence], [1], 9)
