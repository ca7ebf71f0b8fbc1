"""The models whose calls are timed."""

from __future__ import annotations

from typing import Any

from tilewise.model.config import PRESETS

SMOLLM2 = PRESETS["smollm2-135m"]
GPT2 = PRESETS["gpt2"]
LLAMA3 = PRESETS["llama-3-8b"]

GRANITE_MOE = {"dim": 1024, "ffn_dim": 512, "count": 32, "top_k": 8}  # Granite 3.0 1B-A400M
OLMOE = {"dim": 2048, "ffn_dim": 1024, "count": 64, "top_k": 8}  # OLMoE 1B-7B

MIXED_LENGTHS = (17, 64, 200, 33, 128, 70)
PER_CHANNEL: dict[str, Any] = {"group_size": -1, "symmetric": True}
"""How int8 weights are quantized where every row of the weight has one scale."""
