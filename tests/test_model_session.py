"""What `generate` keeps for its next call, and when it must not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from model_files import write_llama_gguf
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

import tilewise
from tilewise import native
from tilewise.graph import CpuGraph
from tilewise.model import GPT, GPTConfig, LanguageModel, load, session
from tilewise.model.layers import set_act

pytestmark = pytest.mark.skipif(
    native.why_not_cpu() is not None, reason=native.why_not_cpu() or "the C++ kernels are there"
)

TINY = GPTConfig(
    vocab_size=8, max_positions=8, layers=1, dim=8, heads=1, kv_heads=1, head_dim=8, ffn_dim=8
)
PROMPT = [3, 14, 15, 9, 2, 6]
LONG = [1 + i % 40 for i in range(1100)]


@pytest.fixture
def captures(monkeypatch) -> list[int]:
    """Fills up with the rows of what is recorded."""
    made: list[int] = []
    capture = CpuGraph.capture.__func__

    def counted(cls, function, rows=0):
        result = capture(cls, function, rows)
        made.append(rows)
        return result

    monkeypatch.setattr(CpuGraph, "capture", classmethod(counted))
    return made


@pytest.fixture
def lm(tmp_path) -> LanguageModel:
    """A model that has left recordings of a prompt and of decoding it."""
    model = load(write_llama_gguf(tmp_path / "tiny.gguf"))
    for _ in range(3):
        generated(model)
    assert len(model._idle) == 1
    return model


def generated(model: LanguageModel, prompt=PROMPT, **options) -> list[int]:
    return model.generate(prompt, 6, ignore_eos=True, **options).token_ids


def fresh(model: LanguageModel, prompt=PROMPT, **options) -> list[int]:
    """What the same weights generate where nothing is kept."""
    return generated(LanguageModel(copy.deepcopy(model.gpt)), prompt, **options)


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:2], PROMPT * 3], ids=len)
def test_the_next_call_records_nothing(lm, captures, replays, prompt):
    expected = fresh(lm, prompt)
    captures.clear()
    replays.clear()
    assert generated(lm, prompt) == expected
    assert not captures
    assert replays[0] == (1, len(prompt))


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_size": 4},
        {"temperature": 0.8, "seed": 1},
        {"temperature": 0.8, "seed": 2, "repetition_penalty": 1.4},
        {"cache_dtype": "int8"},
        {"cache_dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_other_options_are_heeded(lm, options):
    other = LanguageModel(copy.deepcopy(lm.gpt))
    for _ in range(2):
        assert generated(lm, **options) == fresh(lm, **options)
        generated(other, **options)
        (left,), (expected,) = lm._idle, other._idle
        assert [x.dtype for x in left.cache.layer(0)[:2]] == [
            x.dtype for x in expected.cache.layer(0)[:2]
        ]
        assert generated(lm) == fresh(lm)


def test_a_longer_text_gets_a_larger_cache(lm):
    assert generated(lm, LONG[:90]) == fresh(lm, LONG[:90])
    longest = lm.gpt.config.max_positions - 6
    assert generated(lm, LONG[:longest]) == fresh(lm, LONG[:longest])
    prompts = [LONG[: 90 + i] for i in range(14)]
    together = lm.generate(prompts, 4, ignore_eos=True)
    assert [g.token_ids for g in together] == [generated(lm, p)[:4] for p in prompts]


def replaced_layer(gpt) -> None:
    shape = gpt.blocks[0].ffn.down.weight.shape
    weight = tilewise.quantize(torch.randn(shape), group_size=32)
    gpt.blocks[0].ffn.down = tilewise.QuantLinear(weight)


def new_weights(gpt) -> None:
    for parameter in gpt.parameters():
        parameter.data = torch.rand_like(parameter)


def changed_weights(gpt) -> None:
    for parameter in gpt.parameters():
        parameter.data.mul_(torch.rand_like(parameter))


def another_forward(gpt) -> None:
    ffn = gpt.blocks[1].ffn
    ffn.forward = lambda x: torch.zeros_like(x)


def no_second_block(gpt) -> None:
    del gpt.blocks[1]


def a_bias(gpt) -> None:
    layer = gpt.blocks[0].ffn.down
    layer.bias = torch.nn.Parameter(torch.ones(layer.out_features))


class Nothing(type(GPT(TINY).blocks[0].ffn)):
    def forward(self, x):
        return torch.zeros_like(x)


def another_class(gpt) -> None:
    gpt.blocks[0].ffn.__class__ = Nothing


@pytest.mark.parametrize(
    "change",
    [
        lambda gpt: set_act(gpt, "int8"),
        lambda gpt: setattr(gpt.blocks[0].ffn_norm, "eps", 3.0),
        replaced_layer,
        new_weights,
        changed_weights,
        another_forward,
        no_second_block,
        a_bias,
        another_class,
    ],
    ids=["act", "eps", "layer", "new weights", "weights", "forward", "blocks", "bias", "class"],
)
def test_a_model_that_was_changed_is_computed_anew(lm, change):
    prompt = PROMPT * 2
    before = lm.generate(prompt, 1).token_ids, logits(lm.gpt, prompt)
    change(lm.gpt)
    assert not torch.equal(logits(lm.gpt, prompt), before[1])  # else nothing would be tested
    for _ in range(3):
        run = tilewise.model.generate._Run(lm, [prompt], 1)
        seen = []
        run._choose = lambda x, sequences, seen=seen: seen.append(x.clone()) or [0]
        list(run.steps())
        torch.testing.assert_close(seen[0], logits(lm.gpt, prompt), atol=1e-4, rtol=1e-4)


def test_a_method_that_is_patched_for_a_while_is_called(lm, monkeypatch):
    expected = generated(lm)
    for owner in (lm.gpt.blocks[0].ffn, type(lm.gpt.blocks[0].ffn)):
        calls = []
        with monkeypatch.context() as patch:
            forward = owner.forward
            patch.setattr(owner, "forward", lambda *a, f=forward, c=calls: c.append(a) or f(*a))
            assert generated(lm) == expected
        assert calls
        assert generated(lm) == expected


@pytest.mark.parametrize(
    "register", [register_module_forward_hook, register_module_forward_pre_hook]
)
def test_a_hook_on_all_modules_is_called(lm, register):
    expected, seen = generated(lm), []
    handle = register(lambda module, *args: seen.append(module))
    assert generated(lm) == expected
    handle.remove()
    assert seen.count(lm.gpt) == 6
    assert generated(lm) == expected


@pytest.fixture
def plain(tmp_path) -> LanguageModel:
    """One that is not quantized, and has left a recording of decoding."""
    model = load(write_llama_gguf(tmp_path / "plain.gguf", quantized=False))
    generated(model)
    generated(model)
    return model


class Hidden(torch.nn.Module):
    """A linear layer whose weight is no parameter."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.held = [weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.held[0])


