"""Splits that requests of the Triton paged cache share: which, and that no bit tells."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import pytest
import torch
from paged_requests import agrees, int32, requests

from tilewise import gpu, paged_attention, testing
from tilewise.paged import cases
from tilewise.testing import Inputs


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
