"""Rows of a quantized embedding table: checks, cost, dispatch and the public function."""

from __future__ import annotations

import torch

from tilewise import checks, gpu
from tilewise.dispatch import Cost, Impl, Op
from tilewise.quant import naive, native
from tilewise.quant import triton_weights as triton
from tilewise.quant.formats import QuantizedTensor


def _check_quantized_embedding(
    token_ids: torch.Tensor,
    weight: QuantizedTensor,
    dtype: torch.dtype = torch.float32,
    *,
    validate: bool = False,
) -> None:
    checks.has_dtype("token_ids", token_ids, (torch.int64,))
    if not isinstance(weight, QuantizedTensor):
        raise TypeError(f"weight: must be a QuantizedTensor, got {type(weight).__name__}")
    if len(weight.shape) != 2:
        raise ValueError(f"weight: shape must be (N, K), got {weight.shape}")
    checks.on_device_of("weight", weight.data, "token_ids", token_ids)
    if dtype not in checks.FLOATS:
        raise ValueError(f"dtype: must be floating point, got {dtype}")
    if validate and token_ids.numel():
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= weight.shape[0]:
            worst = low if low < 0 else high
            raise ValueError(f"token_ids: must be in [0, {weight.shape[0]}), got {worst}")


def _cost_quantized_embedding(
    token_ids: torch.Tensor, weight: QuantizedTensor, dtype: torch.dtype = torch.float32
) -> Cost:
    rows, k = token_ids.numel(), weight.shape[1]
    row_bytes = weight.nbytes / max(weight.shape[0], 1)
    moved = rows * (row_bytes + k * dtype.itemsize) + token_ids.nbytes
    return Cost(2 * rows * k, moved, torch.float32)


_QUANTIZED_EMBEDDING = Op(
    "quantized_embedding",
    naive.quantized_embedding,
    impls=(
        Impl("triton", triton.quantized_embedding, triton.why_not_embedding, gpu.why_not_auto),
        Impl("cpu", native.quantized_embedding, native.why_not_embedding),
    ),
    check=_check_quantized_embedding,
    cost=_cost_quantized_embedding,
)


def quantized_embedding(
    token_ids: torch.Tensor,
    weight: QuantizedTensor,
    dtype: torch.dtype = torch.float32,
    *,
    backend: str = "auto",
    validate: bool = False,
) -> torch.Tensor:
    """Look up rows of a quantized table; no other row is dequantized.

    Args:
        token_ids: (...), int64, in [0, N).
        weight: (N, K).
        dtype: of the result; the rows are computed in float32.
        backend: see `tilewise.use_backend`.
        validate: check that the numbers are in range, and say which is not.

    Returns:
        (..., K), `dtype`.

    Raises:
        ValueError, TypeError: for an argument that does not fit; it is named.
        IndexError, RuntimeError: for a number out of range, without `validate`.
        BackendError: if the named backend cannot run the call.
    """
    _check_quantized_embedding(token_ids, weight, dtype, validate=validate)
    return _QUANTIZED_EMBEDDING(token_ids, weight, dtype, backend=backend)
