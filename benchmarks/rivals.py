"""What PyTorch and other packages offer for the same call: timed beside the backends on a GPU.

A rival is no backend: nobody can choose it, and it keeps none of the contracts. It is given what a
model would give it once, such as a weight in its own layout, before the clock starts; its result
must be that of the call, though it may round more than the agreement rule allows. One that cannot
take a call says why, in PyTorch's words where PyTorch has any.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from tilewise.quant.formats import PER_CHANNEL, QuantizedTensor
from tilewise.quant.packing import unpack_nibbles

Function = Callable[..., Any]
"""Takes the keyword arguments of the public function and returns what that returns."""


@dataclass(frozen=True)
class Rival:
    """Somebody else's kernel for an operation.

    Args:
        name: in tables, beside the names of the backends.
        why_not: takes the call's arguments; why it cannot take them, or None.
        prepare: takes the call's arguments and makes the function that is timed. What depends on
            weights and shapes alone is done here.
        is_differentiable: whether it has a backward pass.
    """

    name: str
    why_not: Callable[[dict[str, Any]], str | None]
    prepare: Callable[[dict[str, Any]], Function]
    is_differentiable: bool = True


def rivals_of(op: str, device: str) -> dict[str, Rival]:
    """The rivals of an operation by name. They are for GPUs alone."""
    if device != "cuda":
        return {}
    from tilewise.benchmarks.rivals_packages import PACKAGES

    return {rival.name: rival for rival in (*_PYTORCH.get(op, ()), *PACKAGES.get(op, ()))}


def only_plain(arguments: dict[str, Any], *names: str) -> str | None:
    """Why a rival that knows no more than these arguments does not take the call."""
    for name, value in arguments.items():
        if name in names:
            continue
        if isinstance(value, torch.Tensor) or value not in (None, False, 0.0, (-1, -1)):
            return f"is compared without {name}"
    return None


# --- attention ------------------------------------------------------------------------------------


def plain_attention(arguments: dict[str, Any]) -> str | None:
    """Why a call is not plain attention, causal over equal lengths if at all."""
    q, k = arguments["q"], arguments["k"]
    if arguments.get("causal") and q.shape[1] not in (1, k.shape[1]):
        return "is compared on causal calls of equal lengths"
    return only_plain(arguments, "q", "k", "v", "causal", "scale")


def is_masked(q: torch.Tensor, causal: bool) -> bool:
    """Whether the mask of such a call hides anything."""
    return causal and q.shape[1] > 1


def _heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _sdpa(name: str, kind: SDPBackend, can_use: Callable[..., bool]) -> Rival:
    def why_not(arguments: dict[str, Any]) -> str | None:
        if reason := plain_attention(arguments):
            return reason
        q, k, v = _heads_first(*(arguments[name] for name in "qkv"))
        masked = is_masked(arguments["q"], arguments.get("causal", False))
        params = SDPAParams(q, k, v, None, 0.0, masked, q.shape[1] != k.shape[1])
        with warnings.catch_warnings(record=True) as said, sdpa_kernel(kind):
            warnings.simplefilter("always")
            if can_use(params, True):
                return None
        return "; ".join(_sentence(warning.message) for warning in said) or "PyTorch refuses it"

    def prepare(arguments: dict[str, Any]) -> Function:
        def attend(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            causal: bool = False,
            scale: float | None = None,
        ) -> torch.Tensor:
            masked, grouped = is_masked(q, causal), q.shape[2] != k.shape[2]
            with sdpa_kernel(kind):
                out = F.scaled_dot_product_attention(
                    *_heads_first(q, k, v), is_causal=masked, scale=scale, enable_gqa=grouped
                )
            return out.transpose(1, 2)

        return attend

    return Rival(name, why_not, prepare)


def _sentence(warning: Any) -> str:
    """PyTorch's reason without the place in its source that follows."""
    return str(warning).split(" (Triggered internally")[0].strip().rstrip(".")


def _prepare_flex(arguments: dict[str, Any]) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k = arguments["q"], arguments["k"]
    mask = None
    if is_masked(q, arguments.get("causal", False)):
        mask = create_block_mask(_is_seen, None, None, q.shape[1], k.shape[1], device=q.device)
    torch.compiler.reset()  # one more shape than torch.compile's limit would run uncompiled
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        scale: float | None = None,
    ) -> torch.Tensor:
        grouped = q.shape[2] != k.shape[2]
        out = compiled(*_heads_first(q, k, v), block_mask=mask, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)

    return attend


