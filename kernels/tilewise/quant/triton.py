"""The Triton backend of products with quantized weights: which kernel for how many rows.

Most products take `matmul`, which unpacks a tile of the weight for each tile of x, and those of
int4 weights in 16 bits `matmul_packed`, which unpacks faster. A few rows in float32 take `vector`,
which reads the weight once and multiplies without tensor cores; one or two in 16 bits, by int4 or
int8 weights, `vector_words`. Where a weight would be unpacked too often, that is done once, into
x's dtype, and PyTorch multiplies: its result is float32, so that `finish` still rounds once, unless
nothing follows and PyTorch's one rounding is the same.

With `act`, codes of x are multiplied with those of the weight (`triton_activations.py`), or x is
rounded first and takes the way of any x.
"""

from __future__ import annotations

from typing import Any

import torch

from tilewise import gpu, tuning
from tilewise.library import Saved, needs_grad, once_differentiable
from tilewise.quant import naive
from tilewise.quant import triton_activations as activations
from tilewise.quant import triton_configs as configs
from tilewise.quant.formats import QuantizedTensor
from tilewise.quant.operators import (
    QUANTIZED_MATMUL,
    QUANTIZED_MATMUL_BACKWARD,
    QUANTIZED_PRODUCT,
    fields,
)
from tilewise.quant.triton_configs import Tile
from tilewise.quant.triton_finish import NOTHING, After, finish
from tilewise.quant.triton_weights import dequantize, format_of, parts_of


def why_not(
    x: torch.Tensor, weight: QuantizedTensor, *others: Any, act: str | None = None, **options: Any
) -> str | None:
    """Why the Triton kernels cannot take the call."""
    reason = gpu.why_not(x)
    is_rounded = act is not None and not activations.multiplies_codes(x, weight, act)
    if reason is None and is_rounded and x.dtype != torch.float32:
        # x would be rounded to int8, scaled, and rounded once more.
        return f"{weight.format} with int8 activations is too far off in 16 bits"
    return reason


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
    """The naive function of this name, by the Triton kernels."""
    a, b = adapter or (None, None)
    if needs_grad(x, bias, residual, a, b):
        # What follows the product is a small part of the work, and PyTorch differentiates it.
        y = _Product.apply(x, weight, act)
        y = naive.finish(y, x, bias, activation, residual, adapter)
        return y.to(naive.result_dtype(x, out_dtype))
    options = (bias, activation, residual, a, b, act, out_dtype, "triton")
    out: torch.Tensor = QUANTIZED_MATMUL(x, *fields(weight), *options)
    return out


class _Product(torch.autograd.Function):
    """x W^T in float32; the gradient passes straight through the rounding of x."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: QuantizedTensor, act: str | None
    ) -> torch.Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        y: torch.Tensor = QUANTIZED_PRODUCT(x, *fields(weight), act, "triton")
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Saved, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # In x's dtype, as the tensor cores take it: its result is rounded to that anyway.
        grad_x = QUANTIZED_MATMUL_BACKWARD(grad.to(ctx.dtype), *fields(ctx.weight), "triton")
        return grad_x, None, None


@QUANTIZED_MATMUL.kernel("triton")
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
    weight = QuantizedTensor(format, tuple(shape), group_size, data, scales, zeros)
    n = shape[0] // 2 if activation == "swiglu" else shape[0]
    out = x.new_empty((*x.shape[:-1], n), dtype=naive.result_dtype(x, out_dtype))
    rows = _rows(x)
    projected = None
    if adapter_a is not None and adapter_b is not None:
        projected, adapter_b = _matmul(rows, adapter_a), adapter_b.contiguous()
    after = After(
        None if bias is None else bias.contiguous(),
        None if residual is None else residual.contiguous(),
        projected,
        adapter_b,
        activation,
    )
    _run(rows, weight, after, act, out)
    return out


@QUANTIZED_PRODUCT.kernel("triton")
def _quantized_product(
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
    out = x.new_empty((*x.shape[:-1], shape[0]), dtype=torch.float32)
    _run(_rows(x), weight, NOTHING, act, out)
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x (M, K) with unit stride within a row."""
    rows = x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
    return rows if rows.shape[1] == 1 or rows.stride(1) == 1 else rows.contiguous()


