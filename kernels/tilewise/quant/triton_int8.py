"""Products with int8 activations in Triton: groups of x to codes first, then whole numbers.

That is for the formats that keep one scale for each group of the activations. For others x is
rounded to what its codes stand for, and takes the way of any x.
"""

from __future__ import annotations

import torch

from tilewise import gpu
from tilewise.quant.formats import QuantizedTensor
from tilewise.quant.triton_configs import tile_for
from tilewise.quant.triton_finish import After
from tilewise.quant.triton_weights import parts_of

FORMATS = ("int8", "int4", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Whole codes, and no scale for less than a group of the activations."""


def _quantize_rows(x: torch.Tensor, group: int, *results: torch.Tensor | None) -> None:
    from tilewise.quant import triton_int8_kernels as kernels

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


def rounded(x: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """What `naive.fake_quantize` makes of x, rounded to `dtype`."""
    rounded = x.new_empty(x.shape, dtype=dtype)
    _quantize_rows(x, group, None, None, None, rounded)
    return rounded


def product(
    x: torch.Tensor, weight: QuantizedTensor, after: After, group: int, out: torch.Tensor
) -> None:
    from tilewise.quant import triton_int8_kernels as kernels

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
