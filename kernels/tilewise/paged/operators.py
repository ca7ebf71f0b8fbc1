"""The registered operators of the paged cache."""

from __future__ import annotations

import torch
from torch.autograd.graph import increment_version

from tilewise.fused.naive import compute_dtype
from tilewise.fused.tables import RotaryTables
from tilewise.library import Contract
from tilewise.paged import kv_formats, naive


def _fake_paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, _ = q.shape
    out = q.new_empty(tokens, heads, kv_formats.elements(v_cache))
    return out, q.new_empty(tokens, heads, dtype=compute_dtype(q))


PAGED_ATTENTION = Contract(
    "paged_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor cache_seqlens, "
    "Tensor? cu_seqlens_q, Tensor? k_scale, Tensor? v_scale, bool causal, float scale, "
    "int window_left, int window_right, float softcap, Tensor? alibi_slopes, Tensor? sinks, "
    "Tensor? bias, bool batch_invariant) -> (Tensor, Tensor)",
    _fake_paged_attention,
)
"""out and lse, both contiguous."""


@PAGED_ATTENTION.kernel("naive")
def _paged_attention_kernel(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = naive.paged_attention(
        q,
        k_cache,
        v_cache,
        block_table,
        cache_seqlens,
        cu_seqlens_q=cu_seqlens_q,
        k_scale=k_scale,
        v_scale=v_scale,
        causal=causal,
        scale=scale,
        window=(window_left, window_right),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        bias=bias,
        return_lse=True,
        batch_invariant=batch_invariant,
    )
    return out.contiguous(), lse.contiguous()


def _fake_append_kv(*args: object) -> None:
    """It returns nothing; what it writes is in the schema."""


APPEND_KV = Contract(
    "append_kv",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, "
    "Tensor? cos, Tensor? sin, bool interleaved, Tensor? positions, "
    "Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> ()",
    _fake_append_kv,
)


def written(*tensors: torch.Tensor | None) -> None:
    """Tell autograd that a kernel wrote to these, so that it uses nothing that it saved of them."""
    increment_version([x for x in tensors if x is not None])


@APPEND_KV.kernel("naive")
def _append_kv_kernel(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    positions: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    naive.append_kv(
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        rotary=None if cos is None or sin is None else RotaryTables(cos, sin, interleaved),
        positions=positions,
        k_scale=k_scale,
        v_scale=v_scale,
    )
