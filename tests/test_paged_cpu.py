"""What the C++ paged cache promises beyond the contracts: which bits may never differ."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tilewise import append_kv, cpu, native, paged_attention, testing
from tilewise.fused.tables import rotary_tables
from tilewise.paged import kv_formats, naive
from tilewise.testing import Inputs

pytestmark = pytest.mark.skipif(
    bool(cpu.why_not(torch.empty(0))), reason=str(cpu.why_not(torch.empty(0)))
)


DIM = 64  # whole vectors of every type, so that bfloat16 takes the kernels that multiply its pairs

both_arithmetics = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def _cache(inputs: Inputs, pages: int, page_size: int, cache: str | None = None) -> dict[str, Any]:
    shape = (pages, page_size, 2, DIM)
    if cache is None:
        return {"k_cache": inputs.randn(*shape), "v_cache": inputs.randn(*shape)}
    k, v = inputs.randn(*shape, dtype=torch.float32), inputs.randn(*shape, dtype=torch.float32)
    dtype = kv_formats.stored_dtype(cache)
    (k, k_scale), (v, v_scale) = kv_formats.encode(k, dtype), kv_formats.encode(v, dtype)
    return {"k_cache": k, "v_cache": v, "k_scale": k_scale, "v_scale": v_scale}


def _attend(q: torch.Tensor, **arguments: Any) -> torch.Tensor:
    out, lse = paged_attention(q, **arguments, return_lse=True, backend="cpu")
    return torch.cat([out, lse.unsqueeze(-1)], -1)


@pytest.mark.parametrize(
    ("dtype", "cache"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8")],
)
def test_pages_change_no_bit(dtype: torch.dtype, cache: str | None) -> None:
    inputs = Inputs(dtype)
    length = 1501
    q, rows = inputs.randn(1, 8, DIM), _cache(inputs, 1, length, cache)
    seqlens = torch.tensor([length], dtype=torch.int32)
    whole = _attend(
        q, **rows, block_table=torch.zeros(1, 1, dtype=torch.int32), cache_seqlens=seqlens
    )
    for page_size in (1, 3, 16, 125):
        order = inputs.permutation(length // page_size + 1)
        paged = {}
        for name, x in rows.items():
            nothing = math.nan if x.is_floating_point() else 77
            padded = torch.full((len(order) * page_size, *x.shape[2:]), nothing, dtype=x.dtype)
            padded[:length] = x[0]
            paged[name] = torch.empty(len(order), page_size, *x.shape[2:], dtype=x.dtype)
            paged[name][order] = padded.view(len(order), page_size, *x.shape[2:])
        cut = _attend(q, **paged, block_table=order.int()[None], cache_seqlens=seqlens)
        assert torch.equal(cut, whole), page_size


@pytest.mark.parametrize("cache", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("heads", [3, 8, 11])
def test_heads_together_have_the_bits_of_each_alone(cache: str, heads: int) -> None:
    """Scales of several heads are taken at once, and those behind the last key may be NaN."""
    inputs = Inputs(torch.bfloat16)
    requests, pages, page_size = 5, 10, 16  # as many tasks as one thread wants, with all heads each
    shape = (requests * pages, page_size, heads, DIM)
    dtype = kv_formats.stored_dtype(cache)
    rows = {}
    for name in ("k", "v"):
        codes, scale = kv_formats.encode(inputs.randn(*shape, dtype=torch.float32), dtype)
        rows |= {f"{name}_cache": codes, f"{name}_scale": scale}
    table = inputs.permutation(requests * pages).view(requests, pages).int()
    seqlens = (1 + inputs.randint(0, pages * page_size, requests)).int()
    for request, length in enumerate(seqlens.tolist()):
        for j in range(length, pages * page_size):
            slot = table[request, j // page_size], j % page_size
            rows["k_scale"][slot] = rows["v_scale"][slot] = math.nan
    q = inputs.randn(requests, 2 * heads, DIM)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        together = _attend(q, **rows, block_table=table, cache_seqlens=seqlens)
        assert together.isfinite().all()
        for h in range(heads):
            own = {name: x[:, :, h : h + 1] for name, x in rows.items()}
            pair = slice(2 * h, 2 * h + 2)
            alone = _attend(q[:, pair], **own, block_table=table, cache_seqlens=seqlens)
            assert torch.equal(together[:, pair], alone), h
    finally:
        torch.set_num_threads(threads)


@both_arithmetics
@pytest.mark.parametrize("cache", [None, "int8", "fp8", "int4"])
@pytest.mark.parametrize("requests", [3, 40])
def test_a_shared_prefix_changes_no_bit(
    dtype: torch.dtype, cache: str | None, requests: int
) -> None:
    """Requests that share pages are attended to together, and alone they get the same bits."""
    inputs = Inputs(dtype)
    page_size, shared, own = 16, 70, 3  # 1120 shared tokens: two splits and a part of one
    arguments = _cache(inputs, shared + own * requests, page_size, cache)
    first = torch.arange(shared).repeat(requests, 1)
    table = torch.cat([first, shared + torch.arange(own * requests).view(requests, own)], 1).int()
    seqlens = (shared * page_size + 1 + inputs.randint(0, own * page_size, requests)).int()
    seqlens[0] = 600  # ends within the prefix
    q, slopes = inputs.randn(requests, 8, DIM), inputs.rand(8, dtype=torch.float32)
    options = arguments | {"alibi_slopes": slopes, "window": (900, -1)}
    together = _attend(q, block_table=table, cache_seqlens=seqlens, **options)
    for i in range(requests):
        one = slice(i, i + 1)
        alone = _attend(q[one], block_table=table[one], cache_seqlens=seqlens[one], **options)
        assert torch.equal(alone, together[one]), i
    truth_options = {
        name: x.double() if isinstance(x, torch.Tensor) and x.dtype in (dtype, torch.float32) else x
        for name, x in options.items()
    }
    some = slice(None, None, max(1, requests // 5))  # the naive operation takes its time
    places = {"block_table": table[some], "cache_seqlens": seqlens[some]}
    expected = naive.paged_attention(q[some], **places, **options)
    truth = naive.paged_attention(q[some].double(), **places, **truth_options)
    testing.assert_agrees(together[some, ..., :-1].to(dtype), expected, truth)


@both_arithmetics
def test_values_that_are_not_finite_reach_only_who_sees_them(dtype: torch.dtype) -> None:
    """In every split, a value that one query sees and another does not."""
    inputs = Inputs(dtype)
    arguments = _cache(inputs, 100, 16)
    table = inputs.permutation(100).int()[None]
    places = {"block_table": table, "cache_seqlens": torch.tensor([1600], dtype=torch.int32)}
    ragged = {"cu_seqlens_q": torch.tensor([0, 3], dtype=torch.int32), "window": (600, -1)}
    q = inputs.randn(3, 8, DIM)
    clean = _attend(q, **arguments, **places, **ragged)
    poisoned = {name: x.clone() for name, x in arguments.items()}
    key = 1597 - 600  # the first that the first query sees; the others do not
    where = (int(table[0, key // 16]), key % 16)
    poisoned["v_cache"][where][0, 5] = math.inf
    out = _attend(q, **poisoned, **places, **ragged)
    assert torch.equal(out[1:], clean[1:])
    assert torch.equal(out[0, 4:], clean[0, 4:])
    assert out[0, :4, :DIM].isnan().all()
    assert torch.equal(out[0, :4, DIM], clean[0, :4, DIM])


@pytest.mark.parametrize("cache", ["int8", "fp8", "int4"])
def test_every_code_is_exact_in_both_arithmetics(cache: str) -> None:
    """A single key of weight 1 gives back its value: each code of the format, of either sign."""
    dtype = kv_formats.stored_dtype(cache)
    width = kv_formats.stored_width("k", DIM, dtype)
    codes = torch.arange(16 * width).to(torch.uint8).view(16, 1, 1, width)
    if cache == "fp8":
        codes[codes & 0x7F == 0x7F] = 0  # not a number
    pages = len(codes)
    ones = torch.ones(pages, 1, 1)
    arguments = {
        "k_cache": codes.view(dtype),
        "v_cache": codes.view(dtype),
        "k_scale": ones,
        "v_scale": ones,
        "block_table": torch.arange(pages, dtype=torch.int32)[:, None],
        "cache_seqlens": torch.ones(pages, dtype=torch.int32),
    }
    q = torch.zeros(pages, 1, DIM)
    for q_dtype in (torch.float32, torch.bfloat16):
        out = paged_attention(q.to(q_dtype), **arguments, backend="cpu")
        expected = naive.paged_attention(q, **arguments)
        assert torch.equal(out.float(), expected), q_dtype


@both_arithmetics
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_every_fp8_code_is_exact_wherever_it_is(dtype: torch.dtype, heads: int, dim: int) -> None:
    """A query that is zero but for one element gets a single key's code for a score."""
    requests = torch.arange(256)
    chosen = (requests[:, None] + 37 * torch.arange(heads)) % dim  # element of a request and head
    codes = (torch.arange(dim) - requests[:, None] % dim + requests[:, None]) % 256
    codes[codes & 0x7F == 0x7F] = 0  # not a number
    keys, values = codes, codes.flip(0)
    arguments = {
        "k_cache": keys.to(torch.uint8).view(torch.float8_e4m3fn).view(256, 1, 1, dim),
        "v_cache": values.to(torch.uint8).view(torch.float8_e4m3fn).view(256, 1, 1, dim),
        "k_scale": torch.ones(256, 1, 1),
        "v_scale": torch.ones(256, 1, 1),
        "block_table": requests.int()[:, None],
        "cache_seqlens": torch.ones(256, dtype=torch.int32),
    }
    q = torch.nn.functional.one_hot(chosen, dim).to(dtype)
    out, lse = paged_attention(q, **arguments, scale=1.0, return_lse=True, backend="cpu")
    numbers = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.bfloat16)
    assert torch.equal(lse, numbers[keys.gather(1, chosen)].float())
    assert torch.equal(out, numbers[values][:, None].expand(256, heads, dim).to(dtype))

    for name, index in (("k_cache", 0), ("v_cache", 1)):
        for code in (0x7F, 0xFF):
            poisoned = arguments[name].clone()
            poisoned.view(torch.uint8)[requests, 0, 0, chosen[:, 0]] = code
            results = paged_attention(
                q, **arguments | {name: poisoned}, scale=1.0, return_lse=True, backend="cpu"
            )
            first = results[0][requests, 0, chosen[:, 0]] if index else results[1][:, 0]
            assert first.isnan().all(), (name, code)


