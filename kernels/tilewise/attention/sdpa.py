"""`torch.nn.functional.scaled_dot_product_attention`'s signature on tilewise's attention."""

from __future__ import annotations

from typing import cast

import torch

from tilewise import checks
from tilewise.attention import flash_attention

_NAMES = {"q": "query", "k": "key", "v": "value", "bias": "attn_mask"}


@checks.renamed(_NAMES)
def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`tilewise.flash_attention` for code that calls PyTorch's attention.

    Args:
        query: (batch, heads, seqlen_q, head_dim).
        key: (batch, kv_heads, seqlen_k, head_dim).
        value: (batch, kv_heads, seqlen_k, v_head_dim).
        attn_mask: broadcasts to (batch, heads, seqlen_q, seqlen_k); boolean (True means visible)
            or floating point (added).
        dropout_p: must be 0.
        is_causal: query i sees keys 0 to i, whatever the lengths: PyTorch aligns the mask at the
            top left, `tilewise.flash_attention` at the bottom right. Excludes `attn_mask`.
        scale: of the scores; None means 1 / sqrt(head_dim).
        enable_gqa: allow fewer key heads than query heads.

    Returns:
        (batch, heads, seqlen_q, v_head_dim) in query's dtype.

    Raises:
        ValueError, TypeError: as `tilewise.flash_attention`, and for a positive dropout_p.
    """
    if dropout_p != 0:
        raise ValueError(f"dropout_p: must be 0, dropout is not supported, got {dropout_p}")
    checks.is_bool("is_causal", is_causal)
    checks.is_bool("enable_gqa", enable_gqa)
    for name, x in (("query", query), ("key", key), ("value", value)):
        checks.is_tensor(name, x)
        checks.has_dims(name, x, "batch heads seqlen head_dim")
    if not enable_gqa and key.shape[1] != query.shape[1]:
        raise ValueError(
            f"key: heads must be query's, {query.shape[1]}, without enable_gqa, got {key.shape[1]}"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    window = (-1, -1)
    if is_causal:
        if attn_mask is not None:
            raise ValueError("attn_mask: must be None with is_causal")
        # Seen from the bottom right: keys behind the last query are nobody's, and with fewer keys
        # than queries every query sees as many keys ahead of it as are missing.
        k, v = (x[:, : q.shape[1]] for x in (k, v))
        window = (-1, q.shape[1] - k.shape[1])
    out = flash_attention(q, k, v, scale=scale, window=window, bias=attn_mask)
    return cast(torch.Tensor, out).transpose(1, 2)
