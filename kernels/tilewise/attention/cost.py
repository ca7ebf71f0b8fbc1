"""The work that attention calls cannot avoid: hidden pairs of query and key are not counted."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from tilewise.dispatch import Cost


def visible_pairs(
    q_len: int, k_len: int, *, causal: bool = False, window: tuple[int, int] = (-1, -1)
) -> int:
    """How many pairs of a query and a key the causal mask and the window leave."""
    left, right = window
    if causal:
        right = 0
    # Query i is level with key i + shift, and sees keys [i + shift - left, i + shift + right].
    shift = k_len - q_len
    past_last = q_len * k_len if right < 0 else _clamped_sum(shift + right + 1, q_len, k_len)
    first = 0 if left < 0 else _clamped_sum(shift - left, q_len, k_len)
    return past_last - first


def _clamped_sum(start: int, count: int, limit: int) -> int:
    """The sum of min(max(x, 0), limit) over x = start .. start + count - 1."""

    def below(x: int) -> int:  # the same sum over all integers less than x
        inside = min(max(x, 0), limit)
        return inside * (inside - 1) // 2 + max(x - limit, 0) * limit

    return below(start + count) - below(start)


def cost_flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Cost:
    """Two products per visible pair; q, k, v, the bias and the results move once."""
    pairs = q.shape[0] * visible_pairs(q.shape[1], k.shape[1], **_mask(options))
    return _cost(pairs, q, k, v, options)


def cost_flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    **options: Any,
) -> Cost:
    """As `cost_flash_attention`, per sequence; reads the lengths."""
    lengths = zip(
        (end - start for start, end in pairwise(cu_seqlens_q.tolist())),
        (end - start for start, end in pairwise(cu_seqlens_k.tolist())),
        strict=True,
    )
    pairs = sum(visible_pairs(q_len, k_len, **_mask(options)) for q_len, k_len in lengths)
    return _cost(pairs, q, k, v, options)


def cost_merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> Cost:
    """Three floating-point operations per element of the output."""
    nbytes = 3 * (out_a.nbytes + lse_a.nbytes)
    return Cost(3 * out_a.numel(), nbytes, torch.float32)


def _mask(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("causal", "window") if name in options}


def _cost(
    pairs: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
) -> Cost:
    heads, dims = q.shape[-2], q.shape[-1] + v.shape[-1]
    rows = q.numel() // q.shape[-1]
    nbytes = q.nbytes + k.nbytes + v.nbytes + rows * v.shape[-1] * q.itemsize
    bias = options.get("bias")
    if bias is not None:
        nbytes += bias.nbytes
    if options.get("return_lse"):
        nbytes += rows * 4
    return Cost(2.0 * pairs * heads * dims, nbytes, q.dtype)
