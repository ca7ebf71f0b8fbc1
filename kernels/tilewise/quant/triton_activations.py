"""Products with rounded activations in Triton: groups of x to codes first, then codes times codes.

int8 codes are multiplied with the formats that keep one scale for each group of the activations,
fp8 codes for x in 16 bits: sums of fp8 products are not those of float32 on every tensor core. In
all other calls x is rounded to what its codes stand for, and takes the way of any x.
"""

from __future__ import annotations

import torch

from tilewise import gpu
from tilewise.quant.formats import QuantizedTensor
from tilewise.quant.triton_configs import tile_for
from tilewise.quant.triton_finish import After
from tilewise.quant.triton_weights import parts_of

_INT8_FORMATS = ("int8", "int4", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Whole codes, and no scale for less than a group of the activations."""


def multiplies_codes(x: torch.Tensor, weight: QuantizedTensor, act: str) -> bool:
    """Whether codes of x are multiplied, where there are enough rows of it."""
    return weight.format in _INT8_FORMATS if act == "int8" else x.dtype != torch.float32


def _quantize_rows(x: torch.Tensor, group: int, act: str, *results: torch.Tensor | None) -> None:
    from tilewise.quant import triton_activation_kernels as kernels

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
        ACT=act,
        GROUP=group,
        BLOCK=block,
        num_warps=4,
    )


def rounded(x: torch.Tensor, group: int, act: str, dtype: torch.dtype) -> torch.Tensor:
    """What `naive.fake_quantize` makes of x, rounded to `dtype`."""
    rounded = x.new_empty(x.shape, dtype=dtype)
    _quantize_rows(x, group, act, None, None, None, rounded)
    return rounded


def product(
    x: torch.Tensor,
    weight: QuantizedTensor,
    after: After,
    group: int,
    act: str,
    out: torch.Tensor,
) -> None:
    """Codes of x (M, K) times those of the weight, and what follows, into `out`."""
    (m, k), n = x.shape, weight.shape[0]
    groups = 1 if group < 0 else -(-k // group)
    if act == "int8":
        dtype = torch.int8
    else:
        dtype = torch.uint8 if gpu.multiplies_fp8(x) else torch.float16
    codes = x.new_empty(m, k if group < 0 else groups * group, dtype=dtype)
    scales = x.new_empty(m, groups, dtype=torch.float32)
    sums = x.new_empty(m, groups, dtype=torch.int32) if act == "int8" else None
    _quantize_rows(x, group, act, codes, scales, sums, None)
    # For int8 as for a pair: sums in whole numbers and scaled ones are held at once.
    is_pair = act == "int8" or after.activation == "swiglu"
    tile = tile_for(x.new_empty(0, dtype=torch.bfloat16), m, is_pair=is_pair)
    block_k = tile.k if group < 0 else group
    (data, weight_scales, zeros, _), sizes = parts_of(weight, x.dtype)
    options = {
        "GROUP": group,
        "ACTIVATION": after.activation,
        "EVEN": k % block_k == 0,
        "BLOCK_N": tile.n,
        "BLOCK_M": tile.m,
        "BLOCK_K": block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    grid = (-(-out.shape[-1] // tile.n) * -(-m // tile.m),)
    rest = (*after.tensors, out, m, n, k, *sizes, after.rank)
    if act == "int8":
        from tilewise.quant.triton_int8_kernels import matmul_int8

        whole = (codes, scales, sums, data, weight_scales, zeros)
        gpu.launch(matmul_int8, grid, *whole, *rest, FORMAT=weight.format, **options)
    else:
        from tilewise.quant.triton_fp8_kernels import matmul_fp8

        promoted = dtype == torch.uint8 and gpu.architecture(x) != "sm_100"
        parts = (codes, scales, data, weight_scales)
        gpu.launch(matmul_fp8, grid, *parts, *rest, PROMOTED=promoted, **options)
