"""Bad arguments are named, with what was wanted and what came."""

import math
import re

import pytest
import torch

import tilewise
from tilewise import BackendError

_INT32 = {"dtype": torch.int32}


def _dense(**change):
    arguments = {
        "q": torch.zeros(2, 3, 4, 8),
        "k": torch.zeros(2, 5, 2, 8),
        "v": torch.zeros(2, 5, 2, 6),
    }
    return tilewise.flash_attention(**arguments | change)


def _ragged(**change):
    arguments = {
        "q": torch.zeros(6, 4, 8),
        "k": torch.zeros(9, 2, 8),
        "v": torch.zeros(9, 2, 6),
        "cu_seqlens_q": torch.tensor([0, 2, 5], **_INT32),
        "cu_seqlens_k": torch.tensor([0, 5, 9], **_INT32),
    }
    return tilewise.flash_attention_varlen(**arguments | change)


def _merge(**change):
    out, lse = torch.zeros(3, 2, 4), torch.zeros(3, 2)
    arguments = {"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse}
    return tilewise.merge_states(**arguments | change)


def _raises(call, change, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": torch.zeros(2, 3, 4, 8, dtype=torch.int32)},
            "q: dtype must be float32 or float16 or bfloat16 or float64, got int32",
        ),
        (
            {"q": torch.zeros(3, 4, 8)},
            "q: shape must be (batch, seqlen_q, heads, head_dim), got (3, 4, 8)",
        ),
        (
            {"k": torch.zeros(5, 2, 8)},
            "k: shape must be (batch, seqlen_k, kv_heads, head_dim), got (5, 2, 8)",
        ),
        (
            {"v": torch.zeros(5, 2, 8)},
            "v: shape must be (batch, seqlen_k, kv_heads, v_head_dim), got (5, 2, 8)",
        ),
        ({"k": torch.zeros(2, 5, 2, 8).half()}, "k: dtype must be q's, float32, got float16"),
        (
            {"v": torch.zeros(2, 5, 2, 6, device="meta")},
            "v: must be on the device of q (cpu), got meta",
        ),
        ({"k": torch.zeros(1, 5, 2, 8)}, "k: batch must be q's, 2, got 1"),
        ({"k": torch.zeros(2, 5, 2, 7)}, "k: head_dim must be q's, 8, got 7"),
        (
            {"k": torch.zeros(2, 5, 3, 8)},
            "q: heads must be a multiple of k's kv_heads, 3, got 4; "
            "k is (batch, seqlen_k, kv_heads, head_dim)",
        ),
        (
            {"k": torch.zeros(2, 5, 0, 8)},
            "q: heads must be a multiple of k's kv_heads, 0, got 4; "
            "k is (batch, seqlen_k, kv_heads, head_dim)",
        ),
        ({"v": torch.zeros(1, 5, 2, 6)}, "v: batch must be q's, 2, got 1"),
        ({"v": torch.zeros(2, 4, 2, 6)}, "v: seqlen_k must be k's, 5, got 4"),
        ({"v": torch.zeros(2, 5, 1, 6)}, "v: kv_heads must be k's, 2, got 1"),
        ({"q": torch.zeros(2, 3, 4, 640)}, "q: head_dim must be <= 576, got 640"),
        ({"v": torch.zeros(2, 5, 2, 577)}, "v: head_dim must be <= 576, got 577"),
        ({"q": torch.zeros(2, 3, 4, 0)}, "q: head_dim must be >= 1, got 0"),
        (
            {"k": torch.zeros(2, 5, 8, 2).mT},
            "k: the last dimension must have stride 1, got 2",
        ),
        ({"window": (-2, 0)}, "window: must be >= -1 on both sides, got (-2, 0)"),
        ({"window": (1, 2, 3)}, "window: must be (left, right), got (1, 2, 3)"),
        ({"softcap": -1.0}, "softcap: must be >= 0 and finite, got -1.0"),
        ({"softcap": math.nan}, "softcap: must be >= 0 and finite, got nan"),
        ({"softcap": math.inf}, "softcap: must be >= 0 and finite, got inf"),
        ({"scale": math.nan}, "scale: must be finite, got nan"),
        ({"scale": -math.inf}, "scale: must be finite, got -inf"),
        (
            {"alibi_slopes": torch.zeros(3)},
            "alibi_slopes: shape must be (4,) or (2, 4), (heads,) or (batch, heads), got (3,)",
        ),
        (
            {"alibi_slopes": torch.zeros(4, dtype=torch.float16)},
            "alibi_slopes: dtype must be float32 or float64, got float16",
        ),
        (
            {"alibi_slopes": torch.zeros(4, requires_grad=True)},
            "alibi_slopes: must not require a gradient, they are constants",
        ),
        ({"sinks": torch.zeros(2)}, "sinks: shape must be (4,) (q's heads), got (2,)"),
        (
            {"sinks": torch.zeros(4, dtype=torch.int64)},
            "sinks: dtype must be float32 or float16 or bfloat16 or float64, got int64",
        ),
        (
            {"bias": torch.zeros(3, 4)},
            "bias: shape must broadcast to (2, 4, 3, 5), (batch, heads, seqlen_q, seqlen_k), "
            "got (3, 4)",
        ),
        (
            {"bias": torch.zeros(1, 1, 1, 3, 5)},
            "bias: shape must broadcast to (2, 4, 3, 5), (batch, heads, seqlen_q, seqlen_k), "
            "got (1, 1, 1, 3, 5)",
        ),
        (
            {"bias": torch.zeros(3, 5, dtype=torch.int8)},
            "bias: dtype must be bool or float32 or float16 or bfloat16 or float64, got int8",
        ),
    ],
)
def test_dense_values_and_shapes(change, message):
    _raises(_dense, change, ValueError, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": [1.0]}, "q: must be a torch.Tensor, got list"),
        ({"k": None}, "k: must be a torch.Tensor, got NoneType"),
        ({"causal": 1}, "causal: must be a bool, got int"),
        ({"return_lse": "yes"}, "return_lse: must be a bool, got str"),
        ({"batch_invariant": None}, "batch_invariant: must be a bool, got NoneType"),
        ({"scale": "0.5"}, "scale: must be a number or None, got str"),
        ({"softcap": None}, "softcap: must be a number, got NoneType"),
        ({"window": 4}, "window: must be (left, right), got int"),
        ({"window": (4, 1.0)}, "window: must be an int, got float"),
        ({"alibi_slopes": 0.5}, "alibi_slopes: must be a torch.Tensor, got float"),
        ({"sinks": 0.5}, "sinks: must be a torch.Tensor, got float"),
        ({"bias": 0.5}, "bias: must be a torch.Tensor, got float"),
    ],
)
def test_dense_types(change, message):
    _raises(_dense, change, TypeError, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": torch.zeros(1, 6, 4, 8)},
            "q: shape must be (tokens_q, heads, head_dim), got (1, 6, 4, 8)",
        ),
        ({"v": torch.zeros(8, 2, 6)}, "v: tokens_k must be k's, 9, got 8"),
        (
            {"cu_seqlens_q": torch.tensor([0, 2, 5])},
            "cu_seqlens_q: dtype must be int32, got int64",
        ),
        (
            {"cu_seqlens_k": torch.zeros(0, **_INT32)},
            "cu_seqlens_k: shape must be (batch + 1,), got (0,)",
        ),
        (
            {"cu_seqlens_k": torch.zeros(1, 3, **_INT32)},
            "cu_seqlens_k: shape must be (batch + 1,), got (1, 3)",
        ),
        (
            {"cu_seqlens_k": torch.tensor([0, 9], **_INT32)},
            "cu_seqlens_k: must be as long as cu_seqlens_q, 3, got 2",
        ),
        ({"max_seqlen_k": -1}, "max_seqlen_k: must be >= 0, got -1"),
        (
            {"alibi_slopes": torch.zeros(3, 4)},
            "alibi_slopes: shape must be (4,) or (2, 4), (heads,) or (batch, heads), got (3, 4)",
        ),
        (
            {"bias": torch.zeros(4, 6, 4), "max_seqlen_k": 5},
            "bias: shape must broadcast to (4, 6, 5), (heads, tokens_q, max_seqlen_k), "
            "got (4, 6, 4)",
        ),
        (
            {"bias": torch.zeros(4, 5, 5)},
            "bias: shape must broadcast to (4, 6, 5), (heads, tokens_q, max_seqlen_k), "
            "got (4, 5, 5)",
        ),
    ],
)
def test_ragged_values_and_shapes(change, message):
    _raises(_ragged, change, ValueError, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": [0, 2, 5]}, "cu_seqlens_q: must be a torch.Tensor, got list"),
        ({"max_seqlen_q": 3.0}, "max_seqlen_q: must be an int, got float"),
        ({"max_seqlen_q": True}, "max_seqlen_q: must be an int, got bool"),
    ],
)
def test_ragged_types(change, message):
    _raises(_ragged, change, TypeError, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cu_seqlens_q": torch.tensor([1, 2, 5], **_INT32)},
            "cu_seqlens_q: must start at 0, got 1",
        ),
        (
            {"cu_seqlens_k": torch.tensor([0, 5, 4], **_INT32)},
            "cu_seqlens_k: must not decrease, batch row 1 is 5 to 4",
        ),
        (
            {"cu_seqlens_k": torch.tensor([0, 5, 10], **_INT32)},
            "cu_seqlens_k: must stay within k's 9 tokens, batch row 1 is 5 to 10",
        ),
        (
            {"cu_seqlens_q": torch.tensor([0, 7, 7], **_INT32)},
            "cu_seqlens_q: must stay within q's 6 tokens, batch row 0 is 0 to 7",
        ),
        (
            {"max_seqlen_q": 2},
            "max_seqlen_q: must be >= 3, the length of batch row 1, got 2",
        ),
        (
            {"max_seqlen_k": 4},
            "max_seqlen_k: must be >= 5, the length of batch row 0, got 4",
        ),
        (
            {"bias": torch.zeros(4, 6, 4)},
            "bias: last dimension: must be >= 5, the length of batch row 0, got 4",
        ),
    ],
)
def test_validate_checks_the_lengths(change, message):
    _ragged(**change)  # memory-safe without it
    _raises(_ragged, change | {"validate": True}, ValueError, message)


