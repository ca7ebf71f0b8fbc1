"""The calls on which every backend of the paged operations must agree."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import torch

from tilewise.cases import Case
from tilewise.fused.tables import rotary_tables
from tilewise.paged import kv_formats
from tilewise.testing import Inputs, Make

_GARBAGE = (-1, 10**6)


def _stored(inputs: Inputs, *shape: int, cache: torch.dtype | str | None) -> tuple[Any, Any]:
    """A full cache of this shape and format, and its scales."""
    dtype = inputs.dtype if cache is None else kv_formats.stored_dtype(cache)
    if not kv_formats.is_quantized(dtype):
        return inputs.randn(*shape, dtype=dtype), None
    return kv_formats.encode(inputs.randn(*shape, dtype=torch.float32), dtype)


def _attention(
    seqlens: tuple[int, ...],
    page_size: int,
    *,
    queries: tuple[int, ...] | None = None,
    padding: int = 0,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    v_head_dim: int | None = None,
    cache: torch.dtype | str | None = None,
    spare_entries: int = 2,
    alibi: str | None = None,
    sinks: bool = False,
    bias: str | None = None,
    **options: Any,
) -> Make:
    """Requests of these lengths in pages that lie in no order, among pages that are not used."""

    def make(inputs: Inputs) -> dict[str, Any]:
        used = [-(-seqlen // page_size) for seqlen in seqlens]
        num_pages = sum(used) + 3
        order = inputs.permutation(num_pages).tolist()
        width = max(used, default=0) + spare_entries
        table = [[_GARBAGE[(i + j) % 2] for j in range(width)] for i in range(len(seqlens))]
        for row, n in zip(table, used, strict=True):
            row[:n] = [order.pop() for _ in range(n)]
        slots = (num_pages, page_size, kv_heads)
        k_cache, k_scale = _stored(inputs, *slots, head_dim, cache=cache)
        v_cache, v_scale = _stored(inputs, *slots, v_head_dim or head_dim, cache=cache)
        tokens = len(seqlens) if queries is None else sum(queries) + padding
        arguments = {
            "q": inputs.randn(tokens, heads, head_dim),
            "k_cache": k_cache,
            "v_cache": v_cache,
            "block_table": inputs.tensor(table, torch.int32).reshape(len(seqlens), width),
            "cache_seqlens": inputs.tensor(seqlens, torch.int32),
            **options,
        }
        if k_scale is not None:
            arguments |= {"k_scale": k_scale, "v_scale": v_scale}
        if queries is not None:
            ends = accumulate(queries, initial=0)
            arguments["cu_seqlens_q"] = inputs.tensor(list(ends), torch.int32)
        if alibi is not None:
            shape = (heads,) if alibi == "heads" else (len(seqlens), heads)
            arguments["alibi_slopes"] = inputs.rand(*shape, dtype=torch.float32)
        if sinks:
            arguments["sinks"] = inputs.randn(heads)
        if bias is not None:
            values = inputs.randn(heads, tokens, width * page_size)
            hides = inputs.rand(tokens, width * page_size) < 0.25
            arguments["bias"] = ~hides if bias == "bool" else values.masked_fill(hides, -math.inf)
        return arguments

    return make


def _poison_attention(arguments: dict[str, Any]) -> dict[str, Any]:
    """NaN in every slot that no request has written, and in the queries that are padding."""
    k_cache = arguments["k_cache"]
    num_pages, page_size = k_cache.shape[:2]
    is_used = torch.zeros(num_pages, page_size, dtype=torch.bool)
    table = arguments["block_table"].tolist()
    for pages, seqlen in zip(table, arguments["cache_seqlens"].tolist(), strict=True):
        for position in range(seqlen):
            is_used[pages[position // page_size], position % page_size] = True
    is_unused = ~is_used.to(k_cache.device)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        if name in arguments and arguments[name].dtype.is_floating_point:
            _set_nan(arguments[name], is_unused)
    if "cu_seqlens_q" in arguments:
        arguments["q"][int(arguments["cu_seqlens_q"][-1]) :] = math.nan
    return arguments


def _set_nan(cache: torch.Tensor, where: torch.Tensor) -> None:
    """`cache[where] = nan`, which PyTorch cannot do to float8."""
    if cache.dtype == torch.float8_e4m3fn:
        cache.view(torch.uint8)[where] = 0x7F
    else:
        cache[where] = math.nan


def _around(page_size: int) -> tuple[int, ...]:
    """Lengths at a page's boundaries, and none."""
    return tuple(sorted({0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size + 1}))


