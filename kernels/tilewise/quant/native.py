"""The C++ kernels of the product with a quantized weight.

They read weights in panels (`tilewise.quant.panels`). A weight in rows is turned on its first use,
and the result is remembered for as long as its `data` lives and nobody writes to it; one of tensors
that were made in inference mode, which do not count writes, on every use. A weight that was turned
before, as `QuantLinear` does with its own, is held only once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from tilewise import cpu, native
from tilewise.library import Saved, needs_grad, once_differentiable
from tilewise.quant import naive
from tilewise.quant.formats import FORMATS, QuantizedTensor
from tilewise.quant.operators import (
    QUANTIZED_EMBEDDING,
    QUANTIZED_MATMUL,
    QUANTIZED_MATMUL_BACKWARD,
    fields,
)

_FORMAT_CODES = {name: code for code, name in enumerate(FORMATS)}
"""`enum class Format` of C++ is in the same order."""

_ACTIVATION_CODES = {None: 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "swiglu": 4}
"""The order of C++'s `enum class Finish`."""

_ACT_CODES = {None: 0, "int8": 1, "fp8": 2}
"""The order of C++'s `enum class Rounding`."""

_NAMES = (str, type(None))
"""The types of what can be looked up in them."""


def why_not(x: torch.Tensor, weight: QuantizedTensor, *others: Any, **options: Any) -> str | None:
    """Why the C++ kernels cannot take the call."""
    return cpu.why_not(x)


def quantized_matmul(
    x: torch.Tensor,
    weight: QuantizedTensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    adapter: tuple[torch.Tensor, torch.Tensor] | None = None,
    act: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The naive function of this name, by the C++ kernels."""
    a, b = adapter or (None, None)
    if needs_grad(x, bias, residual, a, b):
        # What follows the product is a small part of the work, and PyTorch differentiates it.
        y = _Product.apply(x, weight, act)
        y = naive.finish(y, x, bias, activation, residual, adapter)
        return y.to(naive.result_dtype(x, out_dtype))
    options = (bias, activation, residual, a, b, act, out_dtype, "cpu")
    out: torch.Tensor = QUANTIZED_MATMUL(x, *fields(weight), *options)
    return out


def quantized_matmul_plainly(
    backend: str,
    x: torch.Tensor,
    weight: QuantizedTensor,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
    act: str | None,
    out_dtype: torch.dtype | None,
) -> torch.Tensor | None:
    """What `quantized_matmul` returns for a plain call; None for any other.

    A weight in rows is ordinary: turning it into panels is worth a check before.
    """
    if type(weight) is not QuantizedTensor or len(weight.shape) != 2 or not weight.is_panels:
        return None
    operators = cpu.plain_operators(
        "quantized_matmul", backend, x, weight.data, optional=(bias, residual)
    )
    if operators is None or type(activation) not in _NAMES or type(act) not in _NAMES:
        return None
    finish, rounding = _ACTIVATION_CODES.get(activation), _ACT_CODES.get(act)
    if finish is None or rounding is None or (act == "fp8" and weight.format != "fp8"):
        return None
    if out_dtype not in (None, torch.float32):
        return None
    group = naive.activation_group(weight)
    options = (bias, finish, residual, rounding, group, out_dtype is not None)
    multiply = operators.plain_quantized_matmul
    out: torch.Tensor | None = cpu.plainly(multiply, x, *describe(weight), *options)
    return out


class _Product(torch.autograd.Function):
    """x W^T in float32; the gradient passes straight through the rounding of x."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: QuantizedTensor, act: str | None
    ) -> torch.Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        options = (None, None, None, None, None, act, None, "cpu")
        y: torch.Tensor = QUANTIZED_MATMUL(x.float(), *fields(weight), *options)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Saved, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad_x = QUANTIZED_MATMUL_BACKWARD(grad, *fields(ctx.weight), "cpu")
        return grad_x.to(ctx.dtype), None, None


