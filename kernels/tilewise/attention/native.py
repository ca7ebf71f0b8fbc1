"""The C++ kernels of attention: results allocated, options in the form that C++ takes."""

from __future__ import annotations

from typing import Any

import torch

from tilewise import cpu, native
from tilewise.attention.checks import Numbers, are_plain_numbers
from tilewise.attention.operators import (
    FLASH_ATTENTION,
    FLASH_ATTENTION_BACKWARD,
    FLASH_ATTENTION_VARLEN,
    FLASH_ATTENTION_VARLEN_BACKWARD,
    MERGE_STATES,
)
from tilewise.fused.rows import empty_like


def why_not(q: torch.Tensor, *others: Any, **options: Any) -> str | None:
    """Why the C++ kernels cannot take the call."""
    return cpu.why_not(q)


def attend_plainly(
    op: str,
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    numbers: Numbers,
    places: tuple[()] | tuple[torch.Tensor, torch.Tensor] = (),
    optional: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None,) * 3,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
    """What the public function `op` returns for a plain call; None for any other.

    Where the keys and values lie in pages, `places` is block_table and cache_seqlens, and
    `optional` k_scale, v_scale and cu_seqlens_q.
    """
    operators = cpu.plain_operators(op, backend, q, k, v, *places, optional=optional)
    if operators is None or not are_plain_numbers(numbers):
        return None
    causal, scale, window, softcap, return_lse, _ = numbers
    out, lse = cpu.plainly(
        operators.plain_attention,
        *(q, k, v, *optional, *(places or (None, None))),
        *(causal, scale, *window, softcap, return_lse),
        otherwise=(None, None),
    )
    return (out, lse) if return_lse and out is not None else out


@FLASH_ATTENTION.kernel("cpu")
def _flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return attend(q, k, v, (None,) * 6, *options)


@FLASH_ATTENTION_VARLEN.kernel("cpu")
def _flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    ends = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    return attend(q, k, v, (None, None, *ends, None, None), *options)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    places: tuple[torch.Tensor | None, ...],
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
    causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    batch_invariant: bool,
    v_head_dim: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse. `places` is k_scale, v_scale, cu_seqlens_q, cu_seqlens_k, block_table,
    cache_seqlens, all contiguous; `v_head_dim` is v's last dimension unless v is packed.

    The kernels are always batch invariant.
    """
    shape = q.shape
    v_dim = v.shape[-1] if v_head_dim is None else v_head_dim
    out = empty_like(q) if v_dim == shape[-1] else q.new_empty((*shape[:-1], v_dim))
    lse = q.new_empty(shape[:-1], dtype=torch.float32)
    native.cpu_ops().attention(
        cpu.unit_stride(q),
        cpu.unit_stride(k),
        cpu.unit_stride(v),
        *places,
        *extras(alibi_slopes, sinks, bias),
        causal,
        scale,
        window_left,
        window_right,
        softcap,
        out,
        lse,
    )
    return out, lse


def extras(
    alibi_slopes: torch.Tensor | None, sinks: torch.Tensor | None, bias: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """Slopes and sinks as float32, the bias as it is where it is a mask."""
    if alibi_slopes is None and sinks is None and bias is None:
        return None, None, None
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.float()
    return (
        None if alibi_slopes is None else alibi_slopes.float().contiguous(),
        None if sinks is None else sinks.float().contiguous(),
        bias,
    )


@FLASH_ATTENTION_BACKWARD.kernel("cpu")
def _flash_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, ...]:
    return _gradients(grad_out, grad_lse, out, lse, q, k, v, (None, None), *options)


@FLASH_ATTENTION_VARLEN_BACKWARD.kernel("cpu")
def _flash_attention_varlen_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    *options: Any,
) -> tuple[torch.Tensor, ...]:
    ends = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    return _gradients(grad_out, grad_lse, out, lse, q, k, v, ends, *options)


def _gradients(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: tuple[torch.Tensor | None, torch.Tensor | None],
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
    causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    batch_invariant: bool,
    needs_grad_bias: bool,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v, sinks and bias, those of a missing tensor empty."""
    grads = [x.new_zeros(x.shape) for x in (q, k, v)]
    grad_sinks, grad_bias = (
        x.new_zeros(x.shape, dtype=torch.float32) if x is not None and is_wanted else None
        for x, is_wanted in ((sinks, True), (bias, needs_grad_bias))
    )
    native.cpu_ops().attention_backward(
        cpu.unit_stride(grad_out),
        None if grad_lse is None else grad_lse.contiguous(),
        cpu.unit_stride(out),
        lse.contiguous(),
        cpu.unit_stride(q),
        cpu.unit_stride(k),
        cpu.unit_stride(v),
        *cu_seqlens,
        *extras(alibi_slopes, sinks, bias),
        causal,
        scale,
        window_left,
        window_right,
        softcap,
        *grads,
        grad_sinks,
        grad_bias,
    )
    extra = (
        q.new_empty(0) if grad is None or x is None else grad.to(x.dtype)
        for x, grad in ((sinks, grad_sinks), (bias, grad_bias))
    )
    return (*grads, *extra)


# --- partial results ------------------------------------------------------------------------------


def why_not_merge_states(out_a: torch.Tensor, *others: Any, **named: Any) -> str | None:
    """Why the C++ kernel cannot take the call."""
    return cpu.why_not(out_a)


@MERGE_STATES.kernel("cpu")
def _merge_states_kernel(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)
    rows = (-1, out_a.shape[-1]) if out_a.numel() else (0, out_a.shape[-1])
    native.cpu_ops().merge_states(
        out_a.reshape(rows).contiguous(),
        lse_a.reshape(-1).contiguous(),
        out_b.reshape(rows).contiguous(),
        lse_b.reshape(-1).contiguous(),
        out.view(rows),
        lse.view(-1),
    )
    return out, lse
