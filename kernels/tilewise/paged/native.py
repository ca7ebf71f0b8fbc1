"""The C++ kernels of the paged cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tilewise import cpu, native
from tilewise.attention.native import attend
from tilewise.fused.tables import RotaryTables
from tilewise.library import needs_grad
from tilewise.paged import kv_formats, naive
from tilewise.paged.operators import APPEND_KV, PAGED_ATTENTION


def why_not_paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    *others: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    **options: Any,
) -> str | None:
    """Why the C++ kernel cannot take the call."""
    if torch.compiler.is_compiling() and needs_grad(q, k_cache, others[0], sinks, bias):
        return "torch.compile cannot trace its gradient, which is the naive function's"
    return cpu.why_not(q) or _why_not_cache(k_cache, k_scale, v_scale)


def why_not_append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    *others: torch.Tensor,
    rotary: RotaryTables | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    **options: Any,
) -> str | None:
    """Why the C++ kernel cannot take the call."""
    if needs_grad(k, v, k_cache):
        return "has no gradient"
    if rotary is not None and {rotary.cos.dtype, rotary.sin.dtype} != {torch.float32}:
        return "needs float32 tables"
    return cpu.why_not(k) or _why_not_cache(k_cache, k_scale, v_scale)


def _why_not_cache(
    k_cache: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None
) -> str | None:
    if k_cache.dtype == torch.float64:
        return "computes in float32, got a float64 cache"
    if any(x is not None and x.dtype != torch.float32 for x in (k_scale, v_scale)):
        return "needs float32 scales"
    return None


# --- reading --------------------------------------------------------------------------------------


def paged_attention(
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
    """The naive function of this name, by the C++ kernel."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    places = (block_table, cache_seqlens, cu_seqlens_q, k_scale, v_scale)
    options = (causal, scale, *window, softcap, alibi_slopes)
    arguments = (q, k_cache, v_cache, sinks, bias, places, options, batch_invariant)
    run = _PagedAttention.apply if needs_grad(q, k_cache, v_cache, sinks, bias) else _forward
    out, lse = run(*arguments)
    return (out, lse) if return_lse else out


def _forward(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
    places: tuple[Any, ...],
    options: tuple[Any, ...],
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    result: tuple[torch.Tensor, torch.Tensor] = PAGED_ATTENTION.op(
        q, k_cache, v_cache, *places, *options, sinks, bias, batch_invariant, "cpu"
    )
    return result


class _PagedAttention(torch.autograd.Function):
    """Nobody trains through a cache: its gradient is that of the definition, run again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *differentiable, ctx.places, ctx.options, _ = arguments
        ctx.save_for_backward(*differentiable)
        return _forward(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[Any, ...]:
        block_table, cache_seqlens, cu_seqlens_q, k_scale, v_scale = ctx.places
        causal, scale, left, right, softcap, alibi_slopes = ctx.options
        needed = ctx.needs_input_grad[:5]
        with torch.enable_grad():
            leaves: list[Any] = [
                x if x is None else x.detach().requires_grad_(need)
                for x, need in zip(ctx.saved_tensors, needed, strict=True)
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
        return (*(next(grads) if need else None for need in needed), None, None, None)


@PAGED_ATTENTION.kernel("cpu")
def _paged_attention_kernel(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return attend(
        q,
        k_cache,
        v_cache,
        (k_scale, v_scale, cu_seqlens_q, None, block_table, cache_seqlens),
        alibi_slopes,
        sinks,
        bias,
        causal,
        scale,
        window_left,
        window_right,
        softcap,
        batch_invariant,
        kv_formats.elements(v_cache),
    )


# --- writing --------------------------------------------------------------------------------------


def append_kv(
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
    """The naive function of this name, by the C++ kernel."""
    cos, sin, interleaved = (None, None, False) if rotary is None else rotary
    APPEND_KV.op(
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
        "cpu",
    )


@APPEND_KV.kernel("cpu")
def _append_kv_kernel(
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
    native.cpu_ops().append_kv(
        cpu.unit_stride(k),
        cpu.unit_stride(v),
        k_cache,
        v_cache,
        slot_mapping,
        None if cos is None else cpu.unit_stride(cos),
        None if sin is None else cpu.unit_stride(sin),
        interleaved,
        positions,
        k_scale,
        v_scale,
    )
