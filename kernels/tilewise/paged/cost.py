"""The work that calls on a paged cache cannot avoid; the lengths of requests are read for it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from tilewise.attention.cost import visible_pairs
from tilewise.dispatch import Cost
from tilewise.paged import kv_formats


def _bytes_per_token(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> int:
    stored = (k_cache, v_cache, k_scale, v_scale)
    return sum(x[0, 0].numel() * x.itemsize for x in stored if x is not None)


def cost_paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    bias: torch.Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Cost:
    """Two products per visible pair; every key and value that is seen moves once, as stored.

    A page that several requests share moves once for all of them, and with a window the keys before
    the first query's are not needed.
    """
    ends = range(len(q) + 1) if cu_seqlens_q is None else cu_seqlens_q.tolist()
    pairs, spans = 0, []
    for (start, end), seqlen in zip(pairwise(ends), cache_seqlens.tolist(), strict=True):
        pairs += visible_pairs(end - start, seqlen, causal=causal, window=window)
        seen = seqlen if window[0] < 0 else min(seqlen, window[0] + end - start)
        spans.append((seqlen - seen if end > start else seqlen, seqlen))
    keys = _distinct(block_table, spans, *k_cache.shape[:2])
    rows, v_dim = q.shape[0] * q.shape[1], kv_formats.elements(v_cache)
    nbytes = keys * _bytes_per_token(k_cache, v_cache, k_scale, v_scale)
    nbytes += q.numel() * q.itemsize + rows * v_dim * q.itemsize
    nbytes += 4 * (block_table.numel() + cache_seqlens.numel())
    nbytes += 0 if bias is None else bias.nbytes
    nbytes += 4 * rows if return_lse else 0
    return Cost(2.0 * pairs * q.shape[1] * (q.shape[2] + v_dim), nbytes, q.dtype)


def _distinct(
    block_table: torch.Tensor, spans: list[tuple[int, int]], num_pages: int, page_size: int
) -> int:
    """How many slots of the cache hold a key that some request sees: those of its span."""
    if not spans:
        return 0
    starts, ends = torch.tensor(spans).T[..., None]
    first = torch.arange(block_table.shape[1]) * page_size  # of each page of a request
    low, high = ((x - first).clamp(0, page_size) for x in (starts, ends))
    is_seen = high > low
    pages = block_table.cpu().long().clamp(0, num_pages - 1)[is_seen]
    lows = torch.full((num_pages,), page_size).scatter_reduce(0, pages, low[is_seen], "amin")
    highs = torch.zeros(num_pages, dtype=torch.int64).scatter_reduce(
        0, pages, high[is_seen], "amax"
    )
    return int((highs - lows).clamp(min=0).sum())


def cost_append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    rotary: Any = None,
    positions: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> Cost:
    """Each token is read as it is and written as it is stored; six operations per rotated pair."""
    nbytes = k.nbytes + v.nbytes + slot_mapping.nbytes
    nbytes += len(k) * _bytes_per_token(k_cache, v_cache, k_scale, v_scale)
    flops = 0
    if rotary is not None:
        pairs = rotary.cos.shape[1]
        flops = 6 * pairs * k.shape[0] * k.shape[1]
        nbytes += len(k) * (2 * pairs * rotary.cos.itemsize + 8)
    return Cost(flops, nbytes, torch.float32)