def test_validate_accepts_padding_and_upper_bounds():
    _ragged(max_seqlen_q=6, max_seqlen_k=9, validate=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out_a": 1.0}, TypeError, "out_a: must be a torch.Tensor, got float"),
        (
            {"out_a": torch.zeros(4)},
            ValueError,
            "out_a: shape must be (..., heads, head_dim), got (4,)",
        ),
        (
            {"out_b": torch.zeros(3, 2, 5)},
            ValueError,
            "out_b: shape must be (3, 2, 4) (out_a's shape), got (3, 2, 5)",
        ),
        (
            {"out_b": torch.zeros(3, 2, 4).half()},
            ValueError,
            "out_b: dtype must be out_a's, float32, got float16",
        ),
        (
            {"lse_a": torch.zeros(2, 3)},
            ValueError,
            "lse_a: shape must be (3, 2) (out_a's without head_dim), got (2, 3)",
        ),
        (
            {"lse_b": torch.zeros(3, 2).double()},
            ValueError,
            "lse_b: dtype must be float32, got float64",
        ),
    ],
)
def test_merge_states(change, error, message):
    _raises(_merge, change, error, message)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"softcap": 1.0}, "has no softcap"),
        ({"sinks": torch.zeros(4)}, "has no sinks"),
        ({"return_lse": True}, "does not return the log-sum-exp"),
        ({"batch_invariant": True}, "does not promise batch invariance"),
        (
            {"bias": torch.zeros(3, 5).half()},
            "takes no torch.float16 mask for a torch.float32 query",
        ),
    ],
)
def test_pytorchs_attention_says_what_it_cannot_do(change, reason):
    with pytest.raises(BackendError, match=f"torch: scaled_dot_product_attention {reason}"):
        _dense(**change, backend="torch")
