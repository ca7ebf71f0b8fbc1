"""The shape of a decoder: what a checkpoint says about itself beside its weights, and presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from tilewise.fused import RotaryScaling

__all__ = ["PRESETS", "GPTConfig", "ModelError"]

_LARGEST = 2**24
"""No dimension of a real decoder comes near; a corrupted file's may, and would exhaust memory."""


class ModelError(ValueError):
    """A file or folder is not a model that can be loaded; the message says why in one line."""


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """A decoder-only transformer of the GPT-2 or the Llama family.

    Args:
        vocab_size: rows of the embedding table.
        max_positions: the longest sequence that the model was made for, in tokens.
        layers: number of blocks.
        dim: width of the residual stream.
        heads, kv_heads, head_dim: query heads, key-value heads (a divisor of `heads`), and the
            width of each.
        ffn_dim: width inside the feed-forward network (inside each expert, with experts).
        norm: the normalisation, with `norm_eps` added to the (mean) square.
        ffn: "swiglu" has a gate, "gelu" (tanh approximation, as in GPT-2) has none.
        positions: rotary embedding of queries and keys, or a learned table.
        rotary_base, rotary_scaling: of the rotary embedding.
        bias: whether every projection has a bias; `qkv_bias` and `out_bias` for attention's alone.
        qk_norm: RMSNorm of every query and key head, as in Qwen3.
        tied_embeddings: whether the output head is the embedding table.
        experts, experts_per_token: a mixture of experts in place of each feed-forward network.

    Raises:
        ValueError: naming the first field that makes no sense.
    """

    vocab_size: int
    max_positions: int
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_eps: float = 1e-5
    ffn: Literal["swiglu", "gelu"] = "swiglu"
    positions: Literal["rotary", "learned"] = "rotary"
    rotary_base: float = 10000.0
    rotary_scaling: RotaryScaling | None = None
    bias: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = True
    experts: int = 0
    experts_per_token: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_positions", "layers", "dim", "heads", "kv_heads"):
            self._within(name, 1, _LARGEST)
        self._within("head_dim", 1, _LARGEST)
        self._within("ffn_dim", 1, _LARGEST)
        self._within("experts", 0, 4096)
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: must divide heads ({self.heads}), got {self.kv_heads}")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"head_dim: must be even with rotary, got {self.head_dim}")
        if self.experts:
            self._within("experts_per_token", 1, self.experts)
        if not 0 <= self.norm_eps < 1:
            raise ValueError(f"norm_eps: must be in [0, 1), got {self.norm_eps}")
        if not 1 <= self.rotary_base < 1e12:
            raise ValueError(f"rotary_base: must be in [1, 1e12), got {self.rotary_base}")

    def _within(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not low <= value <= high:
            raise ValueError(f"{name}: must be in [{low}, {high}], got {value}")

    def replace(self, **changes: object) -> GPTConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def _gpt2(
    layers: int, dim: int, heads: int, *, vocab_size: int = 50257, max_positions: int = 1024
) -> GPTConfig:
    return GPTConfig(
        vocab_size=vocab_size,
        max_positions=max_positions,
        layers=layers,
        dim=dim,
        heads=heads,
        kv_heads=heads,
        head_dim=dim // heads,
        ffn_dim=4 * dim,
        norm="layer_norm",
        ffn="gelu",
        positions="learned",
        bias=True,
    )


def _gpt3(layers: int, dim: int, heads: int) -> GPTConfig:
    return _gpt2(layers, dim, heads, max_positions=2048)


_LLAMA_3 = GPTConfig(
    vocab_size=128256,
    max_positions=8192,
    layers=32,
    dim=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    ffn_dim=14336,
    rotary_base=500000.0,
    tied_embeddings=False,
)

PRESETS: dict[str, GPTConfig] = {
    "smollm2-135m": GPTConfig(
        vocab_size=49152,
        max_positions=8192,
        layers=30,
        dim=576,
        heads=9,
        kv_heads=3,
        head_dim=64,
        ffn_dim=1536,
        rotary_base=100000.0,
    ),
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    # Brown et al. 2020 (arXiv:2005.14165), table 2.1, where heads x head width is the model's
    # width: its rows for 1.3B (24 heads of 128 for 2048) and 13B (width 5140) are not.
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1024, 16),
    "gpt3-760m": _gpt3(24, 1536, 16),
    "gpt3-1.3b": _gpt3(24, 2048, 16),
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),
    "gpt3-175b": _gpt3(96, 12288, 96),
    "llama-3-8b": _LLAMA_3,
    "llama-3-70b": _LLAMA_3.replace(layers=80, dim=8192, heads=64, ffn_dim=28672),
    "qwen2.5-0.5b": GPTConfig(
        vocab_size=151936,
        max_positions=32768,
        layers=24,
        dim=896,
        heads=14,
        kv_heads=2,
        head_dim=64,
        ffn_dim=4864,
        norm_eps=1e-6,
        rotary_base=1e6,
        qkv_bias=True,
    ),
    "mixtral-8x7b": _LLAMA_3.replace(
        vocab_size=32000, max_positions=32768, rotary_base=1e6, experts=8, experts_per_token=2
    ),
}
"""Known models by name, for cards and benchmarks; a checkpoint brings its own configuration."""
