"""What the Triton paged cache promises beyond the contracts: splits, bits, bytes, compiling."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import pytest
import torch

from tilewise import append_kv, gpu, paged_attention, testing
from tilewise.fused.tables import rotary_tables
from tilewise.paged import cases, kv_formats, triton
from tilewise.testing import Inputs

compiles = pytest.mark.skipif(
    gpu.INTERPRETED or not gpu._has_triton(), reason="compiling needs Triton, not its interpreter"
)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def requests(
    inputs: Inputs,
    seqlens: tuple[int, ...],
    queries: tuple[int, ...] | None = None,
    *,
    page_size: int = 8,
    padding: int = 0,
    spare: int = 0,
    cache: str | None = None,
    head_dim: int = 16,
) -> dict[str, Any]:
    """Arguments of a call on requests of these lengths, `spare` more pages wide than need be."""
    used = [-(-n // page_size) for n in seqlens]
    order = inputs.permutation(sum(used)).tolist()
    table = torch.full((len(seqlens), max(used) + spare), -1, dtype=torch.int32)
    for row, n in zip(table, used, strict=True):
        row[:n] = int32(*(order.pop() for _ in range(n)))
    shape = (sum(used), page_size, 2, head_dim)
    k, v = inputs.randn(*shape), inputs.randn(*shape)
    arguments = {"k_cache": k, "v_cache": v}
    if cache is not None:
        dtype = kv_formats.stored_dtype(cache)
        (k, k_scale), (v, v_scale) = kv_formats.encode(k, dtype), kv_formats.encode(v, dtype)
        arguments = {"k_cache": k, "v_cache": v, "k_scale": k_scale, "v_scale": v_scale}
    tokens = len(seqlens) if queries is None else sum(queries) + padding
    if queries is not None:
        arguments["cu_seqlens_q"] = int32(*accumulate(queries, initial=0))
        arguments["causal"] = True
    made = {
        "q": inputs.randn(tokens, 4, head_dim),
        "block_table": table,
        "cache_seqlens": int32(*seqlens),
        "return_lse": True,
        **arguments,
    }
    return testing.map_tensors(made, lambda x: x.to(inputs.device))


def agrees(arguments: dict[str, Any], actual: Any = None) -> None:
    if actual is None:
        actual = paged_attention(**arguments, backend="triton")
    naive = paged_attention(**arguments, backend="naive")
    truth = paged_attention(**testing.to_float64(arguments), backend="naive")
    for result in zip(actual, naive, truth, strict=True):
        testing.assert_agrees(*result)


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few keys make several splits, and twice as many longer ones."""
    monkeypatch.setattr(triton, "_MIN_SPLIT", 64)
    monkeypatch.setattr(triton, "_MAX_SPLITS", 4)


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


