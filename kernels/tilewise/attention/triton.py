"""The Triton backend of attention: results allocated, configurations chosen, kernels launched."""

from __future__ import annotations

from typing import Any

import torch

from tilewise import cpu, gpu
from tilewise.attention.native import extras
from tilewise.attention.operators import FLASH_ATTENTION, FLASH_ATTENTION_VARLEN


def why_not(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any, **options: Any
) -> str | None:
    """Why the Triton kernels cannot take the call."""
    return gpu.why_not(q)


def pieces(dim: int) -> tuple[int, int]:
    """A head dimension as two powers of two of at least 16, the second of which may be 0."""
    main = max(1 << (dim.bit_length() - 1), 16)
    rest = dim - main
    return main, 0 if rest <= 0 else power_of_two(rest)


def power_of_two(n: int) -> int:
    """The next power of two that tiles can have."""
    return max(1 << (n - 1).bit_length(), 16)


def _blocks(q: torch.Tensor, dim: int, v_dim: int) -> dict[str, int]:
    """BLOCK_M, BLOCK_N and how to compile, by the head dimension: not yet measured.

    They must not depend on the lengths: a row's bits would.
    """
    widest = max(power_of_two(dim), power_of_two(v_dim))
    if q.dtype == torch.float32:  # no tensor cores: small tiles that stay in registers
        m, n, warps, stages = {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 32, 4, 2)}.get(
            widest, (32, 32, 4, 2) if widest == 128 else (16, 16, 4, 1)
        )
    elif widest <= 64:
        m, n, warps, stages = 128, 64, 4, 3
    elif widest == 128:
        m, n, warps, stages = (128, 64, 8, 3) if gpu.architecture(q) != "gfx942" else (128, 64, 4, 1)
    elif widest == 256:
        m, n, warps, stages = 64, 32, 8, 2
    else:
        m, n, warps, stages = 32, 16, 8, 1
    if gpu.architecture(q) == "gfx942":
        stages = 1
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


@FLASH_ATTENTION.kernel("triton")
def _flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _attend(q, k, v, None, None, *options)


@FLASH_ATTENTION_VARLEN.kernel("triton")
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
    return _attend(q, k, v, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), *options)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
    causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from tilewise.attention import triton_kernels as kernels

    q, k, v = (cpu.unit_stride(x) for x in (q, k, v))
    is_ragged = cu_seqlens_q is not None
    out_shape, (dim, v_dim) = (*q.shape[:-1], v.shape[-1]), (q.shape[-1], v.shape[-1])
    if is_ragged:  # tokens behind the last sequence belong to no program
        out, lse = q.new_zeros(out_shape), q.new_full(q.shape[:-1], -torch.inf, dtype=torch.float32)
    else:
        out, lse = q.new_empty(out_shape), q.new_empty(q.shape[:-1], dtype=torch.float32)
    blocks = _blocks(q, dim, v_dim)
    tokens, heads = q.shape[-3:-1]
    batch = len(cu_seqlens_q) - 1 if cu_seqlens_q is not None else q.shape[0]
    tiles = -(-tokens // blocks["BLOCK_M"])
    grid = (tiles + batch, heads, 1) if is_ragged else (tiles, heads, batch)
    if out.numel() == 0 or batch == 0:
        return out, lse
    alibi_slopes, sinks, bias = extras(alibi_slopes, sinks, bias)
    main, rest = pieces(dim)
    gpu.launch(
        kernels.forward,
        grid,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        alibi_slopes,
        sinks,
        bias,
        batch,
        heads,
        tokens,
        k.shape[-3],
        dim,
        v_dim,
        *(stride for x in (q, k, v) for stride in _strides(x)),
        alibi_slopes.stride(0) if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        *_bias_layout(bias, (batch, heads, tokens), k.shape[-3], is_ragged),
        scale,
        softcap,
        window_left,
        0 if causal else window_right,
        GROUP=heads // k.shape[-2],
        HAS_SOFTCAP=softcap > 0,
        IS_MASK=bias is not None and bias.dtype == torch.bool,
        D_MAIN=main,
        D_REST=rest,
        D_V=power_of_two(v_dim),
        **blocks,
    )
    return out, lse


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Of the batch, tokens and heads."""
    *batch, tokens, heads, _ = x.stride()
    return (batch[0] if batch else 0, tokens, heads)


def _bias_layout(
    bias: torch.Tensor | None, shape: tuple[int, int, int], keys: int, is_ragged: bool
) -> tuple[int, ...]:
    """Strides of the batch, heads, queries and keys, 0 where all have the same, and the keys."""
    if bias is None:
        return (0, 0, 0, 0, 0)
    batch, heads, queries = shape
    if is_ragged:  # by a key's number within its sequence
        keys = keys if bias.shape[-1] == 1 else bias.shape[-1]
        return (0, *bias.expand(heads, queries, keys).stride(), keys)
    return (*bias.expand(batch, heads, queries, keys).stride(), keys)
