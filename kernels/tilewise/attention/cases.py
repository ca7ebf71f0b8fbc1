"""The calls on which every backend of attention must agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tilewise.attention import naive
from tilewise.cases import Case
from tilewise.testing import Inputs, Make

_QKV = ("q", "k", "v")


# --- dense ----------------------------------------------------------------------------------------


def _dense(
    q_len: int,
    k_len: int | None = None,
    *,
    batch: int = 2,
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
    """`alibi`, `bias` (added) and `mask` (boolean) are shapes."""

    def make(inputs: Inputs) -> dict[str, Any]:
        keys, kv = q_len if k_len is None else k_len, kv_heads or heads
        return {
            "q": inputs.randn(batch, q_len, heads, dim),
            "k": inputs.randn(batch, keys, kv, dim),
            "v": inputs.randn(batch, keys, kv, v_dim or dim),
            **_tensor_options(inputs, heads, alibi, sinks, bias, mask),
            **options,
        }

    return make


def _tensor_options(
    inputs: Inputs,
    heads: int,
    alibi: tuple[int, ...] | None,
    sinks: bool,
    bias: tuple[int, ...] | None,
    mask: tuple[int, ...] | None,
) -> dict[str, Any]:
    made: dict[str, Any] = {}
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
    return made


def _minus_infinity(make: Make, hidden: slice) -> Make:
    """The same call with -inf in these columns of the bias."""

    def with_minus_infinity(inputs: Inputs) -> dict[str, Any]:
        arguments = make(inputs)
        arguments["bias"][..., hidden] = -math.inf
        return arguments

    return with_minus_infinity


def _fine(make: Make) -> Make:
    """The same call with sinks and bias in float32, whatever the rest is in."""

    def with_fine_parameters(inputs: Inputs) -> dict[str, Any]:
        arguments = make(inputs)
        for name in ("sinks", "bias"):
            if name in arguments and arguments[name].dtype.itemsize == 2:
                arguments[name] = arguments[name].float()
        return arguments

    return with_fine_parameters


def _poison(arguments: dict[str, Any]) -> dict[str, Any]:
    """Keys and values that no query sees, queries that see no key, and bias behind the mask."""
    poisoned = dict(arguments)
    q, k, v = (arguments[name].clone() for name in _QKV)
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


def _case(
    id: str,
    make: Make,
    *,
    op: str = "flash_attention",
    more_grad: tuple[str, ...] = (),
    poison: bool = False,
    cancelled: float = 2.5,
) -> Case:
    # An output is a mean of values of size 1. The gradient of a score is a difference of products
    # of size sqrt(v_head_dim), off by a few steps in float32, and is divided by sqrt(head_dim)
    # again; where a query sees one key, nothing but the error remains.
    floors = {"output": 0.5, "grad v": cancelled / 2}
    floors |= {f"grad {name}": cancelled for name in ("q", "k", "bias")}
    grad = _QKV + more_grad
    return Case(op, id, make, grad=grad, floors=floors, poison=_poison if poison else None)


_DENSE = [
    _case("causal", _dense(17, causal=True)),
    _case(
        "everything",
        _minus_infinity(
            _dense(
                9,
                21,
                heads=4,
                kv_heads=2,
                dim=40,
                v_dim=24,
                causal=True,
                scale=0.3,
                window=(12, 3),
                softcap=5.0,
                alibi=(2, 4),
                sinks=True,
                bias=(2, 4, 9, 21),
                return_lse=True,
            ),
            slice(10, 12),
        ),
        more_grad=("sinks", "bias"),
        poison=True,
    ),
    _case("full", _dense(16)),
    _case("lse", _dense(5, 9, return_lse=True)),
    # Sizes.
    _case("dim 1", _dense(5, dim=1)),
    _case("dim 40", _dense(7, dim=40, causal=True)),
    _case("dim 64", _dense(63, dim=64, causal=True)),
    _case("dim 127", _dense(9, dim=127)),
    _case("dim 128", _dense(127, batch=1, dim=128, causal=True), cancelled=6.0),
    _case("dim 576/512", _dense(3, 5, batch=1, kv_heads=1, dim=576, v_dim=512)),
    _case("v_dim 16 of 24", _dense(6, 10, dim=24, v_dim=16, causal=True)),
    _case("v_dim 32 of 48", _dense(6, 10, dim=48, v_dim=32)),
    _case("v_dim 33 of 8", _dense(6, 10, dim=8, v_dim=33)),
    _case("grouped heads", _dense(6, 10, heads=6, kv_heads=2, causal=True)),
    _case("one kv head", _dense(6, 10, heads=4, kv_heads=1)),
    _case("one query", _dense(1, 33, heads=4, kv_heads=2, causal=True)),
    _case("one query and key", _dense(1, 1, batch=1, heads=1, dim=1, return_lse=True)),
    _case("more queries", _dense(10, 6, causal=True, return_lse=True), poison=True),
    _case("long", _dense(130, 257, batch=1, heads=1, dim=8, causal=True)),
    _case("no keys", _dense(3, 0, return_lse=True)),
    _case("no keys, sinks", _dense(3, 0, sinks=True, return_lse=True), more_grad=("sinks",)),
    _case("no queries", _dense(0, 5, return_lse=True)),
    _case("no batch", _dense(3, 5, batch=0, causal=True, return_lse=True)),
    # Scores.
    _case("scale", _dense(5, scale=0.35), cancelled=4.0),
    _case("scale 0", _dense(17, 15, scale=0.0, causal=True, return_lse=True)),
    _case("softcap", _dense(9, 12, softcap=2.0)),
    _case("alibi", _dense(9, 12, alibi=(2,))),
    _case("alibi, causal", _dense(9, 12, alibi=(2,), causal=True)),
    _case("alibi by batch", _dense(12, 9, alibi=(2, 2), window=(4, 4), return_lse=True)),
    _case("sinks", _dense(9, 12, sinks=True, return_lse=True), more_grad=("sinks",)),
    _case(
        "sinks, rows that see nothing",
        _dense(10, 6, sinks=True, causal=True, return_lse=True),
        more_grad=("sinks",),
        poison=True,
    ),
    _case("bias", _dense(5, 7, bias=(2, 2, 5, 7)), more_grad=("bias",)),
    _case("bias by head", _dense(5, 7, bias=(2, 1, 7), causal=True), more_grad=("bias",)),
    _case("bias by key", _dense(5, 7, bias=(2, 1, 1, 7)), more_grad=("bias",)),
    _case(
        "float32 bias by query, sinks",
        _fine(_dense(33, 70, heads=4, kv_heads=2, causal=True, bias=(4, 33, 1), sinks=True)),
        more_grad=("sinks", "bias"),
    ),
    _case("bias, alibi", _dense(5, 7, bias=(5, 7), alibi=(2,)), more_grad=("bias",)),
    _case(
        "bias of -inf",
        _minus_infinity(_dense(5, 7, bias=(2, 1, 5, 7), causal=True), slice(0, 3)),
        more_grad=("bias",),
        poison=True,
    ),
    _case(
        "bias of -inf only",
        _minus_infinity(_dense(5, 7, bias=(7,), return_lse=True), slice(None)),
        more_grad=("bias",),
        poison=True,
    ),
    # Masks.
    _case("mask", _dense(7, 9, mask=(2, 2, 7, 9), return_lse=True), poison=True),
    _case("mask of padding", _dense(5, 9, mask=(2, 1, 1, 9), causal=True), poison=True),
    _case("mask, alibi", _dense(5, 9, mask=(5, 9), alibi=(2,)), poison=True),
    _case("window left", _dense(5, 12, window=(3, -1)), poison=True),
    _case("window right", _dense(12, 5, window=(-1, 2), return_lse=True), poison=True),
    _case("window both", _dense(6, 19, kv_heads=1, window=(4, 2)), poison=True),
    _case("window 0, 0", _dense(6, 9, window=(0, 0), return_lse=True), poison=True),
    _case("window, causal", _dense(33, window=(7, 5), causal=True)),
    _case("window wider than the keys", _dense(6, 9, window=(50, 50))),
    _case("window at the last query", _dense(1, 33, window=(15, 0), causal=True), poison=True),
    _case(
        "batch invariant",
        _dense(
            6, 9, batch=3, alibi=(3, 2), bias=(3, 1, 6, 9), batch_invariant=True, return_lse=True
        ),
        more_grad=("bias",),
    ),
]


# --- ragged ---------------------------------------------------------------------------------------


def _ragged(
    q_lens: tuple[int, ...],
    k_lens: tuple[int, ...] | None = None,
    *,
    padding: int = 0,
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
    """`padding` tokens follow the last sequence, of the queries and of the keys."""

    def make(inputs: Inputs) -> dict[str, Any]:
        keys, kv = q_lens if k_lens is None else k_lens, kv_heads or heads
        tokens_q, tokens_k = sum(q_lens) + padding, sum(keys) + padding
        return {
            "q": inputs.randn(tokens_q, heads, dim),
            "k": inputs.randn(tokens_k, kv, dim),
            "v": inputs.randn(tokens_k, kv, v_dim or dim),
            "cu_seqlens_q": _cumulative(inputs, q_lens),
            "cu_seqlens_k": _cumulative(inputs, keys),
            **_tensor_options(inputs, heads, alibi, sinks, bias, mask),
            **options,
        }

    return make


def _cumulative(inputs: Inputs, lengths: tuple[int, ...]) -> torch.Tensor:
    return inputs.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], torch.int32)


_ragged_case = partial(_case, op="flash_attention_varlen")

_RAGGED = [
    _ragged_case("causal", _ragged((5, 1, 9), causal=True)),
    _ragged_case(
        "everything",
        _ragged(
            (3, 0, 6),
            (8, 2, 4),
            padding=2,
            heads=4,
            kv_heads=2,
            dim=40,
            v_dim=24,
            max_seqlen_q=6,
            max_seqlen_k=8,
            causal=True,
            scale=0.3,
            window=(3, 1),
            softcap=5.0,
            alibi=(3, 4),
            sinks=True,
            bias=(4, 11, 8),
            return_lse=True,
        ),
        more_grad=("sinks", "bias"),
        poison=True,
    ),
    _ragged_case("one sequence", _ragged((17,), dim=64, causal=True, return_lse=True)),
    _ragged_case("full", _ragged((4, 7), (6, 3), return_lse=True)),
    _ragged_case("dim 127", _ragged((4, 7), dim=127, causal=True)),
    _ragged_case("dim 1", _ragged((4, 7), dim=1, causal=True)),
    _ragged_case("one query each", _ragged((1, 1, 1), (63, 1, 8), heads=4, kv_heads=1)),
    _ragged_case(
        "empty sequences",
        _ragged((0, 3, 0, 4, 0), (2, 0, 0, 5, 0), causal=True, return_lse=True),
        poison=True,
    ),
    _ragged_case("padding", _ragged((3, 5), padding=3, return_lse=True), poison=True),
    _ragged_case("padding only", _ragged((), padding=3, sinks=True, return_lse=True), poison=True),
    _ragged_case(
        "padding only, batch invariant",
        _ragged((), padding=3, batch_invariant=True, return_lse=True),
    ),
    _ragged_case("no tokens", _ragged((0, 0), causal=True, return_lse=True)),
    _ragged_case("no keys", _ragged((2, 3), (0, 0), return_lse=True)),
    _ragged_case("window", _ragged((6, 4), (9, 7), window=(1, 1)), poison=True),
    _ragged_case("more queries", _ragged((9, 3), (4, 3), causal=True), poison=True),
    _ragged_case("alibi", _ragged((6, 4), (9, 7), padding=1, alibi=(2,), causal=True)),
    _ragged_case("sinks", _ragged((6, 4), sinks=True), more_grad=("sinks",)),
    _ragged_case("bias", _ragged((6, 4), padding=1, bias=(2, 11, 6)), more_grad=("bias",)),
    _ragged_case("bias of one number", _ragged((6, 4), bias=())),
    _ragged_case(
        "bias of one number, batch invariant", _ragged((6, 4), bias=(), batch_invariant=True)
    ),
    _ragged_case(
        "float32 bias by query, sinks",
        _fine(_ragged((16, 4), bias=(2, 20, 1), sinks=True)),
        more_grad=("sinks", "bias"),
    ),
    _ragged_case("bias by head", _ragged((6, 4), bias=(2, 1, 6)), more_grad=("bias",)),
    _ragged_case("mask", _ragged((6, 4), (5, 9), mask=(1, 10, 9), return_lse=True), poison=True),
    _ragged_case(
        "batch invariant",
        _ragged(
            (6, 0, 4),
            (5, 3, 9),
            padding=2,
            alibi=(3, 2),
            sinks=True,
            bias=(2, 12, 9),
            causal=True,
            batch_invariant=True,
            return_lse=True,
        ),
        more_grad=("sinks", "bias"),
        poison=True,
    ),
]


# --- partial results ------------------------------------------------------------------------------


def _states(*shape: int, nothing: bool = False) -> Make:
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


def _poison_states(arguments: dict[str, Any]) -> dict[str, Any]:
    poisoned = dict(arguments)
    for side in ("a", "b"):
        saw_nothing = (arguments[f"lse_{side}"] == -math.inf).unsqueeze(-1)
        poisoned[f"out_{side}"] = arguments[f"out_{side}"].masked_fill(saw_nothing, math.nan)
    return poisoned


_STATES = ("out_a", "lse_a", "out_b", "lse_b")
_MERGE = [
    Case("merge_states", "dense", _states(2, 5, 3, 16), grad=_STATES),
    Case(
        "merge_states",
        "sides that saw nothing",
        _states(4, 2, 63, nothing=True),
        grad=_STATES,
        poison=_poison_states,
    ),
    # The log of a sum can be small by cancellation; its rounding step is that of the terms.
    Case("merge_states", "ragged", _states(7, 1, 127), grad=_STATES, floors={"output 1": 1.0}),
    Case("merge_states", "empty", _states(0, 4, 8), grad=_STATES),
]

CASES = [*_DENSE, *_RAGGED, *_MERGE]


# --- calls to compile ahead of time ---------------------------------------------------------------


def _compiled(id: str, make: Make, *dtypes: torch.dtype, grad: bool = True, **options: Any) -> Case:
    return Case("flash_attention", id, make, dtypes=dtypes, grad=_QKV if grad else (), **options)


_LLAMA: dict[str, Any] = {"batch": 1, "heads": 32, "kv_heads": 8, "dim": 128, "causal": True}
COMPILED = [
    _compiled("SmolLM2", _dense(512, heads=9, kv_heads=3, dim=64, causal=True), torch.bfloat16),
    _compiled("Llama-3-8B", _dense(512, **_LLAMA), torch.bfloat16),
    _compiled("Llama-3-8B, float32", _dense(512, **_LLAMA), torch.float32),
    _compiled(
        "everything",
        _dense(512, **_LLAMA, softcap=30.0, alibi=(32,), sinks=True, bias=(512, 512)),
        torch.bfloat16,
        grad=False,
    ),
    _compiled("heads of 256", _dense(512, batch=1, heads=8, dim=256, causal=True), torch.bfloat16),
    _compiled(
        "DeepSeek",
        _dense(512, batch=1, heads=16, kv_heads=1, dim=576, v_dim=512, causal=True),
        torch.bfloat16,
        grad=False,
    ),
    *(
        _compiled(
            f"Llama-3-8B decode, {tokens}{', bias' * (bias is not None)}",
            _dense(tokens, 4096, **_LLAMA | {"batch": 2}, bias=bias),
            torch.bfloat16,
            grad=False,
        )
        for tokens, bias in ((1, None), (4, None), (4, (4, 4096)))
    ),
    Case(
        "flash_attention_varlen",
        "Llama-3-8B",
        _ragged((200, 300), heads=32, kv_heads=8, dim=128, causal=True),
        dtypes=(torch.float16,),
    ),
    Case(
        "merge_states", "Llama-3-8B", _states(64, 32, 128), dtypes=(torch.bfloat16,), grad=_STATES
    ),
]
"""Every kernel in the configurations that ship; see `tilewise build --triton`."""


# --- the operators --------------------------------------------------------------------------------


def _operator_options(arguments: dict[str, Any]) -> tuple[Any, ...]:
    return (
        arguments.get("alibi_slopes"),
        arguments.get("sinks"),
        arguments.get("bias"),
        arguments.get("causal", False),
        0.25,
        *arguments.get("window", (-1, -1)),
        arguments.get("softcap", 0.0),
        arguments.get("batch_invariant", False),
    )


def _forward_call(make: Make) -> Callable[[Inputs], tuple[Any, ...]]:
    """A case as positional arguments of the forward operator."""

    def call(inputs: Inputs) -> tuple[Any, ...]:
        arguments = make(inputs)
        ragged = [arguments[name] for name in arguments if name.startswith("cu_seqlens")]
        if ragged:
            ragged += [arguments.get("max_seqlen_q"), arguments.get("max_seqlen_k")]
        return (*(arguments[name] for name in _QKV), *ragged, *_operator_options(arguments))

    return call


def _backward_call(make: Make) -> Callable[[Inputs], tuple[Any, ...]]:
    """A case as positional arguments of the backward operator, both results having a gradient."""

    def call(inputs: Inputs) -> tuple[Any, ...]:
        q, k, v, *others = _forward_call(make)(inputs)
        out, lse = inputs.randn(*q.shape[:-1], v.shape[-1]), inputs.randn(*q.shape[:-1])
        grad_out, grad_lse = torch.ones_like(out), torch.ones_like(lse)
        bias = others[-7]
        return (grad_out, grad_lse, out, lse, q, k, v, *others, bias is not None)

    return call


def _merge_call(inputs: Inputs) -> tuple[Any, ...]:
    return tuple(_states(4, 2, 8, nothing=True)(inputs).values())


_OPERATOR_DENSE = (
    _dense(5, 7, causal=True),
    _dense(5, 7, heads=4, v_dim=8, alibi=(2, 4), sinks=True, bias=(4, 5, 7), window=(2, 1)),
)
_OPERATOR_RAGGED = (
    _ragged((3, 0, 2), (4, 1, 2), padding=1, causal=True),
    _ragged(
        (3, 0, 2), (4, 1, 2), alibi=(3, 2), sinks=True, bias=(2, 5, 4), max_seqlen_k=4, softcap=2.0
    ),
)

OPERATOR_CALLS = [
    *(("flash_attention", _forward_call(make)) for make in _OPERATOR_DENSE),
    *(("flash_attention_backward", _backward_call(make)) for make in _OPERATOR_DENSE),
    *(("flash_attention_varlen", _forward_call(make)) for make in _OPERATOR_RAGGED),
    *(("flash_attention_varlen_backward", _backward_call(make)) for make in _OPERATOR_RAGGED),
    ("merge_states", _merge_call),
]
