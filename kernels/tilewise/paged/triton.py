"""The Triton backend of paged attention: what a launch needs to know, all of it from shapes alone.

Nothing here reads a tensor's values, so a call can be captured in a CUDA graph and replayed after
lengths and tables have changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tilewise import gpu, tuning
from tilewise.paged import kv_formats
from tilewise.paged.autograd import why_not_gradient
from tilewise.paged.native import why_not_cache
from tilewise.paged.operators import PAGED_ATTENTION
from tilewise.paged.triton_configs import Config, choose_config, power_of_two


def why_not_paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *others: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    **options: Any,
) -> str | None:
    """Why the Triton kernels cannot take the call."""
    return (
        gpu.why_not(q)
        or why_not_gradient(q, k_cache, v_cache, sinks, bias)
        or why_not_cache(k_cache, k_scale, v_scale)
    )


# --- the cache, as the kernels take it ------------------------------------------------------------


@dataclass(frozen=True)
class _Format:
    """How codes become values: a key's by a factor of its score, a value's by one of its weight."""

    name: str
    score: float = 1.0  # of scores
    weight: float = 1.0  # of weights, so that weight x scale is as large as the values are
    out: float = 1.0  # of sums, which undoes it


FORMATS = {
    torch.int8: _Format("int8", 1.0, 128.0, 1 / 128),
    torch.float8_e4m3fn: _Format("fp8", 256.0, 512.0, 256 / 512),  # codes come divided by 256
    torch.uint8: _Format("int4", 1.0, 8.0, 1 / 8),
}
FLOAT = _Format("float")


def stored(cache: torch.Tensor) -> torch.Tensor:
    """float8 as bytes: not every chip has the type."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def _parts(cache: torch.Tensor) -> tuple[int, int, int, int]:
    """A row as two runs of elements: sizes and the blocks that hold them, 0 for no second one.

    Blocks are powers of two of at least 16; two of different sizes fit 96, 192 or 576 elements
    better than one. The codes of int4 come in two halves anyway.
    """
    dim = kv_formats.elements(cache)
    if cache.dtype == torch.uint8:
        return dim // 2, power_of_two(dim // 2), dim // 2, power_of_two(dim // 2)
    whole = power_of_two(dim)
    rest = dim - whole // 2
    if whole == 16 or 2 * power_of_two(rest) >= whole:
        return dim, whole, 0, 0
    return whole // 2, whole // 2, rest, power_of_two(rest)


# --- reading --------------------------------------------------------------------------------------

_MIN_SPLIT = 512
_MAX_SPLITS = 64  # between half as many and as many where a request is long
_SMALL_ROWS = 64
"""A ragged request of at most so many rows, or of one token, has its keys split."""


