# mypy: allow-untyped-defs
"""The Triton kernels of the attention's backward pass.

Scores are computed again, from the log-sum-exp that the forward pass has left. One kernel goes
along the keys for a block of queries (grad q), the other along the queries, head by head of a
group, for a block of keys (grad k, grad v): nothing is added atomically, and the same call gives
the same bits.

Source: Dao, FlashAttention-2, 2023 (arXiv:2307.08691).
"""

import triton
import triton.language as tl

from tilewise.attention.triton_backward_parts import tile_gradients
from tilewise.attention.triton_kernels import (
    find_sequence,
    place,
    sight,
    visible_tiles,
)
from tilewise.attention.triton_tiles import (
    finite,
    load_rows,
    matrix,
    part_of,
    tile_of,
    vector,
    wide,
)


@triton.jit
def grad_queries(
    q,
    k,
    v,
    grad_out,
    shifts,
    delta,
    grad_q,
    grad_scores,
    cu_seqlens_q,
    cu_seqlens_k,
    alibi_slopes,
    bias,
    batch,
    heads,
    q_tokens,
    k_tokens,
    dim,
    v_dim,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    alibi_stride_b,
    bias_stride_b,
    bias_stride_h,
    bias_stride_q,
    bias_stride_k,
    bias_keys,
    room,
    scale,
    softcap,
    left,
    right,
    GROUP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_MASK: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """grad q of BLOCK_M queries of a head; grad_out and grad_q are contiguous.

    `grad_scores` is None or (batch, heads, queries, bias_keys), where all that is seen is written.
    """
    tile = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    q_begin = 0
    q_len = q_tokens
    k_begin = 0
    k_len = k_tokens
    if cu_seqlens_q is not None:
        b, tile = find_sequence(cu_seqlens_q, batch, tile, BLOCK_M)
        q_begin, q_len = place(cu_seqlens_q, b, q_tokens)
        k_begin, k_len = place(cu_seqlens_k, b, k_tokens)
        if bias is not None:
            k_len = tl.minimum(k_len, bias_keys)
    if tile * BLOCK_M < q_len:
        row = wide(b)
        of_batch = row if cu_seqlens_q is None else row * 0
        q += of_batch * q_stride_b + wide(q_begin) * q_stride_s + h * q_stride_h
        k += of_batch * k_stride_b + wide(k_begin) * k_stride_s + h // GROUP * k_stride_h
        v += of_batch * v_stride_b + wide(k_begin) * v_stride_s + h // GROUP * v_stride_h
        first_row = (of_batch * q_tokens + q_begin) * heads + h
        HAS_ALIBI: tl.constexpr = alibi_slopes is not None
        HAS_BIAS: tl.constexpr = bias is not None
        # Masked tiles are few, and take the most registers: they do not fetch the next one, too.
        STAGES: tl.constexpr = 1 if DESCRIPTORS and not HAS_BIAS else None
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(alibi_slopes + row * alibi_stride_b + h)
        if HAS_BIAS:
            bias += of_batch * bias_stride_b + wide(h) * bias_stride_h
            bias += wide(q_begin) * bias_stride_q

        first = tile * BLOCK_M
        queries = first + tl.arange(0, BLOCK_M)
        here = queries < q_len
        q_main = load_rows(q, q_stride_s, first, q_len, dim, 0, BLOCK_M, D_MAIN)
        q_rest = q_main
        if D_REST > 0:
            q_rest = load_rows(q, q_stride_s, first, q_len, dim, D_MAIN, BLOCK_M, D_REST)
        upstream = load_rows(
            grad_out + first_row * v_dim, heads * v_dim, first, q_len, v_dim, 0, BLOCK_M, D_V
        )
        vectors = (of_batch * heads + h) * room + q_begin
        shift = part_of(shifts + vectors, first, q_len, BLOCK_M, False)
        of_row = part_of(delta + vectors, first, q_len, BLOCK_M, False)

        main = tl.zeros([BLOCK_M, D_MAIN], tl.float32)
        rest = main
        if D_REST > 0:
            rest = tl.zeros([BLOCK_M, D_REST], tl.float32)
        all_k = matrix(k, k_stride_s, k_len, dim, BLOCK_N, D_MAIN, DESCRIPTORS)
        all_k_rest = all_k
        if D_REST > 0:
            all_k_rest = matrix(k, k_stride_s, k_len, dim, BLOCK_N, D_REST, DESCRIPTORS)
        all_v = matrix(v, v_stride_s, k_len, v_dim, BLOCK_N, D_V, DESCRIPTORS)

        past = k_len - q_len
        begins, ends = sight(queries, past, q_len, k_len, left, right)
        last = tl.minimum(first + BLOCK_M, q_len) - 1
        begin, inner, outer, end = visible_tiles(
            past + first, past + last, k_len, left, right, HAS_BIAS, BLOCK_N
        )
        for phase in tl.static_range(0 if HAS_LEFT else 1, 3):  # as in the forward pass
            if phase == 0:
                low, high = begin, inner
            elif phase == 1:
                low, high = inner, outer
            else:
                low, high = outer, end
            for at in tl.range(low, high, BLOCK_N, num_stages=None if phase == 1 else STAGES):
                keys = at + tl.arange(0, BLOCK_N)
                k_main = tile_of(all_k, k_stride_s, at, k_len, dim, 0, BLOCK_N, D_MAIN, DESCRIPTORS)
                k_rest = k_main
                if D_REST > 0:
                    k_rest = tile_of(
                        all_k_rest, k_stride_s, at, k_len, dim, D_MAIN, BLOCK_N, D_REST, DESCRIPTORS
                    )
                values = tile_of(all_v, v_stride_s, at, k_len, v_dim, 0, BLOCK_N, D_V, DESCRIPTORS)
                _, of_s, of_dots = tile_gradients(
                    q_main, q_rest, upstream, k_main, k_rest, values, shift[:, None],
                    of_row[:, None], queries[:, None], keys[None, :], begins[:, None],
                    ends[:, None], past, scale, softcap, slope, bias, bias_stride_q, bias_stride_k,
                    phase != 1, HAS_LEFT, HAS_SOFTCAP, HAS_ALIBI, HAS_BIAS, IS_MASK, D_REST,
                )  # fmt: skip
                if grad_scores is not None:
                    to = (of_batch * heads + h) * q_tokens + q_begin + queries
                    inside = here[:, None] & (keys < k_len)[None, :]
                    tl.store(
                        grad_scores + to[:, None] * bias_keys + keys[None, :], of_s, mask=inside
                    )
                if phase != 1:
                    k_main, _ = finite(k_main)
                main = tl.dot(of_dots.to(k_main.dtype), k_main, main, input_precision="ieee")
                if D_REST > 0:
                    if phase != 1:
                        k_rest, _ = finite(k_rest)
                    rest = tl.dot(of_dots.to(k_rest.dtype), k_rest, rest, input_precision="ieee")

        to = grad_q + (first_row + queries.to(tl.int64) * heads)[:, None] * dim
        columns = tl.arange(0, D_MAIN)
        inside = here[:, None] & (columns < dim)[None, :]
        tl.store(to + columns[None, :], (main * scale).to(grad_q.dtype.element_ty), mask=inside)
        if D_REST > 0:
            columns = D_MAIN + tl.arange(0, D_REST)
            inside = here[:, None] & (columns < dim)[None, :]
            tl.store(to + columns[None, :], (rest * scale).to(grad_q.dtype.element_ty), mask=inside)


@triton.jit
def grad_keys(
    q,
    k,
    v,
    grad_out,
    shifts,
    delta,
    grad_k,
    grad_v,
    cu_seqlens_q,
    cu_seqlens_k,
    alibi_slopes,
    bias,
    batch,
    heads,
    q_tokens,
    k_tokens,
    dim,
    v_dim,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    alibi_stride_b,
    bias_stride_b,
    bias_stride_h,
    bias_stride_q,
    bias_stride_k,
    bias_keys,
    room,
    scale,
    softcap,
    left,
    right,
    GROUP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_MASK: tl.constexpr,
    D_MAIN: tl.constexpr,
    D_REST: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """grad k and grad v, contiguous, of BLOCK_N keys of a key head."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    kv_heads = tl.num_programs(1)
    b = tl.program_id(2)
    q_begin = 0
    q_len = q_tokens
    k_begin = 0
    k_len = k_tokens
    if cu_seqlens_q is not None:
        b, tile = find_sequence(cu_seqlens_k, batch, tile, BLOCK_N)
        q_begin, q_len = place(cu_seqlens_q, b, q_tokens)
        k_begin, k_len = place(cu_seqlens_k, b, k_tokens)
        if bias is not None:
            k_len = tl.minimum(k_len, bias_keys)
    if tile * BLOCK_N < k_len:
        row = wide(b)
        of_batch = row if cu_seqlens_q is None else row * 0
        k += of_batch * k_stride_b + wide(k_begin) * k_stride_s + kv_head * k_stride_h
        v += of_batch * v_stride_b + wide(k_begin) * v_stride_s + kv_head * v_stride_h
        HAS_ALIBI: tl.constexpr = alibi_slopes is not None
        HAS_BIAS: tl.constexpr = bias is not None
        # Masked tiles are few, and take the most registers: they do not fetch the next one, too.
        STAGES: tl.constexpr = 1 if DESCRIPTORS and not HAS_BIAS else None

        at = tile * BLOCK_N
        keys = at + tl.arange(0, BLOCK_N)
        k_main = load_rows(k, k_stride_s, at, k_len, dim, 0, BLOCK_N, D_MAIN)
        k_rest = k_main
        if D_REST > 0:
            k_rest = load_rows(k, k_stride_s, at, k_len, dim, D_MAIN, BLOCK_N, D_REST)
        values = load_rows(v, v_stride_s, at, k_len, v_dim, 0, BLOCK_N, D_V)
        main = tl.zeros([BLOCK_N, D_MAIN], tl.float32)
        rest = main
        if D_REST > 0:
            rest = tl.zeros([BLOCK_N, D_REST], tl.float32)
        of_values = tl.zeros([BLOCK_N, D_V], tl.float32)

        # The queries that see any of the keys, [begin, end), and that see all, [inner, outer).
        # Keys from k_len on are not hidden: what they get is not stored.
        past = k_len - q_len
        last = tl.minimum(at + BLOCK_N, k_len) - 1
        begin = 0
        inner = 0
        end = q_len
        outer = q_len
        if right >= 0:
            begin = tl.maximum(at - right - past, 0)
            inner = tl.maximum(last - right - past, 0)
        if left >= 0:
            end = tl.minimum(q_len, last + left - past + 1)
            outer = tl.minimum(q_len, at + left - past + 1)
        end = tl.maximum(end, 0)
        begin = tl.minimum(begin, end) // BLOCK_M * BLOCK_M
        inner = (inner + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        if left >= 0:  # else queries past q_len are among the last tile's: all zeros, they add none
            outer = tl.maximum(outer, 0) // BLOCK_M * BLOCK_M
        if HAS_BIAS or outer <= inner:
            inner = end
            outer = end

        for member in tl.range(0, GROUP):
            h = kv_head * GROUP + member
            slope = 0.0
            if HAS_ALIBI:
                slope = tl.load(alibi_slopes + row * alibi_stride_b + h)
            of_bias = bias
            if HAS_BIAS:
                of_bias = bias + of_batch * bias_stride_b + wide(h) * bias_stride_h
                of_bias += wide(q_begin) * bias_stride_q
            of_head = q + of_batch * q_stride_b + wide(q_begin) * q_stride_s + h * q_stride_h
            first_row = (of_batch * q_tokens + q_begin) * heads + h
            all_q = matrix(of_head, q_stride_s, q_len, dim, BLOCK_M, D_MAIN, DESCRIPTORS)
            all_q_rest = all_q
            if D_REST > 0:
                all_q_rest = matrix(of_head, q_stride_s, q_len, dim, BLOCK_M, D_REST, DESCRIPTORS)
            of_upstream = grad_out + first_row * v_dim
            all_upstream = matrix(
                of_upstream, heads * v_dim, q_len, v_dim, BLOCK_M, D_V, DESCRIPTORS
            )
            vectors = (of_batch * heads + h) * room + q_begin
            IN_PLACE: tl.constexpr = DESCRIPTORS and cu_seqlens_q is None  # else not at 16 bytes
            all_shifts = vector(shifts + vectors, q_len, BLOCK_M, IN_PLACE)
            all_delta = vector(delta + vectors, q_len, BLOCK_M, IN_PLACE)
            for phase in tl.static_range(3 if HAS_LEFT else 2):
                if phase == 0:
                    low, high = begin, inner
                elif phase == 1:
                    low, high = inner, outer
                else:
                    low, high = outer, end
                for first in tl.range(
                    low, high, BLOCK_M, num_stages=None if phase == 1 else STAGES
                ):
                    queries = first + tl.arange(0, BLOCK_M)
                    begins, ends = sight(queries, past, q_len, k_len, left, right)
                    q_main = tile_of(
                        all_q, q_stride_s, first, q_len, dim, 0, BLOCK_M, D_MAIN, DESCRIPTORS
                    )
                    q_rest = q_main
                    if D_REST > 0:
                        q_rest = tile_of(
                            all_q_rest, q_stride_s, first, q_len, dim, D_MAIN, BLOCK_M, D_REST,
                            DESCRIPTORS,
                        )  # fmt: skip
                    upstream = tile_of(
                        all_upstream, heads * v_dim, first, q_len, v_dim, 0, BLOCK_M, D_V,
                        DESCRIPTORS,
                    )  # fmt: skip
                    shift = part_of(all_shifts, first, q_len, BLOCK_M, IN_PLACE)
                    of_row = part_of(all_delta, first, q_len, BLOCK_M, IN_PLACE)
                    p, _, of_dots = tile_gradients(
                        k_main, k_rest, values, q_main, q_rest, upstream, shift[None, :],
                        of_row[None, :], queries[None, :], keys[:, None], begins[None, :],
                        ends[None, :], past, scale, softcap, slope, of_bias, bias_stride_q,
                        bias_stride_k, phase != 1, HAS_LEFT, HAS_SOFTCAP, HAS_ALIBI, HAS_BIAS,
                        IS_MASK, D_REST,
                    )  # fmt: skip
                    of_values = tl.dot(
                        p.to(upstream.dtype), upstream, of_values, input_precision="ieee"
                    )
                    if phase != 1:  # a query that sees nothing may be NaN
                        q_main, _ = finite(q_main)
                    of_dots = of_dots.to(q_main.dtype)
                    main = tl.dot(of_dots, q_main, main, input_precision="ieee")
                    if D_REST > 0:
                        if phase != 1:
                            q_rest, _ = finite(q_rest)
                        rest = tl.dot(of_dots, q_rest, rest, input_precision="ieee")

        first_row = (of_batch * k_tokens + k_begin) * kv_heads + kv_head
        key_rows = (first_row + keys.to(tl.int64) * kv_heads)[:, None]
        here = (keys < k_len)[:, None]
        columns = tl.arange(0, D_MAIN)[None, :]
        to = grad_k + key_rows * dim + columns
        tl.store(to, (main * scale).to(grad_k.dtype.element_ty), mask=here & (columns < dim))
        if D_REST > 0:
            columns = D_MAIN + tl.arange(0, D_REST)[None, :]
            to = grad_k + key_rows * dim + columns
            tl.store(to, (rest * scale).to(grad_k.dtype.element_ty), mask=here & (columns < dim))
        columns = tl.arange(0, D_V)[None, :]
        to = grad_v + key_rows * v_dim + columns
        tl.store(to, of_values.to(grad_v.dtype.element_ty), mask=here & (columns < v_dim))
