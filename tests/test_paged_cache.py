"""The cache of a model: forks that diverge, pages that come back, and what it costs."""

import copy
import pickle
import re

import pytest
import torch

import tilewise
from tilewise import OutOfPages, PagedKVCache
from tilewise.paged.kv_formats import QUANTIZED, decode, encode, is_quantized
from tilewise.testing import Inputs, nan_filled_empty

DTYPES = [torch.float32, torch.bfloat16, *QUANTIZED]
LAYERS = 2


def new_cache(**options):
    """Two layers, eight pages of three slots, with rubbish in all of them."""
    with nan_filled_empty():
        return PagedKVCache(LAYERS, 8, 3, 2, 4, v_head_dim=6, **options)


def append(cache, inputs, seqs, counts):
    """Append random tokens; returns (keys, values) per sequence, with the layers stacked."""
    slots = cache.append(seqs, counts)
    k, v = (inputs.randn(LAYERS, sum(counts), 2, width) for width in (4, 6))
    for i in range(LAYERS):
        layer = cache.layer(i)
        tilewise.append_kv(
            k[i],
            v[i],
            layer.k,
            layer.v,
            slots,
            k_scale=layer.k_scale,
            v_scale=layer.v_scale,
            validate=True,
        )
    return list(zip(k.split(counts, dim=1), v.split(counts, dim=1), strict=True))


def assert_holds(cache, seq, *parts):
    """A sequence reads back as these (keys, values), stored and decoded, in every layer."""
    [table], [length] = cache.block_table([seq]).tolist(), cache.seqlens([seq]).tolist()
    for i in range(LAYERS):
        layer = cache.layer(i)
        for rows, scale, kind in ((layer.k, layer.k_scale, 0), (layer.v, layer.v_scale, 1)):
            expected = torch.cat([part[kind][i] for part in parts])
            if is_quantized(rows.dtype):
                expected = decode(*encode(expected, rows.dtype))
            else:
                expected = expected.to(rows.dtype).float()
            own = decode(rows[table], None if scale is None else scale[table]).flatten(0, 1)
            assert len(expected) == length
            assert torch.equal(own[:length], expected)


