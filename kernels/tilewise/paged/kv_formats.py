"""How a key or value row is stored in a cache: as floats, or as small codes and one scale.

A quantized row (one token, one head) is stored as `value = code * scale` with a symmetric scale
taken from its largest magnitude. One scale per token and head means that a token can be appended
without touching what is there, which a scale per page would not allow, and that no token's outlier
costs another its precision. The formats are told apart by the dtype that they are stored in:

    int8      int8           codes -127..127
    fp8       float8_e4m3fn  codes up to 448
    int4      uint8          codes -7..7 as code + 8; byte j holds element j in its low nibble and
                             element j + head_dim/2 in its high one, so that unpacking a vector of
                             bytes gives two runs of neighbours and needs no shuffle

Source: KIVI (arXiv:2402.02750) and KVQuant (arXiv:2401.18079) discuss what to share a scale over;
float8 e4m3 is from Micikevicius et al., FP8 Formats for Deep Learning, 2022 (arXiv:2209.05433).
"""

from __future__ import annotations

import torch

from tilewise.checks import FLOATS
from tilewise.fused.naive import divide

LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.uint8: 7.0}
"""The code that a row's largest magnitude gets, by the dtype that the codes are stored in."""

QUANTIZED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
"""The quantized formats' names and the dtypes that they are stored in."""

STORED = (*FLOATS, *LARGEST_CODE)
"""The dtypes that a cache can have."""


def is_quantized(cache_dtype: torch.dtype) -> bool:
    """Whether a cache of this dtype holds codes and needs scales."""
    return cache_dtype in LARGEST_CODE


def stored_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype that a cache of this floating-point dtype or quantized format is stored in."""
    if isinstance(dtype, str) and dtype in QUANTIZED:
        return QUANTIZED[dtype]
    if isinstance(dtype, torch.dtype) and dtype in FLOATS:
        return dtype
    names = " or ".join([*(str(d).removeprefix("torch.") for d in FLOATS), *map(repr, QUANTIZED)])
    raise ValueError(f"dtype: must be {names}, got {dtype!r}")


def stored_width(name: str, head_dim: int, cache_dtype: torch.dtype) -> int:
    """The last dimension of a cache for rows of `head_dim` elements."""
    if cache_dtype != torch.uint8:
        return head_dim
    if head_dim % 2:
        raise ValueError(f"{name}: must be even for an int4 cache, got {head_dim}")
    return head_dim // 2


def elements(cache: torch.Tensor) -> int:
    """The number of elements that a row of this cache decodes to."""
    return cache.shape[-1] * (2 if cache.dtype == torch.uint8 else 1)


def encode(
    x: torch.Tensor, cache_dtype: torch.dtype, scale_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows.

    Every step is an IEEE operation or a rounding to nearest even, so that each device can get the
    very same bytes.

    Args:
        x: (..., head_dim), floating point; head_dim even for int4.
        cache_dtype: one of `LARGEST_CODE`.
        scale_dtype: of the scales, and of the arithmetic.

    Returns:
        The codes, (..., head_dim) or (..., head_dim / 2) for int4, in `cache_dtype`; and the scales
        (...). A row of zeros has scale 0. A row with a NaN or an infinity has that for a scale, and
        codes 0: it decodes to NaN throughout, and attention treats the two alike.
    """
    largest = LARGEST_CODE[cache_dtype]
    x = x.to(scale_dtype)
    scale = divide(x.abs().amax(-1), largest)
    divisor = torch.where(scale > 0, scale, 1).unsqueeze(-1)
    # The clamp is for scales so small that they have few bits left.
    codes = torch.where(scale.isfinite().unsqueeze(-1), x / divisor, 0).clamp(-largest, largest)
    if cache_dtype == torch.float8_e4m3fn:
        return codes.to(cache_dtype), scale
    codes = codes.round()
    if cache_dtype == torch.uint8:
        low, high = (codes + 8).to(torch.uint8).chunk(2, dim=-1)
        return low | (high << 4), scale
    return codes.to(cache_dtype), scale


def decode(
    cache: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The values of rows of a cache.

    Args:
        cache: (..., stored width), any of `STORED`.
        scale: (...), whose dtype is multiplied in; None where the cache holds floats.
        dtype: of the result.
    """
    if scale is None:
        return cache.to(dtype)
    if cache.dtype == torch.uint8:
        codes = torch.cat([cache & 15, cache >> 4], dim=-1).to(scale.dtype) - 8
    else:
        codes = cache.to(scale.dtype)
    return (codes * scale.unsqueeze(-1)).to(dtype)
