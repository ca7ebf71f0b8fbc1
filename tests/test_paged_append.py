"""Writing to a paged cache: what lands where, and what is left alone."""

import math

import pytest
import torch

import tilewise
from tilewise.paged.kv_formats import QUANTIZED, decode, encode, is_quantized, stored_width
from tilewise.testing import Inputs

NAN = math.nan
CACHES = [torch.float32, torch.float16, torch.bfloat16, *QUANTIZED.values()]


def caches(cache_dtype, *, pages=5, page_size=3, kv_heads=2, head_dim=8, v_head_dim=6):
    """Caches and scales full of the largest numbers that their dtypes have."""

    def full(*shape, dtype):
        info = torch.finfo if dtype.is_floating_point else torch.iinfo
        return torch.full(shape, info(dtype).max, dtype=torch.float64).to(dtype)

    slots = (pages, page_size, kv_heads)
    tensors = {
        name: full(*slots, stored_width(name, width, cache_dtype), dtype=cache_dtype)
        for name, width in (("k_cache", head_dim), ("v_cache", v_head_dim))
    }
    if is_quantized(cache_dtype):
        tensors |= {name: full(*slots, dtype=torch.float32) for name in ("k_scale", "v_scale")}
    return tensors


def by_slot(x):
    """(slots, bytes of a slot): comparable in any dtype."""
    return x.contiguous().view(torch.uint8).flatten(0, 1).flatten(1)


def slots(*values):
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
def test_writes_its_slots_and_no_others(cache_dtype):
    inputs = Inputs()
    cache = caches(cache_dtype)
    before = {name: x.clone() for name, x in cache.items()}
    k, v = inputs.randn(4, 2, 8), inputs.randn(4, 2, 6)
    k[1] = v[3] = NAN  # skipped
    where = slots(7, -1, 0, 15)
    assert tilewise.append_kv(k, v, **cache, slot_mapping=where) is None
    for name, x in (("k", k), ("v", v)):
        for token, slot in ((0, 7), (2, 0)):
            row, scale = cache[f"{name}_cache"].flatten(0, 1)[slot], None
            expected = x[token].to(cache_dtype)
            if is_quantized(cache_dtype):
                scale = cache[f"{name}_scale"].flatten(0, 1)[slot]
                expected = decode(*encode(x[token], cache_dtype))
            assert torch.equal(decode(row, scale), expected.float())
    others = [slot for slot in range(15) if slot not in (7, 0)]
    for name, x in cache.items():
        assert torch.equal(by_slot(x)[others], by_slot(before[name])[others])


@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
@pytest.mark.parametrize("where", [slots(-1, -7, 15), slots()], ids=["skipped", "no tokens"])
def test_writes_nothing_where_nothing_is_kept(cache_dtype, where):
    cache = caches(cache_dtype)
    before = {name: x.clone() for name, x in cache.items()}
    k, v = torch.full((len(where), 2, 8), NAN), torch.full((len(where), 2, 6), NAN)
    tilewise.append_kv(k, v, **cache, slot_mapping=where)
    for name, x in cache.items():
        assert torch.equal(by_slot(x), by_slot(before[name]))


@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_fused_rotary_is_rotary_and_then_append(cache_dtype, interleaved):
    inputs = Inputs(torch.bfloat16)
    k, v = inputs.randn(4, 2, 8), inputs.randn(4, 2, 6)
    tables = tilewise.rotary_tables(6, 30, interleaved=interleaved)
    positions, where = slots(29, 0, 7, 10**9), slots(3, 9, 14, -1)
    fused, apart = caches(cache_dtype), caches(cache_dtype)
    tilewise.append_kv(
        k, v, **fused, slot_mapping=where, rotary=tables, positions=positions, backend="naive"
    )
    rotated = tilewise.rotary_embedding(k, tables, positions, backend="naive")
    tilewise.append_kv(rotated, v, **apart, slot_mapping=where, backend="naive")
    for name, x in fused.items():
        assert torch.equal(by_slot(x), by_slot(apart[name]))
    assert not torch.equal(rotated[0], k[0])


@pytest.mark.parametrize("format", list(QUANTIZED))
def test_a_token_gets_the_same_bytes_whatever_it_is_appended_with(format):
    inputs = Inputs()
    k, v = inputs.randn(4, 2, 8), inputs.randn(4, 2, 6)
    together, apart = caches(QUANTIZED[format]), caches(QUANTIZED[format])
    where = slots(2, 11, 5, 8)
    tilewise.append_kv(k, v, **together, slot_mapping=where)
    for i in range(4):
        tilewise.append_kv(k[i : i + 1], v[i : i + 1], **apart, slot_mapping=where[i : i + 1])
    for name, x in together.items():
        assert torch.equal(by_slot(x), by_slot(apart[name]))


