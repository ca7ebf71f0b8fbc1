"""Rivals from packages that may be installed: FlashInfer, GemLite and Liger Kernel.

Written against flashinfer-python 0.7.2, gemlite 0.6.0 and liger-kernel 0.8.5. None of them is a
dependency, and one that is missing is a reason and not an error.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch

from tilewise.benchmarks.rivals import (
    Function,
    Rival,
    grouped_int4,
    only_plain,
    plain_attention,
)
from tilewise.quant.packing import unpack_nibbles

_HALVES = (torch.float16, torch.bfloat16)
_WORKSPACE = 128 << 20  # bytes, as FlashInfer's documentation has it


def _from(
    package: str,
    module: str,
    name: str,
    why_not: Callable[[dict[str, Any]], str | None],
    prepare: Callable[[dict[str, Any]], Function],
) -> Rival:
    """A rival that needs a package."""

    def missing_or(arguments: dict[str, Any]) -> str | None:
        return _missing(package, module) or why_not(arguments)

    # Some have a backward pass, in layouts of their own; no workload asks for it.
    return Rival(name, missing_or, prepare, is_differentiable=False)


@functools.cache
def _missing(package: str, module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return f"the package {package} is not installed"
    return None


# --- FlashInfer -----------------------------------------------------------------------------------


def _why_not_prefill(arguments: dict[str, Any]) -> str | None:
    if len(arguments["q"]) != 1 or arguments["q"].dtype not in _HALVES:
        return "is compared on one request in 16 bits"
    return plain_attention(arguments)


def _prepare_prefill(arguments: dict[str, Any]) -> Function:
    from flashinfer import single_prefill_with_kv_cache

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        scale: float | None = None,
    ) -> torch.Tensor:
        out = single_prefill_with_kv_cache(q[0], k[0], v[0], causal=causal, sm_scale=scale)
        return out[None]

    return attend


def _why_not_decode(arguments: dict[str, Any]) -> str | None:
    q, k_cache = arguments["q"], arguments["k_cache"]
    if q.dtype not in _HALVES or k_cache.dtype != q.dtype:
        return "is compared on caches of q's own 16 bits"
    paged = ("q", "k_cache", "v_cache", "block_table", "cache_seqlens", "causal", "scale")
    return only_plain(arguments, *paged)


def paged_indices(
    block_table: torch.Tensor, cache_seqlens: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashInfer's page table: ends of the requests, pages one after the other, last fill."""
    pages = -(-cache_seqlens // page_size)
    ends = torch.nn.functional.pad(pages.cumsum(0), (1, 0)).int()
    used = torch.arange(block_table.shape[1], device=block_table.device) < pages[:, None]
    return ends, block_table[used].int(), ((cache_seqlens - 1) % page_size + 1).int()


def _prepare_decode(arguments: dict[str, Any]) -> Function:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    q, k_cache = arguments["q"], arguments["k_cache"]
    _, page_size, kv_heads, head_dim = k_cache.shape
    heads = q.shape[1]
    workspace = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=q.device)
    # Its tensor cores pay where several queries share a key.
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=heads // kv_heads >= 4
    )
    indices = paged_indices(arguments["block_table"], arguments["cache_seqlens"], page_size)
    wrapper.plan(
        *indices,
        heads,
        kv_heads,
        head_dim,
        page_size,
        q_data_type=q.dtype,
        kv_data_type=k_cache.dtype,
        sm_scale=arguments.get("scale") or 1 / math.sqrt(head_dim),
    )
    return lambda q, k_cache, v_cache, **others: wrapper.run(q, (k_cache, v_cache))


# --- GemLite --------------------------------------------------------------------------------------


def _why_not_gemlite(arguments: dict[str, Any]) -> str | None:
    if arguments["x"].dtype not in _HALVES:
        return "is compared in 16 bits"
    return grouped_int4(arguments)


def _prepare_gemlite(arguments: dict[str, Any]) -> Function:
    from gemlite import DType, GemLiteLinear

    weight, dtype = arguments["weight"].to_rows(), arguments["x"].dtype
    outputs, width = weight.shape
    name = DType.BF16 if dtype == torch.bfloat16 else DType.FP16
    linear = GemLiteLinear(
        4,
        group_size=weight.group_size,
        in_features=width,
        out_features=outputs,
        input_dtype=name,
        output_dtype=name,
    )
    zeros = 8 if weight.zeros is None else weight.zeros.to(dtype)
    linear.pack(unpack_nibbles(weight.data)[:, :width], weight.scales.to(dtype), zeros)
    return lambda x, weight: linear(x)


# --- Liger Kernel ---------------------------------------------------------------------------------


def _why_not_norm(arguments: dict[str, Any]) -> str | None:
    return only_plain(arguments, "x", "weight", "bias", "residual", "eps")


def _prepare_rms_norm(arguments: dict[str, Any]) -> Function:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm, liger_rms_norm

    def norm(
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float = 1e-6,
        residual: torch.Tensor | None = None,
    ) -> Any:
        if residual is not None:
            return liger_fused_add_rms_norm(x, residual, weight, eps)
        return liger_rms_norm(x, weight, eps)

    return norm


def _why_not_layer_norm(arguments: dict[str, Any]) -> str | None:
    if arguments.get("bias") is None or arguments.get("residual") is not None:
        return "is compared with a bias and without a residual"
    return _why_not_norm(arguments)


def _prepare_layer_norm(arguments: dict[str, Any]) -> Function:
    from liger_kernel.transformers.functional import liger_layer_norm

    return lambda x, weight, bias, eps=1e-5: liger_layer_norm(x, weight, bias, eps)


def _why_not_gated(arguments: dict[str, Any]) -> str | None:
    return only_plain(arguments, "gate", "up")


def _prepare_gated(function: str) -> Callable[[dict[str, Any]], Function]:
    def prepare(arguments: dict[str, Any]) -> Function:
        from liger_kernel.transformers import functional

        call = getattr(functional, function)
        return lambda gate, up: call(gate, up)

    return prepare


_liger = functools.partial(_from, "liger-kernel", "liger_kernel", "Liger")
_flashinfer = functools.partial(_from, "flashinfer-python", "flashinfer", "FlashInfer")

PACKAGES: dict[str, tuple[Rival, ...]] = {
    "flash_attention": (_flashinfer(_why_not_prefill, _prepare_prefill),),
    "paged_attention": (_flashinfer(_why_not_decode, _prepare_decode),),
    "quantized_matmul": (
        _from("gemlite", "gemlite", "GemLite", _why_not_gemlite, _prepare_gemlite),
    ),
    "rms_norm": (_liger(_why_not_norm, _prepare_rms_norm),),
    "layer_norm": (_liger(_why_not_layer_norm, _prepare_layer_norm),),
    "swiglu": (_liger(_why_not_gated, _prepare_gated("liger_swiglu")),),
    "geglu": (_liger(_why_not_gated, _prepare_gated("liger_geglu")),),
}
