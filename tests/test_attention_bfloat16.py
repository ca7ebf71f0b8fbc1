"""Attention in bfloat16, which the contracts try in few cases.

AMX multiplies tiles of it and AVX-512 pairs: both are tested in emulation, and where the machine
has the instructions also as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tilewise
from tilewise import build, native
from tilewise.testing import Inputs, assert_agrees, nan_filled_empty

_LIBRARIES = [
    *((isa, "emulated") for isa in ("amx", "avx512")),
    *((isa, "") for isa in ("amx", "avx512") if native.why_not_instruction_set(isa) is None),
]


@pytest.fixture(
    scope="module", autouse=True, params=_LIBRARIES, ids=lambda x: "-".join(filter(None, x))
)
def _library(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernels of one instruction set."""
    if build.compiler().value is None:
        pytest.skip(str(build.compiler()))
    with native.use_library(native.load(*request.param)):
        yield


def _qkv(
    q_len: int, k_len: int, heads: int, kv_heads: int, dim: int, v_dim: int, batch: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = Inputs(torch.bfloat16)
    return (
        inputs.randn(batch, q_len, heads, dim),
        inputs.randn(batch, k_len, kv_heads, dim),
        inputs.randn(batch, k_len, kv_heads, v_dim),
    )


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str = "cpu", **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    with nan_filled_empty():
        return tilewise.flash_attention(q, k, v, return_lse=True, backend=backend, **options)


def _assert_agrees(qkv: tuple[torch.Tensor, ...], **options: Any) -> None:
    double = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in options.items()
    }
    actual = _attend(*qkv, **options)
    naive = _attend(*qkv, "naive", **options)
    truth = _attend(*(x.double() for x in qkv), "naive", **double)
    for name, *results in zip(("out", "lse"), actual, naive, truth, strict=True):
        assert_agrees(*results, name=name)


@pytest.mark.parametrize(
    ("dim", "v_dim"),
    [(1, 16), (2, 16), (16, 63), (63, 80), (80, 1), (126, 126), (127, 127), (192, 128), (576, 512)],
)
def test_any_dimension(dim: int, v_dim: int) -> None:
    _assert_agrees(_qkv(33, 150, 4, 2, dim, v_dim), causal=True)


@pytest.mark.parametrize("q_len", [17, 31, 64, 65, 128, 161])
def test_any_number_of_rows(q_len: int) -> None:
    """Single row tiles and pairs of them, whole blocks and parts."""
    _assert_agrees(_qkv(q_len, 129, 1, 1, 64, 64))


def test_every_option() -> None:
    inputs = Inputs(torch.float32, seed=1)
    _assert_agrees(
        _qkv(70, 300, 4, 2, 64, 96, batch=2),
        window=(150, 20),
        scale=-0.1,
        softcap=5.0,
        alibi_slopes=inputs.rand(2, 4),
        sinks=inputs.randn(4),
        bias=inputs.randn(4, 70, 300),
    )


def test_scores_far_from_zero() -> None:
    q, k, v = _qkv(40, 400, 2, 1, 64, 64)
    _assert_agrees((q * 10, k * 10, v))


def _growing(k_len: int, dim: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores that grow with the key, from query to query at another rate, up to 150."""
    q, k, v = _qkv(70, k_len, 2, 1, dim, 64)
    rates = torch.rand(1, 70, 2, 1, generator=torch.Generator().manual_seed(0))
    k += torch.linspace(0, 150 / math.sqrt(dim), k_len)[None, :, None, None]
    return (q + rates).bfloat16(), k, v


def test_scores_that_grow_from_key_to_key() -> None:
    _assert_agrees(_growing(700))
    _assert_agrees(_growing(700), window=(300, 0))


def test_growing_scores_give_the_same_bits_in_any_company() -> None:
    q, k, v = _growing(700)
    options = {"causal": True, "window": (333, 0)}
    out, lse = _attend(q, k, v, **options)
    for first, end in ((0, 19), (19, 52), (52, 70)):
        part = slice(first, end)
        chunk = _attend(q[:, part], k[:, : 630 + end], v[:, : 630 + end], **options)
        assert torch.equal(chunk[0], out[:, part])
        assert torch.equal(chunk[1], lse[:, part])


def test_what_nobody_sees_may_be_nan() -> None:
    q, k, v = _qkv(100, 300, 2, 1, 64, 64)
    mask = torch.ones(100, 300, dtype=torch.bool)
    mask[:, 170:190] = False
    options = {"window": (60, 0), "bias": mask}
    expected = _attend(q, k, v, **options)
    hidden = torch.zeros(300, dtype=torch.bool)
    hidden[:140] = hidden[170:190] = True  # query 0 is level with key 200
    for x in (k, v):
        x[:, hidden] = torch.tensor([math.nan, math.inf]).repeat(32).bfloat16()
    for actual, clean in zip(_attend(q, k, v, **options), expected, strict=True):
        assert torch.equal(actual, clean)


def test_what_somebody_sees_is_nan_for_them_alone() -> None:
    q, k, v = _qkv(80, 80, 2, 1, 64, 64)
    k[:, 50, 0, 3] = math.inf
    v[:, 60, 0, 5] = math.nan
    out, lse = _attend(q, k, v, causal=True)
    assert out[:, :50].isfinite().all()
    assert out[:, 50:].isnan().all()
    assert lse[:, 50:].isnan().all()


def test_a_row_has_the_same_bits_in_any_company() -> None:
    q, k, v = _qkv(170, 330, 6, 2, 64, 80, batch=2)
    out, _ = _attend(q, k, v, causal=True)
    alone, _ = _attend(q[1:], k[1:], v[1:], causal=True)
    assert torch.equal(out[1:], alone)
    chunks = [
        _attend(q[:, first:end], k[:, : 160 + end], v[:, : 160 + end], causal=True)[0]
        for first, end in ((0, 23), (23, 101), (101, 170))
    ]
    assert torch.equal(torch.cat(chunks, dim=1), out)


def test_pages_give_the_bits_of_contiguous_keys() -> None:
    q, k, v = _qkv(90, 200, 4, 2, 64, 64)
    page = 16
    table = torch.randperm(13, generator=torch.Generator().manual_seed(0)).int()[None]
    caches = [torch.full((13, page, 2, 64), math.nan, dtype=torch.bfloat16) for _ in "kv"]
    for cache, rows in zip(caches, (k, v), strict=True):
        for j in range(200):
            cache[table[0, j // page], j % page] = rows[0, j]
    paged = tilewise.paged_attention(
        q[0],
        *caches,
        table,
        torch.tensor([200], dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, 90], dtype=torch.int32),
        causal=True,
        backend="cpu",
    )
    assert torch.equal(paged, _attend(q, k, v, causal=True)[0][0])


def test_any_thread_count_gives_the_same_bits() -> None:
    qkv = _qkv(200, 200, 3, 1, 64, 64)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(_attend(*qkv, causal=True)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
