"""The naive attention against its formula, PyTorch's attention, and itself in other forms."""

import math

import pytest
import torch
import torch.nn.functional as F

import tilewise
from tilewise.attention import naive
from tilewise.testing import Inputs


def _qkv(inputs, batch=2, q_len=5, k_len=9, heads=4, kv_heads=2, dim=16, v_dim=8):
    return (
        inputs.randn(batch, q_len, heads, dim),
        inputs.randn(batch, k_len, kv_heads, dim),
        inputs.randn(batch, k_len, kv_heads, v_dim),
    )


def _double():
    return Inputs(torch.float64)


# --- against PyTorch ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q_len", "k_len", "causal", "window"),
    [
        (5, 9, False, (-1, -1)),
        (5, 9, True, (-1, -1)),
        (9, 5, True, (-1, -1)),
        (5, 9, False, (2, 1)),
        (5, 9, True, (3, 3)),
        (9, 5, False, (0, 0)),
        (1, 9, True, (-1, -1)),
    ],
)
def test_is_pytorchs_attention_with_an_explicit_mask(q_len, k_len, causal, window):
    q, k, v = _qkv(_double(), q_len=q_len, k_len=k_len)
    row, column = torch.arange(q_len)[:, None] + k_len - q_len, torch.arange(k_len)
    left, right = (math.inf if side < 0 else side for side in window)
    mask = (column >= row - left) & (column <= row + (0 if causal else right))
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), mask, enable_gqa=True
    ).transpose(1, 2)
    out = tilewise.flash_attention(q, k, v, causal=causal, window=window, backend="naive")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def test_scores_are_scaled_capped_sloped_biased_and_masked_in_this_order():
    inputs = _double()
    q, k, v = _qkv(inputs, batch=1, heads=2, kv_heads=2)
    slopes, sinks, bias = inputs.rand(2), inputs.randn(2), inputs.randn(5, 9)
    out, lse = tilewise.flash_attention(
        q,
        k,
        v,
        causal=True,
        scale=0.7,
        softcap=1.5,
        alibi_slopes=slopes,
        sinks=sinks,
        bias=bias,
        return_lse=True,
        backend="naive",
    )
    for head in range(2):
        for i in range(5):
            seen = range(i + 9 - 5 + 1)
            scores = [
                1.5 * math.tanh(0.7 * float(q[0, i, head] @ k[0, j, head]) / 1.5)
                - float(slopes[head]) * abs(i + 9 - 5 - j)
                + float(bias[i, j])
                for j in seen
            ]
            weights = torch.tensor([*scores, float(sinks[head])], dtype=torch.float64).exp()
            expected = (weights[:-1, None] * v[0, : len(seen), head]).sum(0) / weights.sum()
            torch.testing.assert_close(out[0, i, head], expected, rtol=0, atol=1e-13)
            torch.testing.assert_close(lse[0, i, head], weights.sum().log(), rtol=0, atol=1e-13)


def test_lse_is_the_logsumexp_of_the_scores():
    q, k, v = _qkv(_double(), heads=2, kv_heads=2)
    _, lse = tilewise.flash_attention(q, k, v, return_lse=True)
    scores = torch.einsum("bqhd,bkhd->bqhk", q, k) / 4
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0, atol=1e-14)


def test_lse_is_float32_for_half_precision():
    q, k, v = _qkv(Inputs(torch.bfloat16))
    out, lse = tilewise.flash_attention(q, k, v, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_a_row_that_sees_nothing_is_zero():
    q, k, v = _qkv(Inputs(), q_len=6, k_len=2)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    out, lse = tilewise.flash_attention(q, k, v, causal=True, return_lse=True)
    assert out[:, :4].eq(0).all()
    assert lse[:, :4].eq(-math.inf).all()
    assert lse[:, 4:].isfinite().all()
    out, lse = tilewise.flash_attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    assert out[:, :4].eq(0).all()
    assert lse[:, :4].eq(sinks).all()


# --- ragged is dense, sequence by sequence --------------------------------------------------------


def _ragged(inputs, padding=2):
    q, k, v = (x[0] for x in _qkv(inputs, batch=1, q_len=11 + padding, k_len=14 + padding))
    cu_q = torch.tensor([0, 3, 3, 9, 11], dtype=torch.int32)
    cu_k = torch.tensor([0, 8, 10, 14, 14], dtype=torch.int32)
    return q, k, v, cu_q, cu_k


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "window": (2, -1)},
        {"softcap": 2.0, "scale": 0.5, "alibi_slopes": "heads"},
        {"alibi_slopes": "batch", "sinks": True, "causal": True},
        {"bias": "float", "sinks": True},
        {"bias": "bool"},
        {"bias": "float", "max_seqlen_k": 8, "max_seqlen_q": 6},
    ],
    ids=str,
)
def test_ragged_equals_a_loop_over_dense_calls(options):
    inputs = _double()
    q, k, v, cu_q, cu_k = _ragged(inputs)
    options = dict(options)
    slopes, bias = options.pop("alibi_slopes", None), options.pop("bias", None)
    if options.pop("sinks", False):
        options["sinks"] = inputs.randn(4)
    lengths = {name: options.pop(name) for name in list(options) if name.startswith("max_seqlen")}
    slopes = {None: None, "heads": inputs.rand(4), "batch": inputs.rand(4, 4)}[slopes]
    floats = inputs.randn(4, 13, 8)
    bias = {None: None, "float": floats, "bool": floats > -0.5}[bias]

    out, lse = tilewise.flash_attention_varlen(
        q, k, v, cu_q, cu_k, alibi_slopes=slopes, bias=bias, return_lse=True, **lengths, **options
    )
    for i in range(4):
        own_q, own_k = (slice(int(cu[i]), int(cu[i + 1])) for cu in (cu_q, cu_k))
        k_len = own_k.stop - own_k.start
        expected, expected_lse = tilewise.flash_attention(
            q[None, own_q],
            k[None, own_k],
            v[None, own_k],
            alibi_slopes=slopes[i] if slopes is not None and slopes.dim() == 2 else slopes,
            bias=bias[:, own_q, :k_len] if bias is not None else None,
            return_lse=True,
            **options,
        )
        torch.testing.assert_close(out[own_q], expected[0], rtol=0, atol=1e-14)
        torch.testing.assert_close(lse[own_q], expected_lse[0], rtol=0, atol=1e-14)
    assert out[11:].eq(0).all()
    assert lse[11:].eq(-math.inf).all()


