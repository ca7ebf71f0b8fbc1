"""The calls on which every backend of the product with quantized weights must agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tilewise.cases import Case
from tilewise.quant.formats import FORMATS, PER_CHANNEL, QuantizedTensor
from tilewise.quant.quantizer import quantize
from tilewise.testing import HALF_AND_SINGLE, Inputs, Make

MakeWeight = Callable[[Inputs, int, int], QuantizedTensor]

_HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Where the float16 numbers of a GGUF block are; random bytes there could be NaN."""


def gguf_weight(inputs: Inputs, name: str, *shape: int) -> QuantizedTensor:
    """A GGUF weight of random bytes with reasonable scales."""
    form = FORMATS[name]
    *rows, k = shape
    blocks = inputs.randint(
        0, 256, *rows, k // form.block_size, form.block_bytes, dtype=torch.uint8
    )
    for at in _HALVES[name]:
        half = inputs.randn(*blocks.shape[:-1], 1, scale=0.02, dtype=torch.float16)
        blocks[..., at : at + 2] = half.view(torch.uint8)
    return QuantizedTensor(name, shape, form.block_size, blocks.flatten(-2))


def _own(scheme: str, group_size: int, symmetric: bool = True) -> MakeWeight:
    def make(inputs: Inputs, n: int, k: int) -> QuantizedTensor:
        weight = inputs.randn(n, k, scale=0.1, dtype=torch.float32)
        return quantize(weight, scheme, group_size=group_size, symmetric=symmetric, search="minmax")

    return make


def _gguf(name: str) -> MakeWeight:
    return lambda inputs, n, k: gguf_weight(inputs, name, n, k)


