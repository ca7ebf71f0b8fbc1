"""What attention calls must satisfy.

Shapes, dtypes and devices are checked on every call; values only under `validate=True`, because
reading them makes a GPU wait.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TypeAlias

import torch

from tilewise import checks

MAX_HEAD_DIM = 576
"""The widest head: DeepSeek's latent attention has 512 + 64 for its keys."""

_BIAS_DTYPES = (torch.bool, *checks.FLOATS)
_SLOPE_DTYPES = (torch.float32, torch.float64)

Numbers: TypeAlias = tuple[bool, float | None, tuple[int, int], float, bool, bool]
"""The options that are no tensors: causal, scale, window, softcap, return_lse, batch_invariant."""


def check_flash_attention(
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
    validate: bool = False,
) -> None:
    """Raise ValueError or TypeError where `flash_attention` cannot take the arguments."""
    check_heads(q, k, v, "batch seqlen_q heads head_dim", "batch seqlen_k kv_heads")
    batch, q_len, heads, _ = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] != batch:
            raise ValueError(f"{name}: batch must be q's, {batch}, got {x.shape[0]}")
    check_options(
        q,
        batch,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        return_lse=return_lse,
        batch_invariant=batch_invariant,
    )
    if bias is not None:
        check_bias(bias, q, (batch, heads, q_len, k.shape[1]), "(batch, heads, seqlen_q, seqlen_k)")


def check_flash_attention_varlen(
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
    validate: bool = False,
) -> None:
    """Raise ValueError or TypeError where `flash_attention_varlen` cannot take the arguments."""
    check_heads(q, k, v, "tokens_q heads head_dim", "tokens_k kv_heads")
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q)
    if len(cu_seqlens_k) != len(cu_seqlens_q):
        raise ValueError(
            f"cu_seqlens_k: must be as long as cu_seqlens_q, {len(cu_seqlens_q)}, "
            f"got {len(cu_seqlens_k)}"
        )
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest is not None:
            checks.is_integer(name, longest)
            if longest < 0:
                raise ValueError(f"{name}: must be >= 0, got {longest}")
    check_options(
        q,
        len(cu_seqlens_q) - 1,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        return_lse=return_lse,
        batch_invariant=batch_invariant,
    )
    if bias is not None:
        checks.is_tensor("bias", bias)
        columns = max_seqlen_k
        if columns is None and bias.dim() > 0:
            columns = bias.shape[-1]
        shape = (q.shape[1], q.shape[0], columns or 0)
        check_bias(bias, q, shape, "(heads, tokens_q, max_seqlen_k)")
    if validate:
        validate_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "q", len(q), max_seqlen_q, "max_seqlen_q")
        validate_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "k", len(k), max_seqlen_k, "max_seqlen_k")
        if bias is not None and bias.shape[-1] != 1:
            validate_cu_seqlens(
                "cu_seqlens_k", cu_seqlens_k, "k", len(k), bias.shape[-1], "bias: last dimension"
            )


def check_merge_states(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    validate: bool = False,
) -> None:
    """Raise ValueError or TypeError where `merge_states` cannot take the arguments."""
    checks.has_dtype("out_a", out_a, checks.FLOATS)
    if out_a.dim() < 2:
        raise ValueError(f"out_a: shape must be (..., heads, head_dim), got {tuple(out_a.shape)}")
    checks.like("out_b", out_b, "out_a", out_a)
    checks.has_shape("out_b", out_b, tuple(out_a.shape), "out_a's shape")
    lse_dtype = torch.float64 if out_a.dtype == torch.float64 else torch.float32
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        checks.has_dtype(name, lse, (lse_dtype,))
        checks.on_device_of(name, lse, "out_a", out_a)
        checks.has_shape(name, lse, tuple(out_a.shape[:-1]), "out_a's without head_dim")


# --- what dense, ragged and paged attention have in common ----------------------------------------


def check_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_dims: str,
    kv_dims: str,
) -> None:
    """Raise unless q, k and v are of one kind and their heads fit together.

    Args:
        q, k, v: (..., heads, head_dim), (..., kv_heads, head_dim), (..., kv_heads, v_head_dim).
        q_dims: the names of q's dimensions.
        kv_dims: those of k and v, without the last.
    """
    checks.has_dtype("q", q, checks.FLOATS)
    checks.has_dims("q", q, q_dims)
    checks.like("k", k, "q", q)
    checks.has_dims("k", k, kv_dims + " head_dim")
    checks.like("v", v, "q", q)
    checks.has_dims("v", v, kv_dims + " v_head_dim")
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    for name, x, width in (("q", q, q_shape[-1]), ("k", k, k_shape[-1]), ("v", v, v_shape[-1])):
        if not 1 <= width <= MAX_HEAD_DIM:
            wanted = f"<= {MAX_HEAD_DIM}" if width else ">= 1"
            raise ValueError(f"{name}: head_dim must be {wanted}, got {width}")
        checks.has_unit_last_stride(name, x)
    if k_shape[-1] != q_shape[-1]:
        raise ValueError(f"k: head_dim must be q's, {q_shape[-1]}, got {k_shape[-1]}")
    heads, kv_heads = q_shape[-2], k_shape[-2]
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        layout = kv_dims.replace(" ", ", ")
        raise ValueError(
            f"q: heads must be a multiple of k's kv_heads, {kv_heads}, got {heads}; "
            f"k is ({layout}, head_dim)"
        )
    for i in (-3, -2):
        if v_shape[i] != k_shape[i]:
            dim = kv_dims.split()[i + 1]
            raise ValueError(f"v: {dim} must be k's, {k_shape[i]}, got {v_shape[i]}")


