"""transformers' models give the same logits with our attention as with their own."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tilewise.integrations import transformers as ours  # noqa: E402


@pytest.fixture(scope="module")
def models():
    """The same small Llama twice, in float64: with transformers' attention and with ours."""
    ours.register()
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    eager = transformers.LlamaForCausalLM(config).double().eval()
    eager.set_attn_implementation("eager")
    with_ours = transformers.LlamaForCausalLM(config).double().eval()
    with_ours.load_state_dict(eager.state_dict())
    with_ours.set_attn_implementation("tilewise")
    return eager, with_ours


def test_logits_agree_on_a_padded_batch(models):
    eager, with_ours = models
    ids = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        expected = eager(ids, attention_mask=mask).logits
        actual = with_ours(ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()])


def test_generation_agrees(models):
    eager, with_ours = models
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    expected = eager.generate(ids, attention_mask=mask, **options)
    assert torch.equal(with_ours.generate(ids, attention_mask=mask, **options), expected)


def test_our_attention_is_what_runs(models, monkeypatch):
    _, with_ours = models
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs["causal"])
        return original(*args, **kwargs)

    original = ours.flash_attention
    monkeypatch.setattr(ours, "flash_attention", counted)
    with_ours(torch.tensor([[1, 2, 3]]))
    assert len(calls) == 2


def test_dropout_is_refused():
    q = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ValueError, match=r"dropout: must be 0, got 0\.1"):
        ours.attention(torch.nn.Identity(), q, q, q, None, dropout=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling": "1"}, "scaling: must be a number or None, got str"),
        ({"s_aux": torch.zeros(3)}, r"s_aux: shape must be \(2,\) \(query's heads\)"),
        ({"key": torch.zeros(1, 2, 8)}, r"key: shape must be \(batch, heads, seq, head_dim\)"),
        ({"attention_mask": torch.zeros(4)}, "attention_mask: shape must broadcast to"),
        ({"is_causal": 1}, "is_causal: must be a bool, got int"),
    ],
)
def test_errors_name_the_arguments_that_transformers_passes(change, message):
    x = torch.zeros(1, 2, 3, 8)
    arguments = {"query": x, "key": x, "value": x, "attention_mask": None}
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        ours.attention(torch.nn.Identity(), **arguments | change)
