"""Hugging Face transformers: attention of any model that takes an attention implementation.

    from tilewise.integrations import transformers as tilewise_for_transformers

    tilewise_for_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="tilewise")

transformers keeps a table of attention functions by name, and a second one of functions that make
each one's masks. Nothing of transformers is replaced.
"""

from __future__ import annotations

from typing import Any

import torch

from tilewise import checks
from tilewise.attention import flash_attention

_NAMES = {
    "q": "query",
    "k": "key",
    "v": "value",
    "bias": "attention_mask",
    "scale": "scaling",
    "causal": "is_causal",
    "sinks": "s_aux",
}


def register(name: str = "tilewise") -> None:
    """Offer `flash_attention` to transformers as the attention implementation `name`.

    Raises:
        ImportError: if transformers is missing or older than 4.53, where the tables came.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            "tilewise.integrations.transformers needs transformers >= 4.53"
        ) from error
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)  # boolean, True where a key is seen


@checks.renamed(_NAMES)
def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """`flash_attention` behind transformers' attention signature.

    Args:
        module: the attention layer; its `is_causal` decides where there is no mask.
        query: (batch, heads, seq, head_dim).
        key, value: (batch, kv_heads, seq, head_dim).
        attention_mask: boolean or additive, broadcasts to (batch, heads, seq_q, seq_k).
        dropout: must be 0.
        scaling: of the scores; None means 1/sqrt(head_dim).
        is_causal: overrides the module's.
        softcap: bound of the scores (Gemma 2).
        s_aux: (heads,) sinks (gpt-oss).
        unused: what transformers passes to every implementation; sliding windows come as masks.

    Returns:
        The output, (batch, seq, heads, head_dim), and no attention weights.

    Raises:
        ValueError, TypeError: as `tilewise.flash_attention`, and for dropout.
    """
    if dropout:
        raise ValueError(f"dropout: must be 0, got {dropout}; train with attention_dropout=0")
    for name, x in (("query", query), ("key", key), ("value", value)):
        checks.is_tensor(name, x)
        checks.has_dims(name, x, "batch heads seq head_dim")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    checks.is_bool("is_causal", is_causal)
    out = flash_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        causal=is_causal and attention_mask is None,
        scale=scaling,
        softcap=softcap or 0.0,
        sinks=s_aux,
        bias=attention_mask,
    )
    assert isinstance(out, torch.Tensor)  # without return_lse there is one result
    return out, None