def _attention_case(id: str, make: Make, **fields: Any) -> Case:
    return Case("paged_attention", id, make, poison=_poison_attention, **fields)


_PREFILL: dict[str, Any] = {"queries": (5, 1, 0, 16, 3), "causal": True}
_PREFILL_SEQLENS = (5, 17, 4, 33, 16)  # one from its start, one decoding, one idle, two in chunks

# The gradient of a score is the difference of two sums over head_dim = 16, whose standard deviation
# is 4; for a query that sees a single key they cancel.
_CANCELLED = {"grad q": 4.0}

_ATTENTION = [
    _attention_case("decode", _attention((37, 16, 1), 16)),
    _attention_case("prefill", _attention(_PREFILL_SEQLENS, 16, padding=2, **_PREFILL)),
    *(
        _attention_case(f"decode-page-{size}", _attention(_around(size), size, return_lse=True))
        for size in (1, 3, 16, 64)
    ),
    *(
        _attention_case(f"prefill-page-{size}", _attention(_PREFILL_SEQLENS, size, **_PREFILL))
        for size in (1, 3, 64)
    ),
    *(
        case
        for cache in ("int8", "fp8", "int4", torch.float16, torch.bfloat16)
        for case in (
            _attention_case(
                f"decode-cache-{cache}".replace("torch.", ""),
                _attention((19, 3, 0), 8, v_head_dim=10, cache=cache),
            ),
            _attention_case(
                f"prefill-cache-{cache}".replace("torch.", ""),
                _attention((9, 6), 4, queries=(3, 6), causal=True, cache=cache, return_lse=True),
            ),
        )
    ),
    _attention_case("decode-multi-head", _attention((20, 7), 8, heads=3, kv_heads=3, head_dim=63)),
    _attention_case("decode-multi-query", _attention((20, 7), 8, heads=5, kv_heads=1)),
    _attention_case("decode-wide-values", _attention((20, 7), 8, v_head_dim=33)),
    _attention_case("decode-scale", _attention((20, 7), 8, scale=0.5)),
    _attention_case("decode-window", _attention((20, 7, 2, 0), 8, window=(4, 0))),
    _attention_case("decode-softcap", _attention((20, 7), 8, softcap=2.0, return_lse=True)),
    _attention_case("decode-sinks", _attention((20, 0), 8, sinks=True, return_lse=True)),
    _attention_case("decode-alibi", _attention((20, 7), 8, alibi="heads")),
    _attention_case("decode-bias", _attention((20, 7), 8, bias="float", return_lse=True)),
    _attention_case("decode-bias-bool", _attention((20, 7, 1), 8, bias="bool")),
    _attention_case("decode-gradient", _attention((20, 7, 0), 8), grad=("q",), floors=_CANCELLED),
    _attention_case("prefill-not-causal", _attention((9, 6, 0), 4, queries=(3, 6, 0))),
    _attention_case(
        "prefill-window",
        _attention((9, 6), 4, queries=(3, 6), causal=True, window=(2, -1), return_lse=True),
    ),
    _attention_case(
        "prefill-window-both-sides", _attention((9, 6), 4, queries=(3, 6), window=(2, 1))
    ),
    _attention_case(
        "prefill-sinks",
        _attention((9, 6), 4, queries=(3, 6), padding=1, sinks=True, return_lse=True),
    ),
    _attention_case(
        "prefill-alibi", _attention((9, 6), 4, queries=(3, 6), causal=True, alibi="batch")
    ),
    _attention_case(
        "prefill-bias",
        _attention((9, 6), 4, queries=(3, 6), padding=1, causal=True, bias="float"),
    ),
    _attention_case("prefill-bias-bool", _attention((9, 6), 4, queries=(3, 6), bias="bool")),
    _attention_case(
        "prefill-gradient",
        _attention((9, 6), 4, queries=(3, 6), padding=1, causal=True),
        grad=("q",),
        floors=_CANCELLED,
    ),
    _attention_case(
        "prefill-batch-invariant",
        _attention((9, 0, 6), 4, queries=(3, 0, 6), padding=1, causal=True, batch_invariant=True),
    ),
    Case("paged_attention", "empty-batch", _attention((), 4, return_lse=True)),
    Case("paged_attention", "empty-batch-of-padding", _attention((), 4, queries=(), padding=2)),
    Case("paged_attention", "no-pages", _attention((0, 0), 4, spare_entries=0, return_lse=True)),
]


