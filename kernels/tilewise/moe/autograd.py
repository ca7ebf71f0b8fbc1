"""The gradients of the mixture of experts, for every backend with kernels of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tilewise.fused import swiglu
from tilewise.library import Saved, needs_grad, once_differentiable
from tilewise.moe import native, triton
from tilewise.moe.naive import route
from tilewise.moe.operators import MOE, ROUTER_LOGITS, Weight, parts_of
from tilewise.quant.formats import QuantizedTensor


class _Kernels(NamedTuple):
    """What the gradient needs of a backend.

    Args:
        product: x W^T with a quantized weight, differentiable in x.
        linear: x W^T of float32 matrices, the same bits on any number of threads.
    """

    product: Callable[[torch.Tensor, QuantizedTensor], torch.Tensor]
    linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


_KERNELS = {
    "cpu": _Kernels(native.product, native.linear),
    "triton": _Kernels(triton.product, triton.linear),
}


def moe(
    backend: str,
    x: torch.Tensor,
    router_logits: torch.Tensor,
    w_gate_up: Weight,
    w_down: Weight,
    *,
    top_k: int,
    normalize: bool = True,
) -> torch.Tensor:
    """The naive function of this name, by the kernels of a backend."""
    plain = [w for w in (w_gate_up, w_down) if isinstance(w, torch.Tensor)]
    out: torch.Tensor
    if needs_grad(x, router_logits, *plain):
        out = _Moe.apply(backend, x, router_logits, w_gate_up, w_down, top_k, normalize)
    else:
        parts = (*parts_of(w_gate_up), *parts_of(w_down))
        out = MOE(x, router_logits, *parts, top_k, normalize, backend)
    return out


def router_logits(backend: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The naive function of this name, by the kernels of a backend."""
    logits: torch.Tensor
    if needs_grad(x, weight):
        logits = _RouterLogits.apply(backend, x, weight)
    else:
        logits = ROUTER_LOGITS(x, weight, backend)
    return logits


class _Moe(torch.autograd.Function):
    """The gradient runs each expert once more, on its own tokens, and keeps nothing until then."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
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
        ctx.backend, ctx.top_k, ctx.normalize = backend, top_k, normalize
        parts = (*parts_of(w_gate_up), *parts_of(w_down))
        out: torch.Tensor = MOE(x, router_logits, *parts, top_k, normalize, backend)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Saved, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, router_logits, *plain = saved
        weights = [plain.pop(0) if w is None else w for w in ctx.quantized]
        if ctx.backend == "cpu":
            weights = [native.prepared(w) for w in weights]
        with torch.enable_grad():
            logits = router_logits.float().requires_grad_()
            counts, chosen = route(logits, ctx.top_k, ctx.normalize)
        grad_x = torch.zeros_like(x, dtype=torch.float32)
        grad_counts = torch.zeros_like(counts)
        grad_weights = [
            torch.zeros_like(w) if isinstance(w, torch.Tensor) and needed else None
            for w, needed in zip(weights, ctx.needs_input_grad[3:5], strict=True)
        ]
        for expert in chosen.unique().tolist():
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            with torch.enable_grad():
                rows = x[tokens].float().requires_grad_()
                own = [_of_expert(w, expert) for w in weights]
                gate, up = _product(ctx.backend, rows, own[0]).chunk(2, dim=-1)
                out = _product(ctx.backend, swiglu(gate, up, backend=_swiglu(ctx)), own[1])
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
        return None, grad_x.to(x.dtype), grad_logits, *grad_weights, None, None


def _swiglu(ctx: Any) -> str:
    return "cpu" if ctx.backend == "cpu" else "naive"


def _of_expert(weight: Weight, expert: int) -> Weight:
    """An expert's matrix, a plain one in float32 and with a gradient of its own."""
    if isinstance(weight, torch.Tensor):
        return weight[expert].float().requires_grad_()
    return weight[expert]


def _product(backend: str, x: torch.Tensor, weight: Weight) -> torch.Tensor:
    if isinstance(weight, QuantizedTensor):
        return _KERNELS[backend].product(x, weight)
    product: torch.Tensor = _Linear.apply(backend, x, weight)
    return product


class _Linear(torch.autograd.Function):
    """x weight^T in float32, the same bits on any number of threads, which PyTorch's are not."""

    @staticmethod
    def forward(ctx: Any, backend: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.linear = _KERNELS[backend].linear
        return ctx.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: Saved, grad: torch.Tensor
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        x, weight = saved
        return None, ctx.linear(grad, weight.mT), ctx.linear(grad.mT, x.mT)


class _RouterLogits(torch.autograd.Function):
    """x weight^T in float32; the gradients' products are the same operation."""

    @staticmethod
    def forward(ctx: Any, backend: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.backend = backend
        logits: torch.Tensor = ROUTER_LOGITS(x, weight, backend)
        return logits

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: Saved, grad: torch.Tensor
    ) -> tuple[None, torch.Tensor | None, torch.Tensor | None]:
        x, weight = saved
        _, needs_x, needs_weight = ctx.needs_input_grad
        grad_x = ROUTER_LOGITS(grad, weight.mT, ctx.backend).to(x.dtype) if needs_x else None
        grad_weight = None
        if needs_weight:
            grad_weight = ROUTER_LOGITS(grad.mT, x.mT, ctx.backend).to(weight.dtype)
        return None, grad_x, grad_weight
