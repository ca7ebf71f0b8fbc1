"""The router of a mixture of experts: checks, cost, dispatch and the public function."""

from __future__ import annotations

from functools import partial

import torch

from tilewise import checks, gpu
from tilewise.dispatch import Cost, Impl, Op
from tilewise.fused.naive import compute_dtype
from tilewise.moe import autograd, baseline, naive, native, triton


def _check(x: torch.Tensor, weight: torch.Tensor, *, validate: bool = False) -> None:
    checks.has_dtype("x", x, checks.FLOATS)
    checks.has_dims("x", x, "tokens dim")
    checks.has_dtype("weight", weight, checks.FLOATS)
    checks.has_dims("weight", weight, "experts dim")
    checks.has_shape("weight", weight, (weight.shape[0], x.shape[1]), "experts, x's dim")
    checks.on_device_of("weight", weight, "x", x)
    if validate:
        bad = (~weight.isfinite()).any(-1).nonzero()
        if len(bad):
            raise ValueError(f"weight: row {int(bad[0])} holds a number that is not finite")


def _cost(x: torch.Tensor, weight: torch.Tensor) -> Cost:
    outputs, dtype = x.shape[0] * weight.shape[0], compute_dtype(x)
    moved = x.nbytes + weight.nbytes + outputs * dtype.itemsize
    return Cost(2 * outputs * x.shape[1], moved, dtype)


_ROUTER_LOGITS = Op(
    "router_logits",
    naive.router_logits,
    impls=(
        Impl("cpu", partial(autograd.router_logits, "cpu"), native.why_not),
        # On a GPU it is one small product among large ones, and left to PyTorch.
        Impl("torch", baseline.router_logits),
        Impl(
            "triton",
            partial(autograd.router_logits, "triton"),
            triton.why_not_router,
            gpu.why_not_auto,
        ),
    ),
    check=_check,
    cost=_cost,
)


def router_logits(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    backend: str = "auto",
    validate: bool = False,
) -> torch.Tensor:
    """Score every expert for every token, as `moe` wants it: x weight^T, not rounded to x's dtype.

    Two experts may be all but equally good for a token, and a rounding would choose between them.
    With the C++ kernels a token's logits do not depend on what other tokens there are.

    Args:
        x: (tokens, dim), floating point.
        weight: (experts, dim), any floating dtype.
        backend: see `tilewise.use_backend`.
        validate: check that the weight is finite.

    Returns:
        (tokens, experts), float32; float64 where x is.

    Raises:
        ValueError, TypeError: for an argument that does not fit; it is named.
        BackendError: if the named backend cannot run the call.

    Source: Shazeer et al., Outrageously Large Neural Networks, 2017 (arXiv:1701.06538); Fedus et
    al., Switch Transformers, 2021 (arXiv:2101.03961), section 2.4, for the precision.
    """
    _check(x, weight, validate=validate)
    return _ROUTER_LOGITS(x, weight, backend=backend)
