"""A model's numbers from its shape alone: parameters, operations, bytes.

    parameters    attention  dim x (heads + 2 kv_heads) x head_dim + heads x head_dim x dim
                  network    2 or 3 x dim x ffn_dim, for each expert
    operations    2 for each weight that a token is multiplied with (biases, which are few, are
                  counted alike), and in every layer 4 x heads x head_dim for each token that it
                  looks back at
    cache         2 x layers x kv_heads x head_dim numbers for each token

Sources: Brown et al., Language Models are Few-Shot Learners, 2020 (arXiv:2005.14165), table 2.1;
Kaplan et al., Scaling Laws for Neural Language Models, 2020 (arXiv:2001.08361), section 2.1; Hu et
al., LoRA, 2021 (arXiv:2106.09685) for what rank a matrix needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilewise.model.config import PRESETS, GPTConfig

__all__ = ["Card", "LowRank", "card", "gpt3_table", "low_rank"]

WEIGHT_BITS = {
    "float32": 32.0,
    "bfloat16": 16.0,
    "int8": 8 + 16 / 64,
    "int4": 4 + (16 + 8) / 64,
    "Q8_0": 8 * 34 / 32,
    "Q4_K": 8 * 144 / 256,
    "Q4_1": 8 * 20 / 32,
    "Q4_0": 8 * 18 / 32,
}
"""Bits per weight; int8 and int4 in groups of 64 with a float16 scale, int4 with a zero point."""

KV_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "fp8": 8, "int4": 4}
"""Bits per number in a cache; the last three have a float32 scale per token and head besides."""


@dataclass(frozen=True)
class Card:
    """What a decoder of some shape costs; made by `card`.

    Args:
        config: the shape.
        embedding: parameters of the token table.
        positions: of the table of positions, where they are learned.
        attention, ffn: of all layers, biases and the router included.
        norms: of all norms.
        head: of the output head, 0 where it is the token table.
        idle: parameters of the experts that a token does not go through.
    """

    config: GPTConfig
    embedding: int
    positions: int
    attention: int
    ffn: int
    norms: int
    head: int
    idle: int

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(
            (self.embedding, self.positions, self.attention, self.ffn, self.norms, self.head)
        )

    def flops_per_token(self, context: int = 0) -> int:
        """Operations to compute one token that looks back at `context` tokens, itself included."""
        c = self.config
        matrices = self.attention + self.ffn - self.idle + c.vocab_size * c.dim
        return 2 * matrices + 4 * c.layers * c.heads * c.head_dim * context

    def kv_bytes_per_token(self, dtype: str = "float32") -> int:
        """Bytes that a token's keys and values take in the cache, in one of `KV_BITS`."""
        scale = 0 if KV_BITS[dtype] >= 16 else 32
        heads = 2 * self.config.layers * self.config.kv_heads
        return heads * (self.config.head_dim * KV_BITS[dtype] + scale) // 8

    def resident_bytes(self, weight_format: str = "float32") -> int:
        """Bytes of all weights, with the matrices in one of `WEIGHT_BITS`, the norms in float32."""
        matrices = self.parameters - self.norms
        return round(matrices * WEIGHT_BITS[weight_format] / 8) + 4 * self.norms

    def as_dict(self, context: int | None = None) -> dict[str, object]:
        """Everything by name, for JSON; `context` defaults to the model's longest."""
        context = self.config.max_positions if context is None else context
        return {
            "parameters": self.parameters,
            "parameters_by_part": {
                "embedding": self.embedding,
                "positions": self.positions,
                "attention": self.attention,
                "ffn": self.ffn,
                "norms": self.norms,
                "head": self.head,
            },
            "active_parameters": self.parameters - self.idle,
            "flops_per_token": self.flops_per_token(),
            "context": context,
            "flops_per_token_at_context": self.flops_per_token(context),
            "kv_bytes_per_token": {name: self.kv_bytes_per_token(name) for name in KV_BITS},
            "resident_bytes": {name: self.resident_bytes(name) for name in WEIGHT_BITS},
        }


def card(config: GPTConfig) -> Card:
    """Count what a decoder of this shape has and does."""
    c = config
    inner, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    attention = c.dim * (inner + 2 * kv) + inner * c.dim
    attention += (inner + 2 * kv) * (c.bias or c.qkv_bias) + c.dim * (c.bias or c.out_bias)
    wide = c.ffn_dim * (2 if c.ffn == "swiglu" else 1)
    network = c.dim * wide + c.ffn_dim * c.dim
    if c.experts:
        ffn = c.experts * (network + c.dim)
    else:
        ffn = network + (wide + c.dim) * c.bias
    norms = (2 * c.layers + 1) * c.dim * (2 if c.norm == "layer_norm" else 1)
    return Card(
        config=c,
        embedding=c.vocab_size * c.dim,
        positions=c.max_positions * c.dim if c.positions == "learned" else 0,
        attention=c.layers * attention,
        ffn=c.layers * ffn,
        norms=norms + 2 * c.layers * c.head_dim * c.qk_norm,
        head=0 if c.tied_embeddings else c.vocab_size * c.dim,
        idle=c.layers * (c.experts - c.experts_per_token) * network,
    )


def gpt3_table() -> list[dict[str, object]]:
    """The models of GPT-3's table 2.1 with the parameters that their shapes come to."""
    rows: list[dict[str, object]] = []
    for name, config in PRESETS.items():
        if name.startswith("gpt3-"):
            counted = card(config)
            rows.append(
                {
                    "name": name,
                    "layers": config.layers,
                    "dim": config.dim,
                    "heads": config.heads,
                    "head_dim": config.head_dim,
                    "parameters": counted.parameters,
                    "embedding_parameters": counted.embedding,
                    "flops_per_token": counted.flops_per_token(),
                }
            )
    return rows


@dataclass(frozen=True)
class LowRank:
    """A (rows, columns) matrix as the product of a (rows, rank) and a (rank, columns) one.

    Args:
        parameters, full_parameters: of the two factors, and of the matrix.
        saved: the fraction of parameters, and of operations, that the factors save; negative where
            they cost more.
        break_even: the highest rank that still saves something.
    """

    parameters: int
    full_parameters: int
    saved: float
    break_even: int


def low_rank(rows: int, columns: int, rank: int) -> LowRank:
    """What it saves to keep a matrix, or a change to it as in LoRA, as two factors.

    Raises:
        ValueError: for a size below 1, or a rank above what the matrix can have.
    """
    if min(rows, columns) < 1:
        raise ValueError(f"rows, columns: must be >= 1, got {rows} and {columns}")
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"rank: must be in [1, {min(rows, columns)}], got {rank}")
    factors, full = rank * (rows + columns), rows * columns
    return LowRank(factors, full, 1 - factors / full, (full - 1) // (rows + columns))
