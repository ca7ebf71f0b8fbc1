"""What prefill on a CPU promises beyond agreement: bits that depend on a row alone, and memory."""

from __future__ import annotations

import pytest
import torch

import tilewise
from tilewise import native
from tilewise.cases import Case, check_case
from tilewise.testing import Inputs

pytestmark = pytest.mark.skipif(native.why_not_cpu() is not None, reason=str(native.why_not_cpu()))

DTYPES = [torch.float32, torch.bfloat16]


def _qkv(inputs, seq, *, batch=1, heads=4, kv_heads=2, dim=40):
    """Dense q, k and v."""
    return (
        inputs.randn(batch, seq, heads, dim),
        inputs.randn(batch, seq, kv_heads, dim),
        inputs.randn(batch, seq, kv_heads, dim),
    )


def _same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _attend(q, k, v, backend="cpu", **options):
    options = {"causal": True, "return_lse": True} | options
    return tilewise.flash_attention(q, k, v, backend=backend, **options)


@pytest.mark.parametrize("keys", [2048, 8192])
def test_a_sum_over_thousands_of_keys_keeps_the_agreement_rule(keys):
    """Summed in one chain of additions it would not: the error of a chain grows with its length."""

    def make(inputs):
        _, k, v = _qkv(inputs, keys, heads=2, kv_heads=1, dim=64)
        return {"q": inputs.randn(1, 64, 2, 64), "k": k, "v": v}

    check_case(Case("flash_attention", f"{keys} keys", make), "cpu", torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"window": (100, 0)}, {"softcap": 5.0}])
def test_a_prompt_in_chunks_gives_the_bits_of_one_in_one_piece(dtype, options):
    q, k, v = _qkv(Inputs(dtype), 600)
    whole = _attend(q, k, v, **options)
    chunks = [
        _attend(q[:, i:j], k[:, :j], v[:, :j], **options)
        for i, j in ((0, 97), (97, 256), (256, 389), (389, 600))
    ]
    assert _same_bits(whole, (torch.cat(results, 1) for results in zip(*chunks, strict=True)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(dtype):
    q, k, v = _qkv(Inputs(dtype), 300, batch=3)
    together = _attend(q, k, v)
    lengths = torch.tensor([0, 300, 600, 900], dtype=torch.int32)
    ragged = tilewise.flash_attention_varlen(
        *(x.flatten(0, 1) for x in (q, k, v)),
        lengths,
        lengths,
        causal=True,
        return_lse=True,
        backend="cpu",
    )
    assert _same_bits(ragged, (x.flatten(0, 1) for x in together))
    for i in range(3):
        alone = _attend(*(x[i : i + 1] for x in (q, k, v)))
        assert _same_bits(alone, (x[i : i + 1] for x in together))


def test_bits_tell_another_order_of_the_same_keys_apart():
    """The negative control: were the sums exact, the tests above could not fail."""
    q, k, v = _qkv(Inputs(torch.float32), 300)
    order = torch.arange(299, -1, -1)
    forwards = _attend(q, k, v, causal=False)
    backwards = _attend(q, k[:, order], v[:, order], causal=False)
    assert not _same_bits(forwards, backwards)
    torch.testing.assert_close(forwards, backwards)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_pages_give_the_bits_of_contiguous_keys(dtype, page_size):
    inputs = Inputs(dtype)
    q, k, v = _qkv(inputs, 300)
    pages = -(-300 // page_size)
    table = inputs.permutation(pages + 3, torch.int32)[:pages]
    caches = []
    for x in (k, v):
        cache = torch.full((pages + 3, page_size, 2, 40), float("nan"), dtype=dtype)
        slots = table.long().repeat_interleave(page_size) * page_size
        slots = slots + torch.arange(page_size).repeat(pages)
        cache.flatten(0, 1)[slots[:300]] = x[0]
        caches.append(cache)
    paged = tilewise.paged_attention(
        q[0],
        *caches,
        table[None],
        torch.tensor([300], dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, 300], dtype=torch.int32),
        causal=True,
        return_lse=True,
        backend="cpu",
    )
    assert _same_bits(paged, (x[0] for x in _attend(q, k, v)))


def test_bits_do_not_depend_on_the_number_of_threads():
    q, k, v = _qkv(Inputs(torch.float32), 700)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(_attend(q, k, v))
    finally:
        torch.set_num_threads(threads)
    assert _same_bits(results[0], results[1])
    assert _same_bits(results[0], results[2])


@pytest.mark.parametrize("key", [3, 255, 256, 290])
def test_a_bad_key_or_value_spoils_those_who_see_it_and_nobody_else(key):
    q, k, v = _qkv(Inputs(torch.float32), 300)
    clean_out, clean_lse = _attend(q, k, v)
    k[0, key, 0, 5] = float("inf")
    v[0, key, 1, 7] = float("nan")
    out, lse = _attend(q, k, v)
    assert out[0, key:].isnan().all()
    assert lse[0, key:, :2].isnan().all()
    assert _same_bits((out[0, :key], lse[0, :key]), (clean_out[0, :key], clean_lse[0, :key]))
    assert torch.equal(lse[0, :, 2:], clean_lse[0, :, 2:])


def test_many_keys_in_little_memory(run_python):
    """One window's worth of work over 32k keys: what is packed of them is bounded."""
    run_python(_MEASURE)


_MEASURE = """
import resource, torch, tilewise
q, k, v = (torch.randn(1, 32768, 2, 64) for _ in range(3))
def attend(n):
    window = (256, 0)
    return tilewise.flash_attention(
        q[:, -n:], k[:, -n:], v[:, -n:], causal=True, window=window, backend="cpu"
    )
attend(256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = attend(32768)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
beyond = grown * 1024 - out.numel() * 4
assert beyond < 200e6, beyond
"""
