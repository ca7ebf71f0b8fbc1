"""What is timed: calls with the shapes that real models make.

Prefill is bound by arithmetic and decoding by memory, and the models differ in what they share:
SmolLM2-135M and Llama-3-8B have grouped queries (3 and 4 per key head), GPT-2 has none. The CPU
table is sized so that two slow cores finish in a minute; the GPU table has the full sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

import tilewise
from tilewise import native
from tilewise.model.config import PRESETS, GPTConfig
from tilewise.testing import Inputs, Make

SMOLLM2 = PRESETS["smollm2-135m"]
GPT2 = PRESETS["gpt2"]
LLAMA3 = PRESETS["llama-3-8b"]


class Part(NamedTuple):
    """Some of a call's results, and the smaller call that defines them.

    Args:
        reduce: from the call's arguments to the smaller call's.
        pick: from a result of the call to that of the smaller one.
    """

    reduce: Callable[[dict[str, Any]], dict[str, Any]]
    pick: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Workload:
    """A call to time.

    Args:
        op: the operation.
        name: the model, the phase and the sizes; unique within an operation, dtype and device.
        make: builds the keyword arguments of the public function.
        dtype: of its floating-point tensors.
        device: "cpu" or "cuda".
        part: what to check where the definition is too large to compute in float64.
        without: backends that are not measured here, and why.
        results: names the results for the check, as in `tilewise.testing.Case`; None where they
            are what the call returns.
    """

    op: str
    name: str
    make: Make
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    part: Part | None = None
    without: Mapping[str, str] = field(default_factory=dict)
    results: Callable[[dict[str, Any], Any], dict[str, torch.Tensor]] | None = None

    @property
    def id(self) -> str:
        """Unique among all workloads."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {self.name} {dtype} {self.device}"


# --- attention ------------------------------------------------------------------------------------


def _heads(inputs: Inputs, model: GPTConfig, *lead: int) -> tuple[Any, Any, Any]:
    """Query, key and value of one shape but for the number of heads."""
    q = inputs.randn(*lead, model.heads, model.head_dim)
    k, v = (inputs.randn(*lead, model.kv_heads, model.head_dim) for _ in range(2))
    return q, k, v


def prefill(model: GPTConfig, tokens: int, *, batch: int = 1, **options: Any) -> Make:
    """Causal attention of a prompt over itself."""

    def make(inputs: Inputs) -> dict[str, Any]:
        q, k, v = _heads(inputs, model, batch, tokens)
        return {"q": q, "k": k, "v": v, "causal": True, **options}

    return make


def decode(model: GPTConfig, context: int, *, batch: int = 1) -> Make:
    """Attention of one new token per sequence over a contiguous cache."""

    def make(inputs: Inputs) -> dict[str, Any]:
        q = inputs.randn(batch, 1, model.heads, model.head_dim)
        k, v = (inputs.randn(batch, context, model.kv_heads, model.head_dim) for _ in range(2))
        return {"q": q, "k": k, "v": v, "causal": True}

    return make


def ragged_prefill(model: GPTConfig, lengths: tuple[int, ...]) -> Make:
    """Causal attention of prompts of different lengths, packed without padding."""

    def make(inputs: Inputs) -> dict[str, Any]:
        q, k, v = _heads(inputs, model, sum(lengths))
        ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        cu_seqlens = inputs.tensor(ends, torch.int32)
        return {
            "q": q,
            "k": k,
            "v": v,
            "cu_seqlens_q": cu_seqlens,
            "cu_seqlens_k": cu_seqlens,
            "max_seqlen_q": max(lengths),
            "max_seqlen_k": max(lengths),
            "causal": True,
        }

    return make


def merge(model: GPTConfig, tokens: int) -> Make:
    """Two halves of a context, attended to apart, put together."""

    def make(inputs: Inputs) -> dict[str, Any]:
        shape = (tokens, model.heads)
        out_a, out_b = (inputs.randn(*shape, model.head_dim) for _ in range(2))
        lse_a, lse_b = (inputs.randn(*shape, dtype=torch.float32) for _ in range(2))
        return {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}

    return make


