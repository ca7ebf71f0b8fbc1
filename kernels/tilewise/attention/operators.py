"""The registered operators behind attention kernels that PyTorch cannot trace.

Forward operators always return the log-sum-exp, because the backward ones start from it. A tensor
that does not exist (the gradient of a missing bias) is an empty one: operators have a fixed number
of results. A backward operator takes `out` in q's dtype or in float32. Options are plain numbers
here: the scale is known, and a causal call stays `causal`, so that a kernel can choose its fast
path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilewise.attention import naive
from tilewise.fused.naive import compute_dtype
from tilewise.library import Contract

_TENSORS = "Tensor? alibi_slopes, Tensor? sinks, Tensor? bias"
_OPTIONS = (
    "bool causal, float scale, int window_left, int window_right, float softcap, "
    "bool batch_invariant"
)
_RAGGED = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k"
_STATE = "Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse"
_GRADS = "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_sinks, Tensor grad_bias)"


def _fake_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any) -> Any:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(q.shape[:-1], dtype=compute_dtype(q))


def _fake_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *others: Any,
) -> Any:
    sinks, bias, needs_grad_bias = others[-9], others[-8], others[-1]  # as in the schemas
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    grads.append(q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape))
    grads.append(bias.new_empty(bias.shape) if needs_grad_bias else q.new_empty(0))
    return tuple(grads)


FLASH_ATTENTION = Contract(
    "flash_attention",
    f"(Tensor q, Tensor k, Tensor v, {_TENSORS}, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    _fake_forward,
)

FLASH_ATTENTION_BACKWARD = Contract(
    "flash_attention_backward",
    f"({_STATE}, Tensor q, Tensor k, Tensor v, {_TENSORS}, {_OPTIONS}, bool needs_grad_bias) "
    f"-> {_GRADS}",
    _fake_backward,
)

FLASH_ATTENTION_VARLEN = Contract(
    "flash_attention_varlen",
    f"(Tensor q, Tensor k, Tensor v, {_RAGGED}, {_TENSORS}, {_OPTIONS}) "
    "-> (Tensor out, Tensor lse)",
    _fake_forward,
)

FLASH_ATTENTION_VARLEN_BACKWARD = Contract(
    "flash_attention_varlen_backward",
    f"({_STATE}, Tensor q, Tensor k, Tensor v, {_RAGGED}, {_TENSORS}, {_OPTIONS}, "
    f"bool needs_grad_bias) -> {_GRADS}",
    _fake_backward,
)


def _fake_merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> Any:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


MERGE_STATES = Contract(
    "merge_states",
    "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)",
    _fake_merge_states,
)


# --- the naive kernels ----------------------------------------------------------------------------


@FLASH_ATTENTION.kernel("naive")
def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> Any:
    return _contiguous(naive.flash_attention(q, k, v, **_named(*options)))


@FLASH_ATTENTION_VARLEN.kernel("naive")
def _forward_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    *options: Any,
) -> Any:
    return _contiguous(
        naive.flash_attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **_named(*options))
    )


@FLASH_ATTENTION_BACKWARD.kernel("naive")
def _backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *options: Any,
) -> Any:
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **named: Any) -> Any:
        return naive.flash_attention(q, k, v, **named)

    return _gradients(forward, (q, k, v), _named(*options[:-1]), options[-1], grad_out, grad_lse)


@FLASH_ATTENTION_VARLEN_BACKWARD.kernel("naive")
def _backward_varlen(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    *options: Any,
) -> Any:
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **named: Any) -> Any:
        return naive.flash_attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **named)

    return _gradients(forward, (q, k, v), _named(*options[:-1]), options[-1], grad_out, grad_lse)


@MERGE_STATES.kernel("naive")
def _merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> Any:
    return _contiguous(naive.merge_states(out_a, lse_a, out_b, lse_b))


def _named(
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
    causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    batch_invariant: bool,
) -> dict[str, Any]:
    """The operator's options as the naive function's."""
    return {
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "bias": bias,
        "causal": causal,
        "scale": scale,
        "window": (window_left, window_right),
        "softcap": softcap,
        "batch_invariant": batch_invariant,
        "return_lse": True,
    }


def _contiguous(results: Any) -> Any:
    """What the fake functions promise, and operators may not return views of one another."""
    return tuple(result.contiguous() for result in results)


def _gradients(
    forward: Callable[..., Any],
    qkv: tuple[torch.Tensor, ...],
    options: dict[str, Any],
    needs_grad_bias: bool,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
) -> Any:
    """Runs `forward` again, with PyTorch's autograd watching.

    Within a dispatch mode, such as a FLOP counter, an operator is called below autograd, which
    would then see nothing: hence the guard.
    """
    watched = torch._C._SetExcludeDispatchKeyGuard(
        torch._C.DispatchKey.AutogradFunctionality, False
    )
    with watched, torch.enable_grad():
        qkv = tuple(x.detach().requires_grad_() for x in qkv)
        extras = {"sinks": options["sinks"], "bias": options["bias"] if needs_grad_bias else None}
        leaves = {name: x.detach().requires_grad_() for name, x in extras.items() if x is not None}
        out, lse = forward(*qkv, **options | leaves)
    upstream = grad_out, torch.zeros_like(lse) if grad_lse is None else grad_lse
    grads = torch.autograd.grad((out, lse), (*qkv, *leaves.values()), upstream)
    found = dict(zip(leaves, grads[3:], strict=True))
    extra = (found[name] if name in found else qkv[0].new_empty(0) for name in extras)
    return _contiguous((*grads[:3], *extra))
