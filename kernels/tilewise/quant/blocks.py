"""The GGUF block formats, decoded from the file's own bytes.

A row is a sequence of blocks of 32 or 256 weights; a block holds its scales and its codes. The
"K" formats quantize the scales as well: a float16 scale for 256 weights and an integer of 4 to 8
bits for each 16 or 32 of them. Every function takes blocks, uint8 (..., block_bytes), and gives
float32 (..., block_size), bit for bit what the `gguf` package gives: one rounding per product and
per sum, in the order written.

The arithmetic is in place: on a CPU the pages of a fresh result cost more than the product in it.

Source: ggml's block structures (ggml-common.h) and dequantization (ggml-quants.c).
"""

from __future__ import annotations

import torch

from tilewise.quant.packing import spread


def half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte `at` of every block, as float32 (..., 1)."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def _rows(packed: torch.Tensor, size: int) -> torch.Tensor:
    return packed.unflatten(-1, (packed.shape[-1] // size, size))


def _fifth_bits(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The 32 bits from byte `at`, each moved to bit 4."""
    return spread(blocks[..., at : at + 4].unsqueeze(-1), 1).flatten(-3) << 4


def q4_0(blocks: torch.Tensor) -> torch.Tensor:
    """Scale (2 bytes), 32 nibbles: scale * (code - 8)."""
    codes = spread(blocks[..., 2:], 4).flatten(-2)
    return codes.float().sub_(8).mul_(half(blocks, 0))


def q4_1(blocks: torch.Tensor) -> torch.Tensor:
    """Scale and minimum (2 bytes each), 32 nibbles: scale * code + minimum."""
    codes = spread(blocks[..., 4:], 4).flatten(-2)
    return codes.float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def q5_0(blocks: torch.Tensor) -> torch.Tensor:
    """Scale, 32 fifth bits (4 bytes), 32 nibbles: scale * (code - 16)."""
    codes = spread(blocks[..., 6:], 4).flatten(-2) | _fifth_bits(blocks, 2)
    return codes.float().sub_(16).mul_(half(blocks, 0))


def q5_1(blocks: torch.Tensor) -> torch.Tensor:
    """Scale, minimum, 32 fifth bits, 32 nibbles: scale * code + minimum."""
    codes = spread(blocks[..., 8:], 4).flatten(-2) | _fifth_bits(blocks, 4)
    return codes.float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """Scale, 32 signed bytes: code * scale."""
    return blocks[..., 2:].view(torch.int8).float().mul_(half(blocks, 0))


def q2_k(blocks: torch.Tensor) -> torch.Tensor:
    """16 bytes of scale and minimum nibbles, 256 codes of 2 bits, two float16."""
    scales = blocks[..., :16]
    scale = half(blocks, 80) * (scales & 15).float()
    minimum = half(blocks, 82) * (scales >> 4).float()
    codes = _rows(spread(_rows(blocks[..., 16:80], 32), 2).flatten(-3), 16)
    return codes.float().mul_(scale.unsqueeze(-1)).sub_(minimum.unsqueeze(-1)).flatten(-2)


def q3_k(blocks: torch.Tensor) -> torch.Tensor:
    """256 high bits, 256 codes of 2 bits, 16 scales of 6 bits, float16: code - 4 if no high bit."""
    low = spread(blocks[..., 96:104], 4).flatten(-2)
    high = spread(blocks[..., 104:108], 2).flatten(-2)
    scale = half(blocks, 108) * ((low | high << 4).float() - 32)
    codes = spread(_rows(blocks[..., 32:96], 32), 2).flatten(-3)
    high_bit = spread(blocks[..., :32], 1).flatten(-2)
    codes = _rows((codes | high_bit << 2).float().sub_(4), 16)
    return codes.mul_(scale.unsqueeze(-1)).flatten(-2)


def _six_bit_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8 scales and 8 minimums of Q4_K and Q5_K, 6 bits each in 12 bytes.

    Bytes 0-3 and 4-7 hold the first four scales and minimums in their low 6 bits; the last four
    have their low 4 bits in bytes 8-11 and their high 2 bits in the top of bytes 0-7.
    """
    scale, minimum, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat([scale & 63, (rest & 15) | ((scale >> 2) & 48)], dim=-1)
    minimums = torch.cat([minimum & 63, (rest >> 4) | ((minimum >> 2) & 48)], dim=-1)
    return scales.float(), minimums.float()


def _scale_and_minimum(blocks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    scales, minimums = _six_bit_scales(blocks[..., 4:16])
    scale = (half(blocks, 0) * scales).unsqueeze(-1)
    minimum = (half(blocks, 2) * minimums).unsqueeze(-1)
    return codes.float().mul_(scale).sub_(minimum).flatten(-2)


def q4_k(blocks: torch.Tensor) -> torch.Tensor:
    """Two float16, 12 bytes of scales and minimums, 256 nibbles: scale * code - minimum."""
    return _scale_and_minimum(blocks, spread(_rows(blocks[..., 16:], 32), 4).flatten(-3, -2))


def q5_k(blocks: torch.Tensor) -> torch.Tensor:
    """As Q4_K, with 256 fifth bits (32 bytes) before the nibbles."""
    codes = spread(_rows(blocks[..., 48:], 32), 4).flatten(-3, -2)
    return _scale_and_minimum(blocks, codes | spread(blocks[..., 16:48], 1) << 4)


def q6_k(blocks: torch.Tensor) -> torch.Tensor:
    """256 nibbles, 256 codes of 2 bits, 16 signed scales, float16: scale * (code - 32)."""
    low = spread(_rows(blocks[..., :128], 64), 4).flatten(-3)
    high = spread(_rows(blocks[..., 128:192], 32), 2).flatten(-3)
    scale = half(blocks, 208) * blocks[..., 192:208].view(torch.int8).float()
    codes = _rows((low | high << 4).float().sub_(32), 16)
    return codes.mul_(scale.unsqueeze(-1)).flatten(-2)
