"""The C++ kernel of the mixture of experts: one call, whatever the router chose.

Quantized weights are read in panels, and are turned to them as `tilewise.quant.native` says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tilewise import cpu, native
from tilewise.fused import swiglu
from tilewise.library import needs_grad
from tilewise.moe.naive import route
from tilewise.moe.operators import MOE, Weight, parts_of, weight_of
from tilewise.quant import native as quant_native
from tilewise.quant.formats import QuantizedTensor


def why_not(x: torch.Tensor, *others: Any, **options: Any) -> str | None:
    """Why the C++ kernel cannot take the call."""
    return cpu.why_not(x)


def moe(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    w_gate_up: Weight,
    w_down: Weight,
    *,
    top_k: int,
    normalize: bool = True,
) -> torch.Tensor:
    """The naive function of this name, by the C++ kernel."""
    plain = [w for w in (w_gate_up, w_down) if isinstance(w, torch.Tensor)]
    out: torch.Tensor
    if needs_grad(x, router_logits, *plain):
        out = _Moe.apply(x, router_logits, w_gate_up, w_down, top_k, normalize)
    else:
        parts = (*parts_of(w_gate_up), *parts_of(w_down))
        out = MOE(x, router_logits, *parts, top_k, normalize, "cpu")
    return out


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


# --- gradients ------------------------------------------------------------------------------------


class _Moe(torch.autograd.Function):
    """The gradient runs each expert once more, on its own tokens, and keeps nothing until then."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        w_gate_up: Weight,
        w_down: Weight,
        top_k: int,
        normalize: bool,
    ) -> torch.Tensor:
        plain = [w for w in (w_gate_up, w_down) if isinstance(w, torch.Tensor)]
        ctx.save_for_backward(x, router_logits, *plain)
        ctx.quantized = [None if isinstance(w, torch.Tensor) else w for w in (w_gate_up, w_down)]
        ctx.top_k, ctx.normalize = top_k, normalize
        parts = (*parts_of(w_gate_up), *parts_of(w_down))
        out: torch.Tensor = MOE(x, router_logits, *parts, top_k, normalize, "cpu")
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, router_logits, *plain = ctx.saved_tensors
        weights = [plain.pop(0) if w is None else quant_native.as_panels(w) for w in ctx.quantized]
        with torch.enable_grad():
            logits = router_logits.float().requires_grad_()
            counts, chosen = route(logits, ctx.top_k, ctx.normalize)
        grad_x = torch.zeros_like(x, dtype=torch.float32)
        grad_counts = torch.zeros_like(counts)
        grad_weights = [
            torch.zeros_like(w) if isinstance(w, torch.Tensor) and needed else None
            for w, needed in zip(weights, ctx.needs_input_grad[2:4], strict=True)
        ]
        for expert in chosen.unique().tolist():
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            with torch.enable_grad():
                rows = x[tokens].float().requires_grad_()
                own = [_of_expert(w, expert) for w in weights]
                gate, up = _product(rows, own[0]).chunk(2, dim=-1)
                out = _product(swiglu(gate, up, backend="cpu"), own[1])
            of_rows = grad[tokens].float()
            grad_counts[tokens, place] = (of_rows * out.detach()).sum(-1)
            wanted = [w for w, g in zip(own, grad_weights, strict=True) if g is not None]
            scaled = of_rows * counts.detach()[tokens, place, None]
            of_x, *of_weights = torch.autograd.grad(out, (rows, *wanted), scaled)
            grad_x[tokens] += of_x  # a token is in `tokens` once: the order is that of the experts
            for total in grad_weights:
                if total is not None:
                    total[expert] = of_weights.pop(0)
        grad_logits = torch.autograd.grad(counts, logits, grad_counts)[0].to(router_logits.dtype)
        return grad_x.to(x.dtype), grad_logits, *grad_weights, None, None


def _of_expert(weight: Weight, expert: int) -> Weight:
    """An expert's matrix, a plain one in float32 and with a gradient of its own."""
    if isinstance(weight, torch.Tensor):
        return weight[expert].float().requires_grad_()
    return weight[expert]


def _product(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    if isinstance(weight, QuantizedTensor):
        return quant_native.quantized_matmul(x, weight)
    product: torch.Tensor = _Linear.apply(x, weight)
    return product


class _Linear(torch.autograd.Function):
    """x weight^T in float32, the same bits on any number of threads, which PyTorch's are not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        return _linear(grad, weight.mT), _linear(grad.mT, x.mT)


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0])
    native.cpu_ops().linear(x.contiguous(), weight.contiguous(), out)
    return out
