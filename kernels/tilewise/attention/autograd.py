"""Attention kernels with PyTorch's autograd around them: what a compiled backend plugs in.

`Impl("triton", partial(flash_attention, "triton"), ...)` is a backend of `flash_attention` as soon
as the forward operator, and for training the backward one, has a kernel of that name.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from tilewise.attention import operators
from tilewise.library import Saved, needs_grad, once_differentiable


def flash_attention(
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
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
    """The naive function of this name, by the kernels of `backend`."""
    options = (causal, _scale(q, scale), *window, softcap, batch_invariant)
    out, lse = _attention(q, k, v, sinks, bias, alibi_slopes, (), options, backend)
    return (out, lse) if return_lse else out


def flash_attention_varlen(
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
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
    """The naive function of this name, by the kernels of `backend`."""
    ragged = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (causal, _scale(q, scale), *window, softcap, batch_invariant)
    out, lse = _attention(q, k, v, sinks, bias, alibi_slopes, ragged, options, backend)
    return (out, lse) if return_lse else out


def _scale(q: torch.Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    ragged: tuple[Any, ...],
    options: tuple[Any, ...],
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse, through the autograd function only where a gradient is needed: it costs 4 us."""
    if needs_grad(q, k, v, sinks, bias):
        q, k, v, *cu_seqlens = _distinct(q, k, v, *ragged[:2])
        ragged = (*cu_seqlens, *ragged[2:])
        return _Attention.apply(q, k, v, sinks, bias, alibi_slopes, options, backend, *ragged)
    return _forward(q, k, v, sinks, bias, alibi_slopes, ragged, options, backend)


def _distinct(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors with a view for each repetition, as of `cu_seqlens` in self-attention.

    torch.compile does not trace an autograd function that is given one tensor twice.
    """
    found: list[torch.Tensor] = []
    for tensor in tensors:
        repeated = any(tensor is other for other in found)
        found.append(tensor.view_as(tensor) if repeated else tensor)
    return found


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    ragged: tuple[Any, ...],
    options: tuple[Any, ...],
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    contract = operators.FLASH_ATTENTION_VARLEN if ragged else operators.FLASH_ATTENTION
    result: tuple[torch.Tensor, torch.Tensor] = contract(
        q, k, v, *ragged, alibi_slopes, sinks, bias, *options, backend
    )
    return result


def _finer(q: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether one of the others is of a dtype with more bits than q's."""
    return any(x is not None and x.dtype.itemsize > q.dtype.itemsize for x in others)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        bias: torch.Tensor | None,
        alibi_slopes: torch.Tensor | None,
        options: tuple[Any, ...],
        backend: str,
        *ragged: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = _forward(q, k, v, sinks, bias, alibi_slopes, ragged, options, backend)
        cu_seqlens, ctx.max_seqlens = ragged[:2], ragged[2:]
        ctx.save_for_backward(q, k, v, sinks, bias, alibi_slopes, out, lse, *cu_seqlens)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: Saved, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None
    ) -> tuple[Any, ...]:
        q, k, v, sinks, bias, alibi_slopes, out, lse, *cu_seqlens = saved
        contract = (
            operators.FLASH_ATTENTION_VARLEN_BACKWARD
            if cu_seqlens
            else operators.FLASH_ATTENTION_BACKWARD
        )
        needs_grad_sinks, needs_grad_bias = ctx.needs_input_grad[3:5]
        wanted = (sinks if needs_grad_sinks else None, bias if needs_grad_bias else None)
        if _finer(q, *wanted):
            # What a score gains by its weight is told from `out`, and where a gradient is a sum
            # over keys little else is left of it: it would be noise from the rounding of `out`.
            ragged = (*cu_seqlens, *ctx.max_seqlens)
            q_, k_, v_ = q.float(), k.float(), v.float()
            out, lse = _forward(
                q_, k_, v_, sinks, bias, alibi_slopes, ragged, ctx.options, ctx.backend
            )
        grad_q, grad_k, grad_v, grad_sinks, grad_bias = contract(
            torch.zeros_like(out) if grad_out is None else grad_out,
            grad_lse,
            out,
            lse,
            q,
            k,
            v,
            *cu_seqlens,
            *ctx.max_seqlens,
            alibi_slopes,
            sinks,
            bias,
            *ctx.options,
            needs_grad_bias,
            ctx.backend,
        )
        return (
            grad_q,
            grad_k,
            grad_v,
            grad_sinks if needs_grad_sinks else None,
            grad_bias if needs_grad_bias else None,
            *[None] * (len(ctx.needs_input_grad) - 5),
        )
