"""Hugging Face folders as checkpoints: config.json, safetensors files, tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tilewise.fused import LinearScaling, Llama3Scaling, RotaryScaling
from tilewise.model.checkpoint import Checkpoint, Stored
from tilewise.model.config import GPTConfig, ModelError
from tilewise.model.fields import Fields
from tilewise.model.tokenizer import Tokenizer

__all__ = ["open_folder"]

ARCHITECTURES = ("gpt2", "llama", "mixtral", "qwen2", "qwen3")

_LAYER = "model.layers.{i}"
_NAMES: dict[str, tuple[str, ...]] = {
    "embedding": ("model.embed_tokens",),
    "norm": ("model.norm",),
    "head": ("lm_head",),
    "blocks.{i}.attention_norm": (f"{_LAYER}.input_layernorm",),
    "blocks.{i}.attention.qkv": tuple(f"{_LAYER}.self_attn.{x}_proj" for x in "qkv"),
    "blocks.{i}.attention.q_norm": (f"{_LAYER}.self_attn.q_norm",),
    "blocks.{i}.attention.k_norm": (f"{_LAYER}.self_attn.k_norm",),
    "blocks.{i}.attention.out": (f"{_LAYER}.self_attn.o_proj",),
    "blocks.{i}.ffn_norm": (f"{_LAYER}.post_attention_layernorm",),
    "blocks.{i}.ffn.gate_up": (f"{_LAYER}.mlp.gate_proj", f"{_LAYER}.mlp.up_proj"),
    "blocks.{i}.ffn.down": (f"{_LAYER}.mlp.down_proj",),
}
_EXPERT = f"{_LAYER}.block_sparse_moe.experts.{{e}}"
_MIXTRAL_NAMES = _NAMES | {
    "blocks.{i}.ffn.router": (f"{_LAYER}.block_sparse_moe.gate",),
    "blocks.{i}.ffn.gate_up": (f"{_EXPERT}.w1", f"{_EXPERT}.w3"),
    "blocks.{i}.ffn.down": (f"{_EXPERT}.w2",),
}
_GPT2_NAMES: dict[str, tuple[str, ...]] = {
    "embedding": ("wte",),
    "positions": ("wpe",),
    "norm": ("ln_f",),
    "head": ("lm_head",),
    "blocks.{i}.attention_norm": ("h.{i}.ln_1",),
    "blocks.{i}.attention.qkv": ("h.{i}.attn.c_attn",),
    "blocks.{i}.attention.out": ("h.{i}.attn.c_proj",),
    "blocks.{i}.ffn_norm": ("h.{i}.ln_2",),
    "blocks.{i}.ffn.up": ("h.{i}.mlp.c_fc",),
    "blocks.{i}.ffn.down": ("h.{i}.mlp.c_proj",),
}
_TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
"""GPT-2's projections are stored (in, out)."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def open_folder(path: Path) -> Checkpoint:
    """Read a folder with config.json and model.safetensors, or an index of several such files.

    Raises:
        ModelError: if a file is missing or damaged, or the architecture is not supported.
    """
    fields = Fields(_read_json(path / "config.json"))
    architecture = fields.text("model_type")
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"the architecture {architecture!r} is not supported, only {', '.join(ARCHITECTURES)}"
        )
    tensors = _open_tensors(path)
    names = _MIXTRAL_NAMES if architecture == "mixtral" else _NAMES
    unneeded: tuple[str, ...] = ("rotary_emb.inv_freq",)
    if architecture == "gpt2":
        names, unneeded = _GPT2_NAMES, (".attn.bias", ".attn.masked_bias")
        tensors = {key.removeprefix("transformer."): read for key, read in tensors.items()}
    config = _gpt2_config(fields) if architecture == "gpt2" else _config(fields, architecture)
    if config.tied_embeddings:
        unneeded += ("lm_head.weight",)
    tokenizer, chat_template = _open_tokenizer(path, fields)
    return Checkpoint(
        config=config,
        tensors=tensors,
        names=names,
        unneeded=unneeded,
        tokenizer=tokenizer,
        chat_template=chat_template,
    )


