"""Small model files for the tests: random weights, real formats."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np


def byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]


TINY_LLAMA = {"dim": 64, "heads": 4, "kv_heads": 2, "ffn_dim": 96, "layers": 2}


def write_llama_gguf(
    path: Path,
    *,
    seed: int = 0,
    quantized: bool = True,
    experts: int = 0,
    merges: int = 4,
    v_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0,
) -> Path:
    """A llama file with a byte-level tokenizer and mixed quantization types.

    `v_type` is the type of the values' projection; those of the queries and keys are Q4_1.
    """
    random = np.random.default_rng(seed)
    c = TINY_LLAMA
    head_dim = c["dim"] // c["heads"]
    alphabet = byte_alphabet()
    pairs = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("hell", "o")][:merges]
    tokens = [*alphabet, *("".join(pair) for pair in pairs), "<|im_start|>", "<|im_end|>"]
    kinds = [1] * (len(tokens) - 2) + [3, 3]

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(c["dim"])
    writer.add_block_count(c["layers"])
    writer.add_feed_forward_length(c["ffn_dim"])
    writer.add_head_count(c["heads"])
    writer.add_head_count_kv(c["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(head_dim)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    types = gguf.GGMLQuantizationType

    def add(name: str, *shape: int, kind: gguf.GGMLQuantizationType = types.F32) -> None:
        weight = random.normal(0, 0.2, shape).astype(np.float32)
        if len(shape) == 1:
            weight += 1
        if kind == types.F32 or not quantized:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), c["dim"], kind=types.Q8_0)
    add("output_norm.weight", c["dim"])
    for i in range(c["layers"]):
        add(f"blk.{i}.attn_norm.weight", c["dim"])
        add(f"blk.{i}.attn_q.weight", c["dim"], c["dim"], kind=types.Q4_1)
        add(f"blk.{i}.attn_k.weight", c["kv_heads"] * head_dim, c["dim"], kind=types.Q4_1)
        add(f"blk.{i}.attn_v.weight", c["kv_heads"] * head_dim, c["dim"], kind=v_type)
        add(f"blk.{i}.attn_output.weight", c["dim"], c["dim"], kind=types.Q4_0)
        add(f"blk.{i}.ffn_norm.weight", c["dim"])
        wide, narrow = (c["ffn_dim"], c["dim"]), (c["dim"], c["ffn_dim"])
        if experts:
            add(f"blk.{i}.ffn_gate_inp.weight", experts, c["dim"])
            add(f"blk.{i}.ffn_gate_exps.weight", experts, *wide, kind=types.Q8_0)
            add(f"blk.{i}.ffn_up_exps.weight", experts, *wide, kind=types.Q8_0)
            add(f"blk.{i}.ffn_down_exps.weight", experts, *narrow, kind=types.Q8_0)
        else:
            add(f"blk.{i}.ffn_gate.weight", *wide, kind=types.Q4_1)
            add(f"blk.{i}.ffn_up.weight", *wide, kind=types.Q4_1)
            add(f"blk.{i}.ffn_down.weight", *narrow, kind=types.Q5_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tokenizer_json(path: Path) -> Path:
    """A tokenizer.json with one token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(byte_alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path.write_text(json.dumps(json.loads(tokenizer.to_str())), encoding="utf-8")
    return path
