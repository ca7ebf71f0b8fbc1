"""Attention by its definition: every score is computed, in float32, and then masked.

`attend` is the one definition. Dense, ragged and paged attention differ only in which keys exist
for a query and how far apart the two are, so each of them just prepares those two matrices.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

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
    alibi_slopes: torch.Tensor | None,  # broadcasts to (..., heads, queries)
    sinks: torch.Tensor | None,  # (heads,)
    bias: torch.Tensor | None,  # broadcasts to (..., heads, queries, keys)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns out (..., queries, heads, v_head_dim) and lse (..., queries, heads)."""
    dtype = compute_dtype(q)
    groups = q.shape[-2] // k.shape[-2]
    q_, k_, v_ = (x.to(dtype).movedim(-2, -3) for x in (q, k, v))  # (..., heads, seq, dim)
    k_, v_ = (x.repeat_interleave(groups, dim=-3) for x in (k_, v_))

    visible = in_sight(distance, exists, causal, window).unsqueeze(-3)  # (..., 1, queries, keys)
    if bias is not None:
        visible = visible & (bias if bias.dtype == torch.bool else bias != -math.inf)

    # 0 x NaN is NaN, so a value that nobody may see must not be multiplied at all, forward or
    # backward. Whatever is not finite becomes 0 here, and NaN again for those who see it.
    sees_nothing = ~visible.any(-1, keepdim=True)  # (..., queries, 1)
    bad_q, bad_k, bad_v = (~x.isfinite().all(-1, keepdim=True) for x in (q_, k_, v_))
    q_ = q_.masked_fill(bad_q | sees_nothing, 0)
    k_, v_ = k_.masked_fill(bad_k, 0), v_.masked_fill(bad_v, 0)

    s = q_ @ k_.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(dtype).unsqueeze(-1) * distance.abs().unsqueeze(-3).to(dtype)
    if bias is not None and bias.dtype != torch.bool:
        s = s + bias.to(dtype)
    s = s.masked_fill(bad_q | bad_k.mT, math.nan).masked_fill(~visible, -math.inf)

    # A sink is one more key without a value; without sinks it has weight exp(-inf) = 0.
    sink = s.new_full((1,), -math.inf) if sinks is None else sinks.to(dtype)
    s = torch.cat([s, sink[:, None, None].expand(*s.shape[:-1], 1)], dim=-1)
    p = torch.softmax(s, dim=-1)[..., :-1]
    p = p.masked_fill(bad_v.mT, math.nan).masked_fill(~visible, 0)  # rows that see nothing too
    lse = torch.logsumexp(s, dim=-1)
    out = (p @ v_).masked_fill(sees_nothing, 0)  # 0 already; this is for the gradient coming back
    return out.movedim(-3, -2).to(q.dtype), lse.movedim(-2, -1)


