"""Attention by its definition: every score is computed, in float32, and then masked.

`attend` is the one definition. Dense, ragged and paged attention differ only in which keys exist
for a query and how far apart the two are, so each of them just prepares those two matrices.
"""

from __future__ import annotations

import math

import torch

from tilewise.fused.naive import compute_dtype


def attend(
    q: torch.Tensor,  # (..., queries, heads, head_dim)
    k: torch.Tensor,  # (..., keys, kv_heads, head_dim)
    v: torch.Tensor,  # (..., keys, kv_heads, v_head_dim)
    distance: torch.Tensor,  # (..., queries, keys): position of the query minus that of the key
    exists: torch.Tensor,  # (..., queries, keys): whether they belong together at all
    *,
    causal: bool,
    scale: float | None,
    window: tuple[int, int],
    softcap: float,
    alibi_slopes: torch.Tensor | None,  # (heads,) or (..., heads)
    sinks: torch.Tensor | None,  # (heads,)
    bias: torch.Tensor | None,  # broadcasts to (..., heads, queries, keys)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns out (..., queries, heads, v_head_dim) and lse (..., queries, heads)."""
    dtype = compute_dtype(q)
    groups = q.shape[-2] // k.shape[-2]
    q_, k_, v_ = (x.to(dtype).movedim(-2, -3) for x in (q, k, v))  # (..., heads, seq, dim)
    k_, v_ = (x.repeat_interleave(groups, dim=-3) for x in (k_, v_))

    visible = exists
    if causal:
        visible = visible & (distance >= 0)
    if window[0] >= 0:
        visible = visible & (distance <= window[0])
    if window[1] >= 0:
        visible = visible & (distance >= -window[1])
    visible = visible.unsqueeze(-3)  # (..., 1, queries, keys)
    if bias is not None:
        visible = visible & (bias if bias.dtype == torch.bool else bias != -math.inf)

    # 0 x NaN is NaN, so a value that nobody may see must not be multiplied at all, forward or
    # backward. Non-finite keys and values become 0 here and NaN again for those who see them.
    q_ = q_.masked_fill(~visible.any(-1, keepdim=True), 0)
    bad_k, bad_v = (~x.isfinite().all(-1).unsqueeze(-2) for x in (k_, v_))  # (..., heads, 1, keys)
    k_, v_ = (x.masked_fill(bad.mT, 0) for x, bad in ((k_, bad_k), (v_, bad_v)))

    s = q_ @ k_.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(dtype)[..., None, None] * distance.abs().unsqueeze(-3).to(dtype)
    if bias is not None and bias.dtype != torch.bool:
        s = s + bias.to(dtype)
    s = s.masked_fill(bad_k, math.nan).masked_fill(~visible, -math.inf)

    # A sink is one more key without a value; without sinks it has weight exp(-inf) = 0.
    sink = s.new_full((1,), -math.inf) if sinks is None else sinks.to(dtype)
    s = torch.cat([s, sink[:, None, None].expand(*s.shape[:-1], 1)], dim=-1)
    p = torch.softmax(s, dim=-1)[..., :-1]
    p = p.masked_fill(bad_v, math.nan).masked_fill(~visible, 0)  # rows that see nothing too
    lse = torch.logsumexp(s, dim=-1)
    return (p @ v_).movedim(-3, -2).to(q.dtype), lse.movedim(-2, -1)