# --- writing --------------------------------------------------------------------------------------


def _append(
    tokens: int,
    page_size: int,
    *,
    skip: tuple[int, ...] = (),
    kv_heads: int = 2,
    head_dim: int = 16,
    v_head_dim: int | None = None,
    cache: torch.dtype | str | None = None,
    rotary_dim: int = 0,
    interleaved: bool = False,
) -> Make:
    def make(inputs: Inputs) -> dict[str, Any]:
        num_pages = tokens // page_size + 2
        slots = inputs.permutation(num_pages * page_size)[:tokens]
        slots[list(skip)] = -1
        shape = (num_pages, page_size, kv_heads)
        k_cache, k_scale = _stored(inputs, *shape, head_dim, cache=cache)
        v_cache, v_scale = _stored(inputs, *shape, v_head_dim or head_dim, cache=cache)
        arguments = {
            "k": inputs.randn(tokens, kv_heads, head_dim),
            "v": inputs.randn(tokens, kv_heads, v_head_dim or head_dim),
            "k_cache": k_cache,
            "v_cache": v_cache,
            "slot_mapping": slots,
        }
        if k_scale is not None:
            arguments |= {"k_scale": k_scale, "v_scale": v_scale}
        if rotary_dim:
            tables = rotary_tables(rotary_dim, 50, interleaved=interleaved, device=inputs.device)
            arguments |= {"rotary": tables, "positions": inputs.randint(0, 50, tokens)}
        return arguments

    return make


def _caches(arguments: dict[str, Any], returned: None) -> dict[str, torch.Tensor]:
    """The caches after the call, decoded: codes that differ count by how much they differ."""
    results = {}
    for name, scale in (("k_cache", "k_scale"), ("v_cache", "v_scale")):
        cache, scales = arguments[name], arguments.get(scale)
        results[name] = cache if scales is None else kv_formats.decode(cache, scales, scales.dtype)
    return results


def _poison_append(arguments: dict[str, Any]) -> dict[str, Any]:
    """NaN in the tokens that are skipped, and in what is there before it is overwritten."""
    slots = arguments["slot_mapping"]
    for name in ("k", "v"):
        arguments[name][slots < 0] = math.nan
    num_pages, page_size = arguments["k_cache"].shape[:2]
    is_written = torch.zeros(num_pages * page_size, dtype=torch.bool, device=slots.device)
    is_written[slots[slots >= 0]] = True
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        if name in arguments and arguments[name].dtype.is_floating_point:
            _set_nan(arguments[name], is_written.reshape(num_pages, page_size))
    return arguments


def _append_case(id: str, make: Make, **fields: Any) -> Case:
    return Case("append_kv", id, make, results=_caches, poison=_poison_append, **fields)


# Rotating with other roundings can move an element that lies between two codes to the other one.
# So where a rotation comes first, one element of a row may be off by one code: about 3 / 127 for
# normal numbers. The floor is a root mean square, over 16 elements, in units of float32's epsilon.
_ONE_CODE = {"k_cache": 3 / 127 / math.sqrt(16) / torch.finfo(torch.float32).eps}