def turned_in_place(gpt) -> None:
    weight = gpt.blocks[0].attention.out.weight
    weight.data = weight.data.t()


def hidden(gpt) -> None:
    gpt.blocks[0].ffn.down = Hidden(gpt.blocks[0].ffn.down.weight.detach())


@pytest.mark.parametrize("change", [turned_in_place, hidden, new_weights])
def test_a_plain_model_that_was_changed_is_computed_anew(plain, change):
    before = generated(plain)
    change(plain.gpt)
    assert generated(plain) == fresh(plain)
    if change is hidden:
        assert generated(plain) == before
        plain.gpt.blocks[0].ffn.down.held[0] = -plain.gpt.blocks[0].ffn.down.held[0]
        assert generated(plain) == fresh(plain)
    assert generated(plain) != before


def test_a_layer_of_another_depth_is_refused(plain):
    plain.gpt.blocks[0].ffn.down = torch.nn.Linear(90, 64, bias=False)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        generated(plain, chunk_size=4)


def logits(gpt, prompt) -> torch.Tensor:
    with torch.no_grad():
        return gpt(torch.tensor([prompt]))[:, -1]


def test_a_kernel_of_ones_own_is_called(lm, monkeypatch):
    rms_norm, calls = tilewise.dispatch.OPS["rms_norm"], []
    own = next(impl for impl in rms_norm.impls if impl.name == "cpu")

    def counted(*args, **kwargs):
        calls.append(args)
        return own.fn(*args, **kwargs)

    theirs = tilewise.dispatch.Impl(own.name, counted)
    monkeypatch.setattr(rms_norm, "impls", (theirs, *rms_norm.impls))
    generated(lm)
    assert calls