def in_sight(
    distance: torch.Tensor, exists: torch.Tensor, causal: bool, window: tuple[int, int]
) -> torch.Tensor:
    """Which keys the causal mask and the window leave to a query: (..., queries, keys)."""
    if causal:
        exists = exists & (distance >= 0)
    if window[0] >= 0:
        exists = exists & (distance <= window[0])
    if window[1] >= 0:
        exists = exists & (distance >= -window[1])
    return exists


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
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
    """A batch of equally long sequences; the last query is level with the last key."""
    batch, q_len, k_len = q.shape[0], q.shape[1], k.shape[1]
    distance, exists = place_dense(q_len, k_len, q.device)
    slopes = None if alibi_slopes is None else alibi_slopes.unsqueeze(-1)

    def rows(i: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return attend(
            q[i],
            k[i],
            v[i],
            distance,
            exists,
            causal=causal,
            scale=scale,
            window=window,
            softcap=softcap,
            alibi_slopes=slopes[i] if slopes is not None and slopes.dim() == 3 else slopes,
            sinks=sinks,
            bias=bias[i] if bias is not None and bias.dim() == 4 and len(bias) > 1 else bias,
        )

    if batch_invariant and batch > 1:
        # How a batched product is split into blocks may depend on the size of the batch.
        parts = [rows(slice(i, i + 1)) for i in range(batch)]
        out, lse = (torch.cat(results) for results in zip(*parts, strict=True))
    else:
        out, lse = rows(slice(None))
    return (out, lse) if return_lse else out


def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
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
    """All sequences side by side in one score matrix; a query sees its own sequence's keys.

    With `batch_invariant` each sequence has a score matrix of its own, whose size only the values
    of `cu_seqlens` tell: such a call cannot be traced.
    """
    options: dict[str, Any] = {
        "causal": causal,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
    }
    if batch_invariant and len(cu_seqlens_q) > 1:
        out, lse = _one_sequence_at_a_time(
            q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes=alibi_slopes, bias=bias, **options
        )
        return (out, lse) if return_lse else out
    distance, exists = place_ragged(len(q), len(k), cu_seqlens_q, cu_seqlens_k)
    out, lse = attend(
        q,
        k,
        v,
        distance,
        exists,
        alibi_slopes=slopes_of_tokens(alibi_slopes, len(q), cu_seqlens_q),
        bias=bias_of_tokens(bias, len(k), cu_seqlens_k),
        **options,
    )
    is_padding = torch.arange(len(q), device=q.device) >= cu_seqlens_q[-1]
    lse = lse.masked_fill(is_padding.unsqueeze(-1), -math.inf)  # whatever the sinks
    return (out, lse) if return_lse else out


def place_dense(q_len: int, k_len: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend`'s distance and exists for one sequence: its last query and key are level."""
    q_position = torch.arange(k_len - q_len, k_len, device=device)
    distance = q_position.unsqueeze(-1) - torch.arange(k_len, device=device)
    return distance, torch.ones_like(distance, dtype=torch.bool)


def place_ragged(
    q_tokens: int, k_tokens: int, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend`'s distance and exists for sequences side by side, some padding behind the last."""
    q_sequence, _, q_to_end = _locate(q_tokens, cu_seqlens_q)
    k_sequence, _, k_to_end = _locate(k_tokens, cu_seqlens_k)
    is_token = (q_sequence < len(cu_seqlens_q) - 1).unsqueeze(-1)
    distance = k_to_end - q_to_end.unsqueeze(-1)
    return distance, is_token & (q_sequence.unsqueeze(-1) == k_sequence)


def slopes_of_tokens(
    alibi_slopes: torch.Tensor | None, q_tokens: int, cu_seqlens_q: torch.Tensor
) -> torch.Tensor | None:
    """(heads,) or (batch, heads) slopes as `attend` takes them: (heads, 1 or queries)."""
    if alibi_slopes is None or alibi_slopes.dim() == 1:
        return None if alibi_slopes is None else alibi_slopes.unsqueeze(-1)
    sequence, _, _ = _locate(q_tokens, cu_seqlens_q)
    return F.pad(alibi_slopes, (0, 0, 0, 1))[sequence].mT  # padding is one sequence more


def bias_of_tokens(
    bias: torch.Tensor | None, k_tokens: int, cu_seqlens_k: torch.Tensor
) -> torch.Tensor | None:
    """A bias by the key's position in its sequence as one by the key's position among all."""
    if bias is None or bias.shape[-1] == 1:
        return bias
    # One column more is for padding, which may lie further along than the bias goes.
    _, position, _ = _locate(k_tokens, cu_seqlens_k)
    return F.pad(bias, (0, 1)).index_select(-1, position.clamp(max=bias.shape[-1]))


def _locate(
    tokens: int, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each token: its sequence, its position there, and how far the end of it is.

    Tokens behind the last sequence belong to a sequence of padding, whose number is the batch size.
    """
    token = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.bucketize(token, cu_seqlens, right=True) - 1
    end = cu_seqlens[(sequence + 1).clamp(max=len(cu_seqlens) - 1)]
    return sequence, token - cu_seqlens[sequence], end - token


def _one_sequence_at_a_time(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    alibi_slopes: torch.Tensor | None,
    bias: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    if bias is not None:
        bias = bias.expand(q.shape[1], q.shape[0], -1)
    outs, lses = [], []
    for i, (q_rows, k_rows) in enumerate(zip(pairwise(q_ends), pairwise(k_ends), strict=True)):
        q_, k_, v_ = q[slice(*q_rows)], k[slice(*k_rows)], v[slice(*k_rows)]
        slopes = alibi_slopes
        if alibi_slopes is not None and alibi_slopes.dim() == 2:
            slopes = alibi_slopes[i]
        result = flash_attention(
            q_[None],
            k_[None],
            v_[None],
            alibi_slopes=slopes,
            bias=bias[:, slice(*q_rows), : len(k_)] if bias is not None else None,
            return_lse=True,
            **options,
        )
        outs.append(result[0][0])
        lses.append(result[1][0])
    padding = len(q) - q_ends[-1]
    outs.append(q.new_zeros(padding, q.shape[1], v.shape[2]))
    lses.append(q.new_full((padding, q.shape[1]), -math.inf, dtype=compute_dtype(q)))
    return torch.cat(outs), torch.cat(lses)


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys of both, weighted by how much each side's softmax summed to."""
    # logaddexp(-inf, -inf) is right, but its gradient is NaN.
    nothing = (lse_a == -math.inf) & (lse_b == -math.inf)
    lse = torch.logaddexp(lse_a.masked_fill(nothing, 0), lse_b.masked_fill(nothing, 0))
    lse = lse.masked_fill(nothing, -math.inf)
    total = torch.zeros_like(out_a, dtype=lse.dtype)
    for out_x, lse_x in ((out_a, lse_a), (out_b, lse_b)):
        saw_nothing = lse_x == -math.inf
        weight = torch.exp((lse_x - lse).masked_fill(saw_nothing, -math.inf)).unsqueeze(-1)
        total = total + weight * out_x.to(lse.dtype).masked_fill(saw_nothing.unsqueeze(-1), 0)
    return total.to(out_a.dtype), lse
