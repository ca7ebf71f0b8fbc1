"""FlashAttention-2's signatures and PyTorch's, against tilewise's own functions."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import tilewise
from tilewise.testing import Inputs


def _double():
    return Inputs(torch.float64)


def _close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (
            tilewise.flash_attn_func,
            "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
            "return_attn_probs",
        ),
        (
            tilewise.flash_attn_varlen_func,
            "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale "
            "causal window_size softcap alibi_slopes deterministic return_attn_probs block_table",
        ),
        (
            tilewise.flash_attn_with_kvcache,
            "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx "
            "cache_leftpad block_table softmax_scale causal window_size softcap "
            "rotary_interleaved alibi_slopes num_splits return_softmax_lse",
        ),
        (
            tilewise.scaled_dot_product_attention,
            "query key value attn_mask dropout_p is_causal scale enable_gqa",
        ),
    ],
)
def test_parameters_and_their_order(function, parameters):
    assert list(inspect.signature(function).parameters) == parameters.split()


# --- flash_attn_func, flash_attn_varlen_func ------------------------------------------------------


def test_flash_attn_func():
    inputs = _double()
    q, k, v = inputs.randn(2, 5, 4, 8), inputs.randn(2, 7, 2, 8), inputs.randn(2, 7, 2, 8)
    slopes = inputs.rand(2, 4)
    out, lse, probs = tilewise.flash_attn_func(
        q, k, v, 0.0, 0.3, True, (3, 2), 4.0, slopes, True, True
    )
    expected, expected_lse = tilewise.flash_attention(
        q,
        k,
        v,
        causal=True,
        scale=0.3,
        window=(3, 2),
        softcap=4.0,
        alibi_slopes=slopes,
        return_lse=True,
    )
    assert torch.equal(out, expected)
    assert lse.shape == (2, 4, 5)
    assert torch.equal(lse, expected_lse.transpose(1, 2))
    assert probs.numel() == 0
    assert torch.equal(tilewise.flash_attn_func(q, k, v), tilewise.flash_attention(q, k, v))


def test_flash_attn_varlen_func():
    inputs = _double()
    q, k, v = inputs.randn(5, 4, 8), inputs.randn(7, 2, 8), inputs.randn(7, 2, 8)
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 2, 5], [0, 3, 7]))
    out, lse, _ = tilewise.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 3, 4, causal=True, return_attn_probs=True
    )
    expected, expected_lse = tilewise.flash_attention_varlen(
        q, k, v, cu_q, cu_k, causal=True, return_lse=True
    )
    assert torch.equal(out, expected)
    assert lse.shape == (4, 5)
    assert torch.equal(lse, expected_lse.T)


def test_flash_attn_varlen_func_with_pages():
    inputs = _double()
    q, k, v = inputs.randn(5, 4, 8), inputs.randn(7, 2, 8), inputs.randn(7, 2, 8)
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 2, 5], [0, 3, 7]))
    # Pages of 2 tokens: the first sequence in pages 3, 0 and the second in 4, 1.
    table = torch.tensor([[3, 0], [4, 1]], dtype=torch.int32)
    pages = torch.full((2, 5, 2, 2, 8), math.nan, dtype=torch.float64)
    for x, cache in zip((k, v), pages, strict=True):
        cache[3], cache[0, 0], cache[4], cache[1] = x[0:2], x[2], x[3:5], x[5:7]
    out = tilewise.flash_attn_varlen_func(
        q, *pages, cu_q, cu_k, 3, 4, causal=True, block_table=table
    )
    _close(out, tilewise.flash_attention_varlen(q, k, v, cu_q, cu_k, causal=True))


# --- flash_attn_with_kvcache ----------------------------------------------------------------------

CAPACITY, SEQLENS = 12, (3, 9)


def _cache(inputs, rows=2):
    """A dense cache of which only the first SEQLENS tokens are filled."""
    caches = inputs.randn(2, rows, CAPACITY, 2, 8)
    for row, seqlen in zip(range(rows), SEQLENS, strict=False):
        caches[:, row, seqlen:] = math.nan
    return caches[0], caches[1]


def _expected(q, k_cache, v_cache, seqlens, **options):
    """Each row by itself, on the filled part of its cache."""
    rows = [
        tilewise.flash_attention(
            q[i, None], k_cache[i, None, :n], v_cache[i, None, :n], return_lse=True, **options
        )
        for i, n in enumerate(seqlens)
    ]
    out, lse = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return out, lse.transpose(1, 2)


@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "softcap": 2.0}])
def test_reads_a_dense_cache(q_len, options):
    inputs = _double()
    q, (k_cache, v_cache) = inputs.randn(2, q_len, 4, 8), _cache(inputs)
    out, lse = tilewise.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        cache_seqlens=torch.tensor(SEQLENS, dtype=torch.int32),
        return_softmax_lse=True,
        **options,
    )
    expected, expected_lse = _expected(q, k_cache, v_cache, SEQLENS, **options)
    _close(out, expected)
    _close(lse, expected_lse)


def test_a_cache_without_lengths_is_full_and_one_length_is_for_all():
    inputs = _double()
    q, k_cache, v_cache = inputs.randn(2, 1, 4, 8), *inputs.randn(2, 2, CAPACITY, 2, 8)
    out = tilewise.flash_attn_with_kvcache(q, k_cache, v_cache)
    _close(out, _expected(q, k_cache, v_cache, (CAPACITY, CAPACITY))[0])
    out = tilewise.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=4)
    _close(out, _expected(q, k_cache, v_cache, (4, 4))[0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_appends_rotated_keys_and_rotates_queries(causal, interleaved):
    inputs = _double()
    q, k, v = inputs.randn(2, 3, 4, 8), inputs.randn(2, 3, 2, 8), inputs.randn(2, 3, 2, 8)
    k_cache, v_cache = _cache(inputs)
    filled = k_cache.clone(), v_cache.clone()
    tables = tilewise.rotary_tables(4, CAPACITY, interleaved=interleaved)
    seqlens = torch.tensor(SEQLENS, dtype=torch.int32)
    out = tilewise.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        tables.cos,
        tables.sin,
        cache_seqlens=seqlens,
        causal=causal,
        rotary_interleaved=interleaved,
    )
    positions = seqlens.long()[:, None] + torch.arange(3)
    new_k = tilewise.rotary_embedding(k, tables, positions)
    q_positions = positions if causal else positions[:, :1].expand(-1, 3)
    rotated = tilewise.rotary_embedding(q, tables, q_positions)
    for cache, new in zip(filled, (new_k, v), strict=True):
        for row, seqlen in enumerate(SEQLENS):
            cache[row, seqlen : seqlen + 3] = new[row]
    for actual, expected in zip((k_cache, v_cache), filled, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)
    longer = tuple(n + 3 for n in SEQLENS)
    _close(out, _expected(rotated, *filled, longer, causal=causal)[0])


def test_appends_to_the_rows_and_the_pages_that_are_named():
    inputs = _double()
    q, k, v = inputs.randn(2, 1, 4, 8), inputs.randn(2, 1, 2, 8), inputs.randn(2, 1, 2, 8)
    seqlens = torch.tensor(SEQLENS, dtype=torch.int32)
    rows = torch.tensor([3, 1], dtype=torch.int32)
    k_cache, v_cache = inputs.randn(2, 4, CAPACITY, 2, 8)
    before = k_cache.clone()
    out = tilewise.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=seqlens, cache_batch_idx=rows
    )
    assert torch.equal(k_cache[3, 3], k[0, 0])
    assert torch.equal(k_cache[1, 9], k[1, 0])
    assert (k_cache != before).any(-1).any(-1).sum() == 2
    longer = tuple(n + 1 for n in SEQLENS)
    _close(out, _expected(q, k_cache[rows], v_cache[rows], longer)[0])

    # The same keys in pages of 4: row r of the cache is pages 3r, 3r + 1, 3r + 2.
    pages = [cache.reshape(12, 4, 2, 8) for cache in (before, v_cache.clone())]
    table = (3 * rows[:, None] + torch.arange(3)).int()
    paged = tilewise.flash_attn_with_kvcache(
        q, *pages, k, v, cache_seqlens=seqlens, block_table=table
    )
    _close(paged, out)
    assert torch.equal(pages[0].reshape_as(k_cache), k_cache)


def test_what_does_not_fit_into_the_cache_is_left_out():
    inputs = _double()
    q, k, v = inputs.randn(1, 1, 2, 8), inputs.randn(1, 3, 2, 8), inputs.randn(1, 3, 2, 8)
    k_cache, v_cache = inputs.randn(2, 2, CAPACITY, 2, 8)
    before = k_cache.clone()
    tilewise.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=CAPACITY - 1)
    assert torch.equal(k_cache[0, -1], k[0, 0])
    assert torch.equal(k_cache[0, :-1], before[0, :-1])
    assert torch.equal(k_cache[1], before[1])


def _call_with_kvcache(**change):
    q, cache = torch.zeros(1, 1, 2, 8), torch.zeros(1, 4, 2, 8)
    return tilewise.flash_attn_with_kvcache(**{"q": q, "k_cache": cache, "v_cache": cache} | change)


_NEW = torch.zeros(1, 1, 2, 8)
_NEW_ROTATED = {
    "k": _NEW,
    "v": _NEW,
    "cache_seqlens": 1,
    "rotary_cos": torch.ones(4, 2),
    "rotary_sin": torch.ones(4, 2),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache_leftpad": torch.zeros(1)}, "cache_leftpad: must be None, padding on the left"),
        ({"k": _NEW, "v": _NEW}, "cache_seqlens: must be given with k and v, got None"),
        ({"k": _NEW, "cache_seqlens": 1}, "k, v: must be given together, got one of them"),
        (
            {"rotary_cos": torch.ones(4, 2), "rotary_sin": torch.ones(4, 2)},
            "rotary_cos: must be given with k and v, got neither",
        ),
        (
            {"rotary_cos": torch.ones(4, 2)},
            "rotary_cos, rotary_sin: must be given together, got one of them",
        ),
        (
            {
                "block_table": torch.zeros(1, 1, dtype=torch.int32),
                "cache_batch_idx": torch.zeros(1, dtype=torch.int32),
            },
            "cache_batch_idx: must be None with a block_table",
        ),
        ({"q": torch.zeros(1, 2, 8)}, r"q: shape must be \(batch, seqlen_q, heads, head_dim\)"),
        (
            {"cache_seqlens": torch.zeros(1)},
            "cache_seqlens: dtype must be int32, got float32",
        ),
        ({"cache_seqlens": 5}, "cache_seqlens: must be from 0 to 4, the cache's capacity, got 5"),
        ({"cache_seqlens": True}, "cache_seqlens: must be an int, got bool"),
        ({"softmax_scale": math.inf}, "softmax_scale: must be finite, got inf"),
        ({"window_size": (-2, 0)}, "window_size: must be >= -1 on both sides"),
        ({"return_softmax_lse": 1}, "return_softmax_lse: must be a bool, got int"),
        (
            {"cache_batch_idx": torch.zeros(1)},
            "cache_batch_idx: dtype must be int32 or int64, got float32",
        ),
        (
            {"block_table": torch.zeros(2, 1, dtype=torch.int32)},
            "block_table: batch must be q's, 1, got 2",
        ),
        (_NEW_ROTATED | {"rotary_sin": 1}, "rotary_sin: must be a torch.Tensor, got int"),
        (
            _NEW_ROTATED | {"rotary_sin": torch.ones(4, 3)},
            r"rotary_sin: shape must be \(4, 2\)",
        ),
        (
            _NEW_ROTATED | {"rotary_interleaved": 1},
            "rotary_interleaved: must be a bool, got int",
        ),
    ],
)
def test_kvcache_refuses(change, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        _call_with_kvcache(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softmax_scale": "1"}, "softmax_scale: must be a number or None, got str"),
        ({"window_size": 3}, r"window_size: must be \(left, right\), got int"),
        ({"return_attn_probs": 1}, "return_attn_probs: must be a bool, got int"),
        ({"softcap": -1.0}, "softcap: must be >= 0 and finite, got -1.0"),
        ({"scale": 1.0}, ".* got an unexpected keyword argument 'scale'"),
    ],
)
def test_errors_name_the_arguments_that_the_caller_wrote(change, message):
    q, cu = torch.zeros(3, 2, 8), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        tilewise.flash_attn_func(q[None], q[None], q[None], **change)
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        tilewise.flash_attn_varlen_func(q, q, q, cu, cu, 3, 3, **change)


def test_pages_that_do_not_fit_are_called_k_and_v():
    q, cu = torch.zeros(3, 2, 8), torch.tensor([0, 3], dtype=torch.int32)
    pages, table = torch.zeros(1, 3, 2, 8), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^v: shape must be \(1, 3, 2, 8\) \(k's pages"):
        tilewise.flash_attn_varlen_func(q, pages, pages[:, :2], cu, cu, 3, 3, block_table=table)


def test_dropout_is_refused():
    q, cu = torch.zeros(3, 2, 8), torch.tensor([0, 3], dtype=torch.int32)
    message = "^dropout_p: must be 0, dropout is not supported, got 0.1$"
    with pytest.raises(ValueError, match=message):
        tilewise.flash_attn_func(q[None], q[None], q[None], 0.1)
    with pytest.raises(ValueError, match=message):
        tilewise.flash_attn_varlen_func(q, q, q, cu, cu, 3, 3, 0.1)
    with pytest.raises(ValueError, match=message):
        tilewise.scaled_dot_product_attention(q[None], q[None], q[None], dropout_p=0.1)


# --- scaled_dot_product_attention -----------------------------------------------------------------


@pytest.mark.parametrize(("q_len", "k_len"), [(5, 5), (3, 7), (7, 3), (1, 4), (4, 1)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": bool}, {"scale": 0.2}])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_sdpa_is_pytorchs(q_len, k_len, options, kv_heads):
    inputs = _double()
    q, k, v = inputs.randn(2, 4, q_len, 8), *inputs.randn(2, 2, kv_heads, k_len, 8)
    options = dict(options)
    if "attn_mask" in options:
        options["attn_mask"] = inputs.rand(2, 1, q_len, k_len) < 0.7
    if kv_heads != 4:
        options["enable_gqa"] = True
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    _close(tilewise.scaled_dot_product_attention(q, k, v, **options), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"is_causal": True, "attn_mask": torch.zeros(3, 3)},
            "attn_mask: must be None with is_causal",
        ),
        (
            {"key": torch.zeros(1, 1, 3, 8)},
            "key: heads must be query's, 2, without enable_gqa, got 1",
        ),
        (
            {"query": torch.zeros(2, 3, 8)},
            r"query: shape must be \(batch, heads, seqlen, head_dim\), got \(2, 3, 8\)",
        ),
        ({"value": None}, "value: must be a torch.Tensor, got NoneType"),
        ({"value": torch.zeros(1, 2, 2, 8)}, "value: seqlen_k must be key's, 3, got 2"),
        (
            {"attn_mask": torch.zeros(3, 3, dtype=torch.int64)},
            "attn_mask: dtype must be bool or float.*, got int64",
        ),
        ({"is_causal": 1}, "is_causal: must be a bool, got int"),
    ],
)
def test_sdpa_refuses(change, message):
    x = torch.zeros(1, 2, 3, 8)
    with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
        tilewise.scaled_dot_product_attention(**{"query": x, "key": x, "value": x} | change)
