"""Quantized weights inside `torch.nn` models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import nn

from tilewise import checks
from tilewise.quant.formats import QuantizedTensor
from tilewise.quant.matmul import laid_out_for, quantized_matmul
from tilewise.quant.quantizer import quantize

_PARTS = ("data", "scales", "zeros")


class QuantLinear(nn.Module):
    """A linear layer with a quantized weight, which is not trained; gradients pass through to x.

    The parts of the weight are buffers `data`, `scales` and `zeros`, and the format travels as
    extra state, so `state_dict` and safetensors keep all of it. Casting the module to another
    dtype casts the bias and leaves the weight as it is.

    The first call that the C++ kernels run turns the weight into their panels, for good: it takes
    no more memory, and other backends still read it, slowly. State dicts hold rows all the same.

    Args:
        weight: (N, K).
        bias: (N,), floating point; stays a parameter if it is one.
        act: None, "int8" or "fp8" (with a weight in fp8), as `quantized_matmul` takes it. A choice
            of how to compute, not a part of what is stored: it may be assigned at any time and no
            state dict has it.

    Shape: (..., K) to (..., N). The input's dtype must be the bias's, but for autocast, which does
    here what it does to `nn.Linear`: input and bias are cast, the output is in autocast's dtype.
    """

    bias: torch.Tensor | None
    data: torch.Tensor
    scales: torch.Tensor | None
    zeros: torch.Tensor | None

    def __init__(
        self,
        weight: QuantizedTensor,
        bias: torch.Tensor | None = None,
        *,
        act: str | None = None,
    ) -> None:
        super().__init__()
        self._weight: QuantizedTensor | None = None  # what `data` and the like make up
        if not isinstance(weight, QuantizedTensor):
            raise TypeError(f"weight: must be a QuantizedTensor, got {type(weight).__name__}")
        if len(weight.shape) != 2:
            raise ValueError(f"weight: shape must be (N, K), got {weight.shape}")
        if bias is not None:
            checks.has_dtype("bias", bias, checks.FLOATS)
        if bias is not None and bias.shape != weight.shape[:1]:
            wanted, got = tuple(weight.shape[:1]), tuple(bias.shape)
            raise ValueError(f"bias: shape must be {wanted} (weight's N), got {got}")
        self.out_features, self.in_features = weight.shape
        self.format, self.group_size, self.act = weight.format, weight.group_size, act
        for name in _PARTS:
            self.register_buffer(name, getattr(weight, name))
        if bias is None or isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.register_buffer("bias", bias)

    @property
    def weight(self) -> QuantizedTensor:
        """The weight, (out_features, in_features)."""
        # Past `Module.__getattr__`: four layers a block ask for this in every call.
        weight, buffers = self._weight, self._buffers
        is_held = weight is not None and weight.data is buffers["data"]
        if weight is None or not is_held or weight.scales is not buffers["scales"]:
            shape = (self.out_features, self.in_features)
            held = buffers.copy()  # see `_hold`
            parts: list[Any] = [held[name] for name in _PARTS]
            weight = self._weight = QuantizedTensor(self.format, shape, self.group_size, *parts)
        return weight

    def forward(self, x: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """`quantized_matmul` of x, (..., in_features)."""
        return self.project(x, out_dtype=out_dtype)

    def project(
        self,
        x: torch.Tensor,
        *,
        activation: str | None = None,
        residual: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """`quantized_matmul` with what can be fused to it."""
        bias, added = self.bias, None
        device = x.device.type  # autocast knows no "meta"
        if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
            bias = None if bias is None else bias.to(x.dtype)
            residual, added = None, residual  # may be in another dtype, and keeps it
        weight = self.weight_for(x)
        y = quantized_matmul(
            x,
            weight,
            bias,
            activation=activation,
            residual=residual,
            act=self.act,
            out_dtype=out_dtype,
        )
        return y if added is None else y + added

    def weight_for(self, x: torch.Tensor) -> QuantizedTensor:
        """The weight, from now on as the backend that would multiply x by it reads it."""
        weight = self.weight
        laid_out = laid_out_for(x, weight)
        return weight if laid_out is weight else self._hold(laid_out)

    def _hold(self, weight: QuantizedTensor) -> QuantizedTensor:
        # In one step, as it is read: another thread must not find the data of one layout and the
        # scales of another. `before` lives on, for a deleted tensor may let other threads in.
        before = self._buffers.copy()
        self._buffers.update({name: getattr(weight, name) for name in _PARTS})
        del before
        return weight

    def extra_repr(self) -> str:
        weight = self.weight
        act = "" if self.act is None else f", act={self.act}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, group_size={self.group_size}, "
            f"bits_per_weight={weight.bits_per_weight:.3g}{act}"
        )

    def get_extra_state(self) -> torch.Tensor:
        """The format, as a tensor so that safetensors takes it."""
        return self.weight.describe()

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Refuse a weight that was stored in another format: its bytes mean something else."""
        if not torch.equal(state.cpu(), self.weight.describe()):
            ours, theirs = (bytes(t.tolist()).decode() for t in (self.weight.describe(), state))
            raise ValueError(f"weight: the layer holds {ours}, the state dict {theirs}")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # `.half()` and the like cast whatever is floating point, `.type()` whatever there is; codes
        # and scales, handed over as bytes, only move between devices.
        stored = {id(part) for part in (self.data, self.scales, self.zeros)}

        def move(t: torch.Tensor) -> torch.Tensor:
            if id(t) not in stored:
                return fn(t)
            moved = fn(t.view(torch.uint8))
            return moved.view(t.dtype) if moved.dtype == torch.uint8 else t.to(moved.device)

        super()._apply(move, recurse)
        if self.data.device.type != "cpu" and self.weight.is_panels:
            self._hold(self.weight.to_rows())
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        rows = self.weight.to_rows()
        for name in _PARTS:
            if getattr(rows, name) is not None:
                destination[prefix + name] = getattr(rows, name)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._hold(self.weight.to_rows())
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        except ValueError as error:  # of `set_extra_state`, which does not know where it is
            raise ValueError(f"{prefix}{error}") from None
        self._weight = None


