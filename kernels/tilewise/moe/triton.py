"""The Triton backend of the mixture of experts: routing by PyTorch, and three launches."""

from __future__ import annotations

from typing import Any

import torch

from tilewise import gpu
from tilewise.fused.naive import compute_dtype
from tilewise.moe.naive import route
from tilewise.moe.operators import MOE, ROUTER_LOGITS, Weight, weight_of
from tilewise.quant import triton as quant
from tilewise.quant.formats import QuantizedTensor
from tilewise.quant.triton_configs import tile_for
from tilewise.quant.triton_weights import format_of, parts_of

_MOST_EXPERTS = 4096  # every program counts them all


def why_not(
    x: torch.Tensor, router_logits: torch.Tensor, *others: Any, **options: Any
) -> str | None:
    """Why the Triton kernels cannot take the call."""
    experts = router_logits.shape[1]
    if experts > _MOST_EXPERTS:
        return f"takes up to {_MOST_EXPERTS} experts, got {experts}"
    return gpu.why_not(x)


@MOE.kernel("triton")
def _moe(x: torch.Tensor, router_logits: torch.Tensor, *others: Any) -> torch.Tensor:
    from tilewise.moe import triton_kernels as kernels

    *parts, top_k, normalize = others
    w_gate_up, w_down = weight_of(*parts[:6]), weight_of(*parts[6:])
    tokens, dim = x.shape
    hidden = w_down.shape[2]
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    experts = router_logits.shape[1]
    weights, chosen = route(router_logits.to(compute_dtype(x)), top_k, normalize)
    by_expert, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(experts, device=x.device)
    ends = torch.searchsorted(by_expert, numbers, right=True)
    x = x if x.stride(1) == 1 else x.contiguous()
    inner = x.new_empty(tokens * top_k, hidden)
    _product(x, w_gate_up, order, ends, top_k, inner, is_first=True)
    results = x.new_empty(tokens * top_k, dim, dtype=torch.float32)
    _product(inner, w_down, order, ends, top_k, results, is_first=False)
    block = min(1 << (dim - 1).bit_length(), 1024)
    gpu.launch(
        kernels.combine,
        (tokens, -(-dim // block)),
        results,
        weights.contiguous(),
        out,
        dim,
        top_k,
        BLOCK=block,
        num_warps=4,
    )
    return out


def _product(
    x: torch.Tensor,
    weight: Weight,
    order: torch.Tensor,
    ends: torch.Tensor,
    top_k: int,
    out: torch.Tensor,
    *,
    is_first: bool,
) -> None:
    from tilewise.moe import triton_kernels as kernels

    experts, n, k = weight.shape
    choices = len(order)
    # Few choices are seldom of one expert; many are spread.
    tile = tile_for(x, -(-choices // experts), is_pair=is_first)
    max_tiles = choices // tile.m + min(experts, choices)
    tensors, sizes = parts_of(weight, x.dtype)
    gpu.launch(
        kernels.experts_product,
        (max_tiles * -(-out.shape[1] // tile.n),),
        x,
        *tensors,
        order,
        ends,
        out,
        choices,
        experts,
        max_tiles,
        n,
        k,
        x.stride(0),
        *sizes,
        top_k,
        **format_of(weight),
        IS_FIRST=is_first,
        EVEN=k % tile.k == 0,
        BLOCK_E=max(1 << (experts - 1).bit_length(), 2),
        BLOCK_N=tile.n,
        BLOCK_M=tile.m,
        BLOCK_K=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def why_not_router(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why the Triton kernel cannot take the call."""
    # It multiplies float32, which the interpreter can, whatever x is.
    return gpu.why_not(x, dot=False)


@ROUTER_LOGITS.kernel("triton")
def _router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return linear(x.float(), weight.float())


def product(x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """x W^T, differentiable in x."""
    return quant.quantized_matmul(x, weight)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T of float32 matrices."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    quant.linear(x.contiguous(), weight.contiguous(), out)
    return out