def check_options(
    q: torch.Tensor,
    batch: int,
    *,
    causal: bool,
    scale: float | None,
    window: tuple[int, int],
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    return_lse: bool,
    batch_invariant: bool,
) -> None:
    """Raise unless the options fit q (..., heads, head_dim) and the number of sequences."""
    for name, flag in (
        ("causal", causal),
        ("return_lse", return_lse),
        ("batch_invariant", batch_invariant),
    ):
        checks.is_bool(name, flag)
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"scale: must be a number or None, got {type(scale).__name__}")
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale: must be finite, got {scale}")
    if not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap: must be a number, got {type(softcap).__name__}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: must be >= 0 and finite, got {softcap}")
    if not isinstance(window, (tuple, list)):
        raise TypeError(f"window: must be (left, right), got {type(window).__name__}")
    if len(window) != 2:
        raise ValueError(f"window: must be (left, right), got {tuple(window)}")
    for side in window:
        checks.is_integer("window", side)
        if side < -1:
            raise ValueError(f"window: must be >= -1 on both sides, got {tuple(window)}")
    if alibi_slopes is None and sinks is None:
        return
    heads = q.shape[-2]
    if alibi_slopes is not None:
        checks.has_dtype("alibi_slopes", alibi_slopes, _SLOPE_DTYPES)
        checks.on_device_of("alibi_slopes", alibi_slopes, "q", q)
        if alibi_slopes.shape not in ((heads,), (batch, heads)):
            raise ValueError(
                f"alibi_slopes: shape must be ({heads},) or ({batch}, {heads}), (heads,) or "
                f"(batch, heads), got {tuple(alibi_slopes.shape)}"
            )
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise ValueError("alibi_slopes: must not require a gradient, they are constants")
    if sinks is not None:
        checks.has_dtype("sinks", sinks, checks.FLOATS)
        checks.on_device_of("sinks", sinks, "q", q)
        checks.has_shape("sinks", sinks, (heads,), "q's heads")


def are_plain_numbers(numbers: Numbers) -> bool:
    """Whether these are what `check_options` lets pass, and of the usual types; quickly."""
    causal, scale, window, softcap, return_lse, batch_invariant = numbers
    if not (type(causal) is type(return_lse) is type(batch_invariant) is bool):
        return False
    if type(softcap) is not float or not 0 <= softcap < math.inf or type(window) is not tuple:
        return False
    if len(window) != 2 or not type(window[0]) is type(window[1]) is int:
        return False
    if scale is not None and (type(scale) is not float or not -math.inf < scale < math.inf):
        return False
    return window[0] >= -1 <= window[1]


def check_bias(bias: torch.Tensor, q: torch.Tensor, shape: tuple[int, ...], names: str) -> None:
    """Raise unless `bias` broadcasts to `shape`, whose dimensions `names` names."""
    checks.has_dtype("bias", bias, _BIAS_DTYPES)
    checks.on_device_of("bias", bias, "q", q)
    fits = bias.dim() <= len(shape) and all(
        size in (1, wanted)
        for size, wanted in zip(reversed(bias.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"bias: shape must broadcast to {shape}, {names}, got {tuple(bias.shape)}")


def check_cu_seqlens(name: str, cu_seqlens: torch.Tensor, q: torch.Tensor) -> None:
    """Raise unless `cu_seqlens` is an int32 (batch + 1,) on q's device."""
    checks.has_dtype(name, cu_seqlens, (torch.int32,))
    checks.on_device_of(name, cu_seqlens, "q", q)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"{name}: shape must be (batch + 1,), got {tuple(cu_seqlens.shape)}")


def validate_cu_seqlens(
    name: str,
    cu_seqlens: torch.Tensor,
    tokens_name: str,
    tokens: int,
    longest: int | None,
    longest_name: str,
) -> None:
    """Raise unless the sequences follow one another within `tokens`, none above `longest`."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ValueError(f"{name}: must start at 0, got {ends[0]}")
    for row, (start, end) in enumerate(pairwise(ends)):
        if end < start:
            raise ValueError(f"{name}: must not decrease, batch row {row} is {start} to {end}")
        if end > tokens:
            raise ValueError(
                f"{name}: must stay within {tokens_name}'s {tokens} tokens, "
                f"batch row {row} is {start} to {end}"
            )
        if longest is not None and end - start > longest:
            raise ValueError(
                f"{longest_name}: must be >= {end - start}, the length of batch row {row}, "
                f"got {longest}"
            )