def shared_prefix(
    inputs: Inputs, seqlens: tuple[int, ...], prefix: int, **options: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Requests whose first `prefix` pages are those of the first, and the same with copies."""
    apart = requests(inputs, seqlens, **options)
    table = apart["block_table"]
    shared = apart | {"block_table": table.clone()}
    for row in range(1, len(seqlens)):
        here = min(prefix, -(-seqlens[row] // 8))
        shared["block_table"][row, :here] = table[0, :here]
        for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
            if name in apart:
                apart[name][table[row, :here].long()] = apart[name][table[0, :here].long()]
    return shared, apart


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize(
    ("options", "cache"),
    [
        ({}, None),
        ({}, "int8"),
        ({}, "int4"),
        ({"causal": True}, None),
        ({"alibi_slopes": torch.rand(5, 4)}, None),
        ({"softcap": 3.0}, None),
    ],
    ids=lambda value: next(iter(value or {"plain": 0})) if isinstance(value, dict) else str(value),
)
def test_pages_that_requests_share_change_no_bit(
    on: str, options: dict[str, Any], cache: str | None
) -> None:
    """Of lengths that are cut alike, and of one that is not; pages that differ; a short one."""
    options = testing.map_tensors(options, lambda x: x.to(on))
    shared, apart = shared_prefix(Inputs(device=on), (200, 150, 130, 300, 40), 18, cache=cache)
    actual = paged_attention(**shared, **options, backend="triton")
    expected = paged_attention(**apart, **options, backend="triton")
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    agrees(shared | options)


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What `find_shared` found in each call.

    Between it and what reads keys, those that another takes along lose the pages that they share.
    """
    found: list[torch.Tensor] = []
    launch = gpu.launch

    def launch_and_blank(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        launch(kernel, grid, *args, **options)
        if kernel.__name__ != "find_shared":
            return
        takes, table, seqlens = args[:3]
        found.append(takes.clone())
        for request, split in (takes == 0).nonzero().tolist():
            pages = (64 if seqlens[request] <= 256 else 128) // 8
            table[request, split * pages : (split + 1) * pages] = -1

    monkeypatch.setattr(gpu, "launch", launch_and_blank)
    return found


_MIXED = {
    # Decoding; speculating; idle ones between; two blocks of float32 each; a prompt; and again.
    "queries": (1, 1, 1, 3, 3, 3, 0, 3, 1, 9, 9, 33, 2, 2),
    "seqlens": (200, 150, 300, 300, 290, 200, 40, 200, 192, 150, 140, 150, 129, 128),
    "padding": 3,
}


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize(
    ("options", "cache", "dtype"),
    [
        ({}, None, torch.float32),
        ({}, None, torch.float16),
        ({}, "fp8", torch.float32),
        ({"causal": False, "window": (-1, 1)}, None, torch.float32),
        (
            {
                "alibi_slopes": torch.linspace(0.01, 0.9, 14 * 4).reshape(14, 4),
                "sinks": torch.tensor([0.5, -1.0, 3.0, 0.0]),
            },
            None,
            torch.float32,
        ),
    ],
    ids=lambda value: " ".join(value or ["plain"]) if isinstance(value, dict) else str(value),
)
def test_ragged_requests_share_pages_and_no_bit_changes(
    on: str,
    takes: list[torch.Tensor],
    options: dict[str, Any],
    cache: str | None,
    dtype: torch.dtype,
) -> None:
    options = testing.map_tensors(options, lambda x: x.to(on))
    shared, apart = (
        cases._poison_attention(testing.map_tensors(arguments, torch.clone)) | options
        for arguments in shared_prefix(Inputs(dtype, on), prefix=17, cache=cache, **_MIXED)
    )
    table = shared["block_table"].clone()
    expected = paged_attention(**apart, backend="triton")
    with testing.nan_filled_empty():
        actual = paged_attention(**shared, backend="triton")
    agrees(apart, expected)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    # Copies of the pages are not shared; and those taken along had no pages left to read.
    assert [(found > 1).any() for found in takes] == [False, True]
    assert not torch.equal(shared["block_table"], table)
    control = paged_attention(**shared, backend="triton")[0]
    assert not torch.equal(control, expected[0])

    ends = list(accumulate(_MIXED["queries"], initial=0))
    for i in (1, 4):
        rows = slice(ends[i], ends[i + 1])
        alone = shared | {
            "q": shared["q"][rows],
            "block_table": table[i : i + 1],
            "cache_seqlens": shared["cache_seqlens"][i : i + 1],
            "cu_seqlens_q": int32(0, ends[i + 1] - ends[i]).to(on),
        }
        if "alibi_slopes" in options:
            alone["alibi_slopes"] = options["alibi_slopes"][i : i + 1]
        for a, b in zip(actual, paged_attention(**alone, backend="triton"), strict=True):
            assert torch.equal(a[rows], b)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("queries", [None, (2, 2, 2)], ids=["decode", "ragged"])
def test_a_nan_reaches_those_who_share_it(on: str, queries: tuple[int, ...] | None) -> None:
    shared, _ = shared_prefix(Inputs(device=on), (200, 200, 150), 18, queries=queries)
    table = shared["block_table"]
    for page, sees in ((table[0, 2], [True] * 3), (table[1, 22], [False, True, False])):
        poisoned = shared | {"v_cache": shared["v_cache"].clone()}
        poisoned["v_cache"][page, 1] = math.nan
        out, _ = paged_attention(**poisoned, backend="triton")
        assert out.reshape(3, -1).isnan().any(1).tolist() == sees


def found_shared(
    on: str,
    seqlens: tuple[int, ...],
    table: torch.Tensor,
    page_size: int,
    queries: tuple[int, ...] | None = None,
    *,
    m: int = 16,
    group: int = 4,
    right: int = 0,
) -> list[list[int]]:
    """What `find_shared` finds; splits have 64 keys, or 128 where a request has more than 256."""
    from tilewise.paged import triton_split_kernels as kernels

    batch = len(seqlens)
    takes = torch.full((batch, 4), -1, dtype=torch.int32, device=on)
    ends = None if queries is None else int32(*accumulate(queries, initial=0)).to(on)
    gpu.launch(
        kernels.find_shared,
        (-(-batch // 16), 4),
        takes,
        table.to(on),
        int32(*seqlens).to(on),
        ends,
        batch,
        batch if queries is None else sum(queries),
        table.shape[1] * page_size,
        table.stride(0),
        right,
        IS_RAGGED=queries is not None,
        HAS_RIGHT=right >= 0,
        GROUP=group,
        M=m,
        MIN_SPLIT=64,
        MAX_SPLITS=4,
        PAGE_SIZE=page_size,
        REQUESTS=16,
        BLOCK=16,
    )
    rows: list[list[int]] = takes.tolist()
    return rows


@pytest.mark.parametrize("page_size", [1, 3, 8, 64, 256])
def test_which_splits_are_shared(on: str, page_size: int) -> None:
    """By four at most."""
    seqlens = (256, 192, 191, 300, 300, 290, 256, 256, 64, 64, 64)
    table = torch.arange(-(-300 // page_size), dtype=torch.int32).repeat(len(seqlens), 1)
    table[7, 100 // page_size] = 999
    wanted = [
        [3, 3, 2, 1],  # three have two whole splits in common, and two of them a third one
        [0, 0, 0, 1],
        [0, 0, 1, 1],
        [3, 3, 1, 1],  # cut in other places than those before and behind
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [4, 1, 2, 2],
        [0, 1, 0, 0],
        [0, 1, 1, 1],
        [0, 1, 1, 1],
        [1, 1, 1, 1],  # one too many
    ]
    if page_size == 256:  # the first page of request 7 is another in all its splits
        wanted[6:] = [[1] * 4, [1] * 4, [3, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]
    assert found_shared(on, seqlens, table, page_size) == wanted


@pytest.mark.parametrize("right", [0, 1, 2, -1])
def test_which_splits_of_ragged_requests_are_shared(on: str, right: int) -> None:
    """Those of as many tokens, where they have rows for a block and all see the whole split."""
    queries = (1, 1, 1, 2, 2, 2, 3, 3, 0, 3, 3, 9, 9, 1, 1, 1, 1, 1)
    seqlens = (192, 191, *[192] * 16)
    table = torch.arange(24, dtype=torch.int32).repeat(len(queries), 1)
    wanted = (3, 0, 0, 3, 0, 0, 2, 0, 1, 2, 0, 1, 1, 3, 0, 0)
    wanted += (2, 0)  # behind those that a program looks at
    # Not all tokens see all of the last split, [128, 192).
    wanted_last = [1, 1, 1, *wanted[3:]]
    if right in (0, 1):  # those of three tokens do not
        wanted_last[6:8] = wanted_last[9:11] = [1, 1]
    if right == 0:  # nor do those of two
        wanted_last[3:6] = [1, 1, 1]
    found = found_shared(on, seqlens, table, 8, queries, group=2, right=right)
    assert [tuple(column) for column in zip(*found, strict=True)] == [
        wanted,
        wanted,
        tuple(wanted_last),
        (1,) * len(queries),
    ]


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


@pytest.mark.usefixtures("short_splits")
def test_sharing_with_lengths_that_make_no_sense_touches_nothing_outside(on: str) -> None:
    shared, _ = shared_prefix(Inputs(device=on), (200,) * 4, 25, queries=(2, 2, 1, 1))
    shared["block_table"][:, 10] = 10**6
    for bad in ((0, 2, 4, 10**9, 3), (2, 0, 2, 0, 2), (-7, -5, 1, 2, 3), (4, 5, 6, 7, 8)):
        for seqlens in ((200, 10**9, 300, -1), (1, 1, 2**31 - 1, 2**31 - 1)):
            paged_attention(
                **shared
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
        x[4], x[5], x[6] = 0, x[5] * 1e-30, x[6] * torch.logspace(0, -30, x.shape[-1])
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
