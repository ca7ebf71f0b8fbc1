"""Calls on a paged cache, as the tests of the Triton kernels make them."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch

from tilewise import paged_attention, testing
from tilewise.paged import kv_formats
from tilewise.testing import Inputs


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
