"""The calls that models make, as makers of arguments for the shapes of a model.

A maker builds the keyword arguments of a public function from `tilewise.testing.Inputs`. What it
builds can be larger than the definition can compute in float64; a `Part` then says which results
are checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import tilewise
from tilewise.model.config import GPTConfig
from tilewise.testing import Inputs, Make


class Part(NamedTuple):
    """Some of a call's results, and the smaller call that defines them.

    Args:
        reduce: from the call's arguments to the smaller call's.
        pick: from a result of the call to that of the smaller one.
    """

    reduce: Callable[[dict[str, Any]], dict[str, Any]]
    pick: Callable[[torch.Tensor], torch.Tensor]


# --- attention ------------------------------------------------------------------------------------


def _heads(inputs: Inputs, model: GPTConfig, *lead: int) -> tuple[Any, Any, Any]:
    """Query, key and value of one shape but for the number of heads."""
    q = inputs.randn(*lead, model.heads, model.head_dim)
    k, v = (inputs.randn(*lead, model.kv_heads, model.head_dim) for _ in range(2))
    return q, k, v


def prefill(model: GPTConfig, tokens: int, *, batch: int = 1, **options: Any) -> Make:
    """Causal attention of a prompt over itself."""

    def make(inputs: Inputs) -> dict[str, Any]:
        q, k, v = _heads(inputs, model, batch, tokens)
        return {"q": q, "k": k, "v": v, "causal": True, **options}

    return make


def decode(model: GPTConfig, context: int, *, batch: int = 1) -> Make:
    """Attention of one new token per sequence over a contiguous cache."""

    def make(inputs: Inputs) -> dict[str, Any]:
        q = inputs.randn(batch, 1, model.heads, model.head_dim)
        k, v = (inputs.randn(batch, context, model.kv_heads, model.head_dim) for _ in range(2))
        return {"q": q, "k": k, "v": v, "causal": True}

    return make


def ragged_prefill(model: GPTConfig, lengths: tuple[int, ...]) -> Make:
    """Causal attention of prompts of different lengths, packed without padding."""

    def make(inputs: Inputs) -> dict[str, Any]:
        q, k, v = _heads(inputs, model, sum(lengths))
        ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        cu_seqlens = inputs.tensor(ends, torch.int32)
        return {
            "q": q,
            "k": k,
            "v": v,
            "cu_seqlens_q": cu_seqlens,
            "cu_seqlens_k": cu_seqlens,
            "max_seqlen_q": max(lengths),
            "max_seqlen_k": max(lengths),
            "causal": True,
        }

    return make


def merge(model: GPTConfig, tokens: int) -> Make:
    """Two halves of a context, attended to apart, put together."""

    def make(inputs: Inputs) -> dict[str, Any]:
        shape = (tokens, model.heads)
        out_a, out_b = (inputs.randn(*shape, model.head_dim) for _ in range(2))
        lse_a, lse_b = (inputs.randn(*shape, dtype=torch.float32) for _ in range(2))
        return {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}

    return make


def last_queries(count: int) -> Part:
    """The last queries of a causal call: it is level with the keys at its end."""
    return Part(
        lambda arguments: arguments | {"q": arguments["q"][:1, -count:]} | _first(arguments, "kv"),
        lambda result: result[:1, -count:],
    )


def first_head() -> Part:
    """The first head of the first batch row, of calls without grouped heads."""
    return Part(
        lambda arguments: arguments | {name: arguments[name][:1, :, :1] for name in "qkv"},
        lambda result: result[:1, :, :1],
    )


def _first(arguments: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: arguments[name][:1] for name in names}


# --- the paged cache ------------------------------------------------------------------------------


def _cache(
    inputs: Inputs, model: GPTConfig, batch: int, context: int, page_size: int, kv_format: str
) -> dict[str, Any]:
    """A cache of full sequences whose pages lie in random order."""
    pages = -(-context // page_size)
    shape = (batch * pages, page_size, model.kv_heads)
    cache: dict[str, Any] = {}
    for name in "kv":
        if kv_format == "int8":
            codes = inputs.randint(-127, 128, *shape, model.head_dim, dtype=torch.int8)
            cache[f"{name}_cache"] = codes
            cache[f"{name}_scale"] = inputs.rand(*shape, dtype=torch.float32) / 64
        else:
            cache[f"{name}_cache"] = inputs.randn(*shape, model.head_dim)
    order = inputs.permutation(batch * pages, dtype=torch.int32)
    cache["block_table"] = order.reshape(batch, pages)
    cache["cache_seqlens"] = inputs.tensor([context] * batch, torch.int32)
    return cache


def paged_decode(
    model: GPTConfig, context: int, *, batch: int = 1, page_size: int = 16, kv_format: str = "float"
) -> Make:
    """One new token per sequence over pages in random order."""

    def make(inputs: Inputs) -> dict[str, Any]:
        q = inputs.randn(batch, model.heads, model.head_dim)
        cache = _cache(inputs, model, batch, context, page_size, kv_format)
        return {"q": q, **cache, "causal": True}

    return make


def shared_prefix_decode(
    model: GPTConfig, prefix: int, own: int, *, batch: int, page_size: int = 16
) -> Make:
    """One new token for each of many sequences that begin with the same pages."""

    def make(inputs: Inputs) -> dict[str, Any]:
        shared, apart = -(-prefix // page_size), -(-own // page_size)
        pages = inputs.permutation(shared + batch * apart, dtype=torch.int32)
        first = pages[:shared].expand(batch, shared)
        shape = (len(pages), page_size, model.kv_heads, model.head_dim)
        return {
            "q": inputs.randn(batch, model.heads, model.head_dim),
            "k_cache": inputs.randn(*shape),
            "v_cache": inputs.randn(*shape),
            "block_table": torch.cat([first, pages[shared:].reshape(batch, apart)], dim=1),
            "cache_seqlens": inputs.tensor([shared * page_size + own] * batch, torch.int32),
            "causal": True,
        }

    return make


def first_requests(count: int) -> Part:
    """The first requests of a batch in a paged or a contiguous cache."""
    of_requests = ("q", "block_table", "cache_seqlens", "k", "v")
    return Part(
        lambda arguments: (
            arguments | {name: arguments[name][:count] for name in of_requests if name in arguments}
        ),
        lambda result: result[:count],
    )


def paged_prefill(model: GPTConfig, chunk: int, context: int, *, page_size: int = 16) -> Make:
    """A chunk of a prompt over its pages, the chunk's own among them."""

    def make(inputs: Inputs) -> dict[str, Any]:
        q = inputs.randn(chunk, model.heads, model.head_dim)
        cu_seqlens_q = inputs.tensor([0, chunk], torch.int32)
        cache = _cache(inputs, model, 1, context, page_size, "float")
        return {"q": q, **cache, "cu_seqlens_q": cu_seqlens_q, "causal": True}

    return make


