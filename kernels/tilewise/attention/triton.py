"""The Triton backend of attention: results allocated, configurations chosen, kernels launched."""

from __future__ import annotations

from typing import Any

import torch

from tilewise import cpu, gpu, tuning
from tilewise.attention import triton_configs as configs
from tilewise.attention.native import extras
from tilewise.attention.operators import (
    FLASH_ATTENTION,
    FLASH_ATTENTION_BACKWARD,
    FLASH_ATTENTION_VARLEN,
    FLASH_ATTENTION_VARLEN_BACKWARD,
)


def why_not(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any, **options: Any
) -> str | None:
    """Why the Triton kernels cannot take the call."""
    return gpu.why_not(q)


def pieces(dim: int) -> tuple[int, int]:
    """A head dimension as two powers of two of at least 16, the second of which may be 0."""
    main = max(1 << (dim.bit_length() - 1), 16)
    rest = dim - main
    return main, 0 if rest <= 0 else power_of_two(rest)


def power_of_two(n: int) -> int:
    """The next power of two that tiles can have."""
    return max(1 << (n - 1).bit_length(), 16)


def _blocks(
    q: torch.Tensor,
    v_dim: int,
    name: str,
    tables: dict[str, configs.Table],
    float32: configs.Table,
    *,
    is_plain: bool,
) -> dict[str, int]:
    """Of a table, as a kernel takes them.

    They must not depend on the lengths: a row's bits would. What was tuned on plain attention may
    not fit into shared memory beside a bias.
    """
    table = float32 if q.dtype == torch.float32 else tables[gpu.architecture(q)]
    widest = max(q.shape[-1], v_dim)
    limit = next(limit for limit in sorted(table) if widest <= limit)
    blocks = configs.Blocks(*table[limit])
    if is_plain:
        asked = f"attention {name}, {8 * q.dtype.itemsize} bits, heads to {limit}"
        blocks = tuning.chosen(q, asked, blocks, {"m": 16, "n": 16})
    m, n, warps, stages = blocks
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


def _have_descriptors(*tensors: torch.Tensor) -> bool:
    """Whether tiles of all of them can be loaded with descriptors: TMA asks for 16 bytes.

    Lengths must not decide it, a row's bits would depend on them: only the strides of the batch,
    where there is but one row, do not count.
    """

    def fits(x: torch.Tensor) -> bool:
        *batch, tokens, heads, _ = x.stride()
        strides = [tokens, heads, *(batch if x.shape[0] > 1 else ())]
        is_aligned = all(stride % 8 == 0 for stride in strides) and x.data_ptr() % 16 == 0
        return x.dtype.itemsize == 2 and tokens >= x.shape[-1] and is_aligned

    return gpu.has_descriptors(tensors[0]) and all(fits(x) for x in tensors)


@FLASH_ATTENTION.kernel("triton")
def _flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    from tilewise.paged import triton as paged

    alibi_slopes, sinks, bias, *mask, batch_invariant = options
    if not paged.few_rows(q, k):
        return _attend(q, k, v, None, None, *options)
    # The keys are split among programs as those of a paged cache are.
    q, k, v = (cpu.unit_stride(x) for x in (q, k, v))
    options = (*mask, alibi_slopes, sinks, bias, batch_invariant)
    out, lse = paged.attend(q.flatten(0, 1), k, v, None, None, None, None, None, *options)
    return out.view(*q.shape[:3], -1), lse.view(q.shape[:3])