def _config(fields: Fields, architecture: str) -> GPTConfig:
    _expect(fields, "hidden_act", "silu")
    if fields.flag("mlp_bias", False):
        raise ModelError("mlp_bias is not supported")
    windowed = fields.flag("use_sliding_window", architecture == "mixtral")
    if windowed and fields.integer("sliding_window", None) is not None:
        raise ModelError("sliding_window is not supported")
    dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    attention_bias = fields.flag("attention_bias", False)
    base, scaling = _rotary(fields)
    return GPTConfig(
        vocab_size=fields.integer("vocab_size"),
        max_positions=fields.integer("max_position_embeddings"),
        layers=fields.integer("num_hidden_layers"),
        dim=dim,
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", dim // max(heads, 1)),
        ffn_dim=fields.integer("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rotary_base=base,
        rotary_scaling=scaling,
        qkv_bias=attention_bias or architecture == "qwen2",
        out_bias=attention_bias,
        qk_norm=architecture == "qwen3",
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        experts=fields.integer("num_local_experts") if architecture == "mixtral" else 0,
        experts_per_token=fields.integer("num_experts_per_tok", 0),
    )


def _gpt2_config(fields: Fields) -> GPTConfig:
    _expect(fields, "activation_function", "gelu_new")
    if fields.flag("scale_attn_by_inverse_layer_idx", False):
        raise ModelError("scale_attn_by_inverse_layer_idx is not supported")
    dim, heads = fields.integer("n_embd"), fields.integer("n_head")
    return GPTConfig(
        vocab_size=fields.integer("vocab_size"),
        max_positions=fields.integer("n_positions"),
        layers=fields.integer("n_layer"),
        dim=dim,
        heads=heads,
        kv_heads=heads,
        head_dim=dim // max(heads, 1),
        ffn_dim=fields.integer("n_inner", 4 * dim),
        norm="layer_norm",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        ffn="gelu",
        positions="learned",
        bias=True,
        tied_embeddings=fields.flag("tie_word_embeddings", True),
    )


def _expect(fields: Fields, key: str, wanted: str) -> None:
    if (got := fields.text(key, wanted)) != wanted:
        raise ModelError(f"{key} {got!r} is not supported, only {wanted!r}")


def _rotary(fields: Fields) -> tuple[float, RotaryScaling | None]:
    """Base and scaling, in today's `rope_parameters` or in `rope_theta` and `rope_scaling`."""
    rope = fields.section(
        "rope_parameters" if "rope_parameters" in fields.values else "rope_scaling"
    )
    base = rope.number("rope_theta", None) or fields.number("rope_theta", 10000.0)
    kind = rope.text("rope_type", None) or rope.text("type", "default")
    if kind == "default":
        return base, None
    if kind == "linear":
        return base, LinearScaling(rope.number("factor"))
    if kind == "llama3":
        return base, Llama3Scaling(
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_positions=rope.integer("original_max_position_embeddings"),
        )
    raise ModelError(f"rotary scaling {kind!r} is not supported, only linear and llama3")


def _open_tensors(path: Path) -> dict[str, Callable[[], Stored]]:
    """A reader for every tensor in the folder."""
    from safetensors import SafetensorError, safe_open

    index = path / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        weight_map = Fields(_read_json(index)).section("weight_map").values
        files = sorted(set(map(str, weight_map.values())))
        # The index names files of this folder, whatever it says.
        if bad := [name for name in files if Path(name).name != name]:
            raise ModelError(f"{index.name}: {bad[0]!r} is not the name of a file")
    readers: dict[str, Callable[[], Stored]] = {}
    for name in files:
        file = path / name
        if not file.is_file():
            raise ModelError(f"{name} is missing")
        try:
            handle = safe_open(file, framework="pt")  # stays open while a reader refers to it
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file.name}: not a safetensors file: {error}") from error
        readers |= {key: partial(_stored, file, handle, key) for key in list(handle.keys())}
    return readers


def _stored(file: Path, handle: Any, key: str) -> Stored:
    from safetensors import SafetensorError

    try:
        data = handle.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file.name}: {key!r}: {error}") from error
    if data.dtype not in _FLOATS or data.dim() == 0:
        raise ModelError(f"{file.name}: {key!r} must be a tensor of floats, got {data.dtype}")
    if key.endswith(_TRANSPOSED):
        data = data.mT.contiguous()
    return Stored(data, data.shape[-1])


def _open_tokenizer(path: Path, config: Fields) -> tuple[Tokenizer | None, str | None]:
    """The tokenizer and the chat template, as far as the folder has them."""
    settings = _read_json(path / "tokenizer_config.json", {})
    generation = _read_json(path / "generation_config.json", {})
    template = settings.get("chat_template")
    if (path / "chat_template.jinja").is_file():
        template = (path / "chat_template.jinja").read_text(encoding="utf-8")
    template = template if isinstance(template, str) else None
    if not (path / "tokenizer.json").is_file():
        return None, template

    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the package raises nothing narrower
        raise ModelError(f"tokenizer.json: not a tokenizer: {error}") from error
    eos = generation.get("eos_token_id", config.values.get("eos_token_id"))
    eos_ids = eos if isinstance(eos, list) else [eos]
    bos = config.values.get("bos_token_id")
    return (
        Tokenizer(
            backend,
            bos_id=bos if isinstance(bos, int) else None,
            eos_ids=[token for token in eos_ids if isinstance(token, int)],
        ),
        template,
    )


def _read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if not path.is_file():
        if default is None:
            raise ModelError(f"{path.name} is missing")
        return default
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path.name}: must hold an object, got {type(values).__name__}")
    return values
