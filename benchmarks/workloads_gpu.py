"""What is timed on a GPU: the CPU's calls at full size, and the shapes that papers report."""

from __future__ import annotations

from typing import Any

import torch

from tilewise.benchmarks.calls import (
    append,
    decode,
    embedded,
    experts,
    first_head,
    first_requests,
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
    shared_prefix_decode,
    written_caches,
)
from tilewise.benchmarks.models import GPT2, LLAMA3, MIXED_LENGTHS, OLMOE, PER_CHANNEL
from tilewise.benchmarks.workload import Workload
from tilewise.testing import Make

_TOO_LARGE = {"naive": "the score matrix would take more memory than there is"}
_GATHERED = "every request's pages would be copied, tens of gigabytes"


def _attention(dtype: torch.dtype) -> list[Workload]:
    """16 heads of 128, 16384 tokens in all, causal: as papers on attention kernels report it."""
    model = LLAMA3.replace(heads=16, kv_heads=16, head_dim=128)
    workloads = []
    for batch, tokens in ((4, 4096), (2, 8192)):
        name = f"D128 H16 causal {batch} x {tokens}"
        make = prefill(model, tokens, batch=batch)
        workloads += [
            Workload(
                "flash_attention",
                name,
                make,
                dtype,
                "cuda",
                part=last_queries(64),
                without=_TOO_LARGE,
            ),
            Workload(
                "flash_attention",
                f"{name}, backward",
                make,
                dtype,
                "cuda",
                part=first_head(),
                without=_TOO_LARGE,
                grad=("q", "k", "v"),
                # As in attention/cases.py: what cancels is larger than what is left.
                floors={"output": 0.5, "grad q": 6.0, "grad k": 6.0, "grad v": 3.0},
            ),
        ]
    return workloads


def _decoding(dtype: torch.dtype) -> list[Workload]:
    """The same keys in pages and without: what the indirection costs."""
    batch, context = 16, 16384
    part = first_requests(2)
    name = f"Llama-3-8B decode {batch} x {context}"
    workloads = [
        Workload(
            "paged_attention",
            f"{name}, pages of {page_size}",
            paged_decode(LLAMA3, context, batch=batch, page_size=page_size),
            dtype,
            "cuda",
            part=part,
        )
        for page_size in (16, 1)
    ]
    contiguous = decode(LLAMA3, context, batch=batch)
    return [
        *workloads,
        Workload("flash_attention", f"{name}, contiguous", contiguous, dtype, "cuda", part=part),
        Workload(
            "paged_attention",
            "Llama-3-8B decode 128 x 32768 of one prefix + 128",
            shared_prefix_decode(LLAMA3, 32768, 128, batch=128),
            dtype,
            "cuda",
            part=part,
            without={"naive": _GATHERED, "torch": _GATHERED},
        ),
    ]


def on_gpu(dtype: torch.dtype) -> list[Workload]:
    """The workloads in one dtype."""

    def workload(op: str, name: str, make: Make, **options: Any) -> Workload:
        return Workload(op, name, make, dtype, "cuda", **options)

    queries = last_queries(64)
    rows = first_rows(64)
    return [
        *_attention(dtype),
        *_decoding(dtype),
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
            f"Llama-3-8B prefill of {len(MIXED_LENGTHS)} prompts, 17-200",
            ragged_prefill(LLAMA3, MIXED_LENGTHS),
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
        workload(
            "append_kv", "Llama-3-8B, 8192 tokens", append(LLAMA3, 8192), results=written_caches
        ),
        *(
            workload(
                "quantized_matmul",
                f"Llama-3-8B {tokens} x 4096 x 14336, {scheme}",
                quantized(tokens, 4096, 14336, scheme, **options),
                part=rows,
            )
            for tokens in (1, 16, 64, 256, 1024, 4096)
            for scheme, options in (("int4", {}), ("int8", PER_CHANNEL))
        ),
        *(
            workload(
                "quantized_matmul",
                f"Llama-3-8B {tokens} x 4096 x 14336, fp8 x fp8",
                quantized(tokens, 4096, 14336, "fp8", act="fp8"),
                part=rows,
            )
            for tokens in (16, 64, 256, 1024, 4096)
        ),
        workload(
            "quantized_embedding",
            "Llama-3-8B prompt 8192, int4",
            embedded(8192, LLAMA3.vocab_size, LLAMA3.dim, "int4"),
        ),
        workload(
            "rms_norm", "Llama-3-8B prefill 8192, residual", norm(8192, LLAMA3.dim, residual=True)
        ),
        workload("layer_norm", "GPT-2 prefill 8 x 1024", norm(8192, GPT2.dim, bias=True)),
        workload("rotary_embedding", "Llama-3-8B prefill 8192", rotary(LLAMA3, 8192)),
        workload("swiglu", "Llama-3-8B prefill 8192", gated(8192, LLAMA3.ffn_dim)),
        workload("geglu", "Gemma-2B prefill 8192", gated(8192, 16384)),
        workload("sample", "Llama-3-8B batch 64, top-p", sampling(LLAMA3, 64, top_p=0.9)),
        workload("moe", "OLMoE-1B-7B prefill 2048", experts(2048, **OLMOE)),
        workload("moe", "OLMoE-1B-7B decode", experts(1, **OLMOE)),
        workload("router_logits", "OLMoE-1B-7B prefill 2048", routed(2048, **OLMOE)),
        workload("router_logits", "OLMoE-1B-7B decode", routed(1, **OLMOE)),
    ]
