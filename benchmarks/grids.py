"""Attention over a grid of shapes: where a kernel is weak must not depend on what we chose to show.

Prefill over head dimension x length x mask, without grouped heads, as papers on attention kernels
report it; decode over the sizes of the cache, from one that fits in a processor's cache to one that
does not, and over the ways to store it.
"""

from __future__ import annotations

from typing import Any

import torch

from tilewise.benchmarks.calls import decode, last_queries, paged_decode, prefill
from tilewise.benchmarks.workload import Workload
from tilewise.model.config import PRESETS

_TOO_LARGE = {"naive": "it would take minutes and gigabytes: every score is stored"}


def attention_grid(dtype: torch.dtype) -> list[Workload]:
    """The grid on the CPU, in one dtype."""
    grid = []
    for head_dim in (64, 128):
        for tokens, heads in ((512, 8), (2048, 4), (8192, 1)):
            for causal in (False, True):
                model = PRESETS["llama-3-8b"].replace(
                    heads=heads, kv_heads=heads, head_dim=head_dim
                )
                mask = "causal" if causal else "full"
                grid.append(
                    Workload(
                        "flash_attention",
                        f"grid D{head_dim} S{tokens} H{heads} {mask}",
                        prefill(model, tokens, causal=causal),
                        dtype,
                        part=last_queries(64),
                        without=_TOO_LARGE if tokens > 2048 else {},
                    )
                )
    return grid + _decode_grid(dtype)


def _decode_grid(dtype: torch.dtype) -> list[Workload]:
    """Llama-3-8B's heads: 32 queries over 8 keys, 2048 elements of K and of V per token."""
    model = PRESETS["llama-3-8b"]
    token_bytes = 2 * model.kv_heads * model.head_dim * dtype.itemsize
    grid = []
    for megabytes in (16, 128):
        tokens = megabytes * 2**20 // token_bytes
        size = f"{megabytes} MB cache"
        grid.append(
            Workload("flash_attention", f"grid decode {size}", decode(model, tokens), dtype)
        )
        stores: list[tuple[str, dict[str, Any]]] = [
            ("pages of 16", {}),
            ("pages of 1", {"page_size": 1}),
            ("int8, pages of 16", {"kv_format": "int8"}),
        ]
        for store, options in stores:
            grid.append(
                Workload(
                    "paged_attention",
                    f"grid decode {size}, {store}",
                    paged_decode(model, tokens, **options),
                    dtype,
                )
            )
    return grid


def attention_backward_grid(dtype: torch.dtype) -> list[Workload]:
    """The backward pass on the CPU, over the same head dimensions, lengths and masks."""
    grid = []
    for head_dim in (64, 128):
        for tokens, heads in ((512, 8), (2048, 2)):
            for causal in (False, True):
                model = PRESETS["llama-3-8b"].replace(
                    heads=heads, kv_heads=heads, head_dim=head_dim
                )
                mask = "causal" if causal else "full"
                grid.append(
                    Workload(
                        "flash_attention",
                        f"grid backward D{head_dim} S{tokens} H{heads} {mask}",
                        prefill(model, tokens, causal=causal),
                        dtype,
                        grad=("q", "k", "v"),
                        # As in attention/cases.py: what cancels is larger than what is left.
                        floors={"output": 0.5, "grad q": 6.0, "grad k": 6.0, "grad v": 3.0},
                    )
                )
    return grid
