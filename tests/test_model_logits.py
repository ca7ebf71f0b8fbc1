"""The model computes what Hugging Face's models compute from the same weights."""

import gguf
import numpy as np
import pytest
import torch
from model_files import TINY_LLAMA, write_llama_gguf

import tilewise.model
from tilewise.model.gguf_file import read_gguf

transformers = pytest.importorskip("transformers")

TEXT = (
    "The tides are caused by the pull of the Moon, which is stronger on the near side of the "
    "Earth than on the far side.\n\ndef gcd(a, b):\n    while b:\n        a, b = b, a % b\n"
    "    return a\n\nIn 1969, 600 million people watched."
)


def _hugging_face_llama(path, config):
    """transformers' Llama with the weights of a GGUF file, dequantized by the gguf package."""
    tensors = {}
    for name, tensor in read_gguf(path).tensors.items():
        flat = gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType(tensor.type))
        tensors[name] = torch.from_numpy(np.ascontiguousarray(flat)).reshape(tensor.shape)
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    state = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "attn_q" in name or "attn_k" in name:
            # llama.cpp's converter: (heads, 2, head_dim / 2) -> (heads, head_dim / 2, 2)
            half = config.head_dim // 2
            tensor = tensor.reshape(-1, half, 2, tensor.shape[1]).transpose(1, 2).flatten(0, 2)
        prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        state[prefix + names[parts[-2]] + ".weight"] = tensor
    hf_config = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rotary_base,
        rope_parameters={"rope_type": "default", "rope_theta": config.rotary_base},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(hf_config)
    model = model.to_empty(device="cpu")
    fresh = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf_config)
    model.model.rotary_emb = fresh
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing in ([], ["lm_head.weight"])
    assert unexpected == []
    model.tie_weights()
    return model.eval()


@pytest.mark.model
def test_smollm2_logits_are_those_of_transformers():
    path = tilewise.model.find("smollm2")
    lm = tilewise.model.load(path)
    ids = torch.tensor([lm.tokenizer.encode(TEXT)[:64]])
    assert ids.shape == (1, 64)
    with torch.no_grad():
        expected = _hugging_face_llama(path, lm.gpt.config)(ids).logits
        assert (lm.gpt(ids) - expected).abs().max() <= 1e-3


def test_tiny_gguf_logits_are_those_of_transformers(tmp_path):
    path = write_llama_gguf(tmp_path / "tiny.gguf")
    lm = tilewise.model.load(path)
    ids = torch.tensor([lm.tokenizer.encode(TEXT)[:96]])
    with torch.no_grad():
        expected = _hugging_face_llama(path, lm.gpt.config)(ids).logits
        assert (lm.gpt(ids) - expected).abs().max() <= 1e-3


_SHAPE = {
    "vocab_size": 131,
    "hidden_size": TINY_LLAMA["dim"],
    "intermediate_size": TINY_LLAMA["ffn_dim"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # enough for every part to matter
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=131, n_positions=128, n_embd=64, n_layer=2, n_head=4, initializer_range=0.3
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SHAPE)),
    "llama3 rope": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_SHAPE, rope_parameters=_LLAMA3_ROPE, head_dim=32)
    ),
    "linear rope, biases": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_SHAPE, rope_parameters=_LINEAR_ROPE, attention_bias=True)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**_SHAPE, tie_word_embeddings=True)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_SHAPE, head_dim=24)),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_safetensors_logits_are_those_of_transformers(name, tmp_path):
    torch.manual_seed(0)
    theirs = MODELS[name]().eval()
    for key, parameter in theirs.named_parameters():
        if key.endswith("bias") or "norm" in key or "ln_" in key:
            torch.nn.init.normal_(parameter, 1.0 if "weight" in key else 0.0, 0.2)
    # Shards, as large checkpoints have.
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = tilewise.model.load(tmp_path).gpt
    ids = torch.randint(131, (2, 65))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-3)
