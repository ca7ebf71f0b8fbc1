"""The Triton backend of products with quantized weights: which kernel for how many rows.

A few rows take `vector`, which reads the weight once and multiplies without tensor cores. More take
`matmul`, which unpacks a tile of the weight for each tile of x. Where that would be done too often,
the weight is unpacked once, into x's dtype, and PyTorch multiplies: its result is float32, so that
`finish` still rounds once, unless nothing follows and PyTorch's one rounding is the same.

With act="int8", whole numbers are multiplied for the formats that keep one scale for each group of
the activations; otherwise x is rounded first and takes the way of any x.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from tilewise import gpu, tuning
from tilewise.library import needs_grad
from tilewise.quant import naive
from tilewise.quant.formats import QuantizedTensor
from tilewise.quant.operators import (
    QUANTIZED_EMBEDDING,
    QUANTIZED_MATMUL,
    QUANTIZED_MATMUL_BACKWARD,
    QUANTIZED_PRODUCT,
)
from tilewise.quant.packing import NF4

# --- launch configurations ------------------------------------------------------------------------


class Tile(NamedTuple):
    """A tile of `matmul` and how it is run. BLOCK_K is never less than 128: a chunk of Q6_K."""

    n: int
    m: int
    k: int
    num_warps: int
    num_stages: int


class Config(NamedTuple):
    """The table of an architecture; not measured yet, on any of them.

    Args:
        tiles: in ascending order of m; the first that holds all rows of x is taken, or the last.
        pair_n: rows of each half of the weight where swiglu needs a pair of sums.
        float32: the tile for float32, which has no tensor cores to feed.
        programs: K is split until there are about so many. A constant, and not the number of
            processors, on which no result may depend.
        vector_rows: how many rows `vector` takes.
        whole: from how many rows the weight is unpacked as a whole.
    """

    tiles: tuple[Tile, ...]
    pair_n: int
    float32: Tile
    programs: int
    vector_rows: int = 4
    whole: int = 512


_AMPERE = Config(
    tiles=(
        Tile(64, 16, 128, 4, 4),
        Tile(64, 32, 128, 4, 3),
        Tile(64, 64, 128, 4, 3),
        Tile(64, 128, 128, 8, 2),
    ),
    pair_n=32,
    float32=Tile(32, 32, 128, 4, 1),
    programs=216,
)
_HOPPER = Config(
    tiles=(
        Tile(64, 16, 128, 4, 4),
        Tile(64, 32, 128, 4, 4),
        Tile(128, 64, 128, 8, 3),
        Tile(128, 128, 128, 8, 3),
    ),
    pair_n=64,
    float32=Tile(32, 32, 128, 4, 1),
    programs=264,
)
CONFIGS = {
    "sm_80": _AMPERE,
    "sm_86": _AMPERE._replace(
        tiles=(
            Tile(64, 16, 128, 4, 4),
            Tile(64, 32, 128, 4, 3),
            Tile(64, 64, 128, 8, 2),
            Tile(64, 128, 128, 8, 2),
        )
    ),
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
    "gfx942": Config(
        tiles=(Tile(64, 16, 128, 4, 2), Tile(64, 32, 128, 4, 2), Tile(64, 64, 128, 4, 2)),
        pair_n=64,
        float32=Tile(32, 32, 128, 4, 1),
        programs=304,
    ),
}


def config(x: torch.Tensor) -> Config:
    """The launch configurations for the GPU of x."""
    return CONFIGS[gpu.architecture(x)]


def tile_for(x: torch.Tensor, rows: int, *, is_pair: bool = False) -> Tile:
    """The tile for a product of so many rows in x's dtype; of a pair of them for swiglu."""
    chosen = config(x)
    if x.dtype == torch.float32:
        return chosen.float32
    tiles = chosen.tiles[:3] if is_pair else chosen.tiles  # two sums are held at once
    tile = next((tile for tile in tiles if tile.m >= rows), tiles[-1])
    return tile._replace(n=chosen.pair_n) if is_pair else tile


