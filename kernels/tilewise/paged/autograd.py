"""Kernels of the paged cache with PyTorch's autograd around them: what a compiled backend plugs in.

`Impl("triton", partial(paged_attention, "triton"), ...)` is a backend of `paged_attention` as soon
as the registered operator has a kernel of that name.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from tilewise.fused.tables import RotaryTables
from tilewise.library import Saved, needs_grad, once_differentiable
from tilewise.paged import naive
from tilewise.paged.operators import APPEND_KV, PAGED_ATTENTION


def paged_attention(
    backend: str,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The naive function of this name, by the kernel of `backend`."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    places = (block_table, cache_seqlens, cu_seqlens_q, k_scale, v_scale)
    options = (causal, scale, *window, softcap, alibi_slopes)
    arguments = (backend, q, k_cache, v_cache, sinks, bias, places, options, batch_invariant)
    run = _PagedAttention.apply if needs_grad(q, k_cache, v_cache, sinks, bias) else _forward
    out, lse = run(*arguments)
    return (out, lse) if return_lse else out


def why_not_gradient(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> str | None:
    """Why the gradient that `paged_attention` has cannot be recorded here."""
    if torch.compiler.is_compiling() and needs_grad(q, k_cache, v_cache, sinks, bias):
        return "torch.compile cannot trace its gradient, which is the naive function's"
    return None


def _forward(
    backend: str,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
    places: tuple[Any, ...],
    options: tuple[Any, ...],
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    result: tuple[torch.Tensor, torch.Tensor] = PAGED_ATTENTION(
        q, k_cache, v_cache, *places, *options, sinks, bias, batch_invariant, backend
    )
    return result


class _PagedAttention(torch.autograd.Function):
    """Nobody trains through a cache: its gradient is that of the definition, run again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        _, *differentiable, places, ctx.options, _ = arguments
        ctx.save_for_backward(*differentiable, *places)
        return _forward(*arguments)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: Saved, grad_out: torch.Tensor, grad_lse: torch.Tensor
    ) -> tuple[Any, ...]:
        differentiable, places = saved[:5], saved[5:]
        block_table, cache_seqlens, cu_seqlens_q, k_scale, v_scale = places
        causal, scale, left, right, softcap, alibi_slopes = ctx.options
        needed = ctx.needs_input_grad[1:6]
        with torch.enable_grad():
            leaves: list[Any] = [
                x if x is None else x.detach().requires_grad_(need)
                for x, need in zip(differentiable, needed, strict=True)
            ]
            q, k_cache, v_cache, sinks, bias = leaves
            results = naive.paged_attention(
                q,
                k_cache,
                v_cache,
                block_table,
                cache_seqlens,
                cu_seqlens_q=cu_seqlens_q,
                k_scale=k_scale,
                v_scale=v_scale,
                causal=causal,
                scale=scale,
                window=(left, right),
                softcap=softcap,
                alibi_slopes=alibi_slopes,
                sinks=sinks,
                bias=bias,
                return_lse=True,
            )
        wanted = [x for x, need in zip(leaves, needed, strict=True) if need]
        grads = iter(torch.autograd.grad(results, wanted, (grad_out, grad_lse)))
        return (None, *(next(grads) if need else None for need in needed), None, None, None)


def append_kv(
    backend: str,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    rotary: RotaryTables | None = None,
    positions: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """The naive function of this name, by the kernel of `backend`; it has no gradient."""
    cos, sin, interleaved = (None, None, False) if rotary is None else rotary
    APPEND_KV(
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        cos,
        sin,
        interleaved,
        positions,
        k_scale,
        v_scale,
        backend,
    )
