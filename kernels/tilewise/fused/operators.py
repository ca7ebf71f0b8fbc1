"""The registered operators behind fused kernels that PyTorch cannot trace.

They have a fixed number of results: one that does not exist, such as the sum of a norm without a
residual, is empty. Backward operators start from the forward ones' inputs: to compute a row's
statistics again is cheaper than to keep them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tilewise.fused import naive
from tilewise.fused.tables import RotaryTables
from tilewise.library import Contract

# --- norms ----------------------------------------------------------------------------------------


def _fake_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> Any:
    return x.new_empty(x.shape), x.new_empty((0,) if residual is None else x.shape)


def _fake_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> Any:
    return _fake_rms_norm(x, weight, eps, residual)


def _fake_rms_norm_backward(
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> Any:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _fake_layer_norm_backward(
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> Any:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


RMS_NORM = Contract(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps, Tensor? residual) -> (Tensor out, Tensor sum)",
    _fake_rms_norm,
)
RMS_NORM_BACKWARD = Contract(
    "rms_norm_backward",
    "(Tensor grad_out, Tensor? grad_sum, Tensor x, Tensor weight, float eps) "
    "-> (Tensor grad_x, Tensor grad_weight)",
    _fake_rms_norm_backward,
)
LAYER_NORM = Contract(
    "layer_norm",
    "(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor? residual) "
    "-> (Tensor out, Tensor sum)",
    _fake_layer_norm,
)
LAYER_NORM_BACKWARD = Contract(
    "layer_norm_backward",
    "(Tensor grad_out, Tensor? grad_sum, Tensor x, Tensor weight, float eps) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _fake_layer_norm_backward,
)
"""`x` is what was normed, the residual added; `grad_sum` is its gradient as a result by itself."""


# --- rotary embedding -----------------------------------------------------------------------------


def _fake_rotary_embedding(x: torch.Tensor, *others: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


ROTARY_EMBEDDING = Contract(
    "rotary_embedding",
    "(Tensor x, Tensor cos, Tensor sin, Tensor positions, bool interleaved, bool inverse) "
    "-> Tensor",
    _fake_rotary_embedding,
)
"""`inverse` turns back, which is the gradient."""


# --- gated activations ----------------------------------------------------------------------------

ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf")


def _fake_gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return gate.new_empty(gate.shape)


def _fake_gated_backward(
    grad_out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> Any:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


GATED_ACTIVATION = Contract(
    "gated_activation", "(Tensor gate, Tensor up, str activation) -> Tensor", _fake_gated
)
GATED_ACTIVATION_BACKWARD = Contract(
    "gated_activation_backward",
    "(Tensor grad_out, Tensor gate, Tensor up, str activation) "
    "-> (Tensor grad_gate, Tensor grad_up)",
    _fake_gated_backward,
)
"""`activation` is one of `ACTIVATIONS`."""


# --- sampling -------------------------------------------------------------------------------------


def _fake_sample(logits: torch.Tensor, *others: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


SAMPLE = Contract(
    "sample",
    "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
    "Tensor repetition_penalty, Tensor? previous_tokens, int seed, Tensor? sample_ids, "
    "Tensor? positions) -> Tensor",
    _fake_sample,
)
"""Every parameter has one value per row, so that one kernel serves a mixed batch."""


# --- the naive kernels ----------------------------------------------------------------------------


@RMS_NORM.kernel("naive")
def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> Any:
    result = naive.rms_norm(x.contiguous(), weight, eps, residual=residual)
    return result if isinstance(result, tuple) else (result, x.new_empty(0))


@LAYER_NORM.kernel("naive")
def _layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> Any:
    result = naive.layer_norm(x.contiguous(), weight, bias, eps, residual=residual)
    return result if isinstance(result, tuple) else (result, x.new_empty(0))


@RMS_NORM_BACKWARD.kernel("naive")
def _rms_norm_backward(
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> Any:
    def forward(x: torch.Tensor, weight: torch.Tensor) -> Any:
        return naive.rms_norm(x, weight, eps)

    grad_x, grad_weight = _gradients(forward, (x, weight), grad_out)
    return grad_x if grad_sum is None else grad_x + grad_sum, grad_weight


@LAYER_NORM_BACKWARD.kernel("naive")
def _layer_norm_backward(
    grad_out: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> Any:
    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        return naive.layer_norm(x, weight, bias, eps)

    leaves = (x, weight, torch.zeros_like(weight))
    grad_x, *grads = _gradients(forward, leaves, grad_out)
    return grad_x if grad_sum is None else grad_x + grad_sum, *grads


@ROTARY_EMBEDDING.kernel("naive")
def _rotary_embedding(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    inverse: bool,
) -> torch.Tensor:
    tables = RotaryTables(cos, -sin if inverse else sin, interleaved)
    return naive.rotary_embedding(x, tables, positions)


@GATED_ACTIVATION.kernel("naive")
def _gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    gate = gate.contiguous()
    if activation == "silu":
        return naive.swiglu(gate, up)
    return naive.geglu(gate, up, approximate="tanh" if activation == "gelu_tanh" else "none")


@GATED_ACTIVATION_BACKWARD.kernel("naive")
def _gated_activation_backward(
    grad_out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> Any:
    def forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return _gated_activation(gate, up, activation)

    return _gradients(forward, (gate, up), grad_out)


@SAMPLE.kernel("naive")
def _sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    repetition_penalty: torch.Tensor,
    previous_tokens: torch.Tensor | None,
    seed: int,
    sample_ids: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> torch.Tensor:
    return naive.sample(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        previous_tokens=previous_tokens,
        seed=seed,
        sample_ids=sample_ids,
        positions=positions,
    )


def _gradients(
    forward: Callable[..., Any], leaves: tuple[torch.Tensor, ...], grad_out: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Runs `forward` again, with PyTorch's autograd watching.

    Within a dispatch mode, such as a FLOP counter, an operator is called below autograd, which
    would then see nothing: hence the guard.
    """
    watched = torch._C._SetExcludeDispatchKeyGuard(
        torch._C.DispatchKey.AutogradFunctionality, False
    )
    with watched, torch.enable_grad():
        leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
        result = forward(*leaves)
    grads = torch.autograd.grad(result, leaves, grad_out)
    return tuple(grad.contiguous() for grad in grads)