_APPEND = [
    _append_case("rotary", _append(9, 4, skip=(0, 5), rotary_dim=16)),
    _append_case("int8", _append(9, 4, skip=(0, 5), cache="int8")),
    *(_append_case(f"page-{size}", _append(7, size, skip=(3,))) for size in (1, 3, 16, 64)),
    *(
        _append_case(
            f"cache-{cache}".replace("torch.", ""),
            _append(7, 4, skip=(6,), v_head_dim=10, cache=cache),
        )
        for cache in ("fp8", "int4", torch.float16, torch.bfloat16)
    ),
    _append_case(
        "rotary-interleaved", _append(9, 4, rotary_dim=16, interleaved=True, v_head_dim=7)
    ),
    _append_case("rotary-partial", _append(9, 4, rotary_dim=6)),
    _append_case(
        "rotary-int8", _append(9, 4, skip=(1,), rotary_dim=16, cache="int8"), floors=_ONE_CODE
    ),
    _append_case("odd", _append(5, 3, kv_heads=1, head_dim=63)),
    _append_case("one", _append(1, 1, kv_heads=1, head_dim=1)),
    _append_case("all-skipped", _append(3, 4, skip=(0, 1, 2), rotary_dim=16)),
    Case("append_kv", "no-tokens", _append(0, 4, cache="int8"), results=_caches),
]

CASES = _ATTENTION + _APPEND


# --- calls to compile ahead of time ---------------------------------------------------------------

_LLAMA: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head_dim": 128}
_SIXTEEN_BITS = (torch.bfloat16,)

COMPILED = [
    *(
        Case(
            "paged_attention",
            f"Llama-3-8B decode, {cache}",
            _attention((3000, 4000), 16, cache=cache, causal=True, **_LLAMA),
            dtypes=_SIXTEEN_BITS,
        )
        for cache in (None, "int8", "fp8", "int4")
    ),
    Case(
        "paged_attention",
        "Llama-3-8B prefill",
        _attention((3000, 4000), 16, queries=(100, 200), causal=True, **_LLAMA),
        dtypes=(torch.bfloat16, torch.float16),
    ),
    Case(
        "paged_attention",
        "GPT-2 decode",
        _attention((3000, 4000), 16, heads=12, kv_heads=12, head_dim=64),
        dtypes=_SIXTEEN_BITS,
    ),
    Case(
        "paged_attention",
        "DeepSeek decode",
        _attention((3000,), 64, heads=16, kv_heads=1, head_dim=576, v_head_dim=512),
        dtypes=_SIXTEEN_BITS,
    ),
    Case(
        "paged_attention",
        "float32",
        _attention((3000, 4000), 16, queries=(100, 200), causal=True, **_LLAMA),
        dtypes=(torch.float32,),
    ),
    *(
        Case(
            "append_kv",
            f"Llama-3-8B, {cache}",
            _append(64, 16, kv_heads=8, head_dim=128, rotary_dim=128, cache=cache),
            dtypes=_SIXTEEN_BITS,
            results=_caches,
        )
        for cache in (None, "int8", "fp8", "int4")
    ),
]
"""Every kernel in the configurations that ship; see `tilewise build --triton`."""


# --- the registered operators ---------------------------------------------------------------------


def _attention_call(make: Make) -> Any:
    def arguments(inputs: Inputs) -> tuple[Any, ...]:
        given = make(inputs)
        return (
            *(given[name] for name in ("q", "k_cache", "v_cache", "block_table", "cache_seqlens")),
            *(given.get(name) for name in ("cu_seqlens_q", "k_scale", "v_scale")),
            given.get("causal", False),
            0.25,
            *given.get("window", (-1, -1)),
            given.get("softcap", 0.0),
            *(given.get(name) for name in ("alibi_slopes", "sinks", "bias")),
            False,
        )

    return arguments


def _append_call(make: Make) -> Any:
    def arguments(inputs: Inputs) -> tuple[Any, ...]:
        given = make(inputs)
        cos, sin, interleaved = given.get("rotary", (None, None, False))
        return (
            *(given[name] for name in ("k", "v", "k_cache", "v_cache", "slot_mapping")),
            cos,
            sin,
            interleaved,
            *(given.get(name) for name in ("positions", "k_scale", "v_scale")),
        )

    return arguments


OPERATOR_CALLS = [
    ("paged_attention", _attention_call(_attention((9, 0), 4, window=(3, 0), alibi="heads"))),
    (
        "paged_attention",
        _attention_call(
            _attention((9, 6), 4, queries=(3, 6), causal=True, cache="int4", sinks=True)
        ),
    ),
    ("append_kv", _append_call(_append(5, 4, rotary_dim=16))),
    ("append_kv", _append_call(_append(5, 4, skip=(2,), cache="int8"))),
]