# --- partial results ------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [0, 1, 4, 9])
def test_two_halves_of_the_keys_merge_into_the_whole(split):
    inputs = _double()
    q, k, v = _qkv(inputs)
    bias, sinks = inputs.randn(5, 9), inputs.randn(4)
    parts = [
        tilewise.flash_attention(
            q,
            k[:, part],
            v[:, part],
            bias=bias[:, part],
            sinks=own_sinks,
            return_lse=True,
        )
        for part, own_sinks in ((slice(0, split), sinks), (slice(split, 9), None))
    ]
    out, lse = tilewise.merge_states(*parts[0], *parts[1])
    expected, expected_lse = tilewise.flash_attention(
        q, k, v, bias=bias, sinks=sinks, return_lse=True
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-14)


def test_merging_nothing_with_nothing_is_nothing_and_has_a_gradient():
    out = torch.full((2, 3, 4), math.nan, requires_grad=True)
    lse = torch.full((2, 3), -math.inf, requires_grad=True)
    merged, merged_lse = tilewise.merge_states(out, lse, out, lse)
    assert merged.eq(0).all()
    assert merged_lse.eq(-math.inf).all()
    grads = torch.autograd.grad((merged.sum(), merged_lse.sum()), (out, lse))
    assert all(grad.eq(0).all() for grad in grads)


# --- gradients ------------------------------------------------------------------------------------


def test_gradients_are_right_with_every_option_on():
    inputs = _double()
    q, k, v = _qkv(inputs, batch=1, q_len=3, k_len=4, heads=2, kv_heads=1, dim=2, v_dim=3)
    slopes, sinks, bias = inputs.rand(1, 2), inputs.randn(2), inputs.randn(1, 2, 3, 4)
    leaves = [x.requires_grad_() for x in (q, k, v, sinks, bias)]

    def call(q, k, v, sinks, bias):
        return naive.flash_attention(
            q,
            k,
            v,
            causal=True,
            scale=0.8,
            window=(2, 1),
            softcap=2.0,
            alibi_slopes=slopes,
            sinks=sinks,
            bias=bias,
            return_lse=True,
        )

    assert torch.autograd.gradcheck(call, leaves)


def test_ragged_gradients_are_right_with_every_option_on():
    inputs = _double()
    cu_q = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    cu_k = torch.tensor([0, 1, 3, 5], dtype=torch.int32)
    q, k, v = (x[0] for x in _qkv(inputs, 1, 4, 6, heads=2, kv_heads=1, dim=2, v_dim=3))
    slopes, sinks, bias = inputs.rand(3, 2), inputs.randn(2), inputs.randn(2, 4, 2)
    leaves = [x.requires_grad_() for x in (q, k, v, sinks, bias)]

    def call(q, k, v, sinks, bias):
        out, lse = naive.flash_attention_varlen(
            q,
            k,
            v,
            cu_q,
            cu_k,
            causal=True,
            softcap=2.0,
            alibi_slopes=slopes,
            sinks=sinks,
            bias=bias,
            return_lse=True,
        )
        return out, lse[:3]  # padding has -inf

    assert torch.autograd.gradcheck(call, leaves)


# --- batch invariance -----------------------------------------------------------------------------


def test_batch_invariant_rows_have_the_same_bits_in_any_batch():
    inputs = Inputs()
    q, k, v = _qkv(inputs, batch=5, q_len=17, k_len=33, dim=64)
    bias = inputs.randn(5, 1, 17, 33)
    options = {"causal": True, "batch_invariant": True, "return_lse": True}
    out, lse = tilewise.flash_attention(q, k, v, bias=bias, **options)
    for i in range(5):
        row = slice(i, i + 1)
        alone = tilewise.flash_attention(q[row], k[row], v[row], bias=bias[row], **options)
        assert torch.equal(out[row], alone[0])
        assert torch.equal(lse[row], alone[1])


def test_batch_invariant_sequences_have_the_same_bits_in_any_batch_ragged_or_dense():
    q, k, v, cu_q, cu_k = _ragged(Inputs())
    options = {"causal": True, "batch_invariant": True, "return_lse": True}
    out, lse = tilewise.flash_attention_varlen(q, k, v, cu_q, cu_k, **options)
    for i in range(4):
        own_q, own_k = (slice(int(cu[i]), int(cu[i + 1])) for cu in (cu_q, cu_k))
        alone = tilewise.flash_attention(q[None, own_q], k[None, own_k], v[None, own_k], **options)
        assert torch.equal(out[own_q], alone[0][0])
        assert torch.equal(lse[own_q], alone[1][0])
