"""Attention over dense and ragged batches, and the merging of partial results.

FlashAttention's idea, on which every fast backend rests: a softmax can be computed in one pass over
blocks of keys if the running maximum and sum are carried along, so the score matrix never exists in
memory (Dao et al., 2022, arXiv:2205.14135). What is returned beside the output, the logarithm of
each row's sum, is all that is needed to go on with more keys later, or to go back.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tilewise import gpu
from tilewise.attention import autograd, baseline, merge, naive, native, triton, triton_merge
from tilewise.attention.checks import (
    check_flash_attention,
    check_flash_attention_varlen,
    check_merge_states,
)
from tilewise.attention.cost import (
    cost_flash_attention,
    cost_flash_attention_varlen,
    cost_merge_states,
)
from tilewise.dispatch import Impl, Op

__all__ = ["flash_attention", "flash_attention_varlen", "merge_states"]

_FLASH_ATTENTION = Op(
    "flash_attention",
    naive.flash_attention,
    impls=(
        Impl(
            "triton", partial(autograd.flash_attention, "triton"), triton.why_not, gpu.why_not_auto
        ),
        Impl("cpu", partial(autograd.flash_attention, "cpu"), native.why_not),
        Impl(
            "torch",
            baseline.flash_attention,
            baseline.why_not,
            baseline.why_not_auto_flash_attention,
        ),
    ),
    check=check_flash_attention,
    cost=cost_flash_attention,
)

_FLASH_ATTENTION_VARLEN = Op(
    "flash_attention_varlen",
    naive.flash_attention_varlen,
    impls=(
        Impl(
            "triton",
            partial(autograd.flash_attention_varlen, "triton"),
            triton.why_not,
            gpu.why_not_auto,
        ),
        Impl("cpu", partial(autograd.flash_attention_varlen, "cpu"), native.why_not),
        Impl(
            "torch",
            baseline.flash_attention_varlen,
            baseline.why_not,
            baseline.why_not_auto_flash_attention_varlen,
        ),
    ),
    check=check_flash_attention_varlen,
    cost=cost_flash_attention_varlen,
)

_MERGE_STATES = Op(
    "merge_states",
    naive.merge_states,
    impls=(
        Impl(
            "triton",
            partial(merge.merge_states, "triton"),
            triton_merge.why_not_merge_states,
            gpu.why_not_auto,
        ),
        Impl("cpu", partial(merge.merge_states, "cpu"), native.why_not_merge_states),
    ),
    check=check_merge_states,
    cost=cost_merge_states,
)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    backend: str = "auto",
    validate: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend from every query to the keys that it may see: softmax(scale q k^T) v.

    A score is scaled, softcapped, given its ALiBi penalty and its bias, and masked, in this order.
    Nothing that is masked matters: it may be NaN without changing an output or a gradient. A
    query that is not finite, or sees a key or a value that is not, gives NaN.

    Heads come after tokens, as in FlashAttention; `tilewise.scaled_dot_product_attention` takes
    PyTorch's (batch, heads, seqlen, head_dim).

    Args:
        q: (batch, seqlen_q, heads, head_dim), floating point, head_dim <= 576.
        k: (batch, seqlen_k, kv_heads, head_dim), q's dtype; each key head serves heads / kv_heads
            query heads in a row (grouped-query attention; multi-query with one).
        v: (batch, seqlen_k, kv_heads, v_head_dim), q's dtype.
        causal: hide keys behind the query, where the last query is level with the last key.
        scale: of the scores; None means 1 / sqrt(head_dim).
        window: how many keys to the left and to the right of its own position a query sees, that
            one itself not counted; -1 is no limit. With `causal` the right side is 0.
        softcap: where positive, scores become softcap x tanh(score / softcap).
        alibi_slopes: (heads,) or (batch, heads), float32; slope x |distance| is subtracted. They
            are constants and get no gradient.
        sinks: (heads,), floating point; the score of one more key that has no value.
        bias: broadcasts to (batch, heads, seqlen_q, seqlen_k); boolean (True means visible) or
            floating point (added; -inf hides).
        return_lse: return the log-sum-exp of the scores too.
        batch_invariant: a batch row's result has the same bits whatever else is in the batch.
        backend: see `tilewise.use_backend`.
        validate: has nothing more to check here.

    Returns:
        out (batch, seqlen_q, heads, v_head_dim) in q's dtype; with `return_lse` also lse (batch,
        seqlen_q, heads), natural logarithm, float32 (float64 for float64 inputs), sinks counted
        in. A query that sees no key has out 0 and lse -inf, or its sink.

    Raises:
        ValueError, TypeError: for an argument that does not fit.
        BackendError: if the named backend cannot run the call.

    Source: Dao, FlashAttention-2, 2023 (arXiv:2307.08691). Softcap: Gemma 2, 2024
    (arXiv:2408.00118). ALiBi: Press et al., 2021 (arXiv:2108.12409). Sinks: Xiao et al., 2023
    (arXiv:2309.17453), learned as in gpt-oss.
    """
    if alibi_slopes is None and sinks is None and bias is None:
        numbers = (causal, scale, window, softcap, return_lse, batch_invariant)
        result = native.attend_plainly("flash_attention", backend, q, k, v, numbers)
        if result is not None:
            return result
    options: dict[str, Any] = {
        "causal": causal,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "bias": bias,
        "return_lse": return_lse,
        "batch_invariant": batch_invariant,
    }
    check_flash_attention(q, k, v, **options, validate=validate)
    return _FLASH_ATTENTION(q, k, v, **options, backend=backend)


