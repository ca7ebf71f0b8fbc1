"""One decoder for the GPT-2 and the Llama families, on tilewise's operations alone.

A block is norm -> attention -> norm -> feed-forward around a residual stream. What a sublayer found
is not added to the stream at once but handed on as `delta`, since the next norm adds it while it
reads both anyway.

The same weights run in two ways: over whole sequences with `flash_attention`, and, given a
`PagedBatch`, over the newest tokens of many sequences whose keys and values are in a paged cache.

Sources: Vaswani et al. 2017 (arXiv:1706.03762); Radford et al., GPT-2, 2019; Touvron et al., LLaMA,
2023 (arXiv:2302.13971); Ainslie et al., GQA, 2023 (arXiv:2305.13245).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tilewise import checks
from tilewise.attention import flash_attention
from tilewise.fused import RotaryTables, rotary_embedding, rotary_tables, swiglu
from tilewise.model.config import GPTConfig
from tilewise.model.layers import (
    Experts,
    HeadNorm,
    Norm,
    QuantEmbedding,
    TiedHead,
    linear,
    project_heads,
    project_parts,
)
from tilewise.paged import PagedKVCache, append_kv, paged_attention
from tilewise.quant import QuantLinear

__all__ = ["GPT", "PagedBatch"]


@dataclass(frozen=True)
class PagedBatch:
    """Where the tokens of one step stand in their sequences and in the cache.

    Args:
        cache: holds every sequence's keys and values.
        positions: (tokens,) int64, each token's place in its sequence.
        slot_mapping: (tokens,) int64, where the cache keeps its key and value.
        block_table: (batch, pages) int32.
        cache_seqlens: (batch,) int32, lengths with these tokens.
        cu_seqlens_q: (batch + 1,) int32, or None where every sequence has one new token.
        last: (batch,) int64, the last new token of each sequence: the one that is continued.
        length: the longest sequence.
    """

    cache: PagedKVCache
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    last: torch.Tensor
    length: int

    @classmethod
    def append(
        cls, cache: PagedKVCache, sequences: Sequence[int], counts: Sequence[int]
    ) -> PagedBatch:
        """Make room in the cache for the next `counts[i]` tokens of each of `sequences`."""
        sequences, counts = list(sequences), list(counts)
        slot_mapping = cache.append(sequences, counts)
        # In NumPy, where an operation on a few integers takes a fifth of the time.
        lengths = [cache.allocator.length(sequence) for sequence in sequences]
        ends = np.cumsum([0, *counts])
        positions = [np.arange(n - new, n) for n, new in zip(lengths, counts, strict=True)]

        def on_device(numbers: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(numbers).to(cache.device)

        return cls(
            cache=cache,
            positions=on_device(np.concatenate(positions)),
            slot_mapping=slot_mapping,
            block_table=cache.block_table(sequences),
            cache_seqlens=cache.seqlens(sequences),
            cu_seqlens_q=on_device(ends.astype(np.int32)) if max(counts) > 1 else None,
            last=on_device(ends[1:] - 1),
            length=max(lengths),
        )


class Attention(nn.Module):
    """Causal self-attention with grouped key-value heads."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads = [config.heads, config.kv_heads, config.kv_heads]
        inner = config.heads * config.head_dim
        bias = config.bias or config.qkv_bias
        self.qkv = nn.Linear(config.dim, sum(self.heads) * config.head_dim, bias=bias)
        self.out = nn.Linear(inner, config.dim, bias=config.bias or config.out_bias)
        self.has_head_norms = config.qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = HeadNorm(config), HeadNorm(config)

    def forward(
        self,
        x: torch.Tensor,  # (batch, seq, dim), or (tokens, dim) with paged
        positions: torch.Tensor,  # x's shape without dim
        rotary: RotaryTables | None,
        paged: PagedBatch | None,
        last: torch.Tensor | None,  # the tokens whose output is wanted; None for all
    ) -> torch.Tensor:
        q, k, v = project_heads(self.qkv, x, self.heads, self.head_dim)
        asking = positions
        if last is not None:
            q, asking = q[last], positions[last]
        if self.has_head_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q = rotary_embedding(q, rotary, asking)
        if paged is None:
            if rotary is not None:
                k = rotary_embedding(k, rotary, positions)
            out = flash_attention(q, k, v, causal=True)
        else:
            cache = paged.cache.layer(self.layer)
            append_kv(
                k,
                v,
                cache.k,
                cache.v,
                paged.slot_mapping,
                rotary=rotary,
                positions=positions if rotary is not None else None,
                k_scale=cache.k_scale,
                v_scale=cache.v_scale,
            )
            out = paged_attention(
                q,
                cache.k,
                cache.v,
                paged.block_table,
                paged.cache_seqlens,
                cu_seqlens_q=paged.cu_seqlens_q if last is None else None,
                k_scale=cache.k_scale,
                v_scale=cache.v_scale,
                causal=True,
            )
        return self.out(cast(torch.Tensor, out).flatten(-2))


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), or GPT-2's down(gelu(up(x)))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gated, self.ffn_dim = config.ffn == "swiglu", config.ffn_dim
        if self.gated:
            self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=config.bias)
        else:
            self.up = nn.Linear(config.dim, config.ffn_dim, bias=config.bias)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gated and isinstance(self.gate_up, QuantLinear):
            return self.down(self.gate_up.project(x, activation="swiglu"))
        if self.gated:
            return self.down(swiglu(*project_parts(self.gate_up, x, [self.ffn_dim] * 2)))
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """One layer: attention, then the feed-forward network, each behind a norm.

    All new tokens enter the cache; with `last`, the last of each sequence, only these go on.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = Norm(config)
        self.attention = Attention(config, layer)
        self.ffn_norm = Norm(config)
        self.ffn = Experts(config) if config.experts else FeedForward(config)

    def forward(
        self,
        delta: torch.Tensor,
        stream: torch.Tensor | None,
        positions: torch.Tensor,
        rotary: RotaryTables | None,
        paged: PagedBatch | None,
        last: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, stream = self.attention_norm(delta, stream)
        attended = self.attention(x, positions, rotary, paged, last)
        if last is not None:
            stream = stream[last]
        x, stream = self.ffn_norm(attended, stream)
        return self.ffn(x), stream


def _table(rows: int, dim: int) -> nn.Embedding:
    # Not the constructor, whose random start is thrown away and takes seconds on the meta device.
    return nn.Embedding.from_pretrained(torch.empty(rows, dim), freeze=False)


class GPT(nn.Module):
    """A decoder-only language model.

    Args:
        config: its shape. The weights start random; `tilewise.model.load` fills in real ones.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = _table(config.vocab_size, config.dim)
        if config.positions == "learned":
            self.positions = _table(config.max_positions, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = Norm(config)
        if config.tied_embeddings:
            self.tie_head()
        else:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self._rotary: RotaryTables | None = None
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                break
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def tie_head(self) -> None:
        """Make the embedding table the output head too."""
        if isinstance(self.embedding, QuantEmbedding):
            self.head: nn.Module = TiedHead(self.embedding)
        else:
            self.head = linear([self.embedding.weight])

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed and handed on in."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.norm.weight.device

    def forward(self, token_ids: torch.Tensor, paged: PagedBatch | None = None) -> torch.Tensor:
        """Score every possible next token.

        Args:
            token_ids: (batch, seq) int64, whole sequences; with `paged` (tokens,), the new tokens
                of each of its sequences, one sequence after the other.
            paged: where those tokens stand; their keys and values are written to its cache.

        Returns:
            Logits (batch, seq, vocab_size); with `paged` (batch, vocab_size), after the last token
            of each sequence. They are float32 (float64 in such a model) where the output head is
            quantized, otherwise in the model's dtype.

        Raises:
            ValueError: for a sequence longer than the model's `max_positions`.
        """
        checks.has_dtype("token_ids", token_ids, (torch.int64,))
        checks.has_dims("token_ids", token_ids, "batch seq" if paged is None else "tokens")
        length = token_ids.shape[-1] if paged is None else paged.length
        if length > self.config.max_positions:
            raise ValueError(
                f"token_ids: a sequence may have {self.config.max_positions} tokens, got {length}"
            )
        if paged is None:
            positions = torch.arange(length, device=token_ids.device).expand(token_ids.shape)
        else:
            positions = paged.positions

        if isinstance(self.embedding, QuantEmbedding):
            delta = self.embedding(token_ids, self.dtype)
        else:
            delta = self.embedding(token_ids).to(self.dtype)
        stream = rotary = None
        if self.config.positions == "learned":
            delta = delta + self.positions(positions).to(self.dtype)
        else:
            rotary = self._rotary_tables(length, token_ids.device)
        has_prompts = paged is not None and paged.cu_seqlens_q is not None
        for block in self.blocks:
            last = paged.last if has_prompts and block is self.blocks[-1] else None
            delta, stream = block(delta, stream, positions, rotary, paged, last)
        x, _ = self.norm(delta, stream)
        if type(self.head) is QuantLinear:  # a subclass may have a `forward` of its own
            return self.head(x, out_dtype=torch.float32)
        return self.head(x)

    def _rotary_tables(self, length: int, device: torch.device) -> RotaryTables:
        """Tables for at least `length` positions: long contexts cost memory only when used."""
        tables = self._rotary
        if tables is None or len(tables.cos) < length or tables.cos.device != device:
            config = self.config
            with torch.inference_mode(False):  # the tables may outlive it
                self._rotary = tables = rotary_tables(
                    config.head_dim,
                    min(config.max_positions, max(2048, 1 << (length - 1).bit_length())),
                    base=config.rotary_base,
                    scaling=config.rotary_scaling,
                    device=device,
                )
        return tables
