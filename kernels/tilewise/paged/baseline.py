"""Paged attention with PyTorch's own `scaled_dot_product_attention`: the honest baseline.

PyTorch knows no pages on most devices, so they are gathered into one tensor first, as one would
without this library. It also multiplies what is masked by 0, which a NaN survives; keys that no
query of their request may see are therefore cleared on the way.

Writing to a cache has no baseline: PyTorch's indexed assignment is what the naive one is made of.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from tilewise.attention.baseline import sdpa
from tilewise.attention.naive import in_sight
from tilewise.paged import naive


def why_not(
    q: torch.Tensor,
    *args: Any,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    **others: Any,
) -> str | None:
    """What `scaled_dot_product_attention` has no argument for."""
    if softcap > 0:
        return "scaled_dot_product_attention has no softcap"
    if alibi_slopes is not None:
        return "scaled_dot_product_attention has no ALiBi slopes"
    if sinks is not None:
        return "scaled_dot_product_attention has no sinks"
    if return_lse:
        return "scaled_dot_product_attention does not return the log-sum-exp"
    if batch_invariant:
        return "scaled_dot_product_attention does not promise batch invariance"
    return None


def why_not_auto(
    q: torch.Tensor,
    *args: Any,
    cu_seqlens_q: torch.Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    bias: torch.Tensor | None = None,
    **others: Any,
) -> str | None:
    """Keys that only some queries or heads may see, so that they cannot be cleared."""
    if bias is not None:
        return "a NaN in a key that the bias hides would reach the output"
    if cu_seqlens_q is not None and (causal or tuple(window) != (-1, -1)):
        return "a NaN in a key that only some queries may see would reach the others"
    return None


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
) -> torch.Tensor:
    """Gather, mask, and `scaled_dot_product_attention`."""
    queries, is_own, position = naive.queries_of_requests(q, cu_seqlens_q, cache_seqlens)
    pages, exists = naive.keys_of_requests(k_cache, block_table, cache_seqlens)
    distance = position.unsqueeze(-1) - torch.arange(exists.shape[1], device=q.device)
    exists = is_own.unsqueeze(-1) & exists.unsqueeze(1)
    visible = in_sight(distance, exists, causal, window)  # (batch, queries, keys)
    k = naive.gather(k_cache, k_scale, pages, q.dtype)
    v = naive.gather(v_cache, v_scale, pages, q.dtype)
    # Who sees an infinity gets NaN by definition, but not by multiplying with it.
    is_bad = ~(k.isfinite().all(-1, keepdim=True) & v.isfinite().all(-1, keepdim=True))
    is_hidden = ~visible.any(1)[..., None, None]
    k = k.masked_fill(is_bad, math.nan).masked_fill(is_hidden, 0)
    v = v.masked_fill(is_hidden, 0)

    # The heads that share a key head become queries of one head: the keys are read once for all of
    # them, and no kernel has to be passed over because it knows no grouped heads.
    kv_heads, groups = k.shape[2], q.shape[1] // k.shape[2]
    if bias is None:
        mask = visible.repeat_interleave(groups, dim=1).unsqueeze(1)
    else:
        bias = naive.bias_of_requests(bias, q, cu_seqlens_q, k.shape[1])
        mask = visible.unsqueeze(1)  # (batch, heads, queries, keys)
        if bias.dtype == torch.bool:
            mask = mask & bias
        else:
            mask = torch.where(mask, bias.to(q.dtype), -math.inf)
        mask = mask.unflatten(1, (kv_heads, groups)).transpose(2, 3).flatten(2, 3)
    out = sdpa(
        queries.unflatten(2, (kv_heads, groups)).movedim(2, 1).flatten(2, 3),
        k.transpose(1, 2),
        v.transpose(1, 2),
        mask=mask,
        blind=True,
        scale=scale,
    )  # (batch, kv_heads, queries * groups, v_head_dim)
    out = out.unflatten(2, (-1, groups)).movedim(1, 2).flatten(2, 3)
    return naive.results_of_tokens(out, is_own, cu_seqlens_q, nothing=0.0)