@pytest.mark.parametrize("dtype", [torch.float32, "int8"], ids=str)
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))],
    ids=["deep", "pickle"],
)
def test_a_copy_forks_as_the_cache_itself(copied, dtype):
    inputs = Inputs()
    cache = new_cache(dtype=dtype)
    seq = cache.add_sequence()
    (begin,) = append(cache, inputs, [seq], [4])
    cache = copied(cache)
    fork = cache.fork(seq)
    (own,) = append(cache, inputs, [fork], [1])
    assert_holds(cache, seq, begin)
    assert_holds(cache, fork, begin, own)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fork_diverges_without_touching_its_parent(dtype):
    inputs = Inputs()
    cache = new_cache(dtype=dtype)
    parent = cache.add_sequence()
    [prompt] = append(cache, inputs, [parent], [5])
    child = cache.fork(parent)
    assert cache.allocator.num_free_pages == 6
    [of_child] = append(cache, inputs, [child], [2])
    assert cache.allocator.num_free_pages == 4  # a copy of the shared page, and one more
    assert_holds(cache, parent, prompt)
    assert_holds(cache, child, prompt, of_child)
    [of_parent] = append(cache, inputs, [parent], [3])
    assert_holds(cache, parent, prompt, of_parent)
    assert_holds(cache, child, prompt, of_child)
    cache.free(parent)
    assert_holds(cache, child, prompt, of_child)
    cache.free(child)
    assert cache.allocator.num_free_pages == 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_samples_of_one_prompt_diverge_at_once(dtype):
    inputs = Inputs()
    cache = new_cache(dtype=dtype)
    first = cache.add_sequence()
    [prompt] = append(cache, inputs, [first], [4])
    samples = [first, cache.fork(first), cache.fork(first)]
    own = append(cache, inputs, samples, [1, 3, 2])
    for seq, tokens in zip(samples, own, strict=True):
        assert_holds(cache, seq, prompt, tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rejected_drafts_are_forgotten(dtype):
    inputs = Inputs()
    cache = new_cache(dtype=dtype)
    seq = cache.add_sequence()
    [prompt] = append(cache, inputs, [seq], [2])
    [drafts] = append(cache, inputs, [seq], [6])
    cache.truncate(seq, 4)
    assert cache.allocator.num_free_pages == 6
    accepted = tuple(x[:, :2] for x in drafts)
    assert_holds(cache, seq, prompt, accepted)
    [more] = append(cache, inputs, [seq], [3])
    assert_holds(cache, seq, prompt, accepted, more)


def test_forks_attend_to_their_own_tokens():
    inputs = Inputs()
    cache = new_cache()
    parent = cache.add_sequence()
    [prompt] = append(cache, inputs, [parent], [5])
    child = cache.fork(parent)
    suffixes = append(cache, inputs, [parent, child], [1, 1])
    seqs, q = [parent, child], inputs.randn(2, 4, 4)
    layer = cache.layer(1)
    out = tilewise.paged_attention(
        q, layer.k, layer.v, cache.block_table(seqs), cache.seqlens(seqs), backend="naive"
    )
    for i, suffix in enumerate(suffixes):
        k, v = (torch.cat([a[1], b[1]])[None] for a, b in zip(prompt, suffix, strict=True))
        expected = tilewise.flash_attention(q[None, i : i + 1], k, v, backend="naive")
        assert torch.equal(out[i], expected[0, 0])


def test_out_of_pages_changes_nothing():
    inputs = Inputs()
    cache = new_cache()
    a, b = cache.add_sequence(), cache.add_sequence()
    [prompt] = append(cache, inputs, [a], [10])
    with pytest.raises(OutOfPages, match=r"^out of pages: 5 wanted, 4 free$"):
        cache.append([a, b], [3, 12])
    assert cache.seqlens([a, b]).tolist() == [10, 0]
    assert_holds(cache, a, prompt)
    cache.append([b], [12])


def test_tables_are_what_paged_attention_wants():
    cache = new_cache()
    a, b, c = (cache.add_sequence() for _ in range(3))
    slots = cache.append([a, c], [4, 1])
    assert slots.dtype == torch.int64
    assert slots.tolist() == [0, 1, 2, 3, 6]
    table, seqlens = cache.block_table([c, a, b]), cache.seqlens([c, a, b])
    assert table.dtype == seqlens.dtype == torch.int32
    assert table.tolist() == [[2, -1], [0, 1], [-1, -1]]
    assert seqlens.tolist() == [1, 4, 0]
    assert cache.block_table([]).shape == (0, 0)
    assert cache.seqlens([]).shape == (0,)
    assert cache.append([], []).tolist() == []


@pytest.mark.parametrize(
    ("dtype", "bytes_per_token"),
    [
        (torch.float32, 2 * 10 * 4),
        (torch.bfloat16, 2 * 10 * 2),
        ("int8", 2 * (10 + 2 * 4)),
        ("fp8", 2 * (10 + 2 * 4)),
        ("int4", 2 * (5 + 2 * 4)),
    ],
    ids=str,
)
def test_nbytes(dtype, bytes_per_token):
    """Of two heads with 4 + 6 elements, and a scale each for keys and values where quantized."""
    assert new_cache(dtype=dtype).nbytes == LAYERS * 8 * 3 * bytes_per_token


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers: must be >= 1, got 0"),
        ({"num_pages": 0}, "num_pages: must be >= 1, got 0"),
        ({"page_size": 0}, "page_size: must be >= 1, got 0"),
        ({"num_layers": 2.5}, "num_layers: must be an int, got float"),
        ({"num_pages": "8"}, "num_pages: must be an int, got str"),
        ({"page_size": True}, "page_size: must be an int, got bool"),
        ({"head_dim": None}, "head_dim: must be an int, got NoneType"),
        ({"v_head_dim": 0}, "v_head_dim: must be >= 1, got 0"),
        ({"dtype": "int4", "v_head_dim": 5}, "v_head_dim: must be even for an int4 cache, got 5"),
        (
            {"dtype": "int5"},
            "dtype: must be float32 or float16 or bfloat16 or float64 or 'int8' or 'fp8' or "
            "'int4', got 'int5'",
        ),
        (
            {"dtype": torch.int8},
            "dtype: must be float32 or float16 or bfloat16 or float64 or 'int8' or 'fp8' or "
            "'int4', got torch.int8",
        ),
    ],
)
def test_names_the_bad_size(change, message):
    sizes = {"num_layers": 1, "num_pages": 2, "page_size": 3, "kv_heads": 2, "head_dim": 4}
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}$"):
        PagedKVCache(**sizes | change)


def test_says_what_it_is():
    cache = PagedKVCache(2, 3, 4, kv_heads=2, head_dim=8, v_head_dim=6, dtype="int4")
    assert repr(cache) == (
        "PagedKVCache(num_layers=2, num_pages=3, page_size=4, kv_heads=2, head_dim=8, "
        f"v_head_dim=6, dtype=uint8, device='cpu', nbytes={cache.nbytes})"
    )


def test_names_the_layer_that_is_not_there():
    cache = PagedKVCache(2, 3, 4, kv_heads=2, head_dim=8)
    with pytest.raises(IndexError, match="index: must be from 0 to 1, the last layer, got 2"):
        cache.layer(2)
