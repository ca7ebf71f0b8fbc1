"""What attention cases are called with: dense and ragged calls, partial results, and poison."""

from __future__ import annotations

import math
from typing import Any

import torch

from tilewise.attention import naive
from tilewise.testing import Inputs, Make

QKV = ("q", "k", "v")


# --- the calls ------------------------------------------------------------------------------------


def dense(q_len: int, k_len: int | None = None, *, batch: int = 2, **options: Any) -> Make:
    """A call of `flash_attention`; `_make` says what the options may be."""
    return _make((batch, q_len), (batch, q_len if k_len is None else k_len), {}, **options)


def ragged(
    q_lens: tuple[int, ...],
    k_lens: tuple[int, ...] | None = None,
    *,
    padding: int = 0,
    **options: Any,
) -> Make:
    """A call of `flash_attention_varlen`; `_make` says what the options may be.

    `padding` tokens follow the last sequence, of the queries and of the keys.
    """
    k_lens = q_lens if k_lens is None else k_lens
    lengths = {"cu_seqlens_q": q_lens, "cu_seqlens_k": k_lens}
    return _make((sum(q_lens) + padding,), (sum(k_lens) + padding,), lengths, **options)


def _make(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    lengths: dict[str, tuple[int, ...]],
    *,
    heads: int = 2,
    kv_heads: int | None = None,
    dim: int = 16,
    v_dim: int | None = None,
    alibi: tuple[int, ...] | None = None,
    sinks: bool = False,
    bias: tuple[int, ...] | None = None,
    mask: tuple[int, ...] | None = None,
    **options: Any,
) -> Make:
    """`alibi`, `bias` (added) and `mask` (boolean) are shapes; `options` are passed on."""

    def make(inputs: Inputs) -> dict[str, Any]:
        kv = kv_heads or heads
        made = {
            "q": inputs.randn(*q_shape, heads, dim),
            "k": inputs.randn(*k_shape, kv, dim),
            "v": inputs.randn(*k_shape, kv, v_dim or dim),
        }
        for name, each in lengths.items():
            ends = [sum(each[:i]) for i in range(len(each) + 1)]
            made[name] = inputs.tensor(ends, torch.int32)
        if alibi is not None:
            made["alibi_slopes"] = inputs.rand(*alibi, dtype=torch.float32)
        if sinks:
            made["sinks"] = inputs.randn(heads)
        if bias is not None:
            made["bias"] = inputs.randn(*bias)
        if mask is not None:
            # One whole column is hidden, and about a quarter of the rest.
            made["bias"] = inputs.rand(*mask, dtype=torch.float32) < 0.75
            made["bias"][..., -1] = False
        return made | options

    return make


def minus_infinity(make: Make, hidden: slice) -> Make:
    """The same call with -inf in these columns of the bias."""

    def withminus_infinity(inputs: Inputs) -> dict[str, Any]:
        arguments = make(inputs)
        arguments["bias"][..., hidden] = -math.inf
        return arguments

    return withminus_infinity


def fine(make: Make) -> Make:
    """The same call with sinks and bias in float32, whatever the rest is in."""

    def with_fine_parameters(inputs: Inputs) -> dict[str, Any]:
        arguments = make(inputs)
        for name in ("sinks", "bias"):
            if name in arguments and arguments[name].dtype.itemsize == 2:
                arguments[name] = arguments[name].float()
        return arguments

    return with_fine_parameters


def states(*shape: int, nothing: bool = False) -> Make:
    """Two partial results (..., heads, dim); with `nothing` some saw no key."""

    def make(inputs: Inputs) -> dict[str, Any]:
        lse_dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        made: dict[str, Any] = {}
        for side in ("a", "b"):
            out, lse = inputs.randn(*shape), inputs.randn(*shape[:-1], scale=3, dtype=lse_dtype)
            if nothing:
                rows = (slice(0, 2) if side == "a" else slice(1, 3), slice(None))
                out[rows], lse[rows] = 0, -math.inf
            made |= {f"out_{side}": out, f"lse_{side}": lse}
        return made

    return make


# --- what must not matter -------------------------------------------------------------------------


def poison_call(arguments: dict[str, Any]) -> dict[str, Any]:
    """Keys and values that no query sees, queries that see no key, and bias behind the mask."""
    poisoned = dict(arguments)
    q, k, v = (arguments[name].clone() for name in QKV)
    bias = arguments.get("bias")
    causal, window = arguments.get("causal", False), arguments.get("window", (-1, -1))
    ragged = {name: arguments[name] for name in arguments if name.startswith("cu_seqlens")}
    if ragged:
        distance, exists = naive.place_ragged(len(q), len(k), **ragged)
        aligned = naive.bias_of_tokens(bias, len(k), ragged["cu_seqlens_k"])
    else:
        distance, exists = naive.place_dense(q.shape[1], k.shape[1], q.device)
        aligned = bias
    in_sight = naive.in_sight(distance, exists, causal, window)
    visible = in_sight.expand(*q.shape[:-3], q.shape[-2], *in_sight.shape)
    if bias is not None and aligned is not None:
        visible = visible & (aligned if aligned.dtype == torch.bool else aligned != -math.inf)
        if bias.dtype != torch.bool and bias.shape[-2:] == in_sight.shape and not ragged:
            poisoned["bias"] = bias.masked_fill(~in_sight, math.nan)
    q[~visible.any(-1).mT] = math.nan
    seen = visible.any(-2).unflatten(-2, (k.shape[-2], -1)).any(-2).mT  # (..., keys, kv_heads)
    k[~seen] = math.nan
    v[~seen] = math.inf
    return poisoned | {"q": q, "k": k, "v": v}


def poison_states(arguments: dict[str, Any]) -> dict[str, Any]:
    poisoned = dict(arguments)
    for side in ("a", "b"):
        saw_nothing = (arguments[f"lse_{side}"] == -math.inf).unsqueeze(-1)
        poisoned[f"out_{side}"] = arguments[f"out_{side}"].masked_fill(saw_nothing, math.nan)
    return poisoned