def few_rows(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether a dense batch, (batch, tokens, heads, head_dim), is one whose keys `attend` splits.

    It depends on nothing but the shape of a batch row, as do a row's bits.
    """
    rows = q.shape[1] * (q.shape[2] // k.shape[2])
    return k.shape[1] > _MIN_SPLIT and (q.shape[1] == 1 or rows <= _SMALL_ROWS)


_SHARERS = 64
"""Requests among which a program looks for those that share a split: as many as can."""
_MAX_WORKSPACE = 1 << 26
"""Floats of partial results, 256 MB. A batch that needs more is large enough to fill a GPU with
fewer splits, unless its bits may not depend on it."""


@PAGED_ATTENTION.kernel("triton")
def _paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return attend(q, k_cache, v_cache, block_table, cache_seqlens, *options)


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a cache, or without a table over the keys of a dense batch.

    Args:
        q: (tokens, heads, head_dim).
        k_cache, v_cache: (pages, page_size, kv_heads, head_dim); without a table (batch, keys,
            kv_heads, head_dim), for which all requests have as many tokens, `few_rows` of them.
        bias: broadcasts to (heads, tokens, keys that a table has room for); without a table to
            (batch, heads, tokens of a request, keys).
        others: as `paged_attention` has them.

    Returns:
        out (tokens, heads, v_head_dim) and the log-sum-exp (tokens, heads).
    """
    import triton.language as tl

    from tilewise.paged import triton_kernels as kernels
    from tilewise.paged import triton_split_kernels as split_kernels

    tokens, heads, _ = q.shape
    num_pages, page_size, kv_heads = k_cache.shape[:3]
    if block_table is None:
        batch, capacity, page_size = num_pages, page_size, 0
    else:
        batch, capacity = len(block_table), block_table.shape[1] * page_size
    group = heads // kv_heads
    v_dim = kv_formats.elements(v_cache)
    out = q.new_empty(tokens, heads, v_dim)
    lse = q.new_empty(tokens, heads, dtype=torch.float32)
    if tokens == 0:
        return out, lse
    # Whether requests may have more tokens than one.
    is_ragged = cu_seqlens_q is not None or (block_table is None and tokens > batch)
    # A limit that no two tokens are further apart than is none.
    right = 0 if causal else window_right
    left, right = (-1 if x >= capacity + tokens else x for x in (window_left, right))

    format = FORMATS.get(k_cache.dtype, FLOAT)
    if format is not FLOAT or k_cache.dtype == q.dtype:
        dtype = q.dtype
    else:  # neither dtype holds the other's numbers
        dtype = torch.float32
    precision = "ieee"
    if dtype != q.dtype and k_cache.dtype != torch.float32:
        precision = "tf32"  # which holds those of both
    k_parts, v_parts = _parts(k_cache), _parts(v_cache)
    score_scale = scale * format.score
    if softcap > 0:
        score_scale /= softcap
    elif alibi_slopes is None and (bias is None or bias.dtype == torch.bool):
        score_scale *= _LOG2E

    bias_strides: tuple[int, ...] = (0, 0, 0, 0)
    if bias is not None and block_table is None:
        # Token i of request b is number b * queries + i.
        queries = tokens // batch
        step, *rest = bias.expand(batch, heads, queries, capacity).stride()
        bias_strides = (step - queries * rest[1], *rest)
    elif bias is not None:
        bias_strides = (0, *bias.expand(heads, tokens, capacity).stride())
    ks_strides = (0, 0, 0) if k_scale is None else k_scale.stride()
    vs_strides = (0, 0, 0) if v_scale is None else v_scale.stride()
    tensors = (
        block_table,
        None if cache_seqlens is None else cache_seqlens.contiguous(),
        None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
        k_scale,
        v_scale,
        None if alibi_slopes is None else alibi_slopes.contiguous(),
        None if sinks is None else sinks.contiguous(),
        bias.view(torch.uint8) if bias is not None and bias.dtype == torch.bool else bias,
    )
    numbers = (
        batch,
        tokens,
        capacity,
        num_pages,
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *ks_strides,
        *vs_strides,
        0 if block_table is None else block_table.stride(0),
        heads if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        *bias_strides,
        left,
        right,
        score_scale,
        softcap,
    )
    shape = {
        "GROUP": group,
        "HAS_LEFT": left >= 0,
        "HAS_RIGHT": right >= 0,
        "OUT_SCALE": format.out,
        "IS_RAGGED": is_ragged,
        "SMALL_ROWS": _SMALL_ROWS,
        "MIN_SPLIT": _MIN_SPLIT,
    }
    constants = {
        "PAGE_SIZE": page_size,
        **dict(zip(("DIM_1", "BLOCK_1", "DIM_2", "BLOCK_2"), k_parts, strict=True)),
        **dict(zip(("V_DIM_1", "V_BLOCK_1", "V_DIM_2", "V_BLOCK_2"), v_parts, strict=True)),
        "FORMAT": format.name,
        "DTYPE": getattr(tl, str(dtype).removeprefix("torch.")),
        "PRECISION": precision,
        "CODE_SCALE": format.weight,
        "HAS_SOFTCAP": softcap > 0,
        "HAS_ALIBI": alibi_slopes is not None,
        "BIAS": "none" if bias is None else "mask" if bias.dtype == torch.bool else "float",
    }
    columns = k_parts[1] + k_parts[3] + v_parts[1] + v_parts[3]
    row = columns * dtype.itemsize
    # Without tensor cores the products of a tile are written out one by one.
    has_tensor_cores = precision == "tf32" or dtype.itemsize == 2
    most_rows = 16 if not has_tensor_cores else 128 if row <= 640 else 64 if row <= 1024 else 32
    architecture = gpu.architecture(q)

    def configure(m: int, *, is_small: bool) -> Config:
        stored_row = columns * k_cache.itemsize // (2 if format.name == "int4" else 1)
        q_row = (k_parts[1] + k_parts[3]) * dtype.itemsize
        config = choose_config(
            architecture,
            m,
            row,
            stored_row,
            q_row,
            is_small=is_small,
            is_paged=block_table is not None,
            has_bias=bias is not None,
        )
        if not has_tensor_cores:
            return config._replace(n=16, num_stages=1)
        name = (
            f"paged attention, {'small' if is_small else 'large'} requests, {config.m} rows, "
            f"{row} bytes of {dtype} from {stored_row}{', bias' * (bias is not None)}"
        )
        return tuning.chosen(q, name, config, {"n": 16})

    # Requests of few rows.
    small_rows = max(_SMALL_ROWS, group) if is_ragged else group
    if block_table is None:
        small_rows = max(power_of_two(tokens // batch * group), group)
    config = configure(min(power_of_two(small_rows), most_rows, 64), is_small=True)
    visible = capacity
    if left >= 0 and right >= 0:
        visible = min(capacity, left + right + config.m + config.n)
    max_splits, splits = _MAX_SPLITS, min(_MAX_SPLITS, -(-visible // _MIN_SPLIT))
    rows = batch * small_rows * kv_heads
    while splits > 1 and rows * splits * v_dim > _MAX_WORKSPACE and not batch_invariant:
        splits = max_splits = splits // 2
    is_split = splits > 1
    partial_out = lse.new_empty(rows, splits, v_dim) if is_split else None
    partial_max, partial_sum = lse.new_empty(2, rows, splits) if is_split else (None, None)
    takes = None
    # Nobody shares where rows have masks of their own. Behind a window requests of different
    # lengths read different keys, and not many of them.
    can_share = is_split and batch > 1 and config.m >= 2 * group
    if can_share and block_table is not None and left < 0 and bias is None:
        takes = block_table.new_empty(batch, splits)
        gpu.launch(
            split_kernels.find_shared,
            (-(-batch // _SHARERS), splits),
            takes,
            *tensors[:3],
            batch,
            tokens,
            capacity,
            block_table.stride(0),
            right,
            IS_RAGGED=is_ragged,
            HAS_RIGHT=right >= 0,
            GROUP=group,
            M=config.m,
            MIN_SPLIT=_MIN_SPLIT,
            MAX_SPLITS=max_splits,
            PAGE_SIZE=page_size,
            REQUESTS=_SHARERS,
            BLOCK=min(power_of_two(-(-_MIN_SPLIT // page_size)), 32),
        )
    gpu.launch(
        kernels.paged_attention,
        (batch * -(-small_rows // config.m), kv_heads, max(splits, 1)),
        q,
        stored(k_cache),
        stored(v_cache),
        out,
        lse,
        partial_out,
        partial_max,
        partial_sum,
        takes,
        *tensors,
        *numbers,
        **shape,
        **constants,
        IS_SMALL=True,
        REQUEST_ROWS=small_rows,
        SPLITS=max(splits, 1),
        MAX_SPLITS=max_splits,
        M=config.m,
        N=config.n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if is_split:
        gpu.launch(
            split_kernels.merge_splits,
            (batch * small_rows, kv_heads),
            out,
            lse,
            partial_out,
            partial_max,
            partial_sum,
            *tensors[1:3],
            tensors[6],
            batch,
            tokens,
            capacity,
            left,
            right,
            **shape,
            REQUEST_ROWS=small_rows,
            SPLITS=splits,
            MAX_SPLITS=max_splits,
            SPLIT_BLOCK=_MAX_SPLITS,
            M=config.m,
            N=config.n,
            V_DIM=v_dim,
            V_BLOCK=power_of_two(v_dim),
            num_warps=4 if v_dim <= 256 else 8,
        )
    if cu_seqlens_q is not None:
        # All others, and the padding, which is as if it were one more request.
        config = configure(most_rows, is_small=False)
        gpu.launch(
            kernels.paged_attention,
            (tokens * group // config.m + batch + 1, kv_heads, 1),
            q,
            stored(k_cache),
            stored(v_cache),
            out,
            lse,
            None,
            None,
            None,
            None,
            *tensors,
            *numbers,
            **shape,
            **constants,
            IS_SMALL=False,
            REQUEST_ROWS=0,
            SPLITS=1,
            MAX_SPLITS=1,
            M=config.m,
            N=config.n,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out, lse


_LOG2E = 1.4426950408889634
