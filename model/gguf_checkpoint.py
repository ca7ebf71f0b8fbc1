"""GGUF files as checkpoints: llama.cpp's names, and what its converter does to the weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tilewise.fused import LinearScaling, Llama3Scaling, RotaryScaling
from tilewise.model.checkpoint import Checkpoint, Stored
from tilewise.model.config import GPTConfig, ModelError
from tilewise.model.fields import Fields
from tilewise.model.gguf_file import GGUFTensor, read_gguf
from tilewise.model.tokenizer import tokenizer_from_gguf

__all__ = ["open_gguf"]

ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3")

_NAMES: dict[str, tuple[str, ...]] = {
    "embedding": ("token_embd",),
    "positions": ("position_embd",),
    "norm": ("output_norm",),
    "head": ("output",),
    "blocks.{i}.attention_norm": ("blk.{i}.attn_norm",),
    "blocks.{i}.attention.qkv": ("blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v"),
    "blocks.{i}.attention.q_norm": ("blk.{i}.attn_q_norm",),
    "blocks.{i}.attention.k_norm": ("blk.{i}.attn_k_norm",),
    "blocks.{i}.attention.out": ("blk.{i}.attn_output",),
    "blocks.{i}.ffn_norm": ("blk.{i}.ffn_norm",),
    "blocks.{i}.ffn.gate_up": ("blk.{i}.ffn_gate", "blk.{i}.ffn_up"),
    "blocks.{i}.ffn.up": ("blk.{i}.ffn_up",),
    "blocks.{i}.ffn.down": ("blk.{i}.ffn_down",),
}
_GPT2_NAMES = _NAMES | {"blocks.{i}.attention.qkv": ("blk.{i}.attn_qkv",)}
_EXPERT_NAMES = _NAMES | {
    "blocks.{i}.ffn.router": ("blk.{i}.ffn_gate_inp",),
    "blocks.{i}.ffn.gate_up": ("blk.{i}.ffn_gate_exps", "blk.{i}.ffn_up_exps"),
    "blocks.{i}.ffn.down": ("blk.{i}.ffn_down_exps",),
}

_FLOATS = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
"""The ggml types that are not quantized."""


def open_gguf(path: Path) -> Checkpoint:
    """Read a GGUF file.

    Raises:
        ModelError: if it is no GGUF file, damaged, or of an architecture that is not supported.
    """
    file = read_gguf(path)
    fields = Fields(file.metadata)
    architecture = fields.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"the architecture {architecture!r} is not supported, only {', '.join(ARCHITECTURES)}"
        )
    if fields.integer("split.count", 1) > 1:
        raise ModelError("one part of a split file; merge the parts first")
    has_tokenizer = fields.text("tokenizer.ggml.model", "none") not in ("none", "no_vocab")
    config = _config(fields, architecture, file.tensors)
    tensors: dict[str, Callable[[], Stored]] = {
        name: partial(_stored, tensor) for name, tensor in file.tensors.items()
    }
    if architecture == "llama":
        tensors |= _half_split(file.tensors, config)
    names = _GPT2_NAMES if architecture == "gpt2" else _NAMES
    return Checkpoint(
        config=config,
        tensors=tensors,
        names=_EXPERT_NAMES if config.experts else names,
        unneeded=("rope_freqs.weight",),
        tokenizer=tokenizer_from_gguf(file.metadata) if has_tokenizer else None,
        chat_template=fields.text("tokenizer.chat_template", None),
    )


def _stored(tensor: GGUFTensor) -> Stored:
    data = torch.from_numpy(tensor.data)
    if tensor.type in _FLOATS:
        return Stored(data.view(_FLOATS[tensor.type]), tensor.shape[-1])
    return Stored(data, tensor.shape[-1], tensor.type)


def _half_split(
    tensors: Mapping[str, GGUFTensor], config: GPTConfig
) -> dict[str, Callable[[], Stored]]:
    """The q and k projections of a `llama` file in the order of rows that other files have.

    The converter reorders their rows so that rotary embedding turns elements 2i and 2i + 1 of a
    head where the original weights, and all other architectures, turn i and i + head_dim / 2. A row
    of a matrix, quantized or not, is a run of bytes, so they can be put back without loss.
    """

    def put_back(name: str, heads: int) -> Stored:
        def rows(data: torch.Tensor) -> torch.Tensor:
            if data.shape[0] != heads * config.head_dim:
                return data  # refused when the model is built
            pairs = data.unflatten(0, (heads, config.head_dim // 2, 2))
            return pairs.transpose(1, 2).flatten(0, 2).contiguous()

        return _stored(tensors[name]).map(rows)

    readers: dict[str, Callable[[], Stored]] = {}
    for projection, heads in (("attn_q", config.heads), ("attn_k", config.kv_heads)):
        for name in tensors:
            if re.fullmatch(rf"blk\.\d+\.{projection}\.(weight|bias)", name):
                readers[name] = partial(put_back, name, heads)
    return readers


def _config(fields: Fields, architecture: str, tensors: Mapping[str, GGUFTensor]) -> GPTConfig:
    def integer(key: str, *default: Any) -> Any:
        return fields.integer(f"{architecture}.{key}", *default)

    def number(key: str, *default: Any) -> Any:
        return fields.number(f"{architecture}.{key}", *default)

    if "token_embd.weight" not in tensors:
        raise ModelError("the tensor 'token_embd.weight' is missing")
    dim, heads = integer("embedding_length"), integer("attention.head_count")
    if heads < 1:
        raise ModelError(f"{architecture}.attention.head_count is {heads}")
    head_dim = integer("attention.key_length", dim // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if integer(key, head_dim) != head_dim:
            raise ModelError(
                f"{architecture}.{key} must be the head width, {head_dim}, got {integer(key)}"
            )
    shape = {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "max_positions": integer("context_length"),
        "layers": integer("block_count"),
        "dim": dim,
        "heads": heads,
        "kv_heads": integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "ffn_dim": integer("feed_forward_length"),
        "tied_embeddings": "output.weight" not in tensors,
    }
    if architecture == "gpt2":
        return GPTConfig(
            **shape,
            norm="layer_norm",
            norm_eps=number("attention.layer_norm_epsilon"),
            ffn="gelu",
            positions="learned",
            bias=True,
        )
    base = number("rope.freq_base", 10000.0)
    return GPTConfig(
        **shape,
        norm_eps=number("attention.layer_norm_rms_epsilon"),
        rotary_base=base,
        rotary_scaling=_rotary_scaling(fields, architecture, tensors, head_dim),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        experts=integer("expert_count", 0),
        experts_per_token=integer("expert_used_count", 0),
    )


def _rotary_scaling(
    fields: Fields, architecture: str, tensors: Mapping[str, GGUFTensor], head_dim: int
) -> RotaryScaling | None:
    """How the rotary frequencies are stretched.

    Llama 3.1 files have, in place of the four numbers of its rule, the divisor of every frequency.
    The largest is the rule's factor; the other numbers have been the same in every release.
    """
    kind = fields.text(f"{architecture}.rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors:
        stored = _stored(tensors["rope_freqs.weight"])
        if stored.ggml_type is not None or stored.shape != (head_dim // 2,):
            raise ModelError(
                f"rope_freqs.weight must be {head_dim // 2} floats, got shape {stored.shape}"
            )
        factors = stored.data.double()
        scaling = Llama3Scaling(factor=max(float(factors.max()), 1.0))
        base = fields.number(f"{architecture}.rope.freq_base", 10000.0)
        frequencies = base ** (-torch.arange(len(factors)).double() / len(factors))
        if not torch.allclose(frequencies / scaling.scale(frequencies), factors, rtol=1e-3):
            raise ModelError("rope_freqs.weight does not follow Llama 3's rule")
        return scaling
    if kind == "linear":
        return LinearScaling(fields.number(f"{architecture}.rope.scaling.factor"))
    if kind != "none":
        raise ModelError(f"rotary scaling {kind!r} is not supported, only linear")
    return None