@pytest.mark.parametrize("backend", ["auto", "cpu", "naive"])
@pytest.mark.parametrize("changed", ["k_cache", "block_table", "cache_seqlens"])
def test_a_gradient_notices_what_was_written_since(backend, changed):
    inputs = Inputs()
    cache = caches(torch.float32)
    k, v, q = inputs.randn(4, 2, 8), inputs.randn(4, 2, 6), inputs.randn(1, 2, 8).requires_grad_()
    tilewise.append_kv(k, v, **cache, slot_mapping=slots(0, 1, 2, 3))
    places = {
        "block_table": torch.tensor([[0, 1]], dtype=torch.int32),
        "cache_seqlens": torch.tensor([4], dtype=torch.int32),
    }
    out = tilewise.paged_attention(q, **cache, **places)
    if changed == "k_cache":
        tilewise.append_kv(k, v, **cache, slot_mapping=slots(3, 2, 1, 0), backend=backend)
    else:
        places[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", ["cpu", "naive"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_key_at_a_position_outside_the_tables_is_nan(backend, interleaved):
    positions = torch.tensor([3, -1, 10, 2**62, -(2**63)])
    inputs = Inputs()
    cache = caches(torch.float32)
    k, v = inputs.randn(5, 2, 8), inputs.randn(5, 2, 6)
    tables = tilewise.rotary_tables(8, 10, interleaved=interleaved)
    where = slots(0, 1, 2, 3, 4)
    tilewise.append_kv(
        k, v, **cache, slot_mapping=where, rotary=tables, positions=positions, backend=backend
    )
    of_slots = cache["k_cache"].flatten(0, 1)[:5]
    assert of_slots[0].isfinite().all()
    assert of_slots[1:].isnan().all()
    assert torch.equal(cache["v_cache"].flatten(0, 1)[:5], v)


def test_what_is_appended_is_what_attention_reads():
    inputs = Inputs()
    k, v, q = inputs.randn(7, 2, 8), inputs.randn(7, 2, 6), inputs.randn(1, 4, 8)
    table = torch.tensor([[4, 0, 2]], dtype=torch.int32)
    cache = caches(torch.float32)
    where = slots(*(int(table[0, i // 3]) * 3 + i % 3 for i in range(7)))
    tilewise.append_kv(k, v, **cache, slot_mapping=where, validate=True)
    seqlens = torch.tensor([7], dtype=torch.int32)
    options = {"backend": "naive", "return_lse": True}
    paged, _ = tilewise.paged_attention(
        q, **cache, block_table=table, cache_seqlens=seqlens, **options
    )
    # Two slots of the table are past the end: the same sums, with zeros in them.
    k, v = (torch.cat([x, torch.zeros(2, *x.shape[1:])]) for x in (k, v))
    visible = torch.arange(9) < 7
    contiguous, _ = tilewise.flash_attention(q[None], k[None], v[None], bias=visible, **options)
    assert torch.equal(paged, contiguous[0])


# --- bad input ------------------------------------------------------------------------------------


def good_call():
    return {
        "k": torch.ones(3, 2, 8),
        "v": torch.ones(3, 2, 6),
        "slot_mapping": slots(4, -1, 14),
        **caches(torch.float32),
    }


TABLES = tilewise.rotary_tables(8, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 1.0}, "k: must be a torch.Tensor, got float"),
        ({"k": torch.ones(3, 16)}, "k: shape must be (tokens, kv_heads, head_dim), got (3, 16)"),
        ({"v": torch.ones(3, 2, 6).half()}, "v: dtype must be k's, float32, got float16"),
        (
            {"v": torch.ones(4, 2, 6)},
            "v: shape must be (3, 2, 6) (k's tokens and kv_heads), got (4, 2, 6)",
        ),
        ({"k": torch.ones(3, 2, 16)[..., ::2]}, "k: the last dimension must have stride 1, got 2"),
        ({"k": torch.ones(3, 2, 9)}, "k: head_dim must be k_cache's, 8, got 9"),
        ({"v": torch.ones(3, 2, 5)}, "v: head_dim must be v_cache's, 6, got 5"),
        (
            {"k": torch.ones(3, 4, 8), "v": torch.ones(3, 4, 6)},
            "k: kv_heads must be k_cache's, 2, got 4",
        ),
        (
            caches(torch.int8) | {"v_scale": None},
            "v_scale: must be given for int8 caches, got None",
        ),
        (
            {"v_scale": torch.ones(5, 3, 2)},
            "v_scale: must be None for float32 caches, got a tensor",
        ),
        (
            caches(torch.uint8) | {"k": torch.ones(3, 2, 7)},
            "k: head_dim must be even for an int4 cache, got 7",
        ),
        (
            {"slot_mapping": slots(1, 2, 3).int()},
            "slot_mapping: dtype must be int64, got int32",
        ),
        ({"slot_mapping": slots(1)}, "slot_mapping: shape must be (3,) (k's tokens), got (1,)"),
        ({"rotary": TABLES}, "positions: must be given with rotary, got None"),
        ({"positions": slots(0, 1, 2)}, "rotary: must be given with positions, got None"),
        (
            {"rotary": TABLES, "positions": slots(0, 1)},
            "positions: shape must be (3,) (k without heads and head_dim), got (2,)",
        ),
        (
            {"rotary": tuple(TABLES), "positions": slots(0, 1, 2)},
            "rotary: must be RotaryTables, got tuple",
        ),
        (
            {"slot_mapping": slots(1, 2, 3).to("meta")},
            "slot_mapping: must be on the device of k (cpu), got meta",
        ),
    ],
)
def test_names_the_bad_argument(change, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        tilewise.append_kv(**good_call() | change)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"slot_mapping": slots(4, 15, -1)},
            "slot_mapping: must be < 15, the pages * page_size of k_cache, token 1 has 15",
        ),
        (
            {"slot_mapping": slots(4, -1, 4)},
            "slot_mapping: tokens must have different slots, tokens 0 and 2 both have 4",
        ),
        (
            {"rotary": TABLES, "positions": slots(0, 99, 20)},
            "positions: must be from 0 to 19, the table's last, got 20 at (2,)",
        ),
    ],
)
def test_validate_names_the_token(change, message):
    arguments = good_call() | change
    tilewise.append_kv(**arguments)  # safe all the same
    with pytest.raises(ValueError, match=r"token|positions") as caught:
        tilewise.append_kv(**arguments, validate=True)
    assert str(caught.value) == message


def test_validate_lets_skipped_tokens_share_a_slot():
    arguments = good_call() | {"slot_mapping": slots(-1, 3, -1)}
    tilewise.append_kv(**arguments, rotary=TABLES, positions=slots(99, 3, -5), validate=True)
