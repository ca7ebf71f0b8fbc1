"""Attention over a paged cache, and writing to one, by their definitions.

A block table only says where a request's keys are. Once they are gathered, what is left is ordinary
attention in which no key beyond the request's length exists.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch

from tilewise.attention.naive import attend
from tilewise.fused.naive import compute_dtype, rotary_embedding
from tilewise.fused.tables import RotaryTables
from tilewise.paged import kv_formats


def paged_attention(
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
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Every request attends to the keys in its pages.

    With `batch_invariant` the requests run one at a time, each with no more pages than it needs.
    How many those are only values say: such a call cannot be traced.
    """
    options: dict[str, Any] = {
        "causal": causal,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
    }
    if batch_invariant and len(cache_seqlens):
        out, lse = _one_request_at_a_time(
            q,
            k_cache,
            v_cache,
            block_table,
            cache_seqlens,
            cu_seqlens_q,
            alibi_slopes,
            bias,
            k_scale=k_scale,
            v_scale=v_scale,
            **options,
        )
        return (out, lse) if return_lse else out
    dtype = compute_dtype(q)
    queries, is_own, position = queries_of_requests(q, cu_seqlens_q, cache_seqlens)
    pages, exists = keys_of_requests(k_cache, block_table, cache_seqlens)
    out, lse = attend(
        queries,
        gather(k_cache, k_scale, pages, dtype),
        gather(v_cache, v_scale, pages, dtype),
        distance=position.unsqueeze(-1) - torch.arange(exists.shape[1], device=q.device),
        exists=is_own.unsqueeze(-1) & exists.unsqueeze(1),
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.unsqueeze(-1),
        bias=None if bias is None else bias_of_requests(bias, q, cu_seqlens_q, exists.shape[1]),
        **options,
    )
    out = results_of_tokens(out, is_own, cu_seqlens_q, nothing=0.0)
    lse = results_of_tokens(lse, is_own, cu_seqlens_q, nothing=-math.inf)
    return (out, lse) if return_lse else out


def queries_of_requests(
    q: torch.Tensor, cu_seqlens_q: torch.Tensor | None, cache_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each request: candidate queries (batch, n, heads, head_dim), which of them are its own
    (batch, n), and their positions in its sequence (batch, n).

    Only values say which ragged tokens are whose, and shapes must not depend on values: every
    request gets all the tokens, and shows nothing to those of others.
    """
    if cu_seqlens_q is None:
        is_own = torch.ones_like(cache_seqlens, dtype=torch.bool)
        return q.unsqueeze(1), is_own.unsqueeze(1), (cache_seqlens - 1).unsqueeze(1)
    token = torch.arange(len(q), device=q.device)
    start, end = cu_seqlens_q[:-1, None], cu_seqlens_q[1:, None]
    is_own = (token >= start) & (token < end)
    return q.expand(len(is_own), *q.shape), is_own, cache_seqlens.unsqueeze(1) - end + token


def bias_of_requests(
    bias: torch.Tensor, q: torch.Tensor, cu_seqlens_q: torch.Tensor | None, keys: int
) -> torch.Tensor:
    """`bias`, which broadcasts to (heads, tokens, keys), as (batch or 1, heads, n, keys)."""
    bias = bias.expand(q.shape[1], len(q), keys)
    return bias.unsqueeze(0) if cu_seqlens_q is not None else bias.transpose(0, 1).unsqueeze(2)


def results_of_tokens(
    x: torch.Tensor, is_own: torch.Tensor, cu_seqlens_q: torch.Tensor | None, *, nothing: float
) -> torch.Tensor:
    """Back from (batch, n, ...) to q's rows; padding, which no request owns, gets `nothing`."""
    if cu_seqlens_q is None:
        return x.squeeze(1)
    is_own = is_own.reshape(*is_own.shape, *[1] * (x.dim() - 2))
    return x.masked_fill(~is_own, 0).sum(0).masked_fill(~is_own.any(0), nothing)


def keys_of_requests(
    cache: torch.Tensor, block_table: torch.Tensor, cache_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The page numbers (batch, max_pages), safe to index with, and which of the slots in them
    hold a key (batch, max_pages * page_size)."""
    num_pages, page_size = cache.shape[:2]
    pages = block_table.clamp(0, num_pages - 1)
    exists = (block_table == pages).repeat_interleave(page_size, dim=1)
    return pages, exists & (
        torch.arange(exists.shape[1], device=cache.device) < cache_seqlens.unsqueeze(1)
    )


def gather(
    cache: torch.Tensor, scale: torch.Tensor | None, pages: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The rows of every request's pages, decoded: (batch, slots, kv_heads, head_dim)."""
    rows = kv_formats.decode(cache[pages], None if scale is None else scale[pages], dtype)
    return rows.flatten(1, 2)


def _one_request_at_a_time(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    bias: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    page_size = k_cache.shape[1]
    if bias is not None:
        bias = bias.expand(q.shape[1], len(q), block_table.shape[1] * page_size)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.expand(len(cache_seqlens), -1)
    ends = list(range(len(q) + 1)) if cu_seqlens_q is None else cu_seqlens_q.tolist()
    outs, lses = [], []
    for i, ((start, end), seqlen) in enumerate(
        zip(pairwise(ends), cache_seqlens.tolist(), strict=True)
    ):
        table = block_table[i : i + 1, : max(0, -(-seqlen // page_size))]
        out, lse = paged_attention(
            q[start:end],
            k_cache,
            v_cache,
            table,
            cache_seqlens[i : i + 1],
            cu_seqlens_q=cache_seqlens.new_tensor([0, end - start]),
            alibi_slopes=None if alibi_slopes is None else alibi_slopes[i : i + 1],
            bias=None if bias is None else bias[:, start:end, : table.shape[1] * page_size],
            return_lse=True,
            **options,
        )
        outs.append(out)
        lses.append(lse)
    padding = len(q) - ends[-1]
    outs.append(q.new_zeros(padding, q.shape[1], kv_formats.elements(v_cache)))
    lses.append(q.new_full((padding, q.shape[1]), -math.inf, dtype=compute_dtype(q)))
    return torch.cat(outs), torch.cat(lses)


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    rotary: RotaryTables | None = None,
    positions: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Token i goes to slot_mapping[i], rotated and encoded; slots outside the cache are skipped."""
    if len(k) == 0:
        return
    num_pages, page_size = k_cache.shape[:2]
    is_kept = (slot_mapping >= 0) & (slot_mapping < num_pages * page_size)
    # Only values say how many tokens are kept, and shapes must not depend on values. So a skipped
    # token repeats the write of the first that is kept; where none is, all write what is there.
    any_kept = is_kept.any()
    first = is_kept.int().argmax()
    token = torch.where(is_kept, torch.arange(len(k), device=k.device), first)
    slot = torch.where(any_kept, slot_mapping[token], 0)
    page, offset = slot // page_size, slot % page_size
    k, v = k[token], v[token]
    if rotary is not None and positions is not None:
        k = rotary_embedding(k, rotary, positions[token])
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if scale is None:
            rows = x.to(cache.dtype)
        else:
            rows, scales = kv_formats.encode(x, cache.dtype, scale.dtype)
            scale[page, offset] = torch.where(any_kept, scales, scale[page, offset])
        cache[page, offset] = torch.where(any_kept, rows, cache[page, offset])