def splits_of(m: int, k: int, block_k: int, tiles: int, programs: int) -> int:
    """Into how many parts K is cut: of four blocks at least, and few where a part is large."""
    return max(1, min(programs // max(tiles, 1), k // (4 * block_k), 512 // m))


# --- weights --------------------------------------------------------------------------------------


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


# --- the product ----------------------------------------------------------------------------------


def why_not(
    x: torch.Tensor, weight: QuantizedTensor, *others: Any, act: str | None = None, **options: Any
) -> str | None:
    """Why the Triton kernels cannot take the call."""
    reason = gpu.why_not(x)
    is_rounded = act is not None and weight.format not in _INT8_DOT
    if reason is None and is_rounded and x.dtype != torch.float32:
        # Such codes are no integers: x would be rounded to int8, scaled, and rounded once more.
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
) -> torch.Tensor:
    """The naive function of this name, by the Triton kernels."""
    a, b = adapter or (None, None)
    if needs_grad(x, bias, residual, a, b):
        # What follows the product is a small part of the work, and PyTorch differentiates it.
        y = _Product.apply(x, weight, act)
        return naive.finish(y, x, bias, activation, residual, adapter).to(x.dtype)
    options = (bias, activation, residual, a, b, act, "triton")
    out: torch.Tensor = QUANTIZED_MATMUL(x, *_fields(weight), *options)
    return out


class _Product(torch.autograd.Function):
    """x W^T in float32; the gradient of int8 activations passes straight through their rounding."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: QuantizedTensor, act: str | None
    ) -> torch.Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        y: torch.Tensor = QUANTIZED_PRODUCT(x, *_fields(weight), act, "triton")
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # In x's dtype, as the tensor cores take it: its result is rounded to that anyway.
        grad_x = QUANTIZED_MATMUL_BACKWARD(grad.to(ctx.dtype), *_fields(ctx.weight), "triton")
        return grad_x, None, None


def _fields(weight: QuantizedTensor) -> tuple[Any, ...]:
    """A weight as the operators take it."""
    parts = (weight.data, weight.scales, weight.zeros)
    return (weight.format, weight.shape, weight.group_size, *parts)


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
) -> torch.Tensor:
    weight = QuantizedTensor(format, tuple(shape), group_size, data, scales, zeros)
    n = shape[0] // 2 if activation == "swiglu" else shape[0]
    out = x.new_empty((*x.shape[:-1], n))
    rows = _rows(x)
    projected = None
    if adapter_a is not None and adapter_b is not None:
        projected, adapter_b = _matmul(rows, adapter_a), adapter_b.contiguous()
    after = _After(
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
    _run(_rows(x), weight, _NOTHING, act, out)
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
        _split(x, weight, _NOTHING, out, tile_for(x, len(x)), is_vector=False)


class _After(NamedTuple):
    """What follows the product, contiguous; `projected` is x A in float32."""

    bias: torch.Tensor | None
    residual: torch.Tensor | None
    projected: torch.Tensor | None
    adapter_b: torch.Tensor | None
    activation: str | None

    @property
    def is_nothing(self) -> bool:
        return all(part is None for part in self)

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self[:4]

    @property
    def rank(self) -> int:
        return 0 if self.adapter_b is None else self.adapter_b.shape[0]


_NOTHING = _After(None, None, None, None, None)


def _run(
    x: torch.Tensor, weight: QuantizedTensor, after: _After, act: str | None, out: torch.Tensor
) -> None:
    """x (M, K) times the weight, and what follows, into `out`, whose dtype may be another."""
    if out.numel() == 0:
        return
    m, k = x.shape
    chosen = config(x)
    is_few = m <= chosen.vector_rows
    if act is not None and k > 0:
        group = naive.activation_group(weight)
        if not is_few and weight.format in _INT8_DOT:
            return _int8(x, weight, after, group, out)
        x = _rounded(x, group, torch.float32 if is_few else x.dtype)
    if m >= chosen.whole and not is_few:
        return _whole(x, weight, after, out)
    is_pair = after.activation == "swiglu"
    tile = _vector_tile(m, k) if is_few else tile_for(x, m, is_pair=is_pair)
    # What fits into shared memory depends on the format and on x's dtype.
    name = f"{'vector' if is_few else 'matrix'} {weight.format} {x.dtype} {tile.m} x {tile.k}"
    sizes = {"n": 1} if is_few else {"n": 16, "k": 128}
    tile = tuning.chosen(x, f"{name}, {'pairs' if is_pair else 'rows'}", tile, sizes)
    return _split(x, weight, after, out, tile, is_vector=is_few)


def _vector_tile(m: int, k: int) -> Tile:
    """32 weights for each of 128 threads, or 16 where each meets more rows of x."""
    block_m = 1 << (m - 1).bit_length()
    block_k = next((block for block in (512, 256) if k % block == 0), 128)
    return Tile((4096 if block_m == 1 else 2048) // block_k, block_m, block_k, 4, 1)


def _split(
    x: torch.Tensor,
    weight: QuantizedTensor | torch.Tensor,
    after: _After,
    out: torch.Tensor,
    tile: Tile,
    *,
    is_vector: bool,
) -> None:
    from tilewise.quant import triton_kernels as kernels

    (m, k), n = x.shape, weight.shape[0]
    tiles = -(-out.shape[-1] // tile.n) * -(-m // tile.m)
    splits = splits_of(m, k, tile.k, tiles, config(x).programs)
    per_split = -(-k // (splits * tile.k)) * tile.k
    splits = max(1, -(-k // per_split)) if k else 1
    tensors, sizes = parts_of(weight, torch.float32 if is_vector else x.dtype)
    sums = out if splits == 1 else x.new_empty(splits, m, n, dtype=torch.float32)
    gpu.launch(
        kernels.vector if is_vector else kernels.matmul,
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
        **format_of(weight),
        ACTIVATION=after.activation,
        SPLITS=splits,
        EVEN=k % tile.k == 0,
        BLOCK_N=tile.n,
        BLOCK_M=tile.m,
        BLOCK_K=tile.k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if splits > 1:
        _finish(sums, after, out)


def _finish(parts: torch.Tensor, after: _After, out: torch.Tensor) -> None:
    """Add up parts (splits, M, N), and what follows, into `out`."""
    from tilewise.quant import triton_kernels as kernels

    splits, m, n = parts.shape
    block_m = min(1 << (m - 1).bit_length(), 8)
    block_n = 1024 // block_m
    gpu.launch(
        kernels.finish,
        (-(-out.shape[-1] // block_n), -(-m // block_m)),
        parts,
        *after.tensors,
        out,
        m,
        n,
        after.rank,
        SPLITS=splits,
        ACTIVATION=after.activation,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        num_warps=4,
    )


def _whole(x: torch.Tensor, weight: QuantizedTensor, after: _After, out: torch.Tensor) -> None:
    """By a weight unpacked as a whole."""
    w = x.new_empty(weight.shape)
    _dequantize(weight, None, w)
    if after.is_nothing and out.dtype == x.dtype:
        torch.mm(x, w.mT, out=out.view(x.shape[0], -1))
    else:
        _finish(_matmul(x, w.mT)[None], after, out)


# --- int8 activations -----------------------------------------------------------------------------

_INT8_DOT = ("int8", "int4", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Whole codes, and no scale for less than a group of the activations."""


def _quantize_rows(x: torch.Tensor, group: int, *results: torch.Tensor | None) -> None:
    from tilewise.quant import triton_kernels as kernels

    m, k = x.shape
    groups = 1 if group < 0 else -(-k // group)
    block = 1024
    gpu.launch(
        kernels.quantize_rows,
        (m, 1 if group < 0 else -(-k // block)),
        x,
        *results,
        k,
        groups,
        x.stride(0),
        GROUP=group,
        BLOCK=block,
        num_warps=4,
    )


def _rounded(x: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """What `naive.fake_quantize` makes of x, rounded to `dtype`."""
    rounded = x.new_empty(x.shape, dtype=dtype)
    _quantize_rows(x, group, None, None, None, rounded)
    return rounded


def _int8(
    x: torch.Tensor, weight: QuantizedTensor, after: _After, group: int, out: torch.Tensor
) -> None:
    from tilewise.quant import triton_kernels as kernels

    (m, k), n = x.shape, weight.shape[0]
    groups = 1 if group < 0 else -(-k // group)
    codes = x.new_empty(m, k if group < 0 else groups * group, dtype=torch.int8)
    scales = x.new_empty(m, groups, dtype=torch.float32)
    sums = x.new_empty(m, groups, dtype=torch.int32)
    _quantize_rows(x, group, codes, scales, sums, None)
    # As for a pair: sums in whole numbers and scaled ones are held at once.
    tile = tile_for(x.new_empty(0, dtype=torch.bfloat16), m, is_pair=True)
    block_k = tile.k if group < 0 else group
    tensors, sizes = parts_of(weight, x.dtype)
    gpu.launch(
        kernels.matmul_int8,
        (-(-out.shape[-1] // tile.n) * -(-m // tile.m),),
        codes,
        scales,
        sums,
        *tensors[:3],
        *after.tensors,
        out,
        m,
        n,
        k,
        *sizes,
        after.rank,
        FORMAT=weight.format,
        GROUP=group,
        ACTIVATION=after.activation,
        EVEN=k % block_k == 0,
        BLOCK_N=tile.n,
        BLOCK_M=tile.m,
        BLOCK_K=block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


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
    if len(rows) >= config(grad).whole:
        w = rows.new_empty(weight.shape)
        _dequantize(weight, None, w)
        torch.mm(rows, w, out=grad_x.view(-1, k))
        return grad_x

    from tilewise.quant import triton_kernels as kernels

    tile = tile_for(rows, len(rows))
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
    rows: torch.Tensor = QUANTIZED_EMBEDDING(token_ids, *_fields(weight), dtype, "triton")
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
    _dequantize(weight, token_ids.contiguous(), rows)
    return rows


def _dequantize(weight: QuantizedTensor, indices: torch.Tensor | None, out: torch.Tensor) -> None:
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
