"""The registered operators behind kernels for quantized weights that PyTorch cannot trace."""

from __future__ import annotations

from typing import Any

import torch

from tilewise.fused.naive import compute_dtype
from tilewise.library import Contract
from tilewise.quant import naive
from tilewise.quant.formats import QuantizedTensor


def fields(weight: QuantizedTensor) -> tuple[Any, ...]:
    """A weight as the operators take it."""
    parts = (weight.data, weight.scales, weight.zeros)
    return (weight.format, weight.shape, weight.group_size, *parts)


def _fake(
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
    n = shape[0] // 2 if activation == "swiglu" else shape[0]
    return x.new_empty((*x.shape[:-1], n), dtype=naive.result_dtype(x, out_dtype))


QUANTIZED_MATMUL = Contract(
    "quantized_matmul",
    "(Tensor x, str format, int[] shape, int group_size, Tensor data, Tensor? scales, "
    "Tensor? zeros, Tensor? bias, str? activation, Tensor? residual, Tensor? adapter_a, "
    "Tensor? adapter_b, str? act, ScalarType? out_dtype) -> Tensor",
    _fake,
)
"""A weight is its parts, in the order of `QuantizedTensor`'s fields."""


@QUANTIZED_MATMUL.kernel("naive")
def _quantized_matmul_kernel(
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
    weight = QuantizedTensor(format, tuple(shape), group_size, data, scales, zeros)
    adapter = None
    if adapter_a is not None and adapter_b is not None:
        adapter = (adapter_a, adapter_b)
    return naive.quantized_matmul(
        x,
        weight,
        bias,
        activation=activation,
        residual=residual,
        adapter=adapter,
        act=act,
        out_dtype=out_dtype,
    ).contiguous()


def _fake_product(x: torch.Tensor, format: str, shape: list[int], *others: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]), dtype=torch.float32)


QUANTIZED_PRODUCT = Contract(
    "quantized_product",
    "(Tensor x, str format, int[] shape, int group_size, Tensor data, Tensor? scales, "
    "Tensor? zeros, str? act) -> Tensor",
    _fake_product,
)
"""x W^T in float32, for x of any dtype: what follows is differentiated by PyTorch."""


@QUANTIZED_PRODUCT.kernel("naive")
def _quantized_product_kernel(
    x: torch.Tensor,
    format: str,
    shape: list[int],
    group_size: int,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    act: str | None,
) -> torch.Tensor:
    weight = QuantizedTensor(format, tuple(shape), group_size, data, scales, zeros)
    return naive.quantized_matmul(x.float(), weight, act=act).contiguous()


def _fake_backward(grad: torch.Tensor, format: str, shape: list[int], *parts: Any) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], shape[1]))


QUANTIZED_MATMUL_BACKWARD = Contract(
    "quantized_matmul_backward",
    "(Tensor grad, str format, int[] shape, int group_size, Tensor data, Tensor? scales, "
    "Tensor? zeros) -> Tensor",
    _fake_backward,
)
"""The gradient of x: grad W, in grad's dtype. The weight is not trained."""


@QUANTIZED_MATMUL_BACKWARD.kernel("naive")
def _quantized_matmul_backward_kernel(
    grad: torch.Tensor,
    format: str,
    shape: list[int],
    group_size: int,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
) -> torch.Tensor:
    weight = QuantizedTensor(format, tuple(shape), group_size, data, scales, zeros)
    dtype = compute_dtype(grad)
    return (grad.to(dtype) @ weight.dequantize(dtype)).to(grad.dtype)


def _fake_embedding(
    token_ids: torch.Tensor,
    format: str,
    shape: list[int],
    group_size: int,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return token_ids.new_empty((*token_ids.shape, shape[1]), dtype=dtype)


QUANTIZED_EMBEDDING = Contract(
    "quantized_embedding",
    "(Tensor token_ids, str format, int[] shape, int group_size, Tensor data, Tensor? scales, "
    "Tensor? zeros, ScalarType dtype) -> Tensor",
    _fake_embedding,
)


@QUANTIZED_EMBEDDING.kernel("naive")
def _quantized_embedding_kernel(
    token_ids: torch.Tensor,
    format: str,
    shape: list[int],
    group_size: int,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    weight = QuantizedTensor(format, tuple(shape), group_size, data, scales, zeros)
    return naive.quantized_embedding(token_ids, weight, dtype)