def _matmul(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x w in float32, of inputs of any dtype."""
    if x.device.type == "cuda" and torch.version.hip is None and x.dtype != torch.float32:
        return torch.mm(x, w, out_dtype=torch.float32)
    return x.float() @ w.float()


def linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """x (M, K) times a plain weight (N, K), contiguous, into `out`."""
    if out.numel():
        _split(x, weight, NOTHING, out, configs.tile_for(x, len(x)), kind="matrix")


def _run(
    x: torch.Tensor, weight: QuantizedTensor, after: After, act: str | None, out: torch.Tensor
) -> None:
    """x (M, K) times the weight, and what follows, into `out`, whose dtype may be another."""
    if out.numel() == 0:
        return
    m, k = x.shape
    chosen = configs.config(x)
    is_packed = act is None and _is_packed(x, weight)
    is_few_by_words = act is None and m <= chosen.words_rows and _is_in_words(x, weight)
    is_few = is_few_by_words or (not is_packed and configs.is_vector(x, m))
    if act is not None and k > 0:
        group = naive.activation_group(weight)
        if not is_few and activations.multiplies_codes(x, weight, act):
            return activations.product(x, weight, after, group, act, out)
        x = activations.rounded(x, group, act, torch.float32 if is_few else x.dtype)
    if m >= chosen.whole and not is_few:
        return _whole(x, weight, after, out)
    is_pair = after.activation == "swiglu"
    if is_few_by_words:
        tile = configs.words_tile(m, weight.shape[0], k)
        kind, sizes = "words", {"n": 1, "k": 512}
    elif is_packed:
        tile = configs.packed_tile_for(x, m, weight.group_size, is_pair=is_pair)
        kind, sizes = "packed", {"n": 16}
    elif is_few:
        tile, kind, sizes = configs.vector_tile(m, k), "vector", {"n": 1}
    else:
        tile = configs.tile_for(x, m, is_pair=is_pair)
        kind, sizes = "matrix", {"n": 16, "k": 128}
    # What fits into shared memory depends on the format and on x's dtype.
    name = f"{kind} {weight.format} {x.dtype} {tile.m} x {tile.k}"
    tile = tuning.chosen(x, f"{name}, {'pairs' if is_pair else 'rows'}", tile, sizes)
    return _split(x, weight, after, out, tile, kind=kind)


def _is_in_words(x: torch.Tensor, weight: QuantizedTensor) -> bool:
    """Whether `vector_words` can take the product, of few rows."""
    return (
        weight.format in ("int4", "int8")
        and x.dtype.itemsize == 2
        and weight.shape[1] % 32 == 0
        and weight.data.data_ptr() % 8 == 0
    )


def _is_packed(x: torch.Tensor, weight: QuantizedTensor) -> bool:
    """Whether `matmul_packed` takes the product, of whatever number of rows."""
    group, scales, zeros = weight.group_size, weight.scales, weight.zeros
    return (
        _is_in_words(x, weight)
        and weight.format == "int4"
        and group > 0
        and weight.shape[1] % (4 * group) == 0
        and scales is not None
        and scales.dtype == torch.float16
        and all(part is None or part.data_ptr() % 8 == 0 for part in (scales, zeros))
        and bool(configs.config(x).packed)
        and not gpu.INTERPRETED  # which knows no assembly
    )


def _split(
    x: torch.Tensor,
    weight: QuantizedTensor | torch.Tensor,
    after: After,
    out: torch.Tensor,
    tile: Tile,
    *,
    kind: str,
) -> None:
    from tilewise.quant import triton_kernels as kernels
    from tilewise.quant.triton_packed_kernels import matmul_packed, vector_words

    (m, k), n = x.shape, weight.shape[0]
    tiles = -(-out.shape[-1] // tile.n) * -(-m // tile.m)
    programs = configs.programs_for(x, tile, is_packed=kind == "packed")
    splits = configs.splits_of(m, k, tile.k, tiles, programs)
    per_split = -(-k // (splits * tile.k)) * tile.k
    splits = max(1, -(-k // per_split)) if k else 1
    tensors, sizes = parts_of(weight, torch.float32 if kind == "vector" else x.dtype)
    options = {**format_of(weight), "EVEN": k % tile.k == 0, "BLOCK_K": tile.k}
    if kind in ("words", "packed"):
        tensors = tensors[:3]
    if kind == "packed":
        options = {"GROUP": options["GROUP"], "SCALED": tile.m >= 128}
    sums = out if splits == 1 else x.new_empty(splits, m, n, dtype=torch.float32)
    gpu.launch(
        {
            "vector": kernels.vector,
            "matrix": kernels.matmul,
            "words": vector_words,
            "packed": matmul_packed,
        }[kind],
        (tiles, splits),
        x,
        *tensors,
        *(after.tensors if splits == 1 else (None,) * 4),
        sums,
        m,
        n,
        k,
        x.stride(0),
        *sizes,
        after.rank,
        per_split,
        **options,
        ACTIVATION=after.activation,
        SPLITS=splits,
        BLOCK_N=tile.n,
        BLOCK_M=tile.m,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits > 1:
        finish(sums, after, out)


def _whole(x: torch.Tensor, weight: QuantizedTensor, after: After, out: torch.Tensor) -> None:
    """By a weight unpacked as a whole."""
    w = x.new_empty(weight.shape)
    dequantize(weight, None, w)
    if after.is_nothing and out.dtype == x.dtype:
        torch.mm(x, w.mT, out=out.view(x.shape[0], -1))
    else:
        finish(_matmul(x, w.mT)[None], after, out)


# --- the gradient of x ----------------------------------------------------------------------------


@QUANTIZED_MATMUL_BACKWARD.kernel("triton")
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
    weight = QuantizedTensor(format, (n, k), group_size, data, scales, zeros)
    grad_x = grad.new_empty((*grad.shape[:-1], k))
    if n == 0 or grad_x.numel() == 0:
        return grad_x.zero_()
    rows = _rows(grad).contiguous()
    if len(rows) >= configs.config(grad).whole:
        w = rows.new_empty(weight.shape)
        dequantize(weight, None, w)
        torch.mm(rows, w, out=grad_x.view(-1, k))
        return grad_x

    from tilewise.quant import triton_kernels as kernels

    tile = configs.tile_for(rows, len(rows))
    tensors, sizes = parts_of(weight, rows.dtype)
    gpu.launch(
        kernels.matmul_backward,
        (-(-k // tile.k) * -(-len(rows) // tile.m),),
        rows,
        *tensors,
        grad_x,
        len(rows),
        n,
        k,
        *sizes,
        **format_of(weight),
        EVEN=k % tile.k == 0,
        BLOCK_N=min(tile.n, 64),
        BLOCK_M=tile.m,
        BLOCK_K=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return grad_x