@FLASH_ATTENTION_VARLEN.kernel("triton")
def _flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _attend(q, k, v, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), *options)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
    causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from tilewise.attention import triton_kernels as kernels

    q, k, v = (cpu.unit_stride(x) for x in (q, k, v))
    is_ragged = cu_seqlens_q is not None
    out_shape = (*q.shape[:-1], v.shape[-1])
    if is_ragged:  # tokens behind the last sequence belong to no program
        out, lse = q.new_zeros(out_shape), q.new_full(q.shape[:-1], -torch.inf, dtype=torch.float32)
    else:
        out, lse = q.new_empty(out_shape), q.new_empty(q.shape[:-1], dtype=torch.float32)
    is_plain = alibi_slopes is None and bias is None and softcap == 0
    descriptors = _have_descriptors(k, v)
    name, tables = "forward", configs.FORWARD
    if descriptors:
        name, tables = f"{name} by descriptors", configs.FORWARD_DESCRIPTORS
    blocks = _blocks(q, v.shape[-1], name, tables, configs.FORWARD_FLOAT32, is_plain=is_plain)
    widest = max(q.shape[-1], v.shape[-1])
    batch, heads, tokens = _sizes(q, cu_seqlens_q)
    if out.numel() == 0 or batch == 0:
        return out, lse
    if descriptors and is_plain and widest <= 64 and blocks["num_warps"] == 4:
        blocks["maxnreg"] = 168  # three programs on a multiprocessor; masked tiles spill 40 bytes
    # Not for a scale with which a product of -inf, or the largest finite one, would become another.
    fold = is_plain and 1e-20 < scale < 0.5
    alibi_slopes, sinks, bias = extras(alibi_slopes, sinks, bias)
    gpu.launch(
        kernels.forward,
        _grid(tokens, blocks["BLOCK_M"], heads, batch, is_ragged),
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        alibi_slopes,
        sinks,
        bias,
        *_layout(q, k, v, cu_seqlens_q, alibi_slopes, bias),
        scale,
        softcap,
        window_left,
        0 if causal else window_right,
        FOLD=fold,
        DESCRIPTORS=descriptors,
        needs_scratch=descriptors,
        **_constants(q, k, v, bias, softcap, window_left),
        **blocks,
    )
    return out, lse


