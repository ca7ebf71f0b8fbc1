"""Generating on the paged cache gives what running the whole sequence for each token gives."""

import copy

import pytest
import torch
from model_files import write_llama_gguf

import tilewise
import tilewise.model
from tilewise.model import (
    GPT,
    GPTConfig,
    LanguageModel,
    PagedBatch,
    greedy_tokens_agree,
)
from tilewise.paged import PagedKVCache
from tilewise.testing import assert_agrees

LLAMA = GPTConfig(
    vocab_size=97,
    max_positions=128,
    layers=2,
    dim=48,
    heads=4,
    kv_heads=2,
    head_dim=12,
    ffn_dim=80,
)
CONFIGS = {
    "llama": LLAMA,
    "gpt2": LLAMA.replace(
        norm="layer_norm", ffn="gelu", positions="learned", bias=True, kv_heads=4
    ),
    "qwen3": LLAMA.replace(qk_norm=True, qkv_bias=True, tied_embeddings=False),
    "experts": LLAMA.replace(experts=4, experts_per_token=2),
}
PROMPTS = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28], [88], [41, 9]]


def make_model(config, dtype=torch.float32):
    torch.manual_seed(0)
    gpt = GPT(config)
    for parameter in gpt.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # so that every token has a say
    return LanguageModel(gpt.to(dtype).requires_grad_(False).eval())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tilewise.model.load(write_llama_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf"))


@pytest.fixture(scope="module")
def smollm2():
    return tilewise.model.load("smollm2")


def greedy(gpt, ids, count):
    """The whole sequence again for every token."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(gpt(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("name", CONFIGS)
def test_generating_is_the_greedy_loop(name):
    model = make_model(CONFIGS[name])
    for prompt in PROMPTS:
        result = model.generate(prompt, 20)
        assert greedy_tokens_agree(
            model.gpt, prompt, result.token_ids, greedy(model.gpt, prompt, 20)
        )
        assert result.finish_reason == "length"


@pytest.mark.parametrize("chunk_size", [1, 5, 16, 17])
def test_chunks_of_a_prompt_give_the_logits_of_the_whole(chunk_size):
    gpt = make_model(LLAMA).gpt
    cache = PagedKVCache(2, 4, 16, 2, 12)
    sequence, prompt = cache.add_sequence(), PROMPTS[0]
    for start in range(0, len(prompt), chunk_size):
        chunk = torch.tensor(prompt[start : start + chunk_size])
        logits = gpt(chunk, PagedBatch.append(cache, [sequence], [len(chunk)]))
    expected = gpt(torch.tensor([prompt]))[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_of_ragged_tokens_gives_each_sequence_its_own_logits():
    gpt = make_model(LLAMA).gpt
    cache = PagedKVCache(2, 8, 16, 2, 12)
    sequences = [cache.add_sequence() for _ in PROMPTS]
    gpt(torch.tensor(PROMPTS[0][:7]), PagedBatch.append(cache, sequences[:1], [7]))
    rest = [PROMPTS[0][7:], *PROMPTS[1:]]
    batch = PagedBatch.append(cache, sequences, [len(ids) for ids in rest])
    logits = gpt(torch.tensor([token for ids in rest for token in ids]), batch)
    expected = torch.cat([gpt(torch.tensor([prompt]))[:, -1] for prompt in PROMPTS])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 4, 512])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_gives_what_each_prompt_gives(chunk_size, temperature):
    model = make_model(LLAMA)
    options = {"temperature": temperature, "seed": 7, "repetition_penalty": 1.3}
    together = model.generate(PROMPTS, 12, chunk_size=chunk_size, **options)
    alone = [model.generate(prompt, 12, **options).token_ids for prompt in PROMPTS]
    # The random numbers are those of the prompt's place in the batch, the first one's when alone.
    assert together[0].token_ids == alone[0]
    if temperature == 0:
        assert [result.token_ids for result in together] == alone
    again = model.generate(PROMPTS[:2], 12, chunk_size=3, **options)
    assert [result.token_ids for result in again] == [result.token_ids for result in together[:2]]
    assert [result.prompt_ids for result in together] == PROMPTS


def test_samples_of_one_prompt_differ_and_repeat():
    model = make_model(LLAMA)
    first = model.generate([PROMPTS[0]] * 3, 8, temperature=1.0, seed=3)
    again = model.generate([PROMPTS[0]] * 3, 8, temperature=1.0, seed=3)
    other = model.generate([PROMPTS[0]] * 3, 8, temperature=1.0, seed=4)
    ids = [[result.token_ids for result in results] for results in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]
    assert len({tuple(sample) for sample in ids[0]}) == 3


@pytest.mark.parametrize("cache_dtype", ["int8", torch.bfloat16])
def test_a_smaller_cache_is_close(cache_dtype):
    model = make_model(LLAMA)
    exact = model.generate(PROMPTS[0], 1).token_ids
    assert model.generate(PROMPTS[0], 1, cache_dtype=cache_dtype, chunk_size=4).token_ids == exact


def test_pages_go_back_when_a_sequence_ends(tiny):
    run = tilewise.model.generate._Run(tiny, [[1, 2, 3], [4]], 4, ignore_eos=True)
    for _ in run.steps():
        pass
    assert run._cache.allocator.num_free_pages == run._cache.allocator.num_pages


def test_naive_and_auto_agree(tiny):
    prompt = tiny.tokenizer.encode("hello world")
    fast = tiny.generate(prompt, 24).token_ids
    with tilewise.use_backend("naive"):
        naive = tiny.generate(prompt, 24).token_ids
    assert greedy_tokens_agree(tiny.gpt, prompt, fast, naive)


@pytest.mark.model
def test_smollm2_takes_no_more_memory_than_its_file(smollm2):
    parts = [*smollm2.gpt.parameters(), *smollm2.gpt.buffers()]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in parts}
    resident = sum(storage.nbytes() for storage in storages.values())
    assert resident <= 1.05 * tilewise.model.find("smollm2").stat().st_size


@pytest.mark.model
def test_naive_and_auto_agree_on_smollm2(smollm2):
    model = smollm2
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = model.chat(messages, 3)
    assert answer.text == "The capital of"
    with tilewise.use_backend("naive"):
        naive = model.chat(messages, 3)
    assert greedy_tokens_agree(model.gpt, answer.prompt_ids, answer.token_ids, naive.token_ids)


@pytest.mark.model
@pytest.mark.parametrize(
    "prompt",
    [
        "The capital of France is",
        "Once upon a time there was",
        "def fibonacci(n):",
        "Water boils at 100 degrees, and ice",
        "1, 2, 3, 5, 8,",
    ],
)
def test_256_greedy_tokens_are_those_of_the_naive_model(smollm2, prompt):
    prompt_ids = smollm2.tokenizer.encode(prompt)
    ours = smollm2.generate(prompt_ids, 256, ignore_eos=True).token_ids
    # Where the naive model, reading our text, would have written each next token, it would have
    # written the text.
    with torch.no_grad(), tilewise.use_backend("naive"):
        logits = smollm2.gpt(torch.tensor([[*prompt_ids, *ours[:-1]]]))[0, len(prompt_ids) - 1 :]
    naive = logits.argmax(-1).tolist()
    for at in (i for i in range(256) if naive[i] != ours[i]):
        assert greedy_tokens_agree(smollm2.gpt, prompt_ids, ours, [*ours[:at], naive[at]])


# --- the verdict on two texts ---------------------------------------------------------------------


def test_a_wrong_token_is_no_near_tie():
    model = make_model(LLAMA)
    right = model.generate(PROMPTS[0], 6).token_ids
    logits = model.gpt(torch.tensor([PROMPTS[0] + right[:3]]))[0, -1]
    second = int(logits.topk(2).indices[1])
    verdict = greedy_tokens_agree(model.gpt, PROMPTS[0], right, [*right[:3], second, 0, 0])
    assert not verdict
    assert verdict.common == 3
    assert verdict.gap > 100 * verdict.allowed > 0


def test_a_near_tie_agrees():
    model = make_model(LLAMA.replace(tied_embeddings=False))
    right = model.generate(PROMPTS[0], 3).token_ids
    twin = (right[1] + 1) % 97
    model.gpt.head.weight[twin] = model.gpt.head.weight[right[1]]  # the very same logit
    verdict = greedy_tokens_agree(model.gpt, PROMPTS[0], right, [right[0], twin, 5])
    assert verdict
    assert verdict.common == 1
    assert "a near-tie" in str(verdict)


def test_texts_of_different_length_do_not_agree():
    model = make_model(LLAMA)
    assert not greedy_tokens_agree(model.gpt, [1], [2, 3], [2])
    assert greedy_tokens_agree(model.gpt, [1], [2, 3], [2, 3])


# --- text in, text out ----------------------------------------------------------------------------


def test_a_stream_is_the_text(tiny):
    whole = tiny.generate("hello", 30, temperature=1.0, seed=1, ignore_eos=True)
    stream = tiny.stream("hello", 30, temperature=1.0, seed=1, ignore_eos=True)
    assert "".join(stream) == whole.text == str(whole)
    assert stream.generation.token_ids == whole.token_ids
    assert tiny.tokenizer.decode(whole.token_ids) == whole.text


def test_a_stop_string_ends_the_text_and_is_never_shown(tiny):
    options = {"temperature": 1.0, "seed": 1, "ignore_eos": True}
    text = tiny.generate("hello", 60, **options).text
    stop = text[20:24]
    assert text.index(stop) == 20
    stream = tiny.stream("hello", 60, stop=["never in there", stop], **options)
    assert "".join(stream) == text[:20] == stream.generation.text
    assert stream.generation.finish_reason == "stop"
    assert len(stream.generation.token_ids) < 60


def test_what_could_have_become_a_stop_string_is_shown_in_the_end(tiny):
    options = {"temperature": 1.0, "seed": 1, "ignore_eos": True}
    text = tiny.generate("hello", 30, **options).text
    assert tiny.generate("hello", 30, stop=text[-3:] + "!", **options).text == text


def test_an_end_token_ends_the_text(tiny):
    eos = tiny.tokenizer.eos_ids[0]
    free = tiny.generate("hello", 40, temperature=1.0, ignore_eos=True).token_ids
    short = LanguageModel(
        tiny.gpt, tilewise.model.Tokenizer(tiny.tokenizer.backend, bos_id=None, eos_ids=[free[5]])
    )
    result = short.generate("hello", 40, temperature=1.0)
    assert result.token_ids == free[: free.index(free[5]) + 1]
    assert result.finish_reason == "stop"
    assert eos != free[5]


def test_timings_count_what_was_done(tiny):
    result = tiny.generate([[1] * 20, [2] * 3], 5, ignore_eos=True, chunk_size=8)[1]
    timings = result.timings
    assert timings.prompt_tokens == 23
    assert (timings.decode_tokens, timings.decode_steps) == (8, 4)
    assert 0 < timings.first_token_seconds <= timings.prompt_seconds
    assert timings.decode_tokens_per_second == pytest.approx(8 / timings.decode_seconds)
    assert timings.prompt_tokens_per_second == pytest.approx(23 / timings.prompt_seconds)
    assert timings.seconds_per_output_token == pytest.approx(timings.decode_seconds / 4)


def test_a_conversation_becomes_a_prompt(tiny):
    ids = tiny.chat_ids([{"role": "user", "content": "hello"}])
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tiny.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tiny.chat([{"role": "user", "content": "hello"}], 3).prompt_ids == ids


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt: must have at least one token"),
        ([], {}, "prompt: must have at least one token"),
        ([1, 97000], {}, r"prompt: token ids must be in \[0, 262\), got 97000"),
        ([[1], [-1]], {}, r"prompt: token ids must be in \[0, 262\), got -1"),
        ([1, True], {}, "prompt: must be text or token ids, got int"),
        ([[1], [1.5]], {}, r"prompt: token ids must be in \[0, 262\), got 1.5"),
        ([1] * 200, {"max_new_tokens": 57}, "max_new_tokens: the model has 256 positions and"),
        (None, {}, "prompt: must be text or token ids, got NoneType"),
        ([1], {"max_new_tokens": 2.5}, "max_new_tokens: must be an int, got float"),
        ([1], {"chunk_size": "8"}, "chunk_size: must be an int, got str"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens: must be >= 1, got 0"),
        ([1], {"chunk_size": 0}, "chunk_size: must be >= 1, got 0"),
        ([1], {"stop": ["x", 5]}, "stop: must be text or texts, got int"),
        ([1], {"top_p": 0.0}, "top_p: must be > 0"),
    ],
)
def test_bad_input_is_named(tiny, prompt, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        tiny.generate(prompt, **options)


def test_what_needs_a_tokenizer_says_so():
    model = make_model(LLAMA)
    for call in (
        lambda: model.generate("hello"),
        lambda: model.generate([1], stop="x"),
        lambda: model.chat([]),
    ):
        with pytest.raises(ValueError, match="no tokenizer"):
            call()
    with pytest.raises(ValueError, match=r"token_ids: shape must be \(batch, seq\), got \(3,\)"):
        model.gpt(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="token_ids: a sequence may have 128 tokens, got 129"):
        model.gpt(torch.zeros(1, 129, dtype=torch.int64))


# --- the module -----------------------------------------------------------------------------------


def test_a_model_trains():
    torch.manual_seed(0)
    gpt = GPT(LLAMA)
    ids = torch.tensor([PROMPTS[0]])
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        logits = gpt(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_a_model_compiles_as_one_graph(name):
    gpt, ids = make_model(CONFIGS[name]).gpt, torch.tensor([PROMPTS[0]])
    expected = gpt(ids)
    compiled = torch.compile(gpt, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids), expected, rtol=1e-4, atol=1e-4)


def test_our_own_quantization_applies():
    model = make_model(LLAMA.replace(dim=64, head_dim=16, tied_embeddings=False))
    before = model.gpt(torch.tensor([PROMPTS[0]]))
    tilewise.quantize_(model.gpt, "int8")
    assert type(model.gpt.blocks[1].ffn.down) is tilewise.QuantLinear
    after = model.gpt(torch.tensor([PROMPTS[0]]))
    assert 0 < (after - before).norm() < 0.03 * before.norm()
    assert len(model.generate(PROMPTS[0], 3).token_ids) == 3


def test_quantized_weights_stay_quantized_and_move_together(tiny):
    gpt = tiny.gpt
    assert gpt.embedding.format == "Q8_0"
    assert not gpt.head.state_dict()  # the head is the embedding table
    formats = [block.format for block in gpt.blocks[0].attention.qkv]
    assert formats == ["Q4_1", "Q8_0"]  # of q and k, and of v
    assert gpt.blocks[0].ffn.gate_up.format == "Q4_1"
    doubled = copy.deepcopy(gpt).double()
    assert doubled.embedding.data.dtype == torch.uint8
    x = torch.randn(1, gpt.config.dim, dtype=torch.float64)
    table = doubled.embedding.weight.dequantize(torch.float64)
    assert_agrees(doubled.head(x), x @ table.T, x @ table.T)
    assert doubled(torch.tensor([[1, 2]])).dtype == torch.float64


@pytest.mark.parametrize("is_tied", [True, False])
def test_logits_of_a_quantized_head_are_not_rounded(tiny, is_tied):
    gpt = copy.deepcopy(tiny.gpt).bfloat16()
    if not is_tied:
        gpt.head = tilewise.QuantLinear(gpt.embedding.weight)
    logits = gpt(torch.tensor([[1, 2]]))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16())
    with tilewise.use_backend("naive"):
        assert gpt(torch.tensor([[1, 2]])).dtype == torch.float32
    seen = []
    gpt.head.register_forward_hook(lambda module, args, result: seen.append(result))
    gpt(torch.tensor([[1, 2]]))
    assert [result.dtype for result in seen] == [torch.float32]
