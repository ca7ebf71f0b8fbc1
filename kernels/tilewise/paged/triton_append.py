"""The Triton backend of writing to the paged cache."""

from __future__ import annotations

from typing import Any

import torch

from tilewise import gpu
from tilewise.library import needs_grad
from tilewise.paged.native import why_not_cache
from tilewise.paged.operators import APPEND_KV, written
from tilewise.paged.triton import FLOAT, FORMATS, stored
from tilewise.paged.triton_configs import power_of_two


def why_not_append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    *others: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    **options: Any,
) -> str | None:
    """Why the Triton kernel cannot take the call."""
    if needs_grad(k, v, k_cache):
        return "has no gradient"
    return gpu.why_not(k, dot=False) or why_not_cache(k_cache, k_scale, v_scale)


@APPEND_KV.kernel("triton")
def _append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    positions: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    from tilewise.paged import triton_append_kernels as kernels

    tokens, kv_heads, dim = k.shape
    num_pages, page_size = k_cache.shape[:2]
    format = FORMATS.get(k_cache.dtype, FLOAT)
    halves = 2 if format.name == "int4" else 1
    block, v_block = power_of_two(dim // halves), power_of_two(v.shape[2] // halves)
    heads = min(1 << (kv_heads - 1).bit_length(), max(_APPEND_TILE // block, 1))
    cos, sin = (
        x if x is None or x.stride(1) == 1 else x.contiguous()
        for x in ((cos, sin) if cos is not None and cos.shape[1] else (None, None))
    )
    gpu.launch(
        kernels.append_kv,
        (tokens, -(-kv_heads // heads)),
        k,
        v,
        stored(k_cache),
        stored(v_cache),
        k_scale,
        v_scale,
        slot_mapping,
        positions,
        cos,
        sin,
        kv_heads,
        num_pages * page_size,
        page_size,
        0 if cos is None else len(cos),
        slot_mapping.stride(0),
        0 if positions is None else positions.stride(0),
        *(0 if x is None else x.stride(0) for x in (cos, sin)),
        *k.stride()[:2],
        *v.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *((0, 0, 0) if k_scale is None else k_scale.stride()),
        *((0, 0, 0) if v_scale is None else v_scale.stride()),
        PAIRS=0 if cos is None else cos.shape[1],
        IS_INTERLEAVED=interleaved,
        FORMAT=format.name,
        DIM=dim,
        V_DIM=v.shape[2],
        BLOCK=block,
        V_BLOCK=v_block,
        HEADS=heads,
        num_warps=4 if heads * block >= 1024 else 1,
        # A product is rounded before it is added, as in the definition.
        enable_fp_fusion=False,
    )
    written(k_cache, v_cache, k_scale, v_scale)


_APPEND_TILE = 2048  # elements that a program writes at most, of keys