def _sizes(q: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> tuple[int, int, int]:
    """Batch, heads, and tokens of a batch row or of all sequences."""
    tokens, heads = q.shape[-3:-1]
    return (q.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1), heads, tokens


def _grid(tokens: int, block: int, heads: int, batch: int, is_ragged: bool) -> tuple[int, int, int]:
    """Tiles, heads and batch rows; tiles of ragged sequences are counted through the batch."""
    tiles = -(-tokens // block)
    return (tiles + batch, heads, 1) if is_ragged else (tiles, heads, batch)


def _layout(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[int, ...]:
    """Sizes and strides, as all kernels take them."""
    sizes = _sizes(q, cu_seqlens_q)
    return (
        *sizes,
        k.shape[-3],
        q.shape[-1],
        v.shape[-1],
        *(stride for x in (q, k, v) for stride in _strides(x)),
        alibi_slopes.stride(0) if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        *_bias_layout(bias, sizes, k.shape[-3], cu_seqlens_q is not None),
    )


def _constants(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float,
    window_left: int,
) -> dict[str, Any]:
    main, rest = pieces(q.shape[-1])
    if rest and q.shape[-1] <= 128 and gpu.has_descriptors(q) and q.dtype.itemsize == 2:
        # With two parts of different widths an H200 computed wrong gradients (docs/gpu.md).
        main, rest = power_of_two(q.shape[-1]), 0
    return {
        "GROUP": q.shape[-2] // k.shape[-2],
        "HAS_LEFT": window_left >= 0,
        "HAS_SOFTCAP": softcap > 0,
        "IS_MASK": bias is not None and bias.dtype == torch.bool,
        "D_MAIN": main,
        "D_REST": rest,
        "D_V": power_of_two(v.shape[-1]),
    }


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Of the batch, tokens and heads."""
    *batch, tokens, heads, _ = x.stride()
    return (batch[0] if batch else 0, tokens, heads)


def _bias_layout(
    bias: torch.Tensor | None, shape: tuple[int, int, int], keys: int, is_ragged: bool
) -> tuple[int, ...]:
    """Strides of the batch, heads, queries and keys, 0 where all have the same, and the keys."""
    if bias is None:
        return (0, 0, 0, 0, 0)
    batch, heads, queries = shape
    if is_ragged:  # by a key's number within its sequence
        keys = keys if bias.shape[-1] == 1 else bias.shape[-1]
        return (0, *bias.expand(heads, queries, keys).stride(), keys)
    return (*bias.expand(batch, heads, queries, keys).stride(), keys)


# --- gradients ------------------------------------------------------------------------------------


@FLASH_ATTENTION_BACKWARD.kernel("triton")
def _flash_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, ...]:
    return _gradients(grad_out, grad_lse, out, lse, q, k, v, None, None, *options)


@FLASH_ATTENTION_VARLEN_BACKWARD.kernel("triton")
def _flash_attention_varlen_backward(
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
) -> tuple[torch.Tensor, ...]:
    ends = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    return _gradients(grad_out, grad_lse, out, lse, q, k, v, *ends, *options)


def _gradients(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
    causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    batch_invariant: bool,
    needs_grad_bias: bool,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v, sinks and bias, those of a missing tensor empty."""
    from tilewise.attention import triton_backward_kernels as kernels
    from tilewise.attention.triton_backward_parts import row_sums

    is_ragged = cu_seqlens_q is not None
    q, k, v = (cpu.unit_stride(x) for x in (q, k, v))
    grad_out, out, lse = grad_out.contiguous(), out.contiguous(), lse.contiguous()
    # Tokens behind the last sequence, or of a sequence behind the bias, belong to no program.
    make = torch.Tensor.new_zeros if is_ragged else torch.Tensor.new_empty
    grad_q, grad_k, grad_v = grads = [make(x, x.shape) for x in (q, k, v)]
    slopes, sink_logits, added = extras(alibi_slopes, sinks, bias)
    layout = _layout(q, k, v, cu_seqlens_q, slopes, added)
    batch, heads, tokens, k_tokens, _, v_dim = layout[:6]
    room = -(-tokens // 4) * 4  # so that the tokens of each head begin at 16 bytes
    shape = (1 if is_ragged else batch, heads, room)
    shifts, delta = lse.new_empty(shape), lse.new_empty(shape)
    scores = None
    if bias is not None and needs_grad_bias:
        rows = (heads, tokens) if is_ragged else (batch, heads, tokens)
        scores = q.new_zeros(*rows, layout[-1], dtype=torch.float32)
    if batch:
        block = power_of_two(v_dim)
        rows_each = max(4096 // block, 1)
        gpu.launch(
            row_sums,
            (-(-lse.numel() // rows_each),),
            grad_out,
            out,
            lse,
            None if grad_lse is None else grad_lse.contiguous(),
            shifts,
            delta,
            lse.numel(),
            heads,
            tokens,
            room,
            v_dim,
            ROWS=rows_each,
            BLOCK=block,
        )
        is_plain = slopes is None and added is None and softcap == 0
        ends = (cu_seqlens_q, cu_seqlens_k)
        options = (scale, softcap, window_left, 0 if causal else window_right)
        constants = _constants(q, k, v, added, softcap, window_left)

        descriptors = _have_descriptors(k, v)
        name, tables = "grad of queries", configs.GRAD_QUERIES
        if descriptors:
            name, tables = f"{name} by descriptors", configs.GRAD_QUERIES_DESCRIPTORS
        blocks = _blocks(q, v_dim, name, tables, configs.BACKWARD_FLOAT32, is_plain=is_plain)
        gpu.launch(
            kernels.grad_queries,
            _grid(tokens, blocks["BLOCK_M"], heads, batch, is_ragged),
            *(q, k, v, grad_out, shifts, delta, grad_q, scores),
            *(*ends, slopes, added, *layout, room, *options),
            DESCRIPTORS=descriptors,
            needs_scratch=descriptors,
            **constants,
            **blocks,
        )
        descriptors = _have_descriptors(q, grad_out)
        name, tables = "grad of keys", configs.GRAD_KEYS
        if descriptors:
            name, tables = f"{name} by descriptors", configs.GRAD_KEYS_DESCRIPTORS
            if heads > k.shape[-2]:
                name, tables = f"{name}, groups", configs.GRAD_KEYS_GROUPED
            if not is_plain:
                tables = configs.GRAD_KEYS_CROWDED
        blocks = _blocks(q, v_dim, name, tables, configs.BACKWARD_FLOAT32, is_plain=is_plain)
        gpu.launch(
            kernels.grad_keys,
            _grid(k_tokens, blocks["BLOCK_N"], k.shape[-2], batch, is_ragged),
            *(q, k, v, grad_out, shifts, delta, grad_k, grad_v),
            *(*ends, slopes, added, *layout, room, *options),
            DESCRIPTORS=descriptors,
            needs_scratch=descriptors,
            **constants,
            **blocks,
        )
    grad_sinks, grad_bias = q.new_empty(0), q.new_empty(0)
    if sinks is not None and sink_logits is not None:
        share = torch.exp(sink_logits - lse).masked_fill(lse == -torch.inf, 0)
        of_rows = delta[..., :tokens].transpose(1, 2).reshape(share.shape)
        grad_sinks = -(share * of_rows).flatten(0, -2).sum(0).to(sinks.dtype)
    if bias is not None and scores is not None:
        grad_bias = scores.sum_to_size(bias.shape).to(bias.dtype)
    return (*grads, grad_sinks, grad_bias)
