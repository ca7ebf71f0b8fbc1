"""The card counts what the model has, and GPT-3's table comes out of its shapes."""

import math

import pytest
import torch

import tilewise
from tilewise.model import GPT, PRESETS, card, gpt3_table, low_rank
from tilewise.paged import PagedKVCache


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_module(name):
    with torch.device("meta"):
        gpt = GPT(PRESETS[name].replace(layers=2))
    counted = card(PRESETS[name].replace(layers=2))
    assert counted.parameters == sum(parameter.numel() for parameter in gpt.parameters())
    assert counted.norms == sum(p.numel() for key, p in gpt.named_parameters() if "norm" in key)


def test_biases_and_head_norms_are_counted():
    config = PRESETS["qwen2.5-0.5b"].replace(layers=1, qk_norm=True, out_bias=True)
    with torch.device("meta"):
        gpt = GPT(config)
    assert card(config).parameters == sum(parameter.numel() for parameter in gpt.parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("gpt2", 124.4),
        ("gpt2-medium", 354.8),
        ("gpt2-large", 774.0),
        ("gpt2-xl", 1557.6),
        ("smollm2-135m", 134.5),
        ("llama-3-8b", 8030.3),
        ("llama-3-70b", 70553.7),
        ("qwen2.5-0.5b", 494.0),
        ("mixtral-8x7b", 46702.8),
    ],
)
def test_presets_have_the_published_sizes(name, millions):
    assert card(PRESETS[name]).parameters / 1e6 == pytest.approx(millions, abs=0.06)


def test_gpt3_table():
    """Brown et al. 2020, table 2.1: the sizes that name the models, to the digits printed."""
    printed = {
        "gpt3-125m": "125M",
        "gpt3-350m": "356M",  # "350M" in the paper
        "gpt3-760m": "760M",
        "gpt3-1.3b": "1.3B",
        "gpt3-2.7b": "2.7B",
        "gpt3-6.7b": "6.7B",
        "gpt3-13b": "13B",
        "gpt3-175b": "175B",
    }

    def show(count, like):
        unit = {"M": 1e6, "B": 1e9}[like[-1]]
        digits = 1 if "." in like else 0
        return f"{count / unit:.{digits}f}{like[-1]}"

    rows = {row["name"]: row for row in gpt3_table()}
    assert {name: show(rows[name]["parameters"], like) for name, like in printed.items()} == printed
    assert show(rows["gpt3-175b"]["embedding_parameters"], "0.6B") == "0.6B"
    assert all(row["heads"] * row["head_dim"] == row["dim"] for row in rows.values())
    # 3.14e23 operations for 300 billion tokens (appendix D), forward and backward.
    assert 3 * rows["gpt3-175b"]["flops_per_token"] * 300e9 == pytest.approx(3.14e23, rel=0.01)


def test_operations_are_those_that_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    shape = {"layers": 2, "dim": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn_dim": 80}
    gpt = GPT(PRESETS["smollm2-135m"].replace(vocab_size=301, **shape))
    tokens = 24
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), tilewise.use_backend("naive"):  # whose products it knows
        gpt(torch.zeros(1, tokens, dtype=torch.int64))
    # The counter sees every query look at every key.
    assert counter.get_total_flops() == tokens * card(gpt.config).flops_per_token(tokens)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "fp8", "int4"])
def test_cache_bytes_are_those_of_the_cache(dtype):
    config = PRESETS["smollm2-135m"]
    shape = (config.layers, 2, 16, config.kv_heads, config.head_dim)
    cache = PagedKVCache(*shape, dtype=getattr(torch, dtype) if "float" in dtype else dtype)
    assert card(config).kv_bytes_per_token(dtype) * 2 * 16 == cache.nbytes


def test_resident_bytes():
    counted = card(PRESETS["smollm2-135m"])
    assert counted.resident_bytes() == 4 * counted.parameters
    assert counted.resident_bytes("Q4_1") < 0.16 * counted.resident_bytes() + 4 * counted.norms


def test_experts_that_a_token_does_not_visit_cost_bytes_but_no_operations():
    counted = card(PRESETS["mixtral-8x7b"])
    assert (counted.parameters - counted.idle) / 1e9 == pytest.approx(12.9, abs=0.05)
    head = counted.config.vocab_size * counted.config.dim
    embedded = counted.embedding + counted.norms
    assert counted.flops_per_token() == 2 * (counted.parameters - counted.idle - embedded)
    assert head == counted.head


def test_the_card_is_json():
    facts = card(PRESETS["llama-3-8b"]).as_dict()
    assert facts["context"] == 8192
    assert sum(facts["parameters_by_part"].values()) == facts["parameters"]
    assert all(math.isfinite(value) for value in facts["resident_bytes"].values())


def test_low_rank():
    saving = low_rank(4096, 11008, 128)
    assert saving.parameters == 128 * (4096 + 11008)
    assert saving.saved == pytest.approx(1 - saving.parameters / (4096 * 11008))
    assert low_rank(4096, 11008, saving.break_even).saved > 0
    assert low_rank(4096, 11008, saving.break_even + 1).saved <= 0
    with pytest.raises(ValueError, match=r"rank: must be in \[1, 4\], got 5"):
        low_rank(4, 9, 5)
    with pytest.raises(ValueError, match="rows, columns: must be >= 1, got 0 and 9"):
        low_rank(0, 9, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, r"layers: must be in \[1, 16777216\], got 0"),
        ({"dim": 2**40}, "dim: must be in"),
        ({"kv_heads": 2}, r"kv_heads: must divide heads \(9\), got 2"),
        ({"head_dim": 63}, "head_dim: must be even with rotary, got 63"),
        ({"norm_eps": float("nan")}, r"norm_eps: must be in \[0, 1\), got nan"),
        ({"rotary_base": 0.0}, r"rotary_base: must be in \[1, 1e12\), got 0.0"),
        ({"experts": 4, "experts_per_token": 5}, r"experts_per_token: must be in \[1, 4\], got 5"),
    ],
)
def test_a_shape_that_makes_no_sense_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        PRESETS["smollm2-135m"].replace(**changes)