def last_queries(count: int) -> Part:
    """The last queries of a causal call: it is level with the keys at its end."""
    return Part(
        lambda arguments: arguments | {"q": arguments["q"][:1, -count:]} | _first(arguments, "kv"),
        lambda result: result[:1, -count:],
    )


def _first(arguments: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: arguments[name][:1] for name in names}


# --- the paged cache ------------------------------------------------------------------------------


def _cache(
    inputs: Inputs, model: GPTConfig, batch: int, context: int, page_size: int, kv_format: str
) -> dict[str, Any]:
    """A cache of full sequences whose pages lie in random order."""
    pages = -(-context // page_size)
    shape = (batch * pages, page_size, model.kv_heads)
    cache: dict[str, Any] = {}
    for name in "kv":
        if kv_format == "int8":
            codes = inputs.randint(-127, 128, *shape, model.head_dim, dtype=torch.int8)
            cache[f"{name}_cache"] = codes
            cache[f"{name}_scale"] = inputs.rand(*shape, dtype=torch.float32) / 64
        else:
            cache[f"{name}_cache"] = inputs.randn(*shape, model.head_dim)
    order = inputs.permutation(batch * pages, dtype=torch.int32)
    cache["block_table"] = order.reshape(batch, pages)
    cache["cache_seqlens"] = inputs.tensor([context] * batch, torch.int32)
    return cache


def paged_decode(
    model: GPTConfig, context: int, *, batch: int = 1, page_size: int = 16, kv_format: str = "float"
) -> Make:
    """One new token per sequence over pages in random order."""

    def make(inputs: Inputs) -> dict[str, Any]:
        q = inputs.randn(batch, model.heads, model.head_dim)
        cache = _cache(inputs, model, batch, context, page_size, kv_format)
        return {"q": q, **cache, "causal": True}

    return make


def paged_prefill(model: GPTConfig, chunk: int, context: int, *, page_size: int = 16) -> Make:
    """A chunk of a prompt over its pages, the chunk's own among them."""

    def make(inputs: Inputs) -> dict[str, Any]:
        q = inputs.randn(chunk, model.heads, model.head_dim)
        cu_seqlens_q = inputs.tensor([0, chunk], torch.int32)
        cache = _cache(inputs, model, 1, context, page_size, "float")
        return {"q": q, **cache, "cu_seqlens_q": cu_seqlens_q, "causal": True}

    return make


def append(model: GPTConfig, tokens: int, *, page_size: int = 16) -> Make:
    """New keys and values into their pages, the keys rotated on the way."""

    def make(inputs: Inputs) -> dict[str, Any]:
        k, v = (inputs.randn(tokens, model.kv_heads, model.head_dim) for _ in range(2))
        pages = -(-tokens // page_size)
        slots = inputs.permutation(pages * page_size)[:tokens]
        caches = (inputs.randn(pages, page_size, *k.shape[1:]) for _ in range(2))
        k_cache, v_cache = caches
        return {
            "k": k,
            "v": v,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "slot_mapping": slots,
            "rotary": _rotary_tables(model, tokens, inputs),
            "positions": inputs.permutation(tokens),
        }

    return make


def _caches(arguments: dict[str, Any], returned: None) -> dict[str, torch.Tensor]:
    return {name: arguments[name] for name in ("k_cache", "v_cache")}


# --- matrix multiplications -----------------------------------------------------------------------


def quantized(tokens: int, width: int, outputs: int, scheme: str, **options: Any) -> Make:
    """Activations times quantized weights."""

    def make(inputs: Inputs) -> dict[str, Any]:
        weight = inputs.randn(outputs, width, scale=width**-0.5, dtype=torch.float32)
        packed = tilewise.quantize(weight, scheme, search="minmax", **options)
        return {"x": inputs.randn(tokens, width), "weight": packed}

    return make


def first_rows(count: int) -> Part:
    """The first rows of x: every row of a product is on its own."""
    return Part(
        lambda arguments: arguments | {"x": arguments["x"][:count]}, lambda result: result[:count]
    )


def every_output(step: int) -> Part:
    """One in `step` of the outputs, each of which is the product with one row of the weight."""

    def reduce(arguments: dict[str, Any]) -> dict[str, Any]:
        weight = arguments["weight"]
        some = replace(
            weight,
            shape=(-(-weight.shape[0] // step), weight.shape[1]),
            data=weight.data[::step],
            scales=weight.scales[::step],
            zeros=None if weight.zeros is None else weight.zeros[::step],
        )
        return arguments | {"weight": some}

    return Part(reduce, lambda result: result[..., ::step])


def experts(tokens: int, *, dim: int, ffn_dim: int, count: int, top_k: int) -> Make:
    """A mixture-of-experts layer."""

    def make(inputs: Inputs) -> dict[str, Any]:
        return {
            "x": inputs.randn(tokens, dim),
            "router_logits": inputs.randn(tokens, count),
            "w_gate_up": inputs.randn(count, 2 * ffn_dim, dim, scale=dim**-0.5),
            "w_down": inputs.randn(count, dim, ffn_dim, scale=ffn_dim**-0.5),
            "top_k": top_k,
        }

    return make


# --- fused small operations -----------------------------------------------------------------------


def norm(*shape: int, bias: bool = False, residual: bool = False) -> Make:
    """A norm, with the residual's addition where the model has one before it."""

    def make(inputs: Inputs) -> dict[str, Any]:
        arguments = {"x": inputs.randn(*shape), "weight": inputs.randn(shape[-1])}
        if bias:
            arguments["bias"] = inputs.randn(shape[-1])
        if residual:
            arguments["residual"] = inputs.randn(*shape)
        return arguments

    return make


def gated(tokens: int, width: int) -> Make:
    """The activation inside a gated feed-forward network."""

    def make(inputs: Inputs) -> dict[str, Any]:
        return {"gate": inputs.randn(tokens, width), "up": inputs.randn(tokens, width)}

    return make


def _rotary_tables(model: GPTConfig, tokens: int, inputs: Inputs) -> Any:
    return tilewise.rotary_tables(
        model.head_dim, tokens, base=model.rotary_base, device=inputs.device
    )


def rotary(model: GPTConfig, tokens: int) -> Make:
    """The rotation of a prompt's queries."""

    def make(inputs: Inputs) -> dict[str, Any]:
        return {
            "x": inputs.randn(tokens, model.heads, model.head_dim),
            "tables": _rotary_tables(model, tokens, inputs),
            "positions": inputs.permutation(tokens),
        }

    return make


def sampling(model: GPTConfig, batch: int, **options: Any) -> Make:
    """The choice of a next token for every sequence of a batch."""

    def make(inputs: Inputs) -> dict[str, Any]:
        logits = inputs.randn(batch, model.vocab_size, scale=3.0)
        return {"logits": logits, "temperature": 0.8, **options}

    return make


# --- the tables -----------------------------------------------------------------------------------

_MIXED_LENGTHS = (17, 64, 200, 33, 128, 70)
_PER_CHANNEL: dict[str, Any] = {"group_size": -1, "symmetric": True}
_GRANITE_MOE = {"dim": 1024, "ffn_dim": 512, "count": 32, "top_k": 8}  # Granite 3.0 1B-A400M
_OLMOE = {"dim": 2048, "ffn_dim": 1024, "count": 64, "top_k": 8}  # OLMoE 1B-7B


def _on_cpu(dtype: torch.dtype) -> list[Workload]:
    def workload(op: str, name: str, make: Make, **options: Any) -> Workload:
        return Workload(op, name, make, dtype, **options)

    queries = last_queries(64)
    rows = first_rows(32)
    outputs = every_output(8)
    return [
        workload("flash_attention", "GPT-2 prefill 1024", prefill(GPT2, 1024), part=queries),
        workload("flash_attention", "SmolLM2 prefill 512", prefill(SMOLLM2, 512), part=queries),
        workload("flash_attention", "Llama-3-8B prefill 512", prefill(LLAMA3, 512), part=queries),
        workload(
            "flash_attention",
            "SmolLM2 prefill 1024, window 256",
            prefill(SMOLLM2, 1024, window=(256, 0)),
            part=queries,
        ),
        workload("flash_attention", "Llama-3-8B decode at 2048", decode(LLAMA3, 2048)),
        workload("flash_attention", "SmolLM2 decode at 8192", decode(SMOLLM2, 8192)),
        workload(
            "flash_attention_varlen",
            f"SmolLM2 prefill of {len(_MIXED_LENGTHS)} prompts, 17-200",
            ragged_prefill(SMOLLM2, _MIXED_LENGTHS),
        ),
        workload("merge_states", "Llama-3-8B, 64 tokens", merge(LLAMA3, 64)),
        workload("paged_attention", "SmolLM2 decode 8 x 512", paged_decode(SMOLLM2, 512, batch=8)),
        workload(
            "paged_attention", "Llama-3-8B decode 4 x 512", paged_decode(LLAMA3, 512, batch=4)
        ),
        workload(
            "paged_attention",
            "Llama-3-8B decode 4 x 512, int8",
            paged_decode(LLAMA3, 512, batch=4, kv_format="int8"),
        ),
        workload("paged_attention", "SmolLM2 decode at 8192", paged_decode(SMOLLM2, 8192)),
        workload("paged_attention", "SmolLM2 chunk 128 at 1024", paged_prefill(SMOLLM2, 128, 1024)),
        workload("append_kv", "Llama-3-8B, 512 tokens", append(LLAMA3, 512), results=_caches),
        workload("append_kv", "SmolLM2, 8 tokens", append(SMOLLM2, 8), results=_caches),
        workload(
            "quantized_matmul",
            "Llama-3-8B decode 4096 x 4096, int4",
            quantized(1, 4096, 4096, "int4"),
            part=outputs,
        ),
        workload(
            "quantized_matmul",
            "Llama-3-8B decode 4096 x 4096, int8",
            quantized(1, 4096, 4096, "int8", **_PER_CHANNEL),
            part=outputs,
        ),
        workload(
            "quantized_matmul",
            "Llama-3-8B batch 16, 4096 x 1024, int4",
            quantized(16, 4096, 1024, "int4"),
            part=outputs,
        ),
        workload(
            "quantized_matmul",
            "SmolLM2 prefill 512, 576 x 1536, int4",
            quantized(512, 576, 1536, "int4"),
            part=rows,
        ),
        workload(
            "rms_norm", "Llama-3-8B prefill 512, residual", norm(512, LLAMA3.dim, residual=True)
        ),
        workload("rms_norm", "SmolLM2 decode", norm(1, SMOLLM2.dim)),
        workload("layer_norm", "GPT-2 prefill 1024", norm(1024, GPT2.dim, bias=True)),
        workload("rotary_embedding", "Llama-3-8B prefill 512", rotary(LLAMA3, 512)),
        workload("swiglu", "Llama-3-8B prefill 128", gated(128, LLAMA3.ffn_dim)),
        workload("geglu", "Gemma-2B prefill 128", gated(128, 16384)),
        workload("sample", "Llama-3-8B batch 2, greedy", sampling(LLAMA3, 2, temperature=0.0)),
        workload("sample", "Llama-3-8B batch 2, top-p", sampling(LLAMA3, 2, top_p=0.9)),
        workload("moe", "Granite-1B prefill 64", experts(64, **_GRANITE_MOE)),
        workload("moe", "Granite-1B decode", experts(1, **_GRANITE_MOE)),
    ]


_TOO_LARGE = {"naive": "the score matrix would take more memory than there is"}


def _on_gpu(dtype: torch.dtype) -> list[Workload]:
    def workload(op: str, name: str, make: Make, **options: Any) -> Workload:
        return Workload(op, name, make, dtype, "cuda", **options)

    queries = last_queries(64)
    rows = first_rows(64)
    return [
        workload("flash_attention", "GPT-2 prefill 8 x 1024", prefill(GPT2, 1024, batch=8)),
        workload("flash_attention", "Llama-3-8B prefill 4096", prefill(LLAMA3, 4096), part=queries),
        workload(
            "flash_attention",
            "Llama-3-8B prefill 8192",
            prefill(LLAMA3, 8192),
            part=queries,
            without=_TOO_LARGE,
        ),
        workload(
            "flash_attention",
            "Llama-3-8B prefill 32768",
            prefill(LLAMA3, 32768),
            part=queries,
            without=_TOO_LARGE,
        ),
        workload("flash_attention", "Llama-3-8B decode at 65536", decode(LLAMA3, 65536)),
        workload(
            "flash_attention_varlen",
            f"Llama-3-8B prefill of {len(_MIXED_LENGTHS)} prompts, 17-200",
            ragged_prefill(LLAMA3, _MIXED_LENGTHS),
        ),
        workload("merge_states", "Llama-3-8B, 8192 tokens", merge(LLAMA3, 8192)),
        workload(
            "paged_attention", "Llama-3-8B decode 32 x 4096", paged_decode(LLAMA3, 4096, batch=32)
        ),
        workload(
            "paged_attention",
            "Llama-3-8B decode 32 x 4096, int8",
            paged_decode(LLAMA3, 4096, batch=32, kv_format="int8"),
        ),
        workload("paged_attention", "Llama-3-8B decode at 65536", paged_decode(LLAMA3, 65536)),
        workload(
            "paged_attention", "Llama-3-8B chunk 512 at 4096", paged_prefill(LLAMA3, 512, 4096)
        ),
        workload("append_kv", "Llama-3-8B, 8192 tokens", append(LLAMA3, 8192), results=_caches),
        *(
            workload(
                "quantized_matmul",
                f"Llama-3-8B {tokens} x 4096 x 14336, {scheme}",
                quantized(tokens, 4096, 14336, scheme, **options),
                part=rows,
            )
            for tokens in (1, 16, 64, 4096)
            for scheme, options in (("int4", {}), ("int8", _PER_CHANNEL))
        ),
        workload(
            "rms_norm", "Llama-3-8B prefill 8192, residual", norm(8192, LLAMA3.dim, residual=True)
        ),
        workload("layer_norm", "GPT-2 prefill 8 x 1024", norm(8192, GPT2.dim, bias=True)),
        workload("rotary_embedding", "Llama-3-8B prefill 8192", rotary(LLAMA3, 8192)),
        workload("swiglu", "Llama-3-8B prefill 8192", gated(8192, LLAMA3.ffn_dim)),
        workload("geglu", "Gemma-2B prefill 8192", gated(8192, 16384)),
        workload("sample", "Llama-3-8B batch 64, top-p", sampling(LLAMA3, 64, top_p=0.9)),
        workload("moe", "OLMoE-1B-7B prefill 2048", experts(2048, **_OLMOE)),
        workload("moe", "OLMoE-1B-7B decode", experts(1, **_OLMOE)),
    ]


def all_workloads(device: str = "cpu") -> list[Workload]:
    """Every workload for "cpu" or "cuda".

    On the CPU in float32, and in bfloat16 where the processor multiplies it: elsewhere that takes
    forever, but for quantized weights, which PyTorch's own kernels take with bfloat16 alone.
    """
    if device == "cuda":
        return _on_gpu(torch.bfloat16)
    multiplies_bfloat16 = bool({"avx512_bf16", "amx_bf16"} & native.cpu_flags())
    narrow = [
        workload
        for workload in _on_cpu(torch.bfloat16)
        if multiplies_bfloat16 or workload.op == "quantized_matmul"
    ]
    return _on_cpu(torch.float32) + narrow