@QUANTIZED_MATMUL.kernel("cpu")
def _quantized_matmul(
    x: torch.Tensor,
    format: str,
    shape: list[int],
    group_size: int,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str | None,
    residual: torch.Tensor | None,
    adapter_a: torch.Tensor | None,
    adapter_b: torch.Tensor | None,
    act: str | None,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    n, k = shape
    weight = QuantizedTensor(format, (n, k), group_size, data, scales, zeros)
    dtype = naive.result_dtype(x, out_dtype)
    out = x.new_empty((*x.shape[:-1], n // 2 if activation == "swiglu" else n), dtype=dtype)
    # The kernels take what is added to the sums in the dtype that these are rounded to.
    added = (
        None if part is None else part.to(dtype).contiguous()
        for part in (bias, residual, adapter_a, adapter_b)
    )
    bias, residual, adapter_a, adapter_b = added
    rows = x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
    native.cpu_ops().quantized_matmul(
        cpu.unit_stride(rows),
        *describe(as_panels(weight)),
        bias,
        _ACTIVATION_CODES[activation],
        residual,
        adapter_a,
        adapter_b,
        _ACT_CODES[act],
        naive.activation_group(weight),
        out,
    )
    return out


def why_not_embedding(
    token_ids: torch.Tensor, weight: QuantizedTensor, dtype: torch.dtype = torch.float32
) -> str | None:
    """Why the C++ kernel cannot take the call."""
    return cpu.why_not_dtype(token_ids, dtype)


def quantized_embedding(
    token_ids: torch.Tensor, weight: QuantizedTensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The naive function of this name, by the C++ kernel."""
    rows: torch.Tensor = QUANTIZED_EMBEDDING(token_ids, *fields(weight), dtype, "cpu")
    return rows


@QUANTIZED_EMBEDDING.kernel("cpu")
def _quantized_embedding(
    token_ids: torch.Tensor,
    format: str,
    shape: list[int],
    group_size: int,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    n, k = shape
    weight = as_panels(QuantizedTensor(format, (n, k), group_size, data, scales, zeros))
    rows = token_ids.new_empty((*token_ids.shape, k), dtype=dtype)
    native.cpu_ops().embedding(token_ids.contiguous(), *describe(weight), rows)
    return rows


@QUANTIZED_MATMUL_BACKWARD.kernel("cpu")
def _quantized_matmul_backward(
    grad: torch.Tensor,
    format: str,
    shape: list[int],
    group_size: int,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
) -> torch.Tensor:
    n, k = shape
    weight = as_panels(QuantizedTensor(format, (n, k), group_size, data, scales, zeros))
    rows = (grad.unsqueeze(0) if grad.dim() == 1 else grad.flatten(0, -2)).contiguous()
    if n == 0:
        return grad.new_zeros(*grad.shape[:-1], k)
    grad_x = grad.new_empty(*grad.shape[:-1], k)
    native.cpu_ops().quantized_matmul_backward(rows, *describe(weight), grad_x)
    return grad_x


def describe(weight: QuantizedTensor) -> tuple[Any, ...]:
    """A weight in panels as the operators of C++ take it: format, N, K, group size, parts."""
    return (
        _FORMAT_CODES[weight.format],
        *weight.shape[-2:],
        -1 if FORMATS[weight.format].is_gguf else weight.group_size,
        weight.data,
        weight.scales,
        weight.zeros,
    )


_PANELS = WeakTensorKeyDictionary()
"""By the `data` that they were made from: panels, and what else they were made from."""


def as_panels(weight: QuantizedTensor) -> QuantizedTensor:
    """The weight in panels, made once for each weight in rows."""
    if weight.is_panels:
        return weight
    others = (weight.scales, weight.zeros)
    parts = (weight.data, *others)
    if any(part is not None and part.is_inference() for part in parts):
        return weight.to_panels()  # nothing would say that they have changed
    versions = [None if part is None else part._version for part in parts]
    made_from = (weight.format, tuple(weight.shape), weight.group_size, versions)
    entry = _PANELS.get(weight.data)
    if (
        entry is None
        or entry[0] != made_from
        or any(a is not b for a, b in zip(entry[1], others, strict=True))
    ):
        entry = (made_from, others, weight.to_panels())
        _PANELS[weight.data] = entry
    panels: QuantizedTensor = entry[2]
    return panels
