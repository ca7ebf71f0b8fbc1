"""What follows a product with a quantized weight: as a launch takes it, and launched alone."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tilewise import gpu


class After(NamedTuple):
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


NOTHING = After(None, None, None, None, None)


def finish(parts: torch.Tensor, after: After, out: torch.Tensor) -> None:
    """Add up parts (splits, M, N), and what follows, into `out`."""
    from tilewise.quant import triton_finish_kernels as kernels

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
