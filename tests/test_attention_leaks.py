"""What a query does not see cannot change its output, nor any gradient through it.

The contract tests poison keys that nobody sees. Here some rows see the poisoned key and become NaN,
as they must; the others may not change by a single bit.
"""

import math

import pytest
import torch

import tilewise
from tilewise import dispatch
from tilewise.testing import Inputs

BAD = [math.nan, math.inf, -math.inf]
Q_LEN, K_LEN, KEY = 6, 9, 5


def _sees_key(q_len, k_len, key, causal=False, window=(-1, -1), bias=None):
    """Which of the queries see the key."""
    distance = torch.arange(q_len) + k_len - q_len - key
    sees = torch.ones(q_len, dtype=torch.bool)
    if causal:
        sees &= distance >= 0
    if window[0] >= 0:
        sees &= distance <= window[0]
    if window[1] >= 0:
        sees &= distance >= -window[1]
    if bias is not None:
        sees &= bias[:, key] if bias.dtype == torch.bool else bias[:, key] != -math.inf
    return sees


def _masks():
    row, column = torch.arange(Q_LEN)[:, None], torch.arange(K_LEN)
    mask = (row + column) % 3 != 0
    return [
        {"causal": True},
        {"window": (2, -1)},
        {"window": (-1, 0)},
        {"window": (1, 1)},
        {"bias": mask},
        {"bias": (0.1 * (row - column)).masked_fill(~mask, -math.inf)},
        {"bias": mask, "window": (3, 3), "softcap": 2.0},
    ]


def _run(q, k, v, rows, **options):
    """Output and lse of these rows, and the gradients of their sum."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = tilewise.flash_attention(*leaves, return_lse=True, **options)
    grads = torch.autograd.grad(out[:, rows].sum() + lse[:, rows].sum(), leaves)
    return out.detach(), lse.detach(), grads


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("mask", _masks(), ids=lambda mask: "-".join(mask))
def test_rows_that_do_not_see_a_bad_key_keep_every_bit(mask, name, bad):
    inputs = Inputs()
    q, k, v = (
        inputs.randn(2, Q_LEN, 2, 8),
        inputs.randn(2, K_LEN, 2, 8),
        inputs.randn(2, K_LEN, 2, 8),
    )
    sees = _sees_key(Q_LEN, K_LEN, KEY, **{n: x for n, x in mask.items() if n != "softcap"})
    assert sees.any()
    assert not sees.all()
    poisoned = {"k": k.clone(), "v": v.clone()}
    poisoned[name][:, KEY, :, 3] = bad

    out, lse, grads = _run(q, k, v, ~sees, **mask)
    bad_out, bad_lse, bad_grads = _run(q, **poisoned, rows=~sees, **mask)

    assert torch.equal(bad_out[:, ~sees], out[:, ~sees])
    assert torch.equal(bad_lse[:, ~sees], lse[:, ~sees])
    assert bad_out[:, sees].isnan().all()
    assert bad_lse[:, sees].isnan().all() if name == "k" else torch.equal(bad_lse, lse)
    q_grad, bad_q_grad = grads[0], bad_grads[0]
    assert torch.equal(bad_q_grad[:, ~sees], q_grad[:, ~sees])
    for grad in bad_grads[1:]:  # of the keys and values that only the other rows see
        hidden = ~_seen_by(sees, **{n: x for n, x in mask.items() if n != "softcap"})
        assert grad[:, hidden].isfinite().all()


def _seen_by(rows, **mask):
    """Which keys some of these rows see."""
    return torch.stack([_sees_key(Q_LEN, K_LEN, key, **mask)[rows].any() for key in range(K_LEN)])


@pytest.mark.parametrize("bad", BAD)
def test_a_sequence_does_not_see_its_neighbours(bad):
    inputs = Inputs()
    q, k, v = inputs.randn(9, 2, 8), inputs.randn(9, 2, 8), inputs.randn(9, 2, 8)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    clean = tilewise.flash_attention_varlen(q, k, v, cu_seqlens, cu_seqlens)
    for x in (q, k, v):
        x[4:] = bad
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = tilewise.flash_attention_varlen(*leaves, cu_seqlens, cu_seqlens)
    assert torch.equal(out[:4], clean[:4])
    assert out[4:].isnan().all()
    for grad in torch.autograd.grad(out[:4].sum(), leaves):
        assert grad[:4].isfinite().all()


def test_a_gradient_that_arrives_at_padding_goes_nowhere():
    inputs = Inputs()
    leaves = [inputs.randn(7, 2, 8).requires_grad_() for _ in range(3)]
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    out = tilewise.flash_attention_varlen(*leaves, cu_seqlens, cu_seqlens)
    upstream = torch.ones_like(out)
    upstream[5:] = math.nan
    for grad in torch.autograd.grad(out, leaves, upstream):
        assert grad[:5].isfinite().all()
        assert grad[5:].eq(0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_query_that_sees_nothing_may_be_anything(value):
    inputs = Inputs()
    q, k, v = inputs.randn(1, 6, 2, 8), inputs.randn(1, 2, 2, 8), inputs.randn(1, 2, 2, 8)
    q[:, :4] = value
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = tilewise.flash_attention(*leaves, causal=True)
    assert out[:, :4].eq(0).all()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.isfinite().all()


# --- what auto may choose -------------------------------------------------------------------------


def _chosen(**options):
    q, k = torch.zeros(1, options.pop("q_len", 4), 2, 8), torch.zeros(1, 6, 2, 8)
    op = dispatch.OPS["flash_attention"]
    reasons = op.reasons((q, k, k), options, auto=True)
    return next(name for name in op.backends if name in ("torch", "naive") and not reasons[name])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"q_len": 1, "causal": True},
        {"window": (5, 3)},
        {"alibi_slopes": torch.ones(2)},
        {"scale": 0.5},
    ],
    ids=str,
)
def test_auto_takes_pytorchs_attention_where_every_query_sees_every_key(options):
    assert _chosen(**options) == "torch"


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": (4, -1)},
        {"window": (-1, 2)},
        {"q_len": 1, "window": (4, -1)},
        {"bias": torch.ones(4, 6, dtype=torch.bool)},
        {"bias": torch.zeros(4, 6)},
        {"softcap": 1.0},
        {"sinks": torch.ones(2)},
        {"return_lse": True},
        {"batch_invariant": True},
    ],
    ids=str,
)
def test_auto_passes_over_pytorchs_attention_where_it_could_leak_or_cannot_run(options):
    assert _chosen(**options) == "naive"


def test_pytorchs_attention_leaks_what_it_masks():
    """The reason for the two tests above; if this fails, they can go."""
    q, k, v = torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4)
    v[:, 1] = math.nan
    out = tilewise.flash_attention(q, k, v, causal=True, backend="torch")
    assert out[:, 0].isnan().any()
    out = tilewise.flash_attention(q, k, v, causal=True)
    assert out[:, 0].isfinite().all()
