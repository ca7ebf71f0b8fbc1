"""FlashAttention-2's functions, for code that was written for the package `flash_attn`.

Names, parameters, their order, layouts and return values are those of flash_attn 2.x. Which
implementation runs is chosen as everywhere (`tilewise.use_backend`). Two things differ: a query
that sees no key has LSE -inf, where flash_attn has +inf; and all head dimensions up to 576 and all
page sizes are taken, on every device.
"""

from __future__ import annotations

from typing import Any

import torch

from tilewise import checks
from tilewise.attention import flash_attention, flash_attention_varlen
from tilewise.attention.checks import check_cu_seqlens
from tilewise.fused import RotaryTables, rotary_embedding
from tilewise.paged import append_kv, paged_attention

_Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_NAMES = {"scale": "softmax_scale", "window": "window_size", "return_lse": "return_attn_probs"}
_NAMES_OF_PAGES = {"k_cache": "k", "v_cache": "v", "cache_seqlens": "cu_seqlens_k"}
_NAMES_WITH_CACHE = {
    "scale": "softmax_scale",
    "window": "window_size",
    "return_lse": "return_softmax_lse",
    "rotary.cos": "rotary_cos",
    "rotary.sin": "rotary_sin",
    "rotary.interleaved": "rotary_interleaved",
}


@checks.renamed(_NAMES)
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> _Result:
    """`tilewise.flash_attention` with FlashAttention-2's signature.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k, v: (batch, seqlen_k, kv_heads, head_dim).
        dropout_p: must be 0.
        softmax_scale, causal, window_size, softcap, alibi_slopes: `scale`, `causal`, `window`,
            `softcap` and `alibi_slopes` of `tilewise.flash_attention`.
        deterministic: makes no difference, our kernels always are.
        return_attn_probs: return (out, softmax_lse, an empty tensor): flash_attn has
            probabilities only to show which of them were dropped.

    Returns:
        out (batch, seqlen_q, heads, v_head_dim); softmax_lse is (batch, heads, seqlen_q).

    Raises:
        ValueError, TypeError: as `tilewise.flash_attention`, and for a positive dropout_p.
    """
    _refuse_dropout(dropout_p)
    result = flash_attention(
        q,
        k,
        v,
        causal=causal,
        scale=softmax_scale,
        window=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_lse=return_attn_probs,
    )
    return _with_probs(result)


