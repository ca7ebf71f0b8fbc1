"""Products with quantized weights by PyTorch's own CPU kernels: the honest baseline.

`_weight_int8pack_mm` takes our int8 as it is; `_weight_int4pack_mm_for_cpu` wants its own order of
the nibbles, so a weight is repacked on its first use. Both are written for bfloat16 and round the
scales to it, which stays within the agreement rule. Their float32 forms are refused: plain loops
that add up one product after the other, with more rounding error than the rule allows.

`_scaled_mm` multiplies fp8 by fp8, with a scale per row on either side, for x of any dtype; x is
rounded by the definition's own code.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from tilewise.quant import naive
from tilewise.quant.blocks import half, spread
from tilewise.quant.formats import FORMATS, PER_CHANNEL, QuantizedTensor
from tilewise.quant.packing import unpack_nibbles

UNTRACEABLE = "it repacks a weight on its first use and remembers the result by identity"

_ALIGNMENT = 64


def why_not(
    x: torch.Tensor,
    weight: QuantizedTensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    adapter: tuple[torch.Tensor, torch.Tensor] | None = None,
    act: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    """Why PyTorch's kernels cannot take the call."""
    n, k = weight.shape
    if x.device.type != "cpu":
        return f"only PyTorch's CPU kernels are used, x is on {x.device}"
    if act == "fp8":
        if x.dtype == torch.float64:
            return "PyTorch's fp8 product adds up in float32, x is in float64"
        if weight.group_size != PER_CHANNEL:
            return "PyTorch's fp8 product takes a scale per row, not per group"
        if 0 in (n, k, x.numel()):
            return "PyTorch's fp8 product takes no empty matrices"
        return why_not_scales_per_row()
    if x.dtype != torch.bfloat16:
        return (
            "PyTorch's kernels are vectorized for bfloat16 only; in other dtypes they add one "
            "product after the other, which breaks the agreement rule"
        )
    if act is not None:
        return f"PyTorch's kernels take no activations in {act}"
    if out_dtype not in (None, x.dtype):
        return f"PyTorch's kernels round their sums to {x.dtype}"
    if weight.format == "int8":
        if weight.zeros is not None or weight.group_size != PER_CHANNEL:
            return "PyTorch's int8 kernel takes symmetric per-channel weights only"
        return f"PyTorch's int8 kernel needs K to be a multiple of 16, got {k}" if k % 16 else None
    if weight.format not in ("int4", "Q4_0", "Q4_1"):
        return f"PyTorch has no kernel for {weight.format}"
    if weight.group_size == PER_CHANNEL:
        return "PyTorch's int4 kernel takes groups only, not a scale per channel"
    if n % 16 or k % weight.group_size:
        return (
            "PyTorch's int4 kernel needs N to be a multiple of 16 and K of the group size, "
            f"got N {n} and K {k}"
        )
    return None


@functools.cache
def why_not_scales_per_row() -> str | None:
    """Where AMX multiplies fp8, PyTorch 2.11 takes one scale for a whole matrix only."""
    codes = torch.zeros(16, 16).to(torch.float8_e4m3fn)
    scales = torch.ones(16, 1)
    try:
        torch._scaled_mm(codes, codes.mT, scales, scales.mT, out_dtype=torch.float32)
    except RuntimeError:
        return "this PyTorch's fp8 product takes no scale per row on this processor"
    return None


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
    """PyTorch's product, then the rest as in the definition."""
    y = _Product.apply(x, weight, act)
    y = naive.finish(y.float(), x, bias, activation, residual, adapter)
    return y.to(naive.result_dtype(x, out_dtype))


class _Product(torch.autograd.Function):
    """x W^T by a kernel without a derivative of its own."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: QuantizedTensor, act: str | None
    ) -> torch.Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        rows = _aligned(x.reshape(-1, x.shape[-1]).contiguous())
        if act == "fp8":
            y = scaled_product(rows, weight.to_rows())
        elif weight.format == "int8":
            weight = weight.to_rows()
            scales = cast(torch.Tensor, weight.scales).flatten().bfloat16()
            y = torch._weight_int8pack_mm(rows, _aligned(weight.data.contiguous()), scales)
        else:
            packed, scales = _int4_packed(weight)
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, weight.group_size, scales)
        return y.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return (grad.float() @ ctx.weight.dequantize()).to(ctx.dtype), None, None


def scaled_product(rows: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """fp8 times fp8 in float32; of NaN in a weight's scale or x's, NaN."""
    codes, scales = naive.quantize_groups(rows, PER_CHANNEL, "fp8")
    return torch._scaled_mm(
        codes[:, 0].to(torch.float8_e4m3fn),
        weight.data.contiguous().mT,
        scales[:, 0],
        cast(torch.Tensor, weight.scales).reshape(1, -1).float(),
        out_dtype=torch.float32,
    )


def _aligned(t: torch.Tensor) -> torch.Tensor:
    """t where aligned vector loads can read it: elsewhere PyTorch's int8 kernel segfaults."""
    return t if t.data_ptr() % _ALIGNMENT == 0 else t.clone()


_PACKED = WeakTensorKeyDictionary()
"""The repacked weight by the `data` that it was made from, with the version of that tensor."""


def _int4_packed(weight: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as PyTorch's kernel wants it: nibbles in its order, and scales (groups, N, 2)."""
    version = None if weight.data.is_inference() else weight.data._version
    entry = _PACKED.get(weight.data)
    if entry is None or entry[0] != version:
        entry = (version, *_pack_int4(weight))
        _PACKED[weight.data] = entry
    return entry[1], entry[2]


def _pack_int4(weight: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's weight is (code - 8) * scale + offset."""
    weight = weight.to_rows()
    if weight.scales is not None:
        codes = unpack_nibbles(weight.data)
        scale = weight.scales.float()
        offset = torch.zeros_like(scale)
        if weight.zeros is not None:
            offset = (8 - weight.zeros.float()) * scale
    else:
        blocks = weight.data.unflatten(-1, (-1, FORMATS[weight.format].block_bytes))
        codes = spread(blocks[..., -16:], 4).flatten(-3)
        scale = half(blocks, 0).squeeze(-1)
        offset = torch.zeros_like(scale)
        if weight.format == "Q4_1":
            offset = half(blocks, 2).squeeze(-1) + 8 * scale
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return packed, torch.stack([scale, offset], dim=-1).transpose(0, 1).bfloat16().contiguous()