def _product(
    weight: MakeWeight,
    m: int | tuple[int, ...],
    n: int,
    k: int,
    *,
    bias: bool = False,
    activation: str | None = None,
    residual: bool = False,
    rank: int = 0,
    act: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Make:
    rows = (m,) if isinstance(m, int) else m

    def make(inputs: Inputs) -> dict[str, Any]:
        arguments: dict[str, Any] = {"x": inputs.randn(*rows, k), "weight": weight(inputs, n, k)}
        if bias:
            arguments["bias"] = inputs.randn(n)
        if activation:
            arguments["activation"] = activation
        if residual:
            out = n // 2 if activation == "swiglu" else n
            arguments["residual"] = inputs.randn(*rows, out)
        if rank:
            arguments["adapter"] = (inputs.randn(k, rank, scale=0.1), inputs.randn(rank, n))
        if act:
            arguments["act"] = act
        if out_dtype:
            arguments["out_dtype"] = out_dtype
        return arguments

    return make


_INT8 = _own("int8", PER_CHANNEL)
_INT4 = _own("int4", 32, symmetric=False)
_FP8 = {"row": _own("fp8", PER_CHANNEL)} | {f"g{size}": _own("fp8", size) for size in (32, 64, 128)}

_FORMATS: dict[str, MakeWeight] = {
    "int8": _INT8,
    "int8-g32-asymmetric": _own("int8", 32, symmetric=False),
    "int8-asymmetric": _own("int8", PER_CHANNEL, symmetric=False),
    "int4-g32-asymmetric": _INT4,
    "int4-g64": _own("int4", 64),
    "int4-g128-asymmetric": _own("int4", 128, symmetric=False),
    "int4": _own("int4", PER_CHANNEL),
    "nf4-g64": _own("nf4", 64),
    "nf4": _own("nf4", PER_CHANNEL),
    "fp8": _FP8["row"],
    "fp8-g32": _FP8["g32"],
    "mxfp4": _own("mxfp4", 32),
}
_EVEN = {
    "int8": _INT8,
    "int4-g32-asymmetric": _INT4,
    "int4-g128": _own("int4", 128),
    "Q4_0": _gguf("Q4_0"),
    "Q4_1": _gguf("Q4_1"),
}
_GGUF = [name for name, form in FORMATS.items() if form.is_gguf]


_SINGLE = (torch.float32,)
_BFLOAT16_FIRST = (torch.bfloat16, torch.float32, torch.float16)
"""For what PyTorch's kernels take: contracts that are tried in one dtype take the first."""


def _case(
    id: str, make: Make, *grad: str, dtypes: tuple[torch.dtype, ...] = HALF_AND_SINGLE
) -> Case:
    return Case("quantized_matmul", id, make, grad=("x", *grad), dtypes=dtypes)


def _float32_case(id: str, make: Make, *grad: str) -> Case:
    """A case of 16-bit x whose result is in float32."""
    case = _case(id, make, *grad, dtypes=(torch.bfloat16, torch.float16))
    return replace(case, results=_rounded_from_float32)


def _rounded_from_float32(arguments: dict[str, Any], out: torch.Tensor) -> dict[str, torch.Tensor]:
    """The result in x's dtype, for it need not be any more exact."""
    x = arguments["x"]
    expected = torch.float64 if x.dtype == torch.float64 else torch.float32
    if out.dtype != expected:
        raise AssertionError(f"output: expected {expected}, got {out.dtype}")
    return {"output": out.to(x.dtype)}


# MKL gives some numbers of rows (6, for one) other bits on other numbers of threads, when it cuts
# them into pieces that need another inner loop; 1, 3, 4 and 17 are safe.
CASES = [
    # Odd in every dimension: K leaves a group unfinished, and nothing is a multiple of a vector.
    *(_case(f"{name}-odd", _product(make, 3, 63, 79)) for name, make in _FORMATS.items()),
    *(_case(f"{name}-odd", _product(_gguf(name), 3, 63, 512)) for name in _GGUF),
    # So many rows that kernels widen blocks of the weight instead of single weights.
    *(
        _case(f"{name}-rows", _product(make, 13, 50, 333), dtypes=_SINGLE)
        for name, make in _FORMATS.items()
    ),
    *(_case(f"{name}-rows", _product(_gguf(name), 13, 50, 512), dtypes=_SINGLE) for name in _GGUF),
    # What a vectorized kernel likes, PyTorch's among them.
    *(
        _case(f"{name}-even", _product(make, 17, 32, 128), dtypes=_BFLOAT16_FIRST)
        for name, make in _EVEN.items()
    ),
    _case("one", _product(_INT8, 1, 1, 1)),
    _case("one-row", _product(_INT4, 1, 63, 33)),
    _case("vector", _product(_INT4, (), 16, 64)),
    _case("batch", _product(_INT4, (2, 2), 16, 64)),
    # What Triton's kernel of few rows takes, which reads weights in words.
    _case("few-rows-128", _product(_own("int4", 128, symmetric=False), 1, 63, 512)),
    _case("few-rows-64", _product(_own("int4", 64), 2, 31, 768, residual=True), "residual"),
    _case("few-rows-swiglu", _product(_INT4, 2, 42, 4608, bias=True, activation="swiglu"), "bias"),
    _case("few-rows-int4", _product(_own("int4", PER_CHANNEL, symmetric=False), 1, 50, 96)),
    _case("few-rows-int8", _product(_own("int8", PER_CHANNEL), 2, 33, 544, residual=True)),
    _case("few-rows-int8-g64", _product(_own("int8", 64, symmetric=False), 1, 19, 4352)),
    # Several blocks of rows, the last of which is not full.
    _case("many-rows", _product(_gguf("Q4_1"), 77, 50, 96, residual=True), dtypes=_BFLOAT16_FIRST),
    _case(
        "many-rows-swiglu",
        _product(_INT4, 81, 96, 64, bias=True, activation="swiglu"),
        dtypes=_BFLOAT16_FIRST,
    ),
    _case("empty", _product(_INT4, 0, 16, 64)),
    _case("empty-batch", _product(_gguf("Q4_K"), (2, 0), 8, 256)),
    _case("bias", _product(_INT8, 3, 32, 64, bias=True), "bias"),
    *(
        _case(name, _product(_INT4, 3, 16, 64, bias=True, activation=name), "bias")
        for name in ("gelu", "gelu_tanh", "silu", "swiglu")
    ),
    # Halves that meet within 16 rows of the weight, and between them.
    *(
        _case(f"swiglu-{n}", _product(_INT8, 3, n, 64, activation="swiglu", residual=True))
        for n in (42, 96)
    ),
    _case("residual", _product(_INT8, (2, 2), 32, 64, residual=True), "residual"),
    _case("adapter", _product(_INT4, 3, 16, 64, rank=4)),
    _case(
        "everything",
        _product(_gguf("Q4_1"), 4, 64, 96, bias=True, activation="swiglu", residual=True, rank=3),
        "bias",
        "residual",
    ),
    *(
        _case(f"act-int8-{name}", _product(make, 7, 31, 77, bias=True, act="int8"), "bias")
        for name, make in _FORMATS.items()
    ),
    *(_case(f"act-int8-{name}", _product(_gguf(name), 7, 31, 256, act="int8")) for name in _GGUF),
    _case("act-int8-everything", _product(_INT4, 3, 16, 64, residual=True, rank=3, act="int8")),
    *(
        _case(f"act-fp8-{name}-{m}", _product(make, m, 31, 77, bias=True, act="fp8"), "bias")
        for name, make in _FP8.items()
        for m in (3, 7)
    ),
    _case("act-fp8-rows", _product(_FP8["g32"], (2, 7), 50, 333, act="fp8")),
    _case("act-fp8-one", _product(_FP8["row"], 1, 1, 1, act="fp8")),
    _float32_case("float32-result", _product(_INT4, 1, 50, 96, out_dtype=torch.float32)),
    _float32_case(
        "float32-result-everything",
        _product(
            _gguf("Q4_1"),
            (2, 2),
            64,
            96,
            bias=True,
            activation="swiglu",
            residual=True,
            rank=3,
            out_dtype=torch.float32,
        ),
        "bias",
        "residual",
    ),
    _float32_case(
        "float32-result-rows",
        _product(_gguf("Q8_0"), 77, 50, 96, act="int8", out_dtype=torch.float32),
    ),
    _case("act-fp8-empty", _product(_FP8["row"], 0, 16, 64, act="fp8")),
    _case(
        "act-fp8-everything",
        _product(_FP8["row"], 20, 64, 96, activation="swiglu", residual=True, rank=3, act="fp8"),
        "residual",
    ),
]


def _embedding(weight: MakeWeight, shape: tuple[int, ...], n: int, k: int) -> Make:
    def make(inputs: Inputs) -> dict[str, Any]:
        token_ids = inputs.randint(0, n, *shape)
        return {"token_ids": token_ids, "weight": weight(inputs, n, k), "dtype": inputs.dtype}

    return make


CASES += [
    *(
        Case("quantized_embedding", f"{name}-odd", _embedding(make, (3, 5), 63, 333))
        for name, make in _FORMATS.items()
    ),
    *(
        Case("quantized_embedding", f"{name}-odd", _embedding(_gguf(name), (3, 5), 63, 512))
        for name in _GGUF
    ),
    Case("quantized_embedding", "one", _embedding(_INT8, (), 1, 1)),
    Case("quantized_embedding", "empty", _embedding(_INT4, (2, 0), 16, 64)),
]


# --- calls to compile ahead of time ---------------------------------------------------------------

COMPILED = [
    *(
        Case(
            "quantized_matmul",
            f"{name}, {tokens}",
            _product(make, tokens, 512, 4096),
            dtypes=(torch.bfloat16,),
            grad=("x",) if tokens == 64 else (),
        )
        for name, make in (
            ("int4", _own("int4", 64, symmetric=False)),
            ("int8", _INT8),
            ("nf4", _own("nf4", 64)),
            ("mxfp4", _own("mxfp4", 32)),
            ("Q4_K", _gguf("Q4_K")),
            ("Q6_K", _gguf("Q6_K")),
        )
        for tokens in (1, 64)
    ),
    Case(
        "quantized_matmul",
        "everything",
        _product(_INT4, 64, 512, 4096, bias=True, activation="swiglu", residual=True, rank=16),
        dtypes=(torch.bfloat16, torch.float16, torch.float32),
    ),
    Case(
        "quantized_matmul",
        "int8 activations",
        _product(_own("int4", 64), 64, 512, 4096, act="int8"),
        dtypes=(torch.bfloat16,),
    ),
    *(
        Case(
            "quantized_matmul",
            f"float32 result, {tokens}",
            _product(_gguf("Q8_0"), tokens, 512, 4096, out_dtype=torch.float32),
            dtypes=(torch.bfloat16,),
        )
        for tokens in (1, 64)
    ),
    *(
        Case(
            "quantized_matmul",
            f"fp8 activations, {name}, {tokens}",
            _product(_FP8[name], tokens, 512, 4096, act="fp8"),
            dtypes=(torch.bfloat16,),
        )
        for name, tokens in (("row", 1), ("row", 16), ("row", 256), ("g64", 64))
    ),
    Case(
        "quantized_matmul",
        "fp8 activations, everything",
        _product(
            _FP8["row"], 64, 512, 4096, bias=True, activation="swiglu", residual=True, act="fp8"
        ),
        dtypes=(torch.bfloat16,),
    ),
    Case(
        "quantized_embedding",
        "int4",
        _embedding(_INT4, (64,), 512, 4096),
        dtypes=(torch.bfloat16,),
    ),
]
"""Kernels in the configurations that ship; see `tilewise build --triton`."""


def _operator_call(make: Make) -> Callable[[Inputs], tuple[Any, ...]]:
    def call(inputs: Inputs) -> tuple[Any, ...]:
        a = make(inputs)
        w = a["weight"]
        adapter = a.get("adapter", (None, None))
        parts = (w.format, list(w.shape), w.group_size, w.data, w.scales, w.zeros)
        options = (a.get("bias"), a.get("activation"), a.get("residual"), *adapter, a.get("act"))
        return (a["x"], *parts, *options, a.get("out_dtype"))

    return call


def _float32_result_call(inputs: Inputs) -> tuple[Any, ...]:
    x, *others = _operator_call(_product(_INT8, 3, 16, 32, out_dtype=torch.float32))(inputs)
    return (x.to(torch.float16), *others)


def _backward_call(weight: MakeWeight) -> Callable[[Inputs], tuple[Any, ...]]:
    def call(inputs: Inputs) -> tuple[Any, ...]:
        w = weight(inputs, 16, 256)
        grad = inputs.randn(2, 3, 16, dtype=torch.float32)
        return (grad, w.format, list(w.shape), w.group_size, w.data, w.scales, w.zeros)

    return call


def _product_call(weight: MakeWeight, act: str | None) -> Callable[[Inputs], tuple[Any, ...]]:
    def call(inputs: Inputs) -> tuple[Any, ...]:
        w = weight(inputs, 16, 256)
        x = inputs.randn(2, 3, 256, dtype=torch.float16)
        return (x, w.format, list(w.shape), w.group_size, w.data, w.scales, w.zeros, act)

    return call


def _embedding_call(inputs: Inputs) -> tuple[Any, ...]:
    w = _INT4(inputs, 20, 64)
    parts = (w.format, list(w.shape), w.group_size, w.data, w.scales, w.zeros)
    return (inputs.randint(0, 20, 2, 3), *parts, torch.bfloat16)


OPERATOR_CALLS = [
    ("quantized_matmul", _operator_call(_product(_INT4, 3, 16, 64))),
    ("quantized_matmul", _operator_call(_product(_gguf("Q4_K"), 3, 8, 256, bias=True))),
    (
        "quantized_matmul",
        _operator_call(
            _product(_INT8, 3, 16, 32, activation="swiglu", residual=True, rank=2, act="int8")
        ),
    ),
    ("quantized_matmul", _float32_result_call),
    ("quantized_embedding", _embedding_call),
    ("quantized_product", _product_call(_INT4, None)),
    ("quantized_product", _product_call(_gguf("Q4_K"), "int8")),
    ("quantized_matmul_backward", _backward_call(_INT4)),
    ("quantized_matmul_backward", _backward_call(_gguf("Q6_K"))),
]
