"""tilewise: attention, quantized matmul and a paged KV cache beside the PyTorch that defines them.

The public names are here; `tilewise.model` (the reference GPT), `tilewise.testing` (the agreement
rule) and `tilewise.integrations` are imported by name.
"""

from tilewise.attention import flash_attention, flash_attention_varlen, merge_states
from tilewise.attention.flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from tilewise.attention.sdpa import scaled_dot_product_attention
from tilewise.dispatch import (
    BACKENDS,
    BackendError,
    Explanation,
    explain,
    use_backend,
)
from tilewise.fused import (
    LinearScaling,
    Llama3Scaling,
    RotaryTables,
    geglu,
    layer_norm,
    rms_norm,
    rotary_embedding,
    rotary_tables,
    sample,
    swiglu,
)
from tilewise.moe import moe, router_logits
from tilewise.paged import OutOfPages, PagedKVCache, append_kv, paged_attention
from tilewise.quant import (
    QuantizedTensor,
    QuantLinear,
    quantize,
    quantize_,
    quantized_embedding,
    quantized_matmul,
)

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "BackendError",
    "Explanation",
    "LinearScaling",
    "Llama3Scaling",
    "OutOfPages",
    "PagedKVCache",
    "QuantLinear",
    "QuantizedTensor",
    "RotaryTables",
    "append_kv",
    "explain",
    "flash_attention",
    "flash_attention_varlen",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "geglu",
    "layer_norm",
    "merge_states",
    "moe",
    "paged_attention",
    "quantize",
    "quantize_",
    "quantized_embedding",
    "quantized_matmul",
    "rms_norm",
    "rotary_embedding",
    "rotary_tables",
    "router_logits",
    "sample",
    "scaled_dot_product_attention",
    "swiglu",
    "use_backend",
]