def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    backend: str = "auto",
    validate: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attention` over sequences of different lengths, laid end to end without padding.

    Args:
        q: (tokens_q, heads, head_dim), floating point, head_dim <= 576.
        k: (tokens_k, kv_heads, head_dim), q's dtype.
        v: (tokens_k, kv_heads, v_head_dim), q's dtype.
        cu_seqlens_q: (batch + 1,) int32; sequence i is tokens cu_seqlens_q[i] to
            cu_seqlens_q[i + 1] of q. Starts at 0 and never decreases. Tokens behind the last
            sequence are padding: they influence nothing, and get out 0 and lse -inf.
        cu_seqlens_k: the same for k and v.
        max_seqlen_q, max_seqlen_k: at least the length of the longest sequence; spare a GPU kernel
            from reading it back.
        bias: broadcasts to (heads, tokens_q, max_seqlen_k); [h, t, j] is for key j of the sequence
            that token t is in.
        alibi_slopes: (heads,) or (batch, heads), float32.
        causal, scale, window, softcap, sinks, return_lse, batch_invariant, backend: as in
            `flash_attention`, per sequence. The naive backend reads `cu_seqlens` on the host when
            `batch_invariant`, and cannot be compiled then.
        validate: check the values of `cu_seqlens_q`, `cu_seqlens_k` and `max_seqlen_*` as well.

    Returns:
        out (tokens_q, heads, v_head_dim) in q's dtype; with `return_lse` also lse (tokens_q,
        heads).

    Raises:
        ValueError, TypeError: for an argument that does not fit.
        BackendError: if the named backend cannot run the call.

    Source: Dao, FlashAttention-2, 2023 (arXiv:2307.08691).
    """
    if isinstance(bias, torch.Tensor) and bias.dim() == 0:
        bias = bias[None]  # its last dimension is the keys', in all that follows
    options: dict[str, Any] = {
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "causal": causal,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "bias": bias,
        "return_lse": return_lse,
        "batch_invariant": batch_invariant,
    }
    check_flash_attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options, validate=validate)
    return _FLASH_ATTENTION_VARLEN(q, k, v, cu_seqlens_q, cu_seqlens_k, **options, backend=backend)


def merge_states(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    backend: str = "auto",
    validate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of keys, from the attention of the same queries over each.

    Give the sinks to one of the two calls only, or they count twice.

    Args:
        out_a, out_b: (..., heads, head_dim), floating point, one dtype.
        lse_a, lse_b: (..., heads), float32 (float64 for float64 outputs), natural logarithm. Where
            it is -inf that side saw nothing, and its output is ignored.
        backend: see `tilewise.use_backend`.
        validate: has nothing more to check here.

    Returns:
        out and lse of both sets together, shaped like the inputs; (0, -inf) where neither side saw
        anything.

    Raises:
        ValueError, TypeError: for an argument that does not fit.
        BackendError: if the named backend cannot run the call.

    Source: Ye et al., FlashInfer, 2025 (arXiv:2501.01005), section 2.2; the same sum as in
    Rabe and Staats, 2021 (arXiv:2112.05682).
    """
    check_merge_states(out_a, lse_a, out_b, lse_b, validate=validate)
    return _MERGE_STATES(out_a, lse_a, out_b, lse_b, backend=backend)
