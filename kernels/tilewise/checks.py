"""Argument checks whose errors name the argument, what it got and what it wanted."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""The dtypes that every floating-point operation takes."""


def is_tensor(name: str, value: Any) -> None:
    """Raise unless `value` is a tensor whose elements lie in memory by strides."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        got = "a nested one" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name}: must be a strided tensor, got {got.lstrip('_')}")


def is_integer(name: str, value: object) -> None:
    """Raise TypeError unless `value` is an int (and not a bool)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: must be an int, got {type(value).__name__}")


def is_number(name: str, value: object) -> None:
    """Raise TypeError unless `value` is an int or a float (and not a bool)."""
    numbers = (float, int, torch.SymFloat, torch.SymInt)
    if isinstance(value, bool) or not isinstance(value, numbers):
        raise TypeError(f"{name}: must be a number, got {type(value).__name__}")


def is_bool(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: must be a bool, got {type(value).__name__}")


def has_dtype(name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise unless `tensor` is a tensor of one of the allowed dtypes."""
    is_tensor(name, tensor)
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        got = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: dtype must be {wanted}, got {got}")


def has_dims(name: str, tensor: torch.Tensor, dims: str) -> None:
    """Raise unless `tensor` has as many dimensions as the words in `dims`."""
    if tensor.dim() != dims.count(" ") + 1:
        wanted = dims.replace(" ", ", ")
        raise ValueError(f"{name}: shape must be ({wanted}), got {tuple(tensor.shape)}")


def has_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], why: str = "") -> None:
    """Raise unless `tensor` has exactly this shape."""
    if tensor.shape != shape:
        reason = f" ({why})" if why else ""
        raise ValueError(f"{name}: shape must be {tuple(shape)}{reason}, got {tuple(tensor.shape)}")


def on_device_of(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise unless the two tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name}: must be on the device of {other_name} ({other.device}), got {tensor.device}"
        )


def has_unit_last_stride(name: str, tensor: torch.Tensor) -> None:
    """Raise unless the last dimension is contiguous; the others may have any stride."""
    if tensor.dim() > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: the last dimension must have stride 1, got {tensor.stride(-1)}")


def like(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise unless `tensor` has the dtype and the device of `other`."""
    is_tensor(name, tensor)
    if tensor.dtype != other.dtype:
        wanted, got = (str(t.dtype).removeprefix("torch.") for t in (other, tensor))
        raise ValueError(f"{name}: dtype must be {other_name}'s, {wanted}, got {got}")
    on_device_of(name, tensor, other_name, other)


_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def renamed(
    names: dict[str, str],
) -> Callable[[Callable[_Parameters, _Result]], Callable[_Parameters, _Result]]:
    """Decorator: errors of the functions that this one calls name the arguments of this one.

    Args:
        names: by what a called function names an argument, what the caller wrote.
    """
    words = re.compile(rf"(?<![\w.'])({'|'.join(map(re.escape, names))})(?!\w)")

    def decorate(fn: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        @functools.wraps(fn)
        def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
            try:
                return fn(*args, **kwargs)
            except (TypeError, ValueError) as error:
                message = words.sub(lambda found: names[found[0]], str(error))
                if message == str(error):
                    raise
                raise type(error)(message) from None

        return call

    return decorate