@checks.renamed(_NAMES | _NAMES_OF_PAGES)
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> _Result:
    """`tilewise.flash_attention_varlen` with FlashAttention-2's signature.

    Args:
        q: (tokens_q, heads, head_dim).
        k, v: (tokens_k, kv_heads, head_dim), or with `block_table` (pages, page_size, kv_heads,
            head_dim).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32.
        max_seqlen_q, max_seqlen_k: the lengths of the longest sequences.
        block_table: (batch, max_pages) int32, the pages that each sequence's keys are in.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
            return_attn_probs: as in `flash_attn_func`.

    Returns:
        out (tokens_q, heads, v_head_dim); softmax_lse is (heads, tokens_q).

    Raises:
        ValueError, TypeError: as `tilewise.flash_attention_varlen` or, with a block table,
            `tilewise.paged_attention`, and for a positive dropout_p.
    """
    _refuse_dropout(dropout_p)
    options: dict[str, Any] = {
        "causal": causal,
        "scale": softmax_scale,
        "window": window_size,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "return_lse": return_attn_probs,
    }
    if block_table is not None:
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q)
        lengths = cu_seqlens_k.diff()
        result = paged_attention(
            q, k, v, block_table, lengths, cu_seqlens_q=cu_seqlens_q, **options
        )
    else:
        options |= {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
        result = flash_attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    return _with_probs(result)


@checks.renamed(_NAMES_WITH_CACHE)
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Append to a cache and attend to it, with FlashAttention-2's signature.

    A dense cache is a paged one in which every batch row is a page.

    Args:
        q: (batch, seqlen_q, heads, head_dim), the last tokens of their sequences.
        k_cache, v_cache: (rows, capacity, kv_heads, head_dim), or with `block_table` (pages,
            page_size, kv_heads, head_dim); written to if `k` and `v` are given.
        k, v: (batch, seqlen_new, kv_heads, head_dim), appended behind `cache_seqlens` first. What
            does not fit is left out.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2); with `k` and `v` only. New keys are
            rotated by their positions; queries too if the call is causal or has a window, else
            all by the position `cache_seqlens`.
        cache_seqlens: (batch,) int32, or one int for all: tokens in the cache before the call.
            None means that the cache is full.
        cache_batch_idx: (batch,) int32 or int64, the cache row of each batch row; without
            `block_table`.
        cache_leftpad: must be None.
        block_table: (batch, max_pages) int32.
        rotary_interleaved: see `tilewise.RotaryTables`.
        num_splits: makes no difference.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`.
        return_softmax_lse: return softmax_lse too.

    Returns:
        out (batch, seqlen_q, heads, v_head_dim); softmax_lse is (batch, heads, seqlen_q).

    Raises:
        ValueError, TypeError: as `tilewise.paged_attention` and `tilewise.append_kv`, and for an
            argument that must be None.
    """
    checks.is_tensor("q", q)
    checks.has_dims("q", q, "batch seqlen_q heads head_dim")
    checks.is_tensor("k_cache", k_cache)
    checks.has_dims("k_cache", k_cache, "rows capacity kv_heads head_dim")
    if cache_leftpad is not None:
        raise ValueError("cache_leftpad: must be None, padding on the left is not supported")
    batch, q_len = q.shape[:2]
    block_table = _block_table(block_table, cache_batch_idx, batch, q.device)
    seqlens = _cache_seqlens(cache_seqlens, block_table, k_cache, is_appending=k is not None)

    tables = _rotary_tables(rotary_cos, rotary_sin, rotary_interleaved)
    if (k is None) != (v is None):
        raise ValueError("k, v: must be given together, got one of them")
    if k is not None and v is not None:
        _append(k, v, k_cache, v_cache, block_table, seqlens, tables)
        if tables is not None:
            is_local = causal or tuple(window_size) != (-1, -1)
            q = rotary_embedding(q, tables, _following(seqlens, q_len if is_local else 1, q_len))
        seqlens = seqlens + k.shape[1]
    elif tables is not None:
        raise ValueError("rotary_cos: must be given with k and v, got neither")

    result = paged_attention(
        q.flatten(0, 1),
        k_cache,
        v_cache,
        block_table,
        seqlens,
        # One query each needs no ragged batch, and decoding is where most calls are.
        cu_seqlens_q=None if q_len == 1 else _every(q_len, batch, q.device),
        causal=causal,
        scale=softmax_scale,
        window=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_lse=return_softmax_lse,
    )
    if isinstance(result, tuple):
        out, lse = (x.unflatten(0, (batch, q_len)) for x in result)
        return out, lse.transpose(1, 2)
    return result.unflatten(0, (batch, q_len))


# --- what stands between the two signatures -------------------------------------------------------


def _refuse_dropout(dropout_p: float) -> None:
    if dropout_p != 0:
        raise ValueError(f"dropout_p: must be 0, dropout is not supported, got {dropout_p}")


def _with_probs(result: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> _Result:
    """FlashAttention's three results, heads before tokens in the second, where lse was returned."""
    if isinstance(result, torch.Tensor):
        return result
    out, lse = result
    return out, lse.transpose(-1, -2), out.new_empty(0)


def _block_table(
    block_table: torch.Tensor | None,
    cache_batch_idx: torch.Tensor | None,
    batch: int,
    device: torch.device,
) -> torch.Tensor:
    if block_table is None:
        if cache_batch_idx is None:
            cache_batch_idx = torch.arange(batch, device=device)
        checks.has_dtype("cache_batch_idx", cache_batch_idx, (torch.int32, torch.int64))
        checks.has_shape("cache_batch_idx", cache_batch_idx, (batch,), "q's batch")
        return cache_batch_idx.to(torch.int32).unsqueeze(-1)
    if cache_batch_idx is not None:
        raise ValueError("cache_batch_idx: must be None with a block_table")
    checks.has_dtype("block_table", block_table, (torch.int32,))
    checks.has_dims("block_table", block_table, "batch max_pages")
    if len(block_table) != batch:
        raise ValueError(f"block_table: batch must be q's, {batch}, got {len(block_table)}")
    return block_table


def _cache_seqlens(
    cache_seqlens: int | torch.Tensor | None,
    block_table: torch.Tensor,
    k_cache: torch.Tensor,
    *,
    is_appending: bool,
) -> torch.Tensor:
    capacity = block_table.shape[1] * k_cache.shape[1]
    if cache_seqlens is None:
        if is_appending:
            raise ValueError("cache_seqlens: must be given with k and v, got None")
        cache_seqlens = capacity
    if isinstance(cache_seqlens, int):
        checks.is_integer("cache_seqlens", cache_seqlens)
        if not 0 <= cache_seqlens <= capacity:
            raise ValueError(
                f"cache_seqlens: must be from 0 to {capacity}, the cache's capacity, "
                f"got {cache_seqlens}"
            )
        return block_table.new_full((len(block_table),), cache_seqlens)
    checks.has_dtype("cache_seqlens", cache_seqlens, (torch.int32,))
    checks.has_shape("cache_seqlens", cache_seqlens, (len(block_table),), "q's batch")
    return cache_seqlens


def _rotary_tables(
    cos: torch.Tensor | None, sin: torch.Tensor | None, interleaved: bool
) -> RotaryTables | None:
    if cos is None or sin is None:
        if cos is not None or sin is not None:
            raise ValueError("rotary_cos, rotary_sin: must be given together, got one of them")
        return None
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        checks.has_dtype(name, table, checks.FLOATS)
    return RotaryTables(cos.float(), sin.float(), interleaved)


def _following(seqlens: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """The `count` positions behind each sequence, (batch, length)."""
    return (seqlens.long().unsqueeze(-1) + torch.arange(count, device=seqlens.device)).expand(
        -1, length
    )


def _every(step: int, batch: int, device: torch.device) -> torch.Tensor:
    """cu_seqlens of sequences that are all `step` long."""
    return torch.arange(0, batch * step + 1, step, dtype=torch.int32, device=device)


def _append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seqlens: torch.Tensor,
    tables: RotaryTables | None,
) -> None:
    checks.is_tensor("k", k)
    checks.has_dims("k", k, "batch seqlen_new kv_heads head_dim")
    checks.is_tensor("v", v)
    checks.has_dims("v", v, "batch seqlen_new kv_heads v_head_dim")
    if len(k) != len(block_table):
        raise ValueError(f"k: batch must be q's, {len(block_table)}, got {len(k)}")
    page_size = k_cache.shape[1]
    positions = _following(seqlens, k.shape[1], k.shape[1])
    fits = positions < block_table.shape[1] * page_size
    page = block_table.long().gather(1, torch.where(fits, positions // page_size, 0))
    slots = torch.where(fits & (page >= 0), page * page_size + positions % page_size, -1)
    append_kv(
        k.flatten(0, 1),
        v.flatten(0, 1),
        k_cache,
        v_cache,
        slots.flatten(),
        rotary=tables,
        positions=None if tables is None else positions.flatten(),
    )
