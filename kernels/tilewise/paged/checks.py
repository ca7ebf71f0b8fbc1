"""What calls on a paged cache must satisfy.

Shapes, dtypes and devices are checked on every call; values only under `validate=True`, because
reading them makes a GPU wait.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from tilewise import checks
from tilewise.attention.checks import (
    MAX_HEAD_DIM,
    check_bias,
    check_cu_seqlens,
    check_options,
    validate_cu_seqlens,
)
from tilewise.fused.rotary import check_tables, validate_positions
from tilewise.fused.tables import RotaryTables
from tilewise.paged import kv_formats


def check_paged_attention(
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
    validate: bool = False,
) -> None:
    """Raise ValueError or TypeError where `paged_attention` cannot take the arguments."""
    checks.has_dtype("q", q, checks.FLOATS)
    rows = "batch" if cu_seqlens_q is None else "tokens"
    checks.has_dims("q", q, f"{rows} heads head_dim")
    checks.has_unit_last_stride("q", q)
    tokens, heads, head_dim = q.shape
    _check_caches(k_cache, v_cache, k_scale, v_scale, "q", q)
    _check_width("q", head_dim, "k_cache", k_cache)
    kv_heads = k_cache.shape[2]
    if heads < 1 or heads % kv_heads:
        raise ValueError(
            f"q: heads must be a multiple of k_cache's kv_heads, {kv_heads}, got {heads}; "
            "k_cache is (pages, page_size, kv_heads, head_dim)"
        )

    checks.has_dtype("cache_seqlens", cache_seqlens, (torch.int32,))
    checks.has_dims("cache_seqlens", cache_seqlens, "batch")
    checks.on_device_of("cache_seqlens", cache_seqlens, "q", q)
    batch = len(cache_seqlens)
    if cu_seqlens_q is not None:
        check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
        checks.has_shape("cu_seqlens_q", cu_seqlens_q, (batch + 1,), "cache_seqlens' batch + 1")
    elif batch != tokens:
        raise ValueError(
            f"cache_seqlens: batch must be q's, {tokens}, got {batch}; "
            "several queries per request need cu_seqlens_q"
        )
    checks.has_dtype("block_table", block_table, (torch.int32,))
    checks.has_dims("block_table", block_table, "batch max_pages")
    checks.on_device_of("block_table", block_table, "q", q)
    checks.has_unit_last_stride("block_table", block_table)
    if len(block_table) != batch:
        raise ValueError(
            f"block_table: batch must be cache_seqlens', {batch}, got {len(block_table)}"
        )

    check_options(
        q,
        batch,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        return_lse=return_lse,
        batch_invariant=batch_invariant,
    )
    if bias is not None:
        capacity = block_table.shape[1] * k_cache.shape[1]
        check_bias(bias, q, (heads, tokens, capacity), f"(heads, {rows}, max_pages * page_size)")
    if validate:
        _validate_requests(k_cache, block_table, cache_seqlens, cu_seqlens_q, tokens)


def check_append_kv(
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
    validate: bool = False,
) -> None:
    """Raise ValueError or TypeError where `append_kv` cannot take the arguments."""
    checks.has_dtype("k", k, checks.FLOATS)
    checks.has_dims("k", k, "tokens kv_heads head_dim")
    checks.like("v", v, "k", k)
    checks.has_dims("v", v, "tokens kv_heads v_head_dim")
    checks.has_shape("v", v, (*k.shape[:2], v.shape[2]), "k's tokens and kv_heads")
    checks.has_unit_last_stride("k", k)
    checks.has_unit_last_stride("v", v)
    _check_caches(k_cache, v_cache, k_scale, v_scale, "k", k)
    for name, x, cache_name, cache in (("k", k, "k_cache", k_cache), ("v", v, "v_cache", v_cache)):
        _check_width(name, x.shape[2], cache_name, cache)
    if k.shape[1] != k_cache.shape[2]:
        raise ValueError(f"k: kv_heads must be k_cache's, {k_cache.shape[2]}, got {k.shape[1]}")
    checks.has_dtype("slot_mapping", slot_mapping, (torch.int64,))
    checks.on_device_of("slot_mapping", slot_mapping, "k", k)
    checks.has_shape("slot_mapping", slot_mapping, (len(k),), "k's tokens")
    if (rotary is None) != (positions is None):
        given, missing = ("positions", "rotary") if rotary is None else ("rotary", "positions")
        raise ValueError(f"{missing}: must be given with {given}, got None")
    if rotary is not None and positions is not None:
        checks.is_tensor("positions", positions)
        check_tables("rotary", rotary, "k", k, positions)
    if validate:
        is_kept = _validate_slots(slot_mapping, k_cache.shape[0] * k_cache.shape[1])
        if rotary is not None and positions is not None:
            validate_positions(torch.where(is_kept, positions, 0), rotary)


# --- the cache, the same for both -----------------------------------------------------------------


def _check_caches(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    other_name: str,
    other: torch.Tensor,
) -> None:
    checks.has_dtype("k_cache", k_cache, kv_formats.STORED)
    checks.has_dims("k_cache", k_cache, "pages page_size kv_heads head_dim")
    checks.on_device_of("k_cache", k_cache, other_name, other)
    checks.like("v_cache", v_cache, "k_cache", k_cache)
    checks.has_dims("v_cache", v_cache, "pages page_size kv_heads v_head_dim")
    shared, of_v = k_cache.shape[:3], v_cache.shape
    if min(shared) < 1:
        names = ("pages", "page_size", "kv_heads")
        dim, size = next((d, n) for d, n in zip(names, shared, strict=True) if n < 1)
        raise ValueError(f"k_cache: {dim} must be >= 1, got {size}")
    if of_v[:3] != shared:
        wanted = "k_cache's pages, page_size and kv_heads"
        checks.has_shape("v_cache", v_cache, (*shared, of_v[3]), wanted)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.has_unit_last_stride(name, cache)
        head_dim = kv_formats.elements(cache)
        if not 1 <= head_dim <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: head_dim must be from 1 to {MAX_HEAD_DIM}, got {head_dim}")
    is_quantized = kv_formats.is_quantized(k_cache.dtype)
    if not is_quantized and k_scale is None and v_scale is None:
        return
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        stored = str(k_cache.dtype).removeprefix("torch.")
        if not is_quantized:
            if scale is not None:
                raise ValueError(f"{name}: must be None for {stored} caches, got a tensor")
            continue
        if scale is None:
            raise ValueError(f"{name}: must be given for {stored} caches, got None")
        checks.has_dtype(name, scale, (torch.float32, torch.float64))
        checks.on_device_of(name, scale, other_name, other)
        checks.has_shape(name, scale, tuple(shared), "k_cache's pages, page_size and kv_heads")


def _check_width(name: str, head_dim: int, cache_name: str, cache: torch.Tensor) -> None:
    """Raise unless rows of this cache hold heads of this width."""
    if cache.dtype == torch.uint8 and head_dim % 2:
        raise ValueError(f"{name}: head_dim must be even for an int4 cache, got {head_dim}")
    if kv_formats.elements(cache) != head_dim:
        raise ValueError(
            f"{name}: head_dim must be {cache_name}'s, {kv_formats.elements(cache)}, got {head_dim}"
        )


# --- values ---------------------------------------------------------------------------------------


def _validate_requests(
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    tokens: int,
) -> None:
    num_pages, page_size = k_cache.shape[:2]
    capacity = block_table.shape[1] * page_size
    seqlens = cache_seqlens.tolist()
    for row, (seqlen, pages) in enumerate(zip(seqlens, block_table.tolist(), strict=True)):
        if seqlen < 0:
            raise ValueError(f"cache_seqlens: must be >= 0, batch row {row} is {seqlen}")
        if seqlen > capacity:
            raise ValueError(
                f"cache_seqlens: must be <= {capacity}, block_table's max_pages * page_size, "
                f"batch row {row} is {seqlen}"
            )
        for i, page in enumerate(pages[: -(-seqlen // page_size)]):
            if not 0 <= page < num_pages:
                raise ValueError(
                    f"block_table: pages in use must be from 0 to {num_pages - 1}, "
                    f"batch row {row} has {page} at {i}"
                )
    if cu_seqlens_q is None:
        return
    validate_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "q", tokens, None, "")
    for row, ((start, end), seqlen) in enumerate(
        zip(pairwise(cu_seqlens_q.tolist()), seqlens, strict=True)
    ):
        if end - start > seqlen:
            raise ValueError(
                f"cu_seqlens_q: a request must not have more queries than keys, "
                f"batch row {row} has {end - start} and {seqlen}"
            )


def _validate_slots(slot_mapping: torch.Tensor, capacity: int) -> torch.Tensor:
    """Raise unless every slot is free to be written once; returns which tokens are written."""
    token_of_slot: dict[int, int] = {}
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= capacity:
            raise ValueError(
                f"slot_mapping: must be < {capacity}, the pages * page_size of k_cache, "
                f"token {token} has {slot}"
            )
        if slot >= 0 and token_of_slot.setdefault(slot, token) != token:
            raise ValueError(
                f"slot_mapping: tokens must have different slots, "
                f"tokens {token_of_slot[slot]} and {token} both have {slot}"
            )
    return slot_mapping >= 0
