"""Paged attention: pages are only another way to lay out the same keys."""

import math
from itertools import accumulate, pairwise

import pytest
import torch

import tilewise
from tilewise import dispatch
from tilewise.testing import Inputs, assert_agrees

NAN = math.nan
BACKENDS = dispatch.OPS["paged_attention"].backends_on("cpu")


def in_pages(inputs, sequences, page_size, *, spare_pages=2):
    """A cache full of NaN but for these (tokens, kv_heads, head_dim) sequences, and the table."""
    used = [-(-len(x) // page_size) for x in sequences]
    cache = inputs.randn(sum(used) + spare_pages, page_size, *sequences[0].shape[1:]) * NAN
    order = inputs.permutation(len(cache)).tolist()
    table = torch.full((len(sequences), max(used)), -1, dtype=torch.int32)
    for row, (x, n) in enumerate(zip(sequences, used, strict=True)):
        pages = [order.pop() for _ in range(n)]
        table[row, :n] = torch.tensor(pages, dtype=torch.int32)
        for i, token in enumerate(x):
            cache[pages[i // page_size], i % page_size] = token
    return cache, table


def sequences_and_cache(inputs, lengths, page_size, head_dim=16):
    """Keys and values of every sequence, and the arguments of a paged call on them."""
    kv = [inputs.randn(n, 2, 2, head_dim) for n in lengths]  # keys and values side by side
    cache, table = in_pages(inputs, kv, page_size)
    k_cache, v_cache = (x.contiguous() for x in cache.unbind(2))
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    return [x.unbind(1) for x in kv], (k_cache, v_cache, table, seqlens)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def call(backend, *args, **kwargs):
    """The result on this backend, or a skip with its reason."""
    reason = dispatch.OPS["paged_attention"].reasons(args, kwargs)[backend]
    if reason:
        pytest.skip(f"{backend}: {reason}")
    return tilewise.paged_attention(*args, **kwargs, backend=backend)


def agrees_with_contiguous(actual, q, keys, values, **options):
    naive, truth = (
        tilewise.flash_attention(
            *(x[None].to(dtype) for x in (q, keys, values)), **options, backend="naive"
        )[0]
        for dtype in (q.dtype, torch.float64)
    )
    assert_agrees(actual, naive, truth)


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_equals_contiguous_attention(backend, page_size):
    inputs = Inputs()
    kv, cache = sequences_and_cache(inputs, (1, 16, 37), page_size)
    q = inputs.randn(3, 4, 16)
    out = call(backend, q, *cache)
    for i, (k, v) in enumerate(kv):
        agrees_with_contiguous(out[i : i + 1], q[i : i + 1], k, v)


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"window": (5, 0)}], ids=["causal", "window"])
def test_prefill_in_chunks_equals_one_shot(backend, page_size, options):
    inputs = Inputs()
    lengths = (5, 16, 37)
    kv, (k_cache, v_cache, table, _) = sequences_and_cache(inputs, lengths, page_size)
    queries = [inputs.randn(n, 4, 16) for n in lengths]
    outs = [[] for _ in lengths]
    # Each sequence in its own chunks, side by side in one call; the second is done early.
    for ends in pairwise([(0, 0, 0), (2, 15, 1), (3, 16, 20), (5, 16, 37)]):
        chunks = [slice(*rows) for rows in zip(*ends, strict=True)]
        q = torch.cat([x[rows] for x, rows in zip(queries, chunks, strict=True)])
        sizes = [rows.stop - rows.start for rows in chunks]
        out = call(
            backend,
            q,
            k_cache,
            v_cache,
            table,
            int32(*ends[1]),
            cu_seqlens_q=int32(*accumulate(sizes, initial=0)),
            causal=True,
            **options,
        )
        for own, part in zip(outs, out.split(sizes), strict=True):
            own.append(part)
    for q, (k, v), parts in zip(queries, kv, outs, strict=True):
        agrees_with_contiguous(torch.cat(parts), q, k, v, causal=True, **options)


@pytest.mark.parametrize("page_size", [1, 2, 3, 4, 6, 12])
def test_naive_gives_the_bits_of_contiguous_attention_at_any_page_size(page_size):
    inputs = Inputs()
    [(k, v)], cache = sequences_and_cache(inputs, (12,), page_size)
    q = inputs.randn(5, 4, 16)
    options = {"causal": True, "return_lse": True, "backend": "naive"}
    paged = tilewise.paged_attention(q, *cache, cu_seqlens_q=int32(0, 5), **options)
    contiguous = tilewise.flash_attention(q[None], k[None], v[None], **options)
    for actual, expected in zip(paged, contiguous, strict=True):
        assert torch.equal(actual, expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_page_number_out_of_range_reads_as_absent(backend):
    inputs = Inputs()
    [(k, v)], (k_cache, v_cache, table, seqlens) = sequences_and_cache(inputs, (11,), 4)
    q = inputs.randn(1, 4, 16)
    for bad in (-1, len(k_cache), 2**31 - 1, -(2**31)):
        table[0, 1] = bad
        out = call(backend, q, k_cache, v_cache, table, seqlens)
        here = torch.tensor([0, 1, 2, 3, 8, 9, 10])
        agrees_with_contiguous(out, q, k[here], v[here])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_length_past_the_table_reads_no_further(backend):
    inputs = Inputs()
    [(k, v)], (k_cache, v_cache, table, _) = sequences_and_cache(inputs, (8,), 4)
    q = inputs.randn(1, 4, 16)
    out = call(backend, q, k_cache, v_cache, table, int32(10**9))
    agrees_with_contiguous(out, q, k, v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, 1.0, -2.0, 0.0])], ids=["", "sinks"])
