"""The calls on which every backend of the mixture of experts and its router must agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tilewise.cases import Case
from tilewise.moe.operators import parts_of
from tilewise.quant.quantizer import quantize
from tilewise.testing import Inputs, Make

_EVERYTHING = ("x", "router_logits", "w_gate_up", "w_down")

# A row of an expert's gradient may come from a single token: one vector times one factor, which is
# a sum of about `dim` terms of size 1 that nearly cancel. Its error is the whole row's.
_FLOORS = {"grad w_gate_up": 4.0, "grad w_down": 4.0}


def _moe(
    tokens: int, dim: int, hidden: int, *, experts: int, top_k: int, normalize: bool = True
) -> Make:
    def make(inputs: Inputs) -> dict[str, Any]:
        return {
            "x": inputs.randn(tokens, dim),
            "router_logits": inputs.randn(tokens, experts),
            "w_gate_up": inputs.randn(experts, 2 * hidden, dim, scale=dim**-0.5),
            "w_down": inputs.randn(experts, dim, hidden, scale=hidden**-0.5),
            "top_k": top_k,
            "normalize": normalize,
        }

    return make


def _ties(inputs: Inputs) -> dict[str, Any]:
    arguments = _moe(9, 24, 16, experts=6, top_k=2)(inputs)
    return arguments | {"router_logits": inputs.randint(0, 2, 9, 6).to(inputs.dtype)}


def _unused_expert(inputs: Inputs) -> dict[str, Any]:
    arguments = _moe(7, 24, 16, experts=5, top_k=2)(inputs)
    arguments["router_logits"][:, 3] = -20
    return arguments


def _nan_in_unused(arguments: dict[str, Any]) -> dict[str, Any]:
    for name in ("w_gate_up", "w_down"):
        arguments[name][3] = math.nan
    return arguments


def _router_in_float32(inputs: Inputs) -> dict[str, Any]:
    arguments = _moe(7, 24, 16, experts=4, top_k=2)(inputs)
    return arguments | {"router_logits": inputs.randn(7, 4, dtype=torch.float32)}


def _quantized(scheme: str, tokens: int = 5, hidden: int = 32, **options: Any) -> Make:
    def make(inputs: Inputs) -> dict[str, Any]:
        arguments = _moe(tokens, 64, hidden, experts=4, top_k=2)(inputs)
        for name in ("w_gate_up", "w_down"):
            arguments[name] = quantize(arguments[name].float(), scheme, **options)
        return arguments

    return make


def _router(tokens: int, dim: int, experts: int, weight_dtype: torch.dtype | None = None) -> Make:
    def make(inputs: Inputs) -> dict[str, Any]:
        weight = inputs.randn(experts, dim, scale=dim**-0.5, dtype=weight_dtype)
        return {"x": inputs.randn(tokens, dim), "weight": weight}

    return make


CASES = [
    Case(
        "moe", "top 2 of 5", _moe(7, 24, 16, experts=5, top_k=2), grad=_EVERYTHING, floors=_FLOORS
    ),
    Case(
        "moe",
        "not normalized",
        _moe(7, 24, 16, experts=5, top_k=2, normalize=False),
        grad=_EVERYTHING,
        floors=_FLOORS,
    ),
    Case("moe", "odd sizes", _moe(7, 13, 9, experts=3, top_k=2), grad=_EVERYTHING, floors=_FLOORS),
    Case(
        "moe",
        "top 1",
        _moe(9, 24, 16, experts=4, top_k=1),
        grad=("x", "w_gate_up", "w_down"),
        floors=_FLOORS,
    ),
    Case(
        "moe", "all experts", _moe(3, 16, 8, experts=4, top_k=4), grad=_EVERYTHING, floors=_FLOORS
    ),
    Case("moe", "one expert", _moe(3, 16, 8, experts=1, top_k=1)),
    Case("moe", "one token", _moe(1, 32, 64, experts=16, top_k=4)),
    Case("moe", "no tokens", _moe(0, 16, 8, experts=4, top_k=2)),
    Case("moe", "ties", _ties, grad=("x",)),
    Case(
        "moe",
        "unused expert",
        _unused_expert,
        grad=_EVERYTHING,
        floors=_FLOORS,
        poison=_nan_in_unused,
    ),
    Case("moe", "router in float32", _router_in_float32),
    Case("moe", "int4 weights", _quantized("int4", group_size=32), grad=("x", "router_logits")),
    Case("moe", "int8 weights", _quantized("int8", group_size=-1)),
    # So many rows for each expert that kernels widen blocks of its weights; 80 rows of gate and up
    # do not meet between panels of 16.
    Case("moe", "many tokens", _moe(40, 70, 48, experts=3, top_k=2), grad=("x",)),
    Case("moe", "many tokens, odd halves", _moe(40, 70, 40, experts=3, top_k=2)),
    *(
        Case("moe", f"{scheme} weights, many tokens", _quantized(scheme, 40, hidden))
        for scheme, hidden in (("int4", 48), ("int8", 40), ("nf4", 32))
    ),
]

CASES += [
    Case("router_logits", "odd sizes", _router(7, 77, 5), grad=("x", "weight")),
    Case("router_logits", "one token", _router(1, 64, 8)),
    Case("router_logits", "many", _router(67, 300, 33), grad=("x", "weight")),
    Case("router_logits", "one number", _router(3, 1, 1)),
    Case("router_logits", "no tokens", _router(0, 16, 4)),
    Case("router_logits", "no experts", _router(3, 16, 0)),
    Case(
        "router_logits",
        "weight in float32",
        _router(9, 65, 8, torch.float32),
        grad=("x", "weight"),
    ),
]


# --- calls to compile ahead of time ---------------------------------------------------------------


def _int4_experts(inputs: Inputs) -> dict[str, Any]:
    arguments = _moe(64, 1024, 512, experts=4, top_k=2)(inputs)
    for name in ("w_gate_up", "w_down"):
        arguments[name] = quantize(arguments[name].float(), "int4", search="minmax")
    return arguments


COMPILED = [
    Case(
        "moe",
        "Granite-1B",
        _moe(64, 1024, 512, experts=4, top_k=2),
        dtypes=(torch.bfloat16, torch.float32),
    ),
    Case("moe", "Granite-1B, int4", _int4_experts, dtypes=(torch.bfloat16,)),
    Case("router_logits", "Granite-1B", _router(64, 1024, 32), dtypes=(torch.bfloat16,)),
]
"""Every kernel in the configurations that ship; see `tilewise build --triton`."""


# --- the registered operator, for opcheck ---------------------------------------------------------


def _operator(make: Make) -> Callable[[Inputs], tuple[Any, ...]]:
    def make_call(inputs: Inputs) -> tuple[Any, ...]:
        arguments = make(inputs)
        return (
            arguments["x"],
            arguments["router_logits"],
            *parts_of(arguments["w_gate_up"]),
            *parts_of(arguments["w_down"]),
            arguments["top_k"],
            arguments["normalize"],
        )

    return make_call


OPERATOR_CALLS: list[tuple[str, Callable[[Inputs], tuple[Any, ...]]]] = [
    ("moe", _operator(_moe(7, 13, 9, experts=3, top_k=2))),
    ("moe", _operator(_quantized("int4", group_size=32))),
    ("router_logits", lambda inputs: tuple(_router(7, 13, 5)(inputs).values())),
]