def _is_seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return query >= key


# --- matrix multiplications -----------------------------------------------------------------------


def plain_product(arguments: dict[str, Any]) -> str | None:
    """Why a call is not a product alone."""
    return only_plain(arguments, "x", "weight")


def grouped_int4(arguments: dict[str, Any]) -> str | None:
    """Why a call is not a product with int4 weights that have a scale per group."""
    weight = arguments["weight"]
    if weight.format != "int4" or weight.group_size == PER_CHANNEL:
        return "takes int4 in groups"
    return plain_product(arguments)


def _prepare_linear(arguments: dict[str, Any]) -> Function:
    dense = arguments["weight"].dequantize().to(arguments["x"].dtype)
    return lambda x, weight: F.linear(x, dense)


def _why_not_torch_int4(arguments: dict[str, Any]) -> str | None:
    if reason := grouped_int4(arguments):
        return reason
    x, (n, k) = arguments["x"], arguments["weight"].shape
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm"):
        return f"torch {torch.__version__} has no _weight_int4pack_mm"
    if x.dtype != torch.bfloat16:
        return "computes in bfloat16"
    multiple = 16 * _INNER_K_TILES
    if n % 8 or k % multiple:
        return f"needs N to be a multiple of 8 and K of {multiple}, got {n} and {k}"
    return None


_INNER_K_TILES = 8


def _prepare_torch_int4(arguments: dict[str, Any]) -> Function:
    weight = arguments["weight"].to_rows()
    codes = unpack_nibbles(weight.data)
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]  # the even column in the high nibble
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), _INNER_K_TILES)
    affine = torch_int4_scales(weight)
    group = weight.group_size
    return lambda x, weight: torch.ops.aten._weight_int4pack_mm(x, packed, group, affine)


def torch_int4_scales(weight: QuantizedTensor) -> torch.Tensor:
    """(groups, N, 2) of `a` and `b` where PyTorch's weight is (code - 8) a + b."""
    assert weight.scales is not None
    scale = weight.scales.float()
    offset = torch.zeros_like(scale)
    if weight.zeros is not None:
        offset = (8 - weight.zeros.float()) * scale
    return torch.stack([scale, offset], dim=-1).transpose(0, 1).bfloat16().contiguous()


def _why_not_torch_fp8(arguments: dict[str, Any]) -> str | None:
    x, weight = arguments["x"], arguments["weight"]
    if arguments.get("act") != "fp8" or weight.group_size != PER_CHANNEL:
        return "takes fp8 by fp8, with a scale per row"
    if x.dtype != torch.bfloat16:
        return "computes in bfloat16"
    n, k = weight.shape
    if n % 16 or k % 16:
        return f"needs N and K to be multiples of 16, got {n} and {k}"
    return only_plain(arguments, "x", "weight", "act")


def _prepare_torch_fp8(arguments: dict[str, Any]) -> Function:
    weight = arguments["weight"].to_rows()
    codes, scales = weight.data.contiguous().mT, weight.scales.float().reshape(1, -1)

    def multiply(x: torch.Tensor, weight: QuantizedTensor, act: str) -> torch.Tensor:
        of_x = (x.abs().amax(-1, keepdim=True).float() / 448).clamp(min=1e-30)
        rounded = (x / of_x).clamp(-448, 448).to(torch.float8_e4m3fn)
        return torch._scaled_mm(rounded, codes, of_x, scales, out_dtype=x.dtype)

    return multiply


_PYTORCH: dict[str, tuple[Rival, ...]] = {
    "flash_attention": (
        _sdpa("SDPA flash", SDPBackend.FLASH_ATTENTION, can_use_flash_attention),
        _sdpa("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION, can_use_cudnn_attention),
        _sdpa("SDPA efficient", SDPBackend.EFFICIENT_ATTENTION, can_use_efficient_attention),
        Rival("FlexAttention", plain_attention, _prepare_flex),
    ),
    "quantized_matmul": (
        Rival("F.linear", plain_product, _prepare_linear),
        Rival("torch int4", _why_not_torch_int4, _prepare_torch_int4),
        Rival("torch fp8", _why_not_torch_fp8, _prepare_torch_fp8),
    ),
}