def test_who_sees_nothing_gets_nothing(backend, sinks):
    inputs = Inputs()
    _, (k_cache, v_cache, table, _) = sequences_and_cache(inputs, (4, 1), 4)
    q = inputs.randn(4, 4, 16)
    q[3] = NAN  # padding
    out, lse = call(
        backend,
        q,
        k_cache,
        v_cache,
        table,
        int32(4, 0),
        cu_seqlens_q=int32(0, 2, 3),
        sinks=sinks,
        return_lse=True,
    )
    assert (out[2:] == 0).all()
    assert torch.equal(lse[2], torch.full((4,), -math.inf) if sinks is None else sinks)
    assert (lse[3] == -math.inf).all()
    assert out[:2].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["k", "v"])
def test_who_sees_a_value_that_is_not_finite_is_nan(backend, bad, which):
    inputs = Inputs()
    _, (k_cache, v_cache, table, seqlens) = sequences_and_cache(inputs, (6, 9), 4)
    q = inputs.randn(2, 4, 16)
    clean = call(backend, q, k_cache, v_cache, table, seqlens)
    cache = k_cache if which == "k" else v_cache
    cache[table[0, 1], 1, 1, 3] = bad  # token 5 of request 0, key head 1
    out = call(backend, q, k_cache, v_cache, table, seqlens)
    assert out[0, 2:].isnan().all()
    assert torch.equal(out[0, :2], clean[0, :2])
    assert torch.equal(out[1], clean[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_never_reads_what_the_window_hides(backend):
    inputs = Inputs()
    [(k, v)], (k_cache, v_cache, table, seqlens) = sequences_and_cache(inputs, (11,), 4)
    q = inputs.randn(1, 4, 16)
    for cache in (k_cache, v_cache):
        cache[table[0, 0]] = NAN
    out = call(backend, q, k_cache, v_cache, table, seqlens, window=(6, 0))
    agrees_with_contiguous(out, q, k[4:], v[4:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_invariant_rows_do_not_depend_on_the_batch(backend):
    inputs = Inputs()
    lengths, counts = (33, 0, 5, 16), (4, 0, 5, 1)
    _, (k_cache, v_cache, table, seqlens) = sequences_and_cache(inputs, (33, 1, 5, 16), 4)
    seqlens = int32(*lengths)
    ends = list(accumulate(counts, initial=0))
    q, bias = inputs.randn(11, 4, 16), inputs.randn(4, 11, table.shape[1] * 4)
    slopes = inputs.rand(4, 4)
    options = {"causal": True, "batch_invariant": True, "return_lse": True}
    together = call(
        backend,
        q,
        k_cache,
        v_cache,
        table,
        seqlens,
        cu_seqlens_q=int32(*ends),
        bias=bias,
        alibi_slopes=slopes,
        **options,
    )
    for i, rows in enumerate(slice(*x) for x in pairwise(ends)):
        alone = call(
            backend,
            q[rows],
            k_cache,
            v_cache,
            table[i : i + 1],
            seqlens[i : i + 1],
            cu_seqlens_q=int32(0, counts[i]),
            bias=bias[:, rows],
            alibi_slopes=slopes[i : i + 1],
            **options,
        )
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b[rows])
    padding_out, padding_lse = (x[ends[-1] :] for x in together)
    assert (padding_out == 0).all()
    assert (padding_lse == -math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_invariant_decoding_is_the_same_call(backend):
    inputs = Inputs()
    kv, cache = sequences_and_cache(inputs, (9, 4), 4)
    q = inputs.randn(2, 4, 16)
    out = call(backend, q, *cache, batch_invariant=True)
    for i, (k, v) in enumerate(kv):
        agrees_with_contiguous(out[i : i + 1], q[i : i + 1], k, v)


# --- bad input ------------------------------------------------------------------------------------


def good_call():
    return {
        "q": torch.ones(2, 4, 8),
        "k_cache": torch.ones(5, 3, 2, 8),
        "v_cache": torch.ones(5, 3, 2, 6),
        "block_table": torch.zeros(2, 4, dtype=torch.int32),
        "cache_seqlens": int32(7, 12),
    }


INT8 = {name: torch.ones(5, 3, 2, 8, dtype=torch.int8) for name in ("k_cache", "v_cache")}
SCALE = torch.ones(5, 3, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": [1.0]}, "q: must be a torch.Tensor, got list"),
        ({"q": torch.ones(2, 8)}, "q: shape must be (batch, heads, head_dim), got (2, 8)"),
        ({"q": torch.ones(2, 4, 16)[..., ::2]}, "q: the last dimension must have stride 1, got 2"),
        ({"q": torch.ones(2, 4, 9)}, "q: head_dim must be k_cache's, 8, got 9"),
        (
            {"q": torch.ones(2, 3, 8)},
            "q: heads must be a multiple of k_cache's kv_heads, 2, got 3; "
            "k_cache is (pages, page_size, kv_heads, head_dim)",
        ),
        (
            {"k_cache": torch.ones(5, 3, 2, 8, dtype=torch.int16)},
            "k_cache: dtype must be float32 or float16 or bfloat16 or float64 or int8 or "
            "float8_e4m3fn or uint8, got int16",
        ),
        (
            {"k_cache": torch.ones(5, 3, 16)},
            "k_cache: shape must be (pages, page_size, kv_heads, head_dim), got (5, 3, 16)",
        ),
        (
            {"k_cache": torch.ones(5, 0, 2, 8), "v_cache": torch.ones(5, 0, 2, 8)},
            "k_cache: page_size must be >= 1, got 0",
        ),
        (
            {"k_cache": torch.ones(0, 3, 2, 8), "v_cache": torch.ones(0, 3, 2, 8)},
            "k_cache: pages must be >= 1, got 0",
        ),
        (
            {"v_cache": torch.ones(5, 3, 2, 6, dtype=torch.float16)},
            "v_cache: dtype must be k_cache's, float32, got float16",
        ),
        (
            {"v_cache": torch.ones(5, 4, 2, 6)},
            "v_cache: shape must be (5, 3, 2, 6) (k_cache's pages, page_size and kv_heads), "
            "got (5, 4, 2, 6)",
        ),
        (
            {"v_cache": torch.ones(5, 3, 2, 12)[..., ::2]},
            "v_cache: the last dimension must have stride 1, got 2",
        ),
        ({"k_scale": SCALE}, "k_scale: must be None for float32 caches, got a tensor"),
        (INT8, "k_scale: must be given for int8 caches, got None"),
        (INT8 | {"k_scale": SCALE}, "v_scale: must be given for int8 caches, got None"),
        (
            INT8 | {"k_scale": SCALE.half(), "v_scale": SCALE},
            "k_scale: dtype must be float32 or float64, got float16",
        ),
        (
            INT8 | {"k_scale": SCALE, "v_scale": SCALE[:4]},
            "v_scale: shape must be (5, 3, 2) (k_cache's pages, page_size and kv_heads), "
            "got (4, 3, 2)",
        ),
        (
            {
                "q": torch.ones(2, 4, 7),
                "k_cache": torch.ones(5, 3, 2, 4, dtype=torch.uint8),
                "v_cache": torch.ones(5, 3, 2, 4, dtype=torch.uint8),
                "k_scale": SCALE,
                "v_scale": SCALE,
            },
            "q: head_dim must be even for an int4 cache, got 7",
        ),
        ({"block_table": torch.zeros(2, 4)}, "block_table: dtype must be int32, got float32"),
        (
            {"block_table": torch.zeros(8, dtype=torch.int32)},
            "block_table: shape must be (batch, max_pages), got (8,)",
        ),
        (
            {"block_table": torch.zeros(3, 4, dtype=torch.int32)},
            "block_table: batch must be cache_seqlens', 2, got 3",
        ),
        (
            {"block_table": torch.zeros(4, 2, dtype=torch.int32).T},
            "block_table: the last dimension must have stride 1, got 2",
        ),
        (
            {"cache_seqlens": torch.tensor([7, 12])},
            "cache_seqlens: dtype must be int32, got int64",
        ),
        (
            {"cache_seqlens": int32(7, 12, 1)},
            "cache_seqlens: batch must be q's, 2, got 3; "
            "several queries per request need cu_seqlens_q",
        ),
        (
            {"cu_seqlens_q": int32(0, 2)},
            "cu_seqlens_q: shape must be (3,) (cache_seqlens' batch + 1), got (2,)",
        ),
        (
            {"bias": torch.zeros(4, 2, 11)},
            "bias: shape must broadcast to (4, 2, 12), (heads, batch, max_pages * page_size), "
            "got (4, 2, 11)",
        ),
        ({"sinks": torch.zeros(3)}, "sinks: shape must be (4,) (q's heads), got (3,)"),
        (
            {"block_table": torch.zeros(2, 4, dtype=torch.int32, device="meta")},
            "block_table: must be on the device of q (cpu), got meta",
        ),
    ],
)
def test_names_the_bad_argument(change, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        tilewise.paged_attention(**good_call() | change)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache_seqlens": int32(7, -1)}, "cache_seqlens: must be >= 0, batch row 1 is -1"),
        (
            {"cache_seqlens": int32(13, 1)},
            "cache_seqlens: must be <= 12, block_table's max_pages * page_size, batch row 0 is 13",
        ),
        (
            {"block_table": torch.tensor([[0, 1, 2, 9], [0, 1, -1, 2]], dtype=torch.int32)},
            "block_table: pages in use must be from 0 to 4, batch row 1 has -1 at 2",
        ),
        (
            {"block_table": torch.tensor([[0, 1, 5, 9], [0, 1, 3, 2]], dtype=torch.int32)},
            "block_table: pages in use must be from 0 to 4, batch row 0 has 5 at 2",
        ),
        (
            {"cu_seqlens_q": int32(0, 2, 1)},
            "cu_seqlens_q: must not decrease, batch row 1 is 2 to 1",
        ),
        (
            {"cu_seqlens_q": int32(0, 1, 3)},
            "cu_seqlens_q: must stay within q's 2 tokens, batch row 1 is 1 to 3",
        ),
        (
            {"cu_seqlens_q": int32(0, 2, 2), "cache_seqlens": int32(1, 1)},
            "cu_seqlens_q: a request must not have more queries than keys, batch row 0 has 2 and 1",
        ),
    ],
)
def test_validate_names_the_batch_row(change, message):
    arguments = good_call() | change
    tilewise.paged_attention(**arguments)  # safe all the same
    with pytest.raises(ValueError, match="batch row") as caught:
        tilewise.paged_attention(**arguments, validate=True)
    assert str(caught.value) == message
