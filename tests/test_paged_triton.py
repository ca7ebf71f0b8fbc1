"""What the Triton paged cache promises beyond the contracts: splits, bits, bytes, compiling."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import pytest
import torch
from paged_requests import agrees, int32, requests

from tilewise import append_kv, gpu, paged_attention, testing
from tilewise.fused.tables import rotary_tables
from tilewise.paged import kv_formats
from tilewise.testing import Inputs

compiles = pytest.mark.skipif(
    gpu.INTERPRETED or not gpu._has_triton(), reason="compiling needs Triton, not its interpreter"
)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize(
    "options",
    [{}, {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])}, {"window": (100, 0)}, {"softcap": 3.0}],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize("queries", [None, (1, 1, 0, 5, 1)], ids=["decode", "ragged"])
def test_splits_are_merged(
    on: str, options: dict[str, Any], queries: tuple[int, ...] | None
) -> None:
    options = testing.map_tensors(options, lambda x: x.to(on))
    agrees(requests(Inputs(device=on), (300, 65, 0, 128, 1), queries, spare=5) | options)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("cache", ["int8", "fp8", "int4"])
def test_splits_of_a_quantized_cache_are_merged(on: str, cache: str) -> None:
    agrees(requests(Inputs(device=on), (200, 70), cache=cache))


@pytest.mark.parametrize("queries", [(40, 33), (70, 17)], ids=str)
@pytest.mark.parametrize("window", [(-1, -1), (20, -1)], ids=str)
def test_prompts_longer_than_a_block(
    on: str, queries: tuple[int, ...], window: tuple[int, int]
) -> None:
    agrees(requests(Inputs(device=on), (200, 40), queries) | {"window": window})


@pytest.mark.parametrize("head_dim", [24, 80, 96, 192])
def test_heads_of_two_blocks(on: str, head_dim: int) -> None:
    agrees(requests(Inputs(device=on), (20, 3), head_dim=head_dim))


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("queries", [None, (1, 3, 70, 2)], ids=["decode", "ragged"])
def test_no_bit_depends_on_the_batch_or_on_spare_pages(
    on: str, queries: tuple[int, ...] | None
) -> None:
    """In the batch, alone, and in a table so narrow that there is nothing to split."""
    lengths = (300, 40, 100, 7)
    together = requests(Inputs(device=on), lengths, queries, spare=30)
    results = paged_attention(**together, batch_invariant=True, backend="triton")
    ends = list(accumulate(queries or (1,) * 4, initial=0))
    for i, length in enumerate(lengths):
        rows = slice(ends[i], ends[i + 1])
        alone = together | {
            "q": together["q"][rows],
            "block_table": together["block_table"][i : i + 1, : -(-length // 8)],
            "cache_seqlens": int32(length).to(on),
        }
        if queries is not None:
            alone["cu_seqlens_q"] = int32(0, queries[i]).to(on)
        expected = paged_attention(**alone, batch_invariant=True, backend="triton")
        for a, b in zip(results, expected, strict=True):
            assert torch.equal(a[rows], b)


@pytest.mark.parametrize("cache", [None, "int8", "fp8"])
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_value_that_is_not_finite_reaches_just_those_who_see_it(
    on: str, cache: str | None, which: str
) -> None:
    arguments = requests(Inputs(device=on), (40,), (20,), cache=cache) | {"window": (9, -1)}
    clean = paged_attention(**arguments, backend="triton")[0]
    target = arguments[f"{which}_cache" if cache is None else f"{which}_scale"]
    target[arguments["block_table"][0, 3], 1] = math.nan  # key 25; the queries are tokens 20 to 39
    out = paged_attention(**arguments, backend="triton")[0]
    sees = torch.arange(20, 40, device=on)
    sees = (sees >= 25) & (sees <= 25 + 9)
    assert out[sees].isnan().all()
    assert torch.equal(out[~sees], clean[~sees])


def test_lengths_that_make_no_sense_touch_nothing_outside(on: str) -> None:
    arguments = requests(Inputs(device=on), (9, 20, 4), (2, 3, 1))
    for bad in ((0, 10**9, 3, 2), (0, -5, 2**31 - 1, -1), (7, 1, 9, 0), (0, 0, 0, 0)):
        for seqlens in ((10**9, -3, 2), (0, 2**31 - 1, -(2**31))):
            paged_attention(
                **arguments
                | {"cu_seqlens_q": int32(*bad).to(on), "cache_seqlens": int32(*seqlens).to(on)},
                backend="triton",
            )


# --- writing --------------------------------------------------------------------------------------


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


# Not bfloat16, in which the interpreter rounds in its own way.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("interleaved", [None, False, True], ids=["", "halves", "pairs"])
@pytest.mark.parametrize("cache", ["int8", "fp8", "int4", "float32"])
def test_the_bytes_are_those_of_the_definition(
    on: str, cache: str, interleaved: bool | None, dtype: torch.dtype
) -> None:
    inputs = Inputs(dtype, on)
    k, v = inputs.randn(12, 3, 20), inputs.randn(12, 3, 10)
    for x in (k, v):
        x[1, 0, 3], x[2, 1, 0], x[3, 2, 7] = math.nan, math.inf, -math.inf
        fading = torch.logspace(0, -30, x.shape[-1]).to(on)
        x[4], x[5], x[6] = 0, x[5] * 1e-30, x[6] * fading
    stored = torch.float32 if cache == "float32" else kv_formats.stored_dtype(cache)
    options: dict[str, Any] = {"slot_mapping": inputs.permutation(15)[:12]}
    options["slot_mapping"][7] = -1
    if interleaved is not None:
        options["rotary"] = rotary_tables(12, 50, interleaved=interleaved, device=on)
        options["positions"] = inputs.randint(0, 50, 12)
        options["positions"][8] = 50  # outside: NaN
    written = []
    for backend in ("naive", "triton"):
        caches = {
            f"{name}_cache": torch.zeros(
                (5, 3, 3, kv_formats.stored_width("dim", x.shape[-1], stored)),
                dtype=stored,
                device=on,
            )
            for name, x in (("k", k), ("v", v))
        }
        if kv_formats.is_quantized(stored):
            caches |= {name: torch.zeros(5, 3, 3, device=on) for name in ("k_scale", "v_scale")}
        append_kv(k, v, **caches, **options, backend=backend)
        written.append(caches)
    for name, expected in written[0].items():
        actual = written[1][name]
        if actual.is_floating_point() and actual.itemsize == 4:
            assert torch.equal(actual.isnan(), expected.isnan()), name
            actual, expected = actual.nan_to_num(7.0), expected.nan_to_num(7.0)
        assert torch.equal(_bytes(actual), _bytes(expected)), name


# --- compiling ------------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("cache", [torch.bfloat16, "fp8"], ids=str)
def test_compiles_for_a_gpu_that_is_not_there(target: str, cache: Any) -> None:
    stored = kv_formats.stored_dtype(cache)
    caches: dict[str, Any] = {
        name: torch.zeros(2, 16, 8, 128, dtype=stored) for name in ("k_cache", "v_cache")
    }
    if kv_formats.is_quantized(stored):
        caches |= {name: torch.zeros(2, 16, 8) for name in ("k_scale", "v_scale")}
    x = torch.zeros(3, 32, 128, dtype=torch.bfloat16)
    with gpu.compiling_for(target) as kernels:
        paged_attention(
            x,
            **caches,
            block_table=torch.zeros(3, 256, dtype=torch.int32),
            cache_seqlens=torch.zeros(3, dtype=torch.int32),
            causal=True,
            backend="triton",
        )
        append_kv(
            x[:, :8],
            x[:, :8],
            **caches,
            slot_mapping=torch.zeros(3, dtype=torch.int64),
            backend="triton",
        )
    assert [x.kernel for x in kernels] == [
        "find_shared",
        "paged_attention",
        "merge_splits",
        "append_kv",
    ]
    room = {"sm_90": 227, "gfx942": 64}[target] * 1024
    assert all(x.triton.metadata.shared <= room for x in kernels)
