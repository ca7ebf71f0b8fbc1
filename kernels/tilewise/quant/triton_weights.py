"""Quantized weights as Triton kernels take them, and rows of them unpacked: whole or by number."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tilewise import gpu
from tilewise.quant.formats import QuantizedTensor
from tilewise.quant.operators import QUANTIZED_EMBEDDING, fields
from tilewise.quant.packing import NF4


@functools.cache
def _codebook(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(NF4, device=device, dtype=dtype)


def parts_of(weight: QuantizedTensor | torch.Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    """A weight as the kernels take it: data, scales, zeros, codebook; bytes and groups of a row.

    Args:
        dtype: what it is unpacked to. For a 16-bit one the codebook is in float16: that is as
            precise, and Triton copies to shared memory in advance only what has 4 bytes, which for
            a table that everyone reads would be a waste.
    """
    if isinstance(weight, torch.Tensor):
        return (weight.contiguous(), None, None, None), (weight.shape[-1], 0)
    weight = weight.to_rows()
    data = weight.data.contiguous().view(torch.uint8)
    scales, zeros = (
        None if part is None else part.contiguous() for part in (weight.scales, weight.zeros)
    )
    codebook = None
    if weight.format == "nf4":
        wide = dtype == torch.float32
        codebook = _codebook(data.device, torch.float32 if wide else torch.float16)
    sizes = (data.shape[-1], 0 if scales is None else scales.shape[-1])
    return (data, scales, zeros, codebook), sizes


def format_of(weight: QuantizedTensor | torch.Tensor) -> dict[str, Any]:
    """Its constexpr arguments."""
    if isinstance(weight, torch.Tensor):
        return {"FORMAT": "plain", "GROUP": 1}
    return {"FORMAT": weight.format, "GROUP": weight.group_size}


def dequantize(weight: QuantizedTensor, indices: torch.Tensor | None, out: torch.Tensor) -> None:
    """All rows of the weight, or those of the indices, into `out`, contiguous."""
    from tilewise.quant import triton_kernels as kernels

    n, k = weight.shape
    count = n if indices is None else indices.numel()
    if n == 0 or k == 0:
        return
    block_n, block_k = (2, 256) if indices is not None else (16, 256)
    tensors, sizes = parts_of(weight, torch.float32)
    gpu.launch(
        kernels.dequantize,
        (-(-count // block_n), -(-k // block_k)),
        *tensors,
        indices,
        out,
        count,
        n,
        k,
        *sizes,
        **format_of(weight),
        EVEN=k % block_k == 0,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4 if indices is None else 1,
    )


# --- embeddings -----------------------------------------------------------------------------------


def why_not_embedding(
    token_ids: torch.Tensor, weight: QuantizedTensor, dtype: torch.dtype = torch.float32
) -> str | None:
    """Why the Triton kernel cannot take the call."""
    return gpu.why_not(token_ids, dtype, dot=False)


def quantized_embedding(
    token_ids: torch.Tensor, weight: QuantizedTensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The naive function of this name, by the Triton kernel."""
    rows: torch.Tensor = QUANTIZED_EMBEDDING(token_ids, *fields(weight), dtype, "triton")
    return rows


@QUANTIZED_EMBEDDING.kernel("triton")
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
    weight = QuantizedTensor(format, tuple(shape), group_size, data, scales, zeros)
    rows = token_ids.new_empty((*token_ids.shape, shape[1]), dtype=dtype)
    dequantize(weight, token_ids.contiguous(), rows)
    return rows
