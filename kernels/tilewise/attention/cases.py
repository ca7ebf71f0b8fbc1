"""The calls on which every backend of attention must agree."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tilewise.attention.case_arguments import (
    QKV,
    dense,
    fine,
    minus_infinity,
    poison_call,
    poison_states,
    ragged,
    states,
)
from tilewise.cases import Case
from tilewise.testing import Inputs, Make

# --- dense ----------------------------------------------------------------------------------------


def _case(
    id: str,
    make: Make,
    *,
    op: str = "flash_attention",
    more_grad: tuple[str, ...] = (),
    poison: bool = False,
    cancelled: float = 2.5,
    floors: dict[str, float] | None = None,
) -> Case:
    grad = QKV + more_grad
    poisoned = poison_call if poison else None
    floors = _floors(cancelled) | (floors or {})
    return Case(op, id, make, grad=grad, floors=floors, poison=poisoned)


def _floors(cancelled: float) -> dict[str, float]:
    """An output is a mean of values of size 1. The gradient of a score is a difference of products
    of size sqrt(v_head_dim), off by a few steps in float32, and is divided by sqrt(head_dim) again;
    where a query sees one key, nothing but the error remains."""
    floors = {"output": 0.5, "grad v": cancelled / 2}
    return floors | {f"grad {name}": cancelled for name in ("q", "k", "bias")}


_DENSE = [
    _case("causal", dense(17, causal=True)),
    _case(
        "everything",
        minus_infinity(
            dense(
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
    _case("full", dense(16)),
    _case("lse", dense(5, 9, return_lse=True)),
    # Sizes.
    _case("dim 1", dense(5, dim=1)),
    _case("dim 40", dense(7, dim=40, causal=True)),
    _case("dim 64", dense(63, dim=64, causal=True)),
    _case("dim 127", dense(9, dim=127)),
    _case("dim 128", dense(127, batch=1, dim=128, causal=True), cancelled=6.0),
    _case("dim 256", dense(100, 31, batch=1, heads=8, kv_heads=2, dim=256)),
    _case("dim 576/512", dense(3, 5, batch=1, kv_heads=1, dim=576, v_dim=512)),
    _case("v_dim 16 of 24", dense(6, 10, dim=24, v_dim=16, causal=True)),
    _case("v_dim 32 of 48", dense(6, 10, dim=48, v_dim=32)),
    _case("v_dim 33 of 8", dense(6, 10, dim=8, v_dim=33)),
    _case("grouped heads", dense(6, 10, heads=6, kv_heads=2, causal=True)),
    _case("one kv head", dense(6, 10, heads=4, kv_heads=1)),
    _case("one query", dense(1, 33, heads=4, kv_heads=2, causal=True)),
    _case("one query and key", dense(1, 1, batch=1, heads=1, dim=1, return_lse=True)),
    _case("more queries", dense(10, 6, causal=True, return_lse=True), poison=True),
    _case("long", dense(130, 257, batch=1, heads=1, dim=8, causal=True)),
    _case("no keys", dense(3, 0, return_lse=True)),
    _case("no keys, sinks", dense(3, 0, sinks=True, return_lse=True), more_grad=("sinks",)),
    _case("no queries", dense(0, 5, return_lse=True)),
    _case("no batch", dense(3, 5, batch=0, causal=True, return_lse=True)),
    # Scores.
    _case("scale", dense(5, scale=0.35), cancelled=4.0),
    _case("scale 0", dense(17, 15, scale=0.0, causal=True, return_lse=True)),
    _case("softcap", dense(9, 12, softcap=2.0)),
    _case("alibi", dense(9, 12, alibi=(2,))),
    _case("alibi, causal", dense(9, 12, alibi=(2,), causal=True)),
    _case("alibi by batch", dense(12, 9, alibi=(2, 2), window=(4, 4), return_lse=True)),
    _case("sinks", dense(9, 12, sinks=True, return_lse=True), more_grad=("sinks",)),
    _case(
        "sinks, rows that see nothing",
        dense(10, 6, sinks=True, causal=True, return_lse=True),
        more_grad=("sinks",),
        poison=True,
    ),
    _case("bias", dense(5, 7, bias=(2, 2, 5, 7)), more_grad=("bias",)),
    _case("bias by head", dense(5, 7, bias=(2, 1, 7), causal=True), more_grad=("bias",)),
    _case("bias by key", dense(5, 7, bias=(2, 1, 1, 7)), more_grad=("bias",)),
    _case(
        "float32 bias by query, sinks",
        fine(dense(33, 70, heads=4, kv_heads=2, causal=True, bias=(4, 33, 1), sinks=True)),
        more_grad=("sinks", "bias"),
        floors={"grad bias": 4.0},  # a sum over all keys, which is 0
    ),
    _case("bias, alibi", dense(5, 7, bias=(5, 7), alibi=(2,)), more_grad=("bias",)),
    _case(
        "bias of -inf",
        minus_infinity(dense(5, 7, bias=(2, 1, 5, 7), causal=True), slice(0, 3)),
        more_grad=("bias",),
        poison=True,
    ),
    _case(
        "bias of -inf only",
        minus_infinity(dense(5, 7, bias=(7,), return_lse=True), slice(None)),
        more_grad=("bias",),
        poison=True,
    ),
    # Masks.
    _case("mask", dense(7, 9, mask=(2, 2, 7, 9), return_lse=True), poison=True),
    _case("mask of padding", dense(5, 9, mask=(2, 1, 1, 9), causal=True), poison=True),
    _case("mask, alibi", dense(5, 9, mask=(5, 9), alibi=(2,)), poison=True),
    _case("window left", dense(5, 12, window=(3, -1)), poison=True),
    _case("window right", dense(12, 5, window=(-1, 2), return_lse=True), poison=True),
    _case("window both", dense(6, 19, kv_heads=1, window=(4, 2)), poison=True),
    _case("window 0, 0", dense(6, 9, window=(0, 0), return_lse=True), poison=True),
    _case("window, causal", dense(33, window=(7, 5), causal=True)),
    _case("window wider than the keys", dense(6, 9, window=(50, 50))),
    _case("window at the last query", dense(1, 33, window=(15, 0), causal=True), poison=True),
    _case(
        "batch invariant",
        dense(
            6, 9, batch=3, alibi=(3, 2), bias=(3, 1, 6, 9), batch_invariant=True, return_lse=True
        ),
        more_grad=("bias",),
    ),
]


# --- ragged ---------------------------------------------------------------------------------------


_ragged_case = partial(_case, op="flash_attention_varlen")

_RAGGED = [
    _ragged_case("causal", ragged((5, 1, 9), causal=True)),
    _ragged_case(
        "everything",
        ragged(
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
    _ragged_case("one sequence", ragged((17,), dim=64, causal=True, return_lse=True)),
    _ragged_case("full", ragged((4, 7), (6, 3), return_lse=True)),
    _ragged_case("dim 127", ragged((4, 7), dim=127, causal=True)),
    _ragged_case("dim 1", ragged((4, 7), dim=1, causal=True)),
    _ragged_case("one query each", ragged((1, 1, 1), (63, 1, 8), heads=4, kv_heads=1)),
    _ragged_case(
        "empty sequences",
        ragged((0, 3, 0, 4, 0), (2, 0, 0, 5, 0), causal=True, return_lse=True),
        poison=True,
    ),
    _ragged_case("padding", ragged((3, 5), padding=3, return_lse=True), poison=True),
    _ragged_case("padding only", ragged((), padding=3, sinks=True, return_lse=True), poison=True),
    _ragged_case(
        "padding only, batch invariant",
        ragged((), padding=3, batch_invariant=True, return_lse=True),
    ),
    _ragged_case("no tokens", ragged((0, 0), causal=True, return_lse=True)),
    _ragged_case("no keys", ragged((2, 3), (0, 0), return_lse=True)),
    _ragged_case("window", ragged((6, 4), (9, 7), window=(1, 1)), poison=True),
    _ragged_case("more queries", ragged((9, 3), (4, 3), causal=True), poison=True),
    _ragged_case("alibi", ragged((6, 4), (9, 7), padding=1, alibi=(2,), causal=True)),
    _ragged_case("sinks", ragged((6, 4), sinks=True), more_grad=("sinks",)),
    _ragged_case("bias", ragged((6, 4), padding=1, bias=(2, 11, 6)), more_grad=("bias",)),
    _ragged_case("bias of one number", ragged((6, 4), bias=())),
    _ragged_case(
        "bias of one number, batch invariant", ragged((6, 4), bias=(), batch_invariant=True)
    ),
    _ragged_case(
        "float32 bias by query, sinks",
        fine(ragged((16, 4), bias=(2, 20, 1), sinks=True)),
        more_grad=("sinks", "bias"),
    ),
    _ragged_case("bias by head", ragged((6, 4), bias=(2, 1, 6)), more_grad=("bias",)),
    _ragged_case("mask", ragged((6, 4), (5, 9), mask=(1, 10, 9), return_lse=True), poison=True),
    _ragged_case(
        "batch invariant",
        ragged(
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


_STATES = ("out_a", "lse_a", "out_b", "lse_b")
_MERGE = [
    Case("merge_states", "dense", states(2, 5, 3, 16), grad=_STATES),
    Case(
        "merge_states",
        "sides that saw nothing",
        states(4, 2, 63, nothing=True),
        grad=_STATES,
        poison=poison_states,
    ),
    # The log of a sum can be small by cancellation; its rounding step is that of the terms.
    Case("merge_states", "ragged", states(7, 1, 127), grad=_STATES, floors={"output 1": 1.0}),
    Case("merge_states", "empty", states(0, 4, 8), grad=_STATES),
]

CASES = [*_DENSE, *_RAGGED, *_MERGE]


# --- calls to compile ahead of time ---------------------------------------------------------------


def _compiled(id: str, make: Make, *dtypes: torch.dtype, grad: bool = True, **options: Any) -> Case:
    return Case("flash_attention", id, make, dtypes=dtypes, grad=QKV if grad else (), **options)


_LLAMA: dict[str, Any] = {"batch": 1, "heads": 32, "kv_heads": 8, "dim": 128, "causal": True}
COMPILED = [
    _compiled("SmolLM2", dense(512, heads=9, kv_heads=3, dim=64, causal=True), torch.bfloat16),
    _compiled("Llama-3-8B", dense(512, **_LLAMA), torch.bfloat16),
    _compiled("Llama-3-8B, float32", dense(512, **_LLAMA), torch.float32, floors=_floors(6.0)),
    _compiled(
        "everything",
        dense(512, **_LLAMA, softcap=30.0, alibi=(32,), sinks=True, bias=(512, 512)),
        torch.bfloat16,
        grad=False,
    ),
    _compiled("heads of 256", dense(512, batch=1, heads=8, dim=256, causal=True), torch.bfloat16),
    _compiled(
        "DeepSeek",
        dense(512, batch=1, heads=16, kv_heads=1, dim=576, v_dim=512, causal=True),
        torch.bfloat16,
        grad=False,
    ),
    *(
        _compiled(
            f"Llama-3-8B decode, {tokens}{', bias' * (bias is not None)}",
            dense(tokens, 4096, **_LLAMA | {"batch": 2}, bias=bias),
            torch.bfloat16,
            grad=False,
        )
        for tokens, bias in ((1, None), (4, None), (4, (4, 4096)))
    ),
    Case(
        "flash_attention_varlen",
        "Llama-3-8B",
        ragged((200, 300), heads=32, kv_heads=8, dim=128, causal=True),
        dtypes=(torch.float16,),
    ),
    Case("merge_states", "Llama-3-8B", states(64, 32, 128), dtypes=(torch.bfloat16,), grad=_STATES),
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
        sequences = [arguments[name] for name in arguments if name.startswith("cu_seqlens")]
        if sequences:
            sequences += [arguments.get("max_seqlen_q"), arguments.get("max_seqlen_k")]
        return (*(arguments[name] for name in QKV), *sequences, *_operator_options(arguments))

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
    return tuple(states(4, 2, 8, nothing=True)(inputs).values())


_OPERATOR_DENSE = (
    dense(5, 7, causal=True),
    dense(5, 7, heads=4, v_dim=8, alibi=(2, 4), sinks=True, bias=(4, 5, 7), window=(2, 1)),
)
_OPERATOR_RAGGED = (
    ragged((3, 0, 2), (4, 1, 2), padding=1, causal=True),
    ragged(
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
