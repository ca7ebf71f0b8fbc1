"""The C++ kernels of the paged cache."""

from __future__ import annotations

from typing import Any

import torch

from tilewise import cpu, native
from tilewise.attention.native import attend
from tilewise.fused.native import are_plain_tables
from tilewise.fused.tables import RotaryTables
from tilewise.library import needs_grad
from tilewise.paged import kv_formats
from tilewise.paged.autograd import why_not_gradient
from tilewise.paged.operators import APPEND_KV, PAGED_ATTENTION, written


def why_not_paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *others: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    **options: Any,
) -> str | None:
    """Why the C++ kernel cannot take the call."""
    return (
        cpu.why_not(q)
        or why_not_gradient(q, k_cache, v_cache, sinks, bias)
        or why_not_cache(k_cache, k_scale, v_scale)
    )


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
    return cpu.why_not(k) or why_not_cache(k_cache, k_scale, v_scale)


def why_not_cache(
    k_cache: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None
) -> str | None:
    """Why kernels that compute in float32 cannot take the cache."""
    if k_cache.dtype == torch.float64:
        return "computes in float32, got a float64 cache"
    if any(x is not None and x.dtype != torch.float32 for x in (k_scale, v_scale)):
        return "needs float32 scales"
    return None


# --- reading --------------------------------------------------------------------------------------


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
        (
            None if k_scale is None else k_scale.contiguous(),
            None if v_scale is None else v_scale.contiguous(),
            None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
            None,
            block_table.contiguous(),
            cache_seqlens.contiguous(),
        ),
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


def append_kv_plainly(
    backend: str,
    tensors: tuple[torch.Tensor, ...],
    rotary: RotaryTables | None,
    optional: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
) -> bool:
    """Whether this was a plain call of `append_kv`; it is done then.

    `optional` is positions, k_scale and v_scale.
    """
    tables: tuple[Any, Any, Any] = (None, None, False)
    if rotary is not None:
        if not are_plain_tables(rotary):
            return False
        tables = rotary
    cos, sin, interleaved = tables
    positions, *scales = optional
    operators = cpu.plain_operators("append_kv", backend, *tensors, optional=(cos, sin, *optional))
    if operators is None:
        return False
    rotation = (cos, sin, interleaved, positions)
    is_done = bool(cpu.plainly(operators.plain_append_kv, *tensors, *rotation, *scales))
    if is_done:
        written(*tensors[2:4], *scales)
    return is_done


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
    written(k_cache, v_cache, k_scale, v_scale)