def test_any_table_and_lengths_are_safe() -> None:
    inputs = Inputs(torch.float32)
    arguments = _cache(inputs, 5, 4)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        table = torch.randint(-(2**31), 2**31 - 1, (6, 300), generator=generator).int()
        table[torch.rand(6, 300, generator=generator) < 0.5] = 2
        seqlens = torch.randint(-(2**31), 2**31 - 1, (6,), generator=generator).int()
        cu_seqlens = torch.randint(-3, 12, (7,), generator=generator).int()
        for ragged in ({}, {"cu_seqlens_q": cu_seqlens}):
            out = paged_attention(
                inputs.randn(6, 8, DIM),
                **arguments,
                block_table=table,
                cache_seqlens=seqlens,
                **ragged,
                backend="cpu",
            )
            assert out.shape == (6, 8, DIM)


@pytest.mark.parametrize("dtype", testing.HALF_AND_SINGLE)
@pytest.mark.parametrize("cache", ["int8", "fp8", "int4"])
def test_appended_bytes_are_the_definitions(dtype: torch.dtype, cache: str) -> None:
    inputs = Inputs(dtype)
    tokens, dim = 33, 30
    k, v = inputs.randn(tokens, 3, dim), inputs.randn(tokens, 3, dim)
    k[3], v[4, 1, 2], k[5, 0, 0], v[6] = 0, math.nan, math.inf, 1e-7
    if dtype != torch.float16:
        k[7], k[8] = 1e-38, 1e38
    stored = kv_formats.stored_dtype(cache)
    width = kv_formats.stored_width("k", dim, stored)
    results = []
    for backend in ("naive", "cpu"):
        caches = [torch.zeros(9, 4, 3, width, dtype=stored) for _ in range(2)]
        scales = [torch.zeros(9, 4, 3) for _ in range(2)]
        append_kv(
            k,
            v,
            *caches,
            torch.arange(tokens),
            rotary=rotary_tables(20, 50),
            positions=torch.arange(tokens),
            k_scale=scales[0],
            v_scale=scales[1],
            backend=backend,
        )
        results.append([x.view(torch.uint8) for x in caches] + [x.nan_to_num(-1) for x in scales])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_a_tensor_of_no_pages_still_has_a_table() -> None:
    assert native.why_not_cpu() is None
    out = paged_attention(
        torch.ones(2, 2, DIM),
        **_cache(Inputs(torch.float32), 1, 4),
        block_table=torch.empty(2, 0, dtype=torch.int32),
        cache_seqlens=torch.tensor([0, 7], dtype=torch.int32),
        backend="cpu",
    )
    assert torch.equal(out, torch.zeros(2, 2, DIM))