def quantize_(
    model: nn.Module,
    scheme: str = "int4",
    *,
    filter: Callable[[str, nn.Linear], bool] | None = None,
    **options: Any,
) -> nn.Module:
    """Replace the linear layers of a model by quantized ones, in place.

    Only `nn.Linear` itself is replaced: no subclass, no other module (GPT-2 of Hugging Face has
    `Conv1D`). A weight that several layers share is quantized once and stays shared. What shares a
    weight with a linear layer but is none, such as a tied embedding, keeps the unquantized weight.

    Load unquantized weights before. State dicts of a quantized model fit a model that was quantized
    with the same scheme and options.

    Args:
        model: any module; if it is itself an `nn.Linear` the result is returned.
        scheme: see `quantize`.
        filter: takes a layer's qualified name and the layer; False leaves the layer alone.
        options: `group_size`, `symmetric` and `search` of `quantize`.

    Returns:
        The model.

    Raises:
        ValueError: for a scheme or an option that does not exist.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: must be an nn.Module, got {type(model).__name__}")
    weights: dict[torch.Tensor, QuantizedTensor] = {}
    layers: dict[nn.Linear, QuantLinear] = {}

    def quantized(layer: nn.Linear) -> QuantLinear:
        if layer not in layers:
            if layer.weight not in weights:
                weights[layer.weight] = quantize(layer.weight, scheme, **options)
            layers[layer] = QuantLinear(weights[layer.weight], layer.bias)
            layers[layer].train(layer.training)
        return layers[layer]

    def is_wanted(module: nn.Module | None, name: str) -> TypeGuard[nn.Linear]:
        # Not subclasses: they may use their weight in ways of their own.
        return type(module) is nn.Linear and (filter is None or filter(name, module))

    if is_wanted(model, ""):
        return quantized(model)
    for prefix, parent in list(model.named_modules()):
        # Not named_children(), which leaves out the second place of a layer used twice.
        for child_name, child in list(parent._modules.items()):
            if is_wanted(child, f"{prefix}.{child_name}" if prefix else child_name):
                setattr(parent, child_name, quantized(child))
    return model
