"""What is timed: calls with the shapes that real models make.

Prefill is bound by arithmetic and decoding by memory, and the models differ in what they share:
SmolLM2-135M and Llama-3-8B have grouped queries (3 and 4 per key head), GPT-2 has none. The CPU
table is sized so that two slow cores finish in a minute; `workloads_gpu.py` has the full sizes.
"""

from __future__ import annotations

from typing import Any

import torch

from tilewise import native
from tilewise.benchmarks.calls import (
    append,
    decode,
    embedded,
    every_output,
    experts,
    first_rows,
    gated,
    last_queries,
    merge,
    norm,
    paged_decode,
    paged_prefill,
    prefill,
    quantized,
    ragged_prefill,
    rotary,
    routed,
    sampling,
    written_caches,
)
from tilewise.benchmarks.grids import attention_backward_grid, attention_grid
from tilewise.benchmarks.models import (
    GPT2,
    GRANITE_MOE,
    LLAMA3,
    MIXED_LENGTHS,
    PER_CHANNEL,
    SMOLLM2,
)
from tilewise.benchmarks.workload import Workload
from tilewise.benchmarks.workloads_gpu import on_gpu
from tilewise.testing import Make


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
            f"SmolLM2 prefill of {len(MIXED_LENGTHS)} prompts, 17-200",
            ragged_prefill(SMOLLM2, MIXED_LENGTHS),
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
        workload(
            "append_kv", "Llama-3-8B, 512 tokens", append(LLAMA3, 512), results=written_caches
        ),
        workload("append_kv", "SmolLM2, 8 tokens", append(SMOLLM2, 8), results=written_caches),
        workload(
            "quantized_matmul",
            "Llama-3-8B decode 4096 x 4096, int4",
            quantized(1, 4096, 4096, "int4"),
            part=outputs,
        ),
        workload(
            "quantized_matmul",
            "Llama-3-8B decode 4096 x 4096, int8",
            quantized(1, 4096, 4096, "int8", **PER_CHANNEL),
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
            "quantized_embedding",
            "SmolLM2 prompt 512, int4",
            embedded(512, SMOLLM2.vocab_size, SMOLLM2.dim, "int4"),
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
        workload("moe", "Granite-1B prefill 64", experts(64, **GRANITE_MOE)),
        workload("moe", "Granite-1B decode", experts(1, **GRANITE_MOE)),
        workload("router_logits", "Granite-1B prefill 64", routed(64, **GRANITE_MOE)),
        workload("router_logits", "Granite-1B decode", routed(1, **GRANITE_MOE)),
    ]


def all_workloads(device: str = "cpu") -> list[Workload]:
    """Every workload for "cpu" or "cuda".

    On the CPU in float32, and in bfloat16 where the processor multiplies it: elsewhere that takes
    forever, but for quantized weights, which PyTorch's own kernels take with bfloat16 alone.
    """
    if device == "cuda":
        return on_gpu(torch.bfloat16)
    multiplies_bfloat16 = bool({"avx512_bf16", "amx_bf16"} & native.cpu_flags())
    narrow = [
        workload
        for workload in _on_cpu(torch.bfloat16)
        if multiplies_bfloat16 or workload.op == "quantized_matmul"
    ]
    grids = [
        workload
        for dtype in (torch.float32, torch.bfloat16)
        for workload in attention_grid(dtype) + attention_backward_grid(dtype)
    ]
    return _on_cpu(torch.float32) + narrow + grids
