"""Mixture of experts: each token goes through the few networks that a router picked for it."""

from __future__ import annotations

from functools import partial

import torch

from tilewise import checks, gpu
from tilewise.dispatch import Cost, Impl, Op
from tilewise.moe import autograd, baseline, naive, native, triton
from tilewise.moe.router import router_logits
from tilewise.quant.formats import QuantizedTensor

__all__ = ["moe", "router_logits"]


def _check_weight(
    name: str,
    weight: torch.Tensor | QuantizedTensor,
    shape: tuple[int, int, int],
    why: str,
    x: torch.Tensor,
) -> None:
    if isinstance(weight, QuantizedTensor):
        checks.on_device_of(name, weight.data, "x", x)
    else:
        checks.like(name, weight, "x", x)
    if tuple(weight.shape) != shape:
        raise ValueError(f"{name}: shape must be {shape} ({why}), got {tuple(weight.shape)}")


def _check(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    w_gate_up: torch.Tensor | QuantizedTensor,
    w_down: torch.Tensor | QuantizedTensor,
    *,
    top_k: int,
    normalize: bool = True,
    validate: bool = False,
) -> None:
    checks.has_dtype("x", x, checks.FLOATS)
    checks.has_dims("x", x, "tokens dim")
    checks.has_dtype("router_logits", router_logits, checks.FLOATS)
    checks.has_dims("router_logits", router_logits, "tokens experts")
    tokens, dim = x.shape
    experts = router_logits.shape[1]
    checks.has_shape("router_logits", router_logits, (tokens, experts), "x's tokens")
    checks.on_device_of("router_logits", router_logits, "x", x)
    checks.is_bool("normalize", normalize)
    checks.is_integer("top_k", top_k)
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: must be from 1 to the number of experts, {experts}, got {top_k}")
    for name, weight in (("w_gate_up", w_gate_up), ("w_down", w_down)):
        if not isinstance(weight, (torch.Tensor, QuantizedTensor)):
            wanted = "a torch.Tensor or a QuantizedTensor"
            raise TypeError(f"{name}: must be {wanted}, got {type(weight).__name__}")
        checks.is_tensor(name, weight.data)
        if len(weight.shape) != 3:
            raise ValueError(f"{name}: must have 3 dimensions, got shape {tuple(weight.shape)}")
    hidden = w_down.shape[2]
    _check_weight("w_down", w_down, (experts, dim, hidden), "experts, dim, hidden", x)
    _check_weight("w_gate_up", w_gate_up, (experts, 2 * hidden, dim), "experts, 2 hidden, dim", x)
    if validate:
        bad = router_logits.isnan().any(-1).nonzero()
        if len(bad):
            raise ValueError(f"router_logits: row {int(bad[0])} holds a NaN")


def _cost(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    w_gate_up: torch.Tensor | QuantizedTensor,
    w_down: torch.Tensor | QuantizedTensor,
    *,
    top_k: int,
    normalize: bool = True,
) -> Cost:
    tokens, experts = router_logits.shape
    _, dim, hidden = w_down.shape
    # Which experts are read depends on the values; this is right where the router spreads them.
    share = min(experts, tokens * top_k) / experts
    return Cost(
        6 * tokens * top_k * dim * hidden,
        share * (w_gate_up.nbytes + w_down.nbytes) + 2 * x.nbytes + router_logits.nbytes,
        x.dtype,
    )


_MOE = Op(
    "moe",
    naive.moe,
    impls=(
        Impl("triton", partial(autograd.moe, "triton"), triton.why_not, gpu.why_not_auto),
        Impl("cpu", partial(autograd.moe, "cpu"), native.why_not),
        Impl(
            "torch",
            baseline.moe,
            baseline.why_not,
            untraceable="grouped_mm has a fake function for bfloat16 only",
        ),
    ),
    check=_check,
    cost=_cost,
)


def moe(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    w_gate_up: torch.Tensor | QuantizedTensor,
    w_down: torch.Tensor | QuantizedTensor,
    *,
    top_k: int,
    normalize: bool = True,
    backend: str = "auto",
    validate: bool = False,
) -> torch.Tensor:
    """Send every token through its top_k experts and add up what they make of it.

    An expert is a gated feed-forward network, down(silu(gate x) * (up x)). A token's experts are
    those with the largest router logits, of equal ones the lower index; their weights are the
    softmax over all experts. The sum runs in a fixed order. What an expert holds, NaN included,
    reaches only the tokens that chose it.

    Args:
        x: (tokens, dim), floating point.
        router_logits: (tokens, experts), any floating dtype; see `router_logits`. A NaN makes its
            token NaN.
        w_gate_up: (experts, 2 hidden, dim), x's dtype or quantized; of an expert's rows the first
            half is the gate, the second half up.
        w_down: (experts, dim, hidden), x's dtype or quantized.
        top_k: experts per token.
        normalize: divide the weights of a token's experts by their sum, as Mixtral does.
        backend: see `tilewise.use_backend`.
        validate: check that no router logit is NaN.

    Returns:
        (tokens, dim), x's dtype, computed in float32 and rounded once.

    Raises:
        ValueError: for a shape, dtype, device or top_k that does not fit.
        TypeError: for weights that are neither tensors nor quantized.
        BackendError: if the named backend cannot run the call.

    Source: Shazeer et al., Outrageously Large Neural Networks, 2017 (arXiv:1701.06538); Jiang et
    al., Mixtral of Experts, 2024 (arXiv:2401.04088).
    """
    _check(x, router_logits, w_gate_up, w_down, top_k=top_k, normalize=normalize, validate=validate)
    return _MOE(
        x, router_logits, w_gate_up, w_down, top_k=top_k, normalize=normalize, backend=backend
    )