def append(model: GPTConfig, tokens: int, *, page_size: int = 16) -> Make:
    """New keys and values into their pages, the keys rotated on the way."""

    def make(inputs: Inputs) -> dict[str, Any]:
        k, v = (inputs.randn(tokens, model.kv_heads, model.head_dim) for _ in range(2))
        pages = -(-tokens // page_size)
        slots = inputs.permutation(pages * page_size)[:tokens]
        caches = (inputs.randn(pages, page_size, *k.shape[1:]) for _ in range(2))
        k_cache, v_cache = caches
        return {
            "k": k,
            "v": v,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "slot_mapping": slots,
            "rotary": _rotary_tables(model, tokens, inputs),
            "positions": inputs.permutation(tokens),
        }

    return make


def written_caches(arguments: dict[str, Any], returned: None) -> dict[str, torch.Tensor]:
    return {name: arguments[name] for name in ("k_cache", "v_cache")}


# --- matrix multiplications -----------------------------------------------------------------------


def quantized(
    tokens: int, width: int, outputs: int, scheme: str, *, act: str | None = None, **options: Any
) -> Make:
    """Activations times quantized weights; `act` is what x is rounded to."""

    def make(inputs: Inputs) -> dict[str, Any]:
        weight = inputs.randn(outputs, width, scale=width**-0.5, dtype=torch.float32)
        packed = tilewise.quantize(weight, scheme, search="minmax", **options)
        arguments = {"x": inputs.randn(tokens, width), "weight": packed}
        return arguments | {"act": act} if act else arguments

    return make


def embedded(tokens: int, vocabulary: int, width: int, scheme: str, **options: Any) -> Make:
    """Rows of a quantized table of token embeddings."""

    def make(inputs: Inputs) -> dict[str, Any]:
        table = inputs.randn(vocabulary, width, dtype=torch.float32)
        packed = tilewise.quantize(table, scheme, search="minmax", **options)
        token_ids = inputs.randint(0, vocabulary, tokens)
        return {"token_ids": token_ids, "weight": packed, "dtype": inputs.dtype}

    return make


def first_rows(count: int) -> Part:
    """The first rows of x: every row of a product is on its own."""
    return Part(
        lambda arguments: arguments | {"x": arguments["x"][:count]}, lambda result: result[:count]
    )


def every_output(step: int) -> Part:
    """One in `step` of the outputs, each of which is the product with one row of the weight."""

    def reduce(arguments: dict[str, Any]) -> dict[str, Any]:
        weight = arguments["weight"]
        some = replace(
            weight,
            shape=(-(-weight.shape[0] // step), weight.shape[1]),
            data=weight.data[::step],
            scales=weight.scales[::step],
            zeros=None if weight.zeros is None else weight.zeros[::step],
        )
        return arguments | {"weight": some}

    return Part(reduce, lambda result: result[..., ::step])


def experts(tokens: int, *, dim: int, ffn_dim: int, count: int, top_k: int) -> Make:
    """A mixture-of-experts layer."""

    def make(inputs: Inputs) -> dict[str, Any]:
        return {
            "x": inputs.randn(tokens, dim),
            "router_logits": inputs.randn(tokens, count),
            "w_gate_up": inputs.randn(count, 2 * ffn_dim, dim, scale=dim**-0.5),
            "w_down": inputs.randn(count, dim, ffn_dim, scale=ffn_dim**-0.5),
            "top_k": top_k,
        }

    return make


def routed(tokens: int, *, dim: int, count: int, **others: int) -> Make:
    """The router of such a layer; `others` are what it does not need to know."""

    def make(inputs: Inputs) -> dict[str, Any]:
        weight = inputs.randn(count, dim, scale=dim**-0.5)
        return {"x": inputs.randn(tokens, dim), "weight": weight}

    return make


# --- fused small operations -----------------------------------------------------------------------


def norm(*shape: int, bias: bool = False, residual: bool = False) -> Make:
    """A norm, with the residual's addition where the model has one before it."""

    def make(inputs: Inputs) -> dict[str, Any]:
        arguments = {"x": inputs.randn(*shape), "weight": inputs.randn(shape[-1])}
        if bias:
            arguments["bias"] = inputs.randn(shape[-1])
        if residual:
            arguments["residual"] = inputs.randn(*shape)
        return arguments

    return make


def gated(tokens: int, width: int) -> Make:
    """The activation inside a gated feed-forward network."""

    def make(inputs: Inputs) -> dict[str, Any]:
        return {"gate": inputs.randn(tokens, width), "up": inputs.randn(tokens, width)}

    return make


def _rotary_tables(model: GPTConfig, tokens: int, inputs: Inputs) -> Any:
    return tilewise.rotary_tables(
        model.head_dim, tokens, base=model.rotary_base, device=inputs.device
    )


def rotary(model: GPTConfig, tokens: int) -> Make:
    """The rotation of a prompt's queries."""

    def make(inputs: Inputs) -> dict[str, Any]:
        return {
            "x": inputs.randn(tokens, model.heads, model.head_dim),
            "tables": _rotary_tables(model, tokens, inputs),
            "positions": inputs.permutation(tokens),
        }

    return make


def sampling(model: GPTConfig, batch: int, **options: Any) -> Make:
    """The choice of a next token for every sequence of a batch."""

    def make(inputs: Inputs) -> dict[str, Any]:
        logits = inputs.randn(batch, model.vocab_size, scale=3.0)
        return {"logits": logits, "temperature": 0.8, **options}

    return make
