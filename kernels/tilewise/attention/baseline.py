"""Attention with PyTorch's own `scaled_dot_product_attention`: the honest baseline.

It multiplies what is masked by 0, and 0 x NaN is NaN. So wherever a mask may hide a key that
somebody left full of NaN, it runs when asked for by name but `auto` does not choose it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from tilewise.attention import naive
from tilewise.fused.naive import compute_dtype

_LEAK = "a NaN in a key that the mask hides would reach the output"


def why_not(
    q: torch.Tensor,
    *args: Any,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    **others: Any,
) -> str | None:
    """What `scaled_dot_product_attention` has no argument for; dense and ragged alike."""
    if softcap > 0:
        return "scaled_dot_product_attention has no softcap"
    if sinks is not None:
        return "scaled_dot_product_attention has no sinks"
    if return_lse:
        return "scaled_dot_product_attention does not return the log-sum-exp"
    if batch_invariant:
        return "scaled_dot_product_attention does not promise batch invariance"
    mask_dtype = torch.bool if bias is None else bias.dtype
    if alibi_slopes is not None:
        mask_dtype = torch.promote_types(mask_dtype, compute_dtype(q))
    wanted = (torch.bool, q.dtype, torch.float32) if q.is_cpu else (torch.bool, q.dtype)
    if mask_dtype not in wanted:
        return f"scaled_dot_product_attention takes no {mask_dtype} mask for a {q.dtype} query"
    return None


def why_not_auto_flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    bias: torch.Tensor | None = None,
    **others: Any,
) -> str | None:
    """Calls in which some query may not see some key."""
    hides = bias is not None or _hides(q.shape[1], k.shape[1], causal, window)
    return _LEAK if hides else None


def why_not_auto_flash_attention_varlen(*args: Any, **others: Any) -> str | None:
    """Every call: the sequences hide their keys from one another."""
    return _LEAK


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
) -> torch.Tensor:
    """With `is_causal` where it means the same, and a mask for everything else."""
    q_len, k_len = q.shape[1], k.shape[1]
    if bias is None and alibi_slopes is None:
        if not _hides(q_len, k_len, causal, window):
            return _sdpa(q, k, v, scale=scale)
        right = 0 if causal else window[1]
        if q_len == k_len and right == 0 and not _hides(q_len, k_len, False, (window[0], -1)):
            return _sdpa(q, k, v, scale=scale, is_causal=True)
    # `causal_lower_right` would spare the mask for causal calls where q_len < k_len, but
    # torch.compile cannot trace it.
    distance, exists = naive.place_dense(q_len, k_len, q.device)
    slopes = None if alibi_slopes is None else alibi_slopes.unsqueeze(-1)
    mask = _mask(q, distance, naive.in_sight(distance, exists, causal, window), slopes, bias)
    blind = bias is not None or q_len > k_len
    return _sdpa(q, k, v, scale=scale, mask=mask, blind=blind)


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
) -> torch.Tensor:
    """As one sequence with a block-diagonal mask: one call of any device's kernel, traceable."""
    distance, exists = naive.place_ragged(len(q), len(k), cu_seqlens_q, cu_seqlens_k)
    mask = _mask(
        q,
        distance,
        naive.in_sight(distance, exists, causal, window),
        naive.slopes_of_tokens(alibi_slopes, len(q), cu_seqlens_q),
        naive.bias_of_tokens(bias, len(k), cu_seqlens_k),
    )
    return _sdpa(q[None], k[None], v[None], scale=scale, mask=mask, blind=True)[0]


def _hides(q_len: int, k_len: int, causal: bool, window: tuple[int, int]) -> bool:
    """Whether some query does not see some key. Distances run from 1 - q_len to k_len - 1."""
    right = 0 if causal else window[1]
    return 0 <= window[0] < k_len - 1 or 0 <= right < q_len - 1


def _mask(
    q: torch.Tensor,
    distance: torch.Tensor,  # (queries, keys)
    visible: torch.Tensor,  # (queries, keys)
    slopes: torch.Tensor | None,  # broadcasts to (..., heads, queries)
    bias: torch.Tensor | None,  # broadcasts to (..., heads, queries, keys)
) -> torch.Tensor:
    """A boolean mask, or one to be added; (batch, heads, queries, keys) or broadcast to it."""
    if slopes is not None:
        penalty = -slopes.to(compute_dtype(q)).unsqueeze(-1) * distance.abs()
        if bias is None:
            bias = penalty
        elif bias.dtype == torch.bool:
            bias = penalty.masked_fill(~bias, -math.inf)
        else:
            bias = penalty + bias
    if bias is None:
        mask = visible
    elif bias.dtype == torch.bool:
        mask = bias & visible
    else:
        mask = bias.masked_fill(~visible, -math.inf)
    return mask.reshape((1,) * (4 - mask.dim()) + mask.shape)  # the fused kernels take no 3


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """`sdpa` of (batch, seq, heads, head_dim)."""
    return sdpa(*(x.transpose(1, 2) for x in (q, k, v)), **options).transpose(1, 2)


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None,
    mask: torch.Tensor | None = None,
    blind: bool = False,
    is_causal: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` of (batch, heads, seq, head_dim), on every device.

    Args:
        blind: whether the mask may leave a query nothing to see. PyTorch's kernels differ in what
            such a row gives; so they are shown all keys, and their result, 0, is written here.
    """
    groups = q.shape[1] // max(k.shape[1], 1)
    if 0 in q.shape or 0 in k.shape:  # for which some of the kernels return None
        return q @ k.repeat_interleave(groups, 1).mT @ v.repeat_interleave(groups, 1)
    sees_nothing = None
    if mask is not None and blind:
        is_visible = mask if mask.dtype == torch.bool else mask != -math.inf
        sees_nothing = ~is_visible.any(-1, keepdim=True)
        mask = mask.masked_fill(sees_nothing, True if mask.dtype == torch.bool else 0.0)
    out = F.scaled_dot_product_attention(
        _aligned(q),
        _aligned(k),
        _aligned(v),
        mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=groups != 1,
    )
    return out if sees_nothing is None else out.masked_fill(sees_nothing, 0)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy where PyTorch's kernels for GPUs would find rows at odd addresses.

    "cutlassF: no kernel found to launch!" is what they say to rows that are no multiples of 16
    bytes apart. Where a row itself is none, PyTorch takes other ways.
    """
    step = 16 // x.element_size()
    if not x.is_cuda or x.shape[-1] % step:
        return x
    # Dynamo cannot trace the offset; a compiled call has to be given tensors that begin well.
    start = 0 if torch.compiler.is_compiling() else x.storage_offset()
    is_odd = any(n % step for n in (start, *x.stride()[:-1]))
    return x.clone(memory_format=torch.contiguous_format) if is_odd else x
