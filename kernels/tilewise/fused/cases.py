"""The calls on which every backend of the fused operations must agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tilewise.cases import Case
from tilewise.fused.tables import Llama3Scaling, rotary_tables
from tilewise.testing import Inputs, Make


def _norm(*shape: int, bias: bool = False, residual: bool = False, offset: float = 0) -> Make:
    def make(inputs: Inputs) -> dict[str, Any]:
        arguments = {"x": inputs.randn(*shape) + offset, "weight": inputs.randn(shape[-1])}
        if bias:
            arguments["bias"] = inputs.randn(shape[-1])
        if residual:
            arguments["residual"] = inputs.randn(*shape)
        return arguments | {"eps": 1e-5}

    return make


def _norm_of_heads(inputs: Inputs) -> dict[str, Any]:
    """Heads that are a part of longer rows, as queries are of one projection with the keys."""
    x = inputs.randn(5, 6 * 40)[:, 40:200].unflatten(-1, (4, 40))
    return {"x": x, "weight": inputs.randn(40), "eps": 1e-5}


def _rotary(*shape: int, rotary_dim: int, interleaved: bool = False) -> Make:
    def make(inputs: Inputs) -> dict[str, Any]:
        return {
            "x": inputs.randn(*shape),
            "tables": rotary_tables(
                rotary_dim,
                200,
                scaling=Llama3Scaling(original_max_positions=64),
                interleaved=interleaved,
                device=inputs.device,
            ),
            "positions": inputs.randint(0, 200, *shape[:-2]),
        }

    return make


def _gated(*shape: int, scale: float = 1.0, **options: str) -> Make:
    def make(inputs: Inputs) -> dict[str, Any]:
        gate, up = inputs.randn(*shape, scale=scale), inputs.randn(*shape)
        return {"gate": gate, "up": up, **options}

    return make


def _halves(*shape: int, **options: str) -> Make:
    def make(inputs: Inputs) -> dict[str, Any]:
        gate, up = inputs.randn(*shape).chunk(2, dim=-1)
        return {"gate": gate, "up": up, **options}

    return make


def _sample(batch: int, vocabulary: int, **options: float) -> Make:
    def make(inputs: Inputs) -> dict[str, Any]:
        return {"logits": inputs.randn(batch, vocabulary, scale=3), "seed": 5, **options}

    return make


def _sample_everything(inputs: Inputs) -> dict[str, Any]:
    previous = inputs.randint(-1, 63, 3, 9)
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02}
    return (
        _sample(3, 63)(inputs)
        | options
        | {
            "repetition_penalty": 1.3,
            "previous_tokens": previous,
        }
    )


def _sample_per_row(inputs: Inputs) -> dict[str, Any]:
    def row_values(*values: float) -> torch.Tensor:
        return inputs.tensor(values, torch.float32)

    return _sample(4, 127)(inputs) | {
        "temperature": row_values(0, 0.5, 1, 2),
        "top_k": inputs.tensor([0, 1, 40, 500], torch.int64),
        "top_p": row_values(0.3, 1, 0.9, 1),
        "min_p": row_values(0, 0.1, 0, 1),
        "repetition_penalty": row_values(1, 1.5, 0.8, 1),
        "previous_tokens": inputs.randint(-1, 127, 4, 5),
        "sample_ids": inputs.tensor([7, 7, 2**40, 0], torch.int64),
        "positions": inputs.tensor([0, 1, 2, 10**6], torch.int64),
    }


def _sample_hidden(inputs: Inputs) -> dict[str, Any]:
    """Every third token is forbidden."""
    arguments = _sample(3, 64, top_p=0.95)(inputs)
    arguments["logits"][:, ::3] = -math.inf
    return arguments


def _nan_for_hidden(arguments: dict[str, Any]) -> dict[str, Any]:
    logits = arguments["logits"]
    return arguments | {"logits": logits.masked_fill(logits == -math.inf, math.nan)}


def _sample_ties(inputs: Inputs) -> dict[str, Any]:
    logits = inputs.randint(0, 3, 5, 40).to(inputs.dtype)
    return {"logits": logits, "top_k": 7, "top_p": 0.8, "seed": 11}


CASES = [
    Case("rms_norm", "rows", _norm(7, 576), grad=("x", "weight")),
    Case("rms_norm", "residual", _norm(5, 63, residual=True), grad=("x", "weight", "residual")),
    Case("rms_norm", "batch", _norm(2, 3, 127), grad=("x", "weight")),
    Case("rms_norm", "one", _norm(1, 1), grad=("x", "weight")),
    Case("rms_norm", "narrow", _norm(3, 7, residual=True), grad=("x", "weight", "residual")),
    Case("rms_norm", "wide", _norm(3, 4097), grad=("x", "weight")),
    Case("rms_norm", "heads", _norm_of_heads, grad=("x", "weight")),
    Case("rms_norm", "many", _norm(1500, 17), grad=("x", "weight")),
    Case("rms_norm", "empty", _norm(0, 64)),
    Case("layer_norm", "rows", _norm(7, 576, bias=True), grad=("x", "weight", "bias")),
    Case(
        "layer_norm",
        "residual",
        _norm(5, 63, bias=True, residual=True),
        grad=("x", "weight", "bias", "residual"),
    ),
    Case("layer_norm", "batch", _norm(2, 3, 127), grad=("x", "weight")),
    # The mean of 30 cancels, and with it that much of the precision.
    Case("layer_norm", "offset", _norm(4, 128, bias=True, offset=30), floors={"output": 30}),
    Case("layer_norm", "one", _norm(1, 1, bias=True)),
    Case("layer_norm", "narrow", _norm(3, 7, bias=True), grad=("x", "weight", "bias")),
    Case("layer_norm", "wide", _norm(3, 4097, bias=True), grad=("x", "weight", "bias")),
    # PyTorch's own weight gradient adds 16-bit rows up in 16 bits, and breaks the rule.
    Case(
        "layer_norm",
        "many",
        _norm(1500, 17, bias=True),
        grad=("x", "weight", "bias"),
        dtypes=(torch.float32,),
    ),
    Case("layer_norm", "empty", _norm(0, 64, bias=True)),
    Case("rotary_embedding", "halves", _rotary(2, 7, 3, 64, rotary_dim=64), grad=("x",)),
    Case(
        "rotary_embedding",
        "interleaved",
        _rotary(5, 3, 64, rotary_dim=64, interleaved=True),
        grad=("x",),
    ),
    Case("rotary_embedding", "partial halves", _rotary(5, 2, 20, rotary_dim=6), grad=("x",)),
    Case(
        "rotary_embedding",
        "partial interleaved",
        _rotary(5, 2, 21, rotary_dim=6, interleaved=True),
        grad=("x",),
    ),
    Case("rotary_embedding", "many", _rotary(150, 5, 34, rotary_dim=34), grad=("x",)),
    Case("rotary_embedding", "one token", _rotary(1, 2, rotary_dim=2)),
    Case("rotary_embedding", "no batch", _rotary(3, 8, rotary_dim=8)),
    Case("rotary_embedding", "empty", _rotary(0, 3, 8, rotary_dim=8)),
    Case("rotary_embedding", "no heads", _rotary(2, 3, 0, 8, rotary_dim=8)),
    Case("swiglu", "rows", _gated(7, 127), grad=("gate", "up")),
    Case("swiglu", "halves", _halves(3, 5, 126), grad=("gate", "up")),
    Case("swiglu", "large", _gated(3, 63, scale=100)),
    Case("swiglu", "long", _gated(3, 20001), grad=("gate", "up")),
    Case("swiglu", "one", _gated(1, 1), grad=("gate", "up")),
    Case("swiglu", "empty", _gated(0, 8)),
    Case("geglu", "tanh", _gated(7, 127, approximate="tanh"), grad=("gate", "up")),
    Case("geglu", "erf", _gated(7, 127, approximate="none"), grad=("gate", "up")),
    Case("geglu", "halves", _halves(3, 5, 126, approximate="tanh"), grad=("gate", "up")),
    Case("geglu", "large", _gated(3, 63, scale=100, approximate="none")),
    Case("geglu", "long", _halves(3, 40002, approximate="tanh"), grad=("gate", "up")),
    Case("geglu", "one", _gated(1, 1, approximate="none"), grad=("gate", "up")),
    Case("geglu", "empty", _gated(0, 8, approximate="none")),
    Case("sample", "everything", _sample_everything),
    Case("sample", "per row", _sample_per_row),
    Case("sample", "greedy", _sample(5, 1000, temperature=0)),
    Case("sample", "plain", _sample(5, 1000)),
    Case("sample", "one token", _sample(2, 1)),
    Case("sample", "top-k", _sample(5, 4097, top_k=50)),
    Case("sample", "top-p", _sample(5, 4097, top_p=0.9)),
    Case("sample", "hidden", _sample_hidden, poison=_nan_for_hidden),
    Case("sample", "ties", _sample_ties),
    Case("sample", "empty", _sample(0, 64, top_k=5)),
]


# --- calls to compile ahead of time ---------------------------------------------------------------


def _sample_with_history(batch: int, vocabulary: int, tokens: int) -> Make:
    def make(inputs: Inputs) -> dict[str, Any]:
        return _sample(batch, vocabulary)(inputs) | {
            "previous_tokens": inputs.randint(0, vocabulary, batch, tokens),
            "sample_ids": inputs.randint(0, 9, batch),
            "positions": inputs.randint(0, 9, batch),
        }

    return make


_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def _compiled(op: str, id: str, make: Make, grad: tuple[str, ...] = ()) -> Case:
    return Case(op, id, make, dtypes=_SIXTEEN_BITS, grad=grad)


COMPILED = [
    _compiled("rms_norm", "Llama-3-8B", _norm(512, 4096), ("x", "weight")),
    _compiled(
        "rms_norm", "Llama-3-8B, residual", _norm(512, 4096, residual=True), ("x", "residual")
    ),
    _compiled("rms_norm", "SmolLM2", _norm(512, 576, residual=True), ("x", "residual")),
    _compiled("rms_norm", "heads of 128", _norm(512, 8, 128), ("x",)),
    Case("rms_norm", "float32", _norm(512, 4096), dtypes=(torch.float32,), grad=("x", "weight")),
    _compiled(
        "layer_norm", "GPT-2", _norm(512, 768, bias=True, residual=True), ("x", "weight", "bias")
    ),
    Case("layer_norm", "float32", _norm(512, 768, bias=True), dtypes=(torch.float32,)),
    _compiled("rotary_embedding", "Llama-3-8B", _rotary(512, 32, 128, rotary_dim=128), ("x",)),
    _compiled("rotary_embedding", "SmolLM2", _rotary(512, 3, 64, rotary_dim=64), ("x",)),
    _compiled(
        "rotary_embedding",
        "GPT-J",
        _rotary(512, 16, 256, rotary_dim=64, interleaved=True),
        ("x",),
    ),
    _compiled("swiglu", "Llama-3-8B", _gated(512, 14336), ("gate", "up")),
    _compiled("swiglu", "Llama-3-8B, halves", _halves(512, 28672), ("gate", "up")),
    _compiled("geglu", "tanh", _halves(512, 18432, approximate="tanh"), ("gate", "up")),
    _compiled("geglu", "erf", _halves(512, 18432, approximate="none"), ("gate", "up")),
    _compiled("sample", "Llama-3-8B", _sample(64, 128256)),
    _compiled("sample", "Llama-3-8B, history", _sample_with_history(64, 128256, 1000)),
    _compiled("sample", "GPT-2", _sample(1, 50257)),
    Case("sample", "float32", _sample(64, 49152), dtypes=(torch.float32,)),
]
"""Every kernel in the configurations that ship; see `tilewise build --triton`."""


# --- the registered operators, for opcheck --------------------------------------------------------


def _operator_norm(*names: str) -> Callable[[Inputs], tuple[Any, ...]]:
    def make(inputs: Inputs) -> tuple[Any, ...]:
        arguments = _norm(3, 17, bias=True, residual=True)(inputs)
        arguments |= {"grad_out": inputs.randn(3, 17), "grad_sum": inputs.randn(3, 17)}
        return tuple(arguments.get(name) for name in names)

    return make


def _operator_rotary(inputs: Inputs) -> tuple[Any, ...]:
    arguments = _rotary(5, 2, 20, rotary_dim=6)(inputs)
    return (arguments["x"], *arguments["tables"][:2], arguments["positions"], True, True)


def _operator_gated(activation: str) -> Callable[[Inputs], tuple[Any, ...]]:
    return lambda inputs: (*_halves(3, 14)(inputs).values(), activation)


def _operator_gated_backward(inputs: Inputs) -> tuple[Any, ...]:
    return (inputs.randn(3, 7), *_operator_gated("gelu_tanh")(inputs))


def _operator_sample(inputs: Inputs) -> tuple[Any, ...]:
    a = _sample_per_row(inputs)
    parameters = (a["temperature"], a["top_k"], a["top_p"], a["min_p"], a["repetition_penalty"])
    return (a["logits"], *parameters, a["previous_tokens"], 5, a["sample_ids"], a["positions"])


OPERATOR_CALLS: list[tuple[str, Callable[[Inputs], tuple[Any, ...]]]] = [
    ("rms_norm", _operator_norm("x", "weight", "eps", "residual")),
    ("rms_norm", _operator_norm("x", "weight", "eps", "none")),
    ("rms_norm_backward", _operator_norm("grad_out", "grad_sum", "x", "weight", "eps")),
    ("layer_norm", _operator_norm("x", "weight", "bias", "eps", "residual")),
    ("layer_norm", _operator_norm("x", "weight", "none", "eps", "none")),
    ("layer_norm_backward", _operator_norm("grad_out", "none", "x", "weight", "eps")),
    ("rotary_embedding", _operator_rotary),
    ("gated_activation", _operator_gated("silu")),
    ("gated_activation", _operator_gated("gelu_erf")),
    ("gated_activation_backward", _operator_gated_backward),
    ("sample", _operator_sample),
]
