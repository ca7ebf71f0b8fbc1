"""The C++ kernels of the mixture of experts: one call, whatever the router chose.

Quantized weights are read in panels, and are turned to them as `tilewise.quant.native` says.
"""

from __future__ import annotations

from typing import Any

import torch

from tilewise import cpu, native
from tilewise.moe.operators import MOE, ROUTER_LOGITS, Weight, weight_of
from tilewise.quant import native as quant_native
from tilewise.quant.formats import QuantizedTensor


def why_not(x: torch.Tensor, *others: Any, **options: Any) -> str | None:
    """Why the C++ kernels cannot take the call."""
    return cpu.why_not(x)


@MOE.kernel("cpu")
def _moe(x: torch.Tensor, router_logits: torch.Tensor, *others: Any) -> torch.Tensor:
    *parts, top_k, normalize = others
    w_gate_up, w_down = weight_of(*parts[:6]), weight_of(*parts[6:])
    if router_logits.dtype not in cpu.DTYPES:
        router_logits = router_logits.float()
    out = x.new_empty(x.shape)
    native.cpu_ops().moe(
        cpu.unit_stride(x),
        router_logits.contiguous(),
        w_down.shape[2],
        *_describe(w_gate_up),
        *_describe(w_down),
        top_k,
        normalize,
        out,
    )
    return out


def _describe(weight: Weight) -> tuple[Any, ...]:
    """Format, group size and parts, as the operator of C++ takes them."""
    if isinstance(weight, torch.Tensor):
        return (-1, 0, weight.contiguous(), None, None)
    format, _, _, *others = quant_native.describe(quant_native.as_panels(weight))
    return (format, *others)


@ROUTER_LOGITS.kernel("cpu")
def _router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if weight.dtype not in cpu.DTYPES:
        weight = weight.float()
    logits = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    native.cpu_ops().router_logits(cpu.unit_stride(x), weight.contiguous(), logits)
    return logits


# --- what the gradient needs ----------------------------------------------------------------------


def prepared(weight: Weight) -> Weight:
    """The weight as the kernels read it, turned once for all experts."""
    return weight if isinstance(weight, torch.Tensor) else quant_native.as_panels(weight)


def product(x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """x W^T, differentiable in x."""
    return quant_native.quantized_matmul(x, weight)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T of float32 matrices, the same bits on any number of threads."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    native.cpu_ops().linear(x.contiguous(), weight.contiguous(), None, out)
    return out