def test_another_backend_and_a_hook_are_heeded(lm):
    seen, expected = [], fresh(lm)
    handle = lm.gpt.blocks[0].register_forward_hook(lambda *args: seen.append(args))
    assert generated(lm) == expected
    handle.remove()
    assert len(seen) == 6
    with tilewise.use_backend("naive"):
        assert generated(lm) == fresh(lm)
    assert generated(lm) == expected


def test_calls_at_the_same_time_have_caches_of_their_own(lm):
    prompts = [PROMPT, PROMPT[:3], [7]]
    expected = [fresh(lm, prompt) for prompt in prompts]
    streams = [lm.stream(prompt, 6, ignore_eos=True) for prompt in prompts]
    running = list(streams)
    while running:
        for stream in list(running):
            if next(stream, None) is None:
                running.remove(stream)
    assert [stream.generation.token_ids for stream in streams] == expected
    assert len(lm._idle) == 1
    assert generated(lm) == expected[0]


def test_a_text_that_nobody_reads_to_its_end_leaves_its_pages(lm, captures):
    stream = lm.stream(PROMPT, 40, ignore_eos=True)
    next(stream)
    del stream
    (left,) = lm._idle
    assert left.cache.allocator.num_free_pages == left.cache.allocator.num_pages
    expected = fresh(lm)
    captures.clear()
    assert generated(lm) == expected
    assert not captures


def test_a_text_that_nobody_begins_to_read_takes_nothing(lm):
    stream = lm.stream(PROMPT, 40)
    del stream
    with pytest.raises(ValueError, match="dtype: must be"):
        lm.stream(PROMPT, cache_dtype="int5")
    assert len(lm._idle) == 1


def test_few_recordings_of_prompts_are_held(lm):
    """Of prompts in small chunks, which are sometimes one prompt's and sometimes nine's."""
    prompts = [[7]] * 9 + [PROMPT[:2]] * 5 + [PROMPT[:4]] * 4 + [PROMPT * 3]
    run = tilewise.model.generate._Run(lm, prompts, 2, chunk_size=9, ignore_eos=True)
    held = []
    for _ in run.steps():
        held.append({size for size, _ in run._session._prefills})
    assert max(map(len, held)) == session._MOST_PREFILLS
    assert len(set().union(*held)) >= 4
    expected = [fresh(lm, prompt)[:2] for prompt in prompts]
    assert [s.generation.token_ids for s in run.sequences] == expected


def test_an_error_leaves_nothing(lm, monkeypatch):
    monkeypatch.setattr(tilewise.model.generate._Run, "_choose", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generated(lm)
    assert not lm._idle
    monkeypatch.undo()
    assert generated(lm) == fresh(lm)


def test_a_large_cache_is_not_kept(lm, monkeypatch):
    monkeypatch.setattr(session, "_MOST_KEPT", lm._idle[0].cache.nbytes - 1)
    generated(lm)
    assert not lm._idle


def test_a_model_that_cannot_be_recorded_keeps_nothing(tmp_path):
    model = LanguageModel(GPT(TINY.replace(norm="layer_norm", ffn="gelu", positions="learned")))
    model.generate([1, 2], 4)
    assert not model._idle


def test_a_model_of_which_decoding_alone_is_recorded_keeps_that(tmp_path, captures, replays):
    model = load(write_llama_gguf(tmp_path / "plain.gguf", quantized=False))
    expected = generated(model)
    generated(model)
    captures.clear()
    replays.clear()
    assert generated(model) == expected
    assert not captures
    assert {rows for _, rows in replays} == {None}


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_copy_has_none_of_the_recordings(lm, copied):
    lm.tokenizer = None
    other = copied(lm)
    assert not other._idle
    assert len(lm._idle) == 1
    assert generated(other) == generated(lm)


def test_inference_mode_ends_with_its_block(lm):
    expected = generated(lm)
    lm._idle.clear()
    with torch.inference_mode():
        for _ in range(2):
            assert generated(lm) == expected
    assert generated(lm) == expected
    assert generated(lm, cache_dtype="int8") == fresh(lm, cache_dtype="int8")
