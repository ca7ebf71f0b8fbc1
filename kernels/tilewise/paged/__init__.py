"""Attention over a paged key/value cache, and writing to one.

A cache that gives every request one contiguous stretch must reserve for the longest answer there
could be. Cut into pages, it grows with what is written, and requests that begin alike can share
their pages (Kwon et al., PagedAttention, 2023, arXiv:2309.06180). `PageAllocator` says which pages
are whose, `PagedKVCache` adds the tensors, and the two functions here only see the result: a table
of page numbers and a length per request.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tilewise import gpu
from tilewise.attention.native import attend_plainly
from tilewise.dispatch import Impl, Op
from tilewise.fused.tables import RotaryTables
from tilewise.paged import autograd, baseline, naive, native, triton, triton_append
from tilewise.paged.allocator import OutOfPages, PageAllocator
from tilewise.paged.cache import LayerCache, PagedKVCache
from tilewise.paged.checks import check_append_kv, check_paged_attention
from tilewise.paged.cost import cost_append_kv, cost_paged_attention
from tilewise.paged.operators import APPEND_KV, PAGED_ATTENTION

__all__ = [
    "APPEND_KV",
    "PAGED_ATTENTION",
    "LayerCache",
    "OutOfPages",
    "PageAllocator",
    "PagedKVCache",
    "append_kv",
    "paged_attention",
]

_PAGED_ATTENTION = Op(
    "paged_attention",
    naive.paged_attention,
    impls=(
        Impl(
            "triton",
            partial(autograd.paged_attention, "triton"),
            triton.why_not_paged_attention,
            gpu.why_not_auto,
        ),
        Impl("cpu", partial(autograd.paged_attention, "cpu"), native.why_not_paged_attention),
        Impl("torch", baseline.paged_attention, baseline.why_not, baseline.why_not_auto),
    ),
    check=check_paged_attention,
    cost=cost_paged_attention,
)

_APPEND_KV = Op(
    "append_kv",
    naive.append_kv,
    impls=(
        Impl(
            "triton",
            partial(autograd.append_kv, "triton"),
            triton_append.why_not_append_kv,
            gpu.why_not_auto,
        ),
        Impl("cpu", partial(autograd.append_kv, "cpu"), native.why_not_append_kv),
    ),
    check=check_append_kv,
    cost=cost_append_kv,
)


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
    backend: str = "auto",
    validate: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend to keys and values that lie in pages: decoding and chunked prefill.

    Key j of request i is in slot j % page_size of page block_table[i, j // page_size]. The queries
    of a request are the last tokens of its sequence, whose keys have been appended already. Slots
    past a request's length, pages that no table names and table entries past the last page may
    hold anything. A page number out of range reads as keys that do not exist.

    Args:
        q: (batch, heads, head_dim), one query per request; or with `cu_seqlens_q` (tokens, heads,
            head_dim). Floating point, head_dim <= 576.
        k_cache: (pages, page_size, kv_heads, head_dim) in float32, float16, bfloat16, float64,
            int8, float8_e4m3fn, or uint8 with two int4 codes per byte, (pages, page_size, kv_heads,
            head_dim / 2), as `tilewise.paged.kv_formats` describes.
        v_cache: (pages, page_size, kv_heads, v_head_dim), k_cache's dtype.
        block_table: (batch, max_pages) int32.
        cache_seqlens: (batch,) int32, tokens in the cache per request, the queries' own counted.
        cu_seqlens_q: (batch + 1,) int32; the queries of request i are tokens cu_seqlens_q[i] to
            cu_seqlens_q[i + 1] of q. Starts at 0 and never decreases. Tokens behind the last are
            padding: they influence nothing, and get out 0 and lse -inf.
        k_scale, v_scale: (pages, page_size, kv_heads) float32, value = code * scale; for the
            quantized dtypes, and only for those.
        bias: broadcasts to (heads, tokens, max_pages * page_size); [h, t, j] is for key j of the
            request that query t is in.
        alibi_slopes: (heads,) or (batch, heads), float32.
        causal, scale, window, softcap, sinks, return_lse, batch_invariant, backend: as in
            `flash_attention`, per request. The naive backend reads the lengths on the host when
            `batch_invariant`, and cannot be compiled then.
        validate: check the values of `cache_seqlens`, `block_table` and `cu_seqlens_q` as well.

    Returns:
        out (tokens, heads, v_head_dim) in q's dtype; with `return_lse` also lse (tokens, heads),
        natural logarithm, float32 (float64 for float64 queries), sinks counted in. A query that
        sees no key has out 0 and lse -inf, or its sink.

    Raises:
        ValueError, TypeError: for an argument that does not fit.
        BackendError: if the named backend cannot run the call.

    Source: Kwon et al., Efficient Memory Management for Large Language Model Serving with
    PagedAttention, 2023 (arXiv:2309.06180).
    """
    arguments = (q, k_cache, v_cache, block_table, cache_seqlens)
    if alibi_slopes is None and sinks is None and bias is None and not validate:
        numbers = (causal, scale, window, softcap, return_lse, batch_invariant)
        optional = (k_scale, v_scale, cu_seqlens_q)
        places = (block_table, cache_seqlens)
        result = attend_plainly(
            "paged_attention", backend, q, k_cache, v_cache, numbers, places, optional
        )
        if result is not None:
            return result
    options: dict[str, Any] = {
        "cu_seqlens_q": cu_seqlens_q,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "causal": causal,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "bias": bias,
        "return_lse": return_lse,
        "batch_invariant": batch_invariant,
    }
    check_paged_attention(*arguments, **options, validate=validate)
    return _PAGED_ATTENTION(*arguments, **options, backend=backend)


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
    backend: str = "auto",
    validate: bool = False,
) -> None:
    """Write the keys and values of new tokens to their slots of a paged cache, in place.

    Args:
        k: (tokens, kv_heads, head_dim), floating point.
        v: (tokens, kv_heads, v_head_dim), k's dtype.
        k_cache, v_cache: as in `paged_attention`; written to. In a quantized cache each token and
            head gets a scale of its own, so that no other token is touched.
        slot_mapping: (tokens,) int64, page * page_size + slot within the page, all different. A
            token with a negative slot is skipped; so is one with a slot past the end of the cache,
            which `validate` reports.
        rotary: tables to rotate k with first (v is not rotated).
        positions: (tokens,) int64, the tokens' positions in their sequences; with `rotary` only.
        k_scale, v_scale: (pages, page_size, kv_heads) float32; written to. For the quantized
            dtypes, and only for those.
        backend: see `tilewise.use_backend`.
        validate: check the values of `slot_mapping` and `positions` as well.

    Raises:
        ValueError, TypeError: for an argument that does not fit.
        BackendError: if the named backend cannot run the call.

    Source: Kwon et al., 2023 (arXiv:2309.06180), section 4.3; the formats are described in
    `tilewise.paged.kv_formats`.
    """
    arguments = (k, v, k_cache, v_cache, slot_mapping)
    if not validate and native.append_kv_plainly(
        backend, arguments, rotary, (positions, k_scale, v_scale)
    ):
        return
    options: dict[str, Any] = {
        "rotary": rotary,
        "positions": positions,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    check_append_kv(*arguments, **options, validate=validate)
    _APPEND_KV(*arguments, **options, backend=backend)
