"""How sub-byte codes lie in bytes, and the two 4-bit codebooks.

One layout for all 4-bit codes, the one of GGUF's Q4_0: of every 32 consecutive weights, byte b
holds weight b in its low nibble and weight b + 16 in its high nibble. A 16-byte load then gives
two runs of 16 consecutive weights with one AND and one shift, on every instruction set.
"""

from __future__ import annotations

import torch

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""NormalFloat: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.

Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023 (arXiv:2305.14314),
appendix E.
"""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The 4-bit float of the OCP MX formats; minus zero reads as zero, as it does in ggml.

Source: OCP Microscaling Formats (MX) Specification 1.0, section 5.3.3.
"""


def spread(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Split uint8 (..., n) into its fields of `bits` bits, low ones first: (..., 8 / bits, n)."""
    packed = packed.contiguous()  # blocks are cut out of longer ones; two passes read them
    mask = (1 << bits) - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-2)


def unpack_nibbles(data: torch.Tensor) -> torch.Tensor:
    """uint8 (..., K / 2) to the 4-bit codes uint8 (..., K)."""
    return spread(data.unflatten(-1, (data.shape[-1] // 16, 16)), 4).flatten(-3)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes (..., K), K a multiple of 32, to uint8 (..., K / 2)."""
    low, high = codes.to(torch.uint8).unflatten(-1, (codes.shape[-1] // 32, 2, 16)).unbind(-2)
    return (low | high << 4).flatten(-2)


def trim(values: torch.Tensor, k: int) -> torch.Tensor:
    """The first k of the last dimension, where a row was padded to whole groups.

    Not a slice: torch.compile (2.13, on the CPU) would fuse it into the loop over the groups, whose
    vectorized remainder then multiplies by what lies beside the scales. The base of an as_strided
    is computed in full.
    """
    if values.shape[-1] == k:
        return values
    return values.as_strided((*values.shape[:-1], k), values.stride())


def look_up(codebook: tuple[float, ...], codes: torch.Tensor) -> torch.Tensor:
    """The entries of a codebook, float32, by uint8 code."""
    table = torch.tensor(codebook, dtype=torch.float32, device=codes.device)
    # Not table[codes]: a uint8 index would be taken for a mask, and index_select is many times
    # faster on the CPU than indexing.
    return table.index_select(0, codes.int().flatten()).view(codes.shape)


def nearest_nf4(values: torch.Tensor) -> torch.Tensor:
    """The code of the nearest entry of `NF4`, uint8."""
    levels = torch.tensor(NF4, device=values.device)
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def nearest_e2m1(values: torch.Tensor) -> torch.Tensor:
    """The code of the nearest E2M1 number, uint8; ties go to the even code, as IEEE 754 has it."""
    levels = torch.tensor(E2M1[:8], device=values.device)
    middles = (levels[1:] + levels[:-1]) / 2
    # A value on a boundary counts as below it, so every other boundary moves down by one ulp.
    middles[1::2] = torch.nextafter(middles[1::2], middles[1::2] - 1)
    magnitude = torch.bucketize(values.abs(), middles)
    return (magnitude + 8 * (values < 0)).to(torch.uint8)
