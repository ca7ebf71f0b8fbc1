"""Sampling: each filter against plain Python, the distribution, and what a draw depends on."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tilewise
from tilewise import dispatch
from tilewise.fused.philox import gumbel_noise
from tilewise.testing import Inputs

INFINITY = math.inf


# --- an independent definition, in plain Python ---------------------------------------------------


def _reference(logits, noise, *, temperature, top_k, top_p, min_p, penalty, previous):
    """The token of one row, or None where rounding decides whether a token stays."""
    scores = [-INFINITY if math.isnan(x) else x for x in logits]
    for token in {t for t in previous if 0 <= t < len(scores)}:
        seen = scores[token]
        scores[token] = seen * penalty if seen < 0 else seen / penalty
    if temperature > 0:
        scores = [x / temperature for x in scores]
    top = max(scores)
    if top == -INFINITY:
        return 0
    if top == INFINITY:
        scores = [0.0 if x == INFINITY else -INFINITY for x in scores]
        top = 0.0
    kept = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if top_k > 0:
        kept = kept[:top_k]
    odds = {i: math.exp(scores[i] - top) for i in kept}
    if top_p < 1:
        held, nucleus = 0.0, []
        for i in kept:
            if nucleus and abs(held / sum(odds.values()) - top_p) < 1e-9:
                return None
            if nucleus and held / sum(odds.values()) >= top_p:
                break
            nucleus.append(i)
            held += odds[i]
        kept = nucleus
    if any(0 < abs(odds[i] - min_p) < 1e-9 * min_p for i in kept):
        return None
    kept = [i for i in kept if odds[i] >= min_p]
    if temperature == 0:
        return kept[0]
    drawn = {i: scores[i] - top + noise[i] for i in kept}
    return min(kept, key=lambda i: (-drawn[i], i))


LOGITS = st.one_of(
    st.integers(-3, 3).map(float),  # ties
    st.floats(-20, 20),
    st.sampled_from([math.nan, -INFINITY, INFINITY, -INFINITY]),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    logits=st.lists(LOGITS, min_size=1, max_size=9),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    top_k=st.sampled_from([0, 0, 1, 3, 20]),
    top_p=st.sampled_from([1.0, 1.0, 0.2, 0.75, 0.99]),
    min_p=st.sampled_from([0.0, 0.0, 0.1, 1.0]),
    penalty=st.sampled_from([1.0, 1.0, 1.7, 0.6]),
    previous=st.lists(st.integers(-1, 10), max_size=4),
    seed=st.integers(-(2**63), 2**63 - 1),
    as_tensors=st.booleans(),
)
def test_is_the_plain_python_definition(
    logits, temperature, top_k, top_p, min_p, penalty, previous, seed, as_tensors
):
    rows = 16  # draws, so that one token too many or too few in the filters shows
    sample_ids, positions = torch.full((rows,), 3), torch.arange(rows)
    noise = gumbel_noise(seed, sample_ids, positions, len(logits)).tolist()
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    expected = [
        _reference(logits, draw, penalty=penalty, previous=previous, **options) for draw in noise
    ]
    assume(None not in expected)
    options["repetition_penalty"] = penalty
    if as_tensors:
        options = {
            name: torch.tensor([value], dtype=torch.int64 if name == "top_k" else torch.float64)
            for name, value in options.items()
        }
        options = {name: value.expand(rows) for name, value in options.items()}
    tokens = tilewise.sample(
        torch.tensor(logits, dtype=torch.float64).expand(rows, -1),
        previous_tokens=torch.tensor(previous, dtype=torch.int64).expand(rows, -1),
        seed=seed,
        sample_ids=sample_ids,
        positions=positions,
        **options,
    )
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == expected


# --- the distribution -----------------------------------------------------------------------------


def _assert_drawn_from(tokens, probabilities):
    """Pearson's chi-square at 1 - 1e-4; the draws are fixed, so it passes always or never."""
    quantile = {3: 21.108, 7: 29.878}[int((probabilities > 0).sum()) - 1]
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * len(tokens)
    assert expected[probabilities > 0].min() > 5
    error = (counts - expected).square() / expected
    assert error[probabilities > 0].sum() < quantile


LOGITS_OF_8 = [2.0, -1.0, 0.5, 0.0, 1.0, -2.0, 1.5, 0.25]


@pytest.mark.parametrize("stream", ["positions", "sample_ids", "rows"])
def test_draws_from_the_softmax(stream):
    draws = 10_000
    logits = torch.tensor(LOGITS_OF_8).expand(draws, 8)
    other = {} if stream == "rows" else {stream: torch.arange(draws)}
    if stream == "positions":
        other["sample_ids"] = torch.full((draws,), 4)
    tokens = tilewise.sample(logits, temperature=0.8, seed=1, **other)
    _assert_drawn_from(tokens, (logits[0].double() / 0.8).softmax(-1))


def test_draws_from_the_filtered_softmax():
    draws = 10_000
    logits = torch.tensor(LOGITS_OF_8).expand(draws, 8)
    tokens = tilewise.sample(logits, top_k=4, seed=2)
    kept = torch.full((8,), -INFINITY, dtype=torch.float64)
    for token in (0, 6, 4, 2):
        kept[token] = LOGITS_OF_8[token]
    _assert_drawn_from(tokens, kept.softmax(-1))


def test_neighbouring_draws_are_independent():
    """Pairs of consecutive positions fill the square of the distribution."""
    logits = torch.zeros(10_001, 2)
    tokens = tilewise.sample(
        logits, sample_ids=torch.zeros(10_001).long(), seed=3, positions=torch.arange(10_001)
    )
    _assert_drawn_from(2 * tokens[:-1:2] + tokens[1::2], torch.full((4,), 0.25).double())


# --- what a draw depends on -----------------------------------------------------------------------


def _mixed_batch():
    inputs = Inputs()
    return {
        "logits": inputs.randn(6, 301, scale=3),
        "temperature": inputs.tensor([1, 0, 0.5, 2, 1, 1], torch.float32),
        "top_k": inputs.tensor([0, 5, 50, 0, 1, 9], torch.int64),
        "top_p": inputs.tensor([1, 0.5, 0.9, 0.95, 1, 0.3], torch.float32),
        "min_p": inputs.tensor([0, 0, 0, 0.05, 0, 0.1], torch.float32),
        "repetition_penalty": inputs.tensor([1, 1.2, 1, 2, 1, 0.5], torch.float32),
        "previous_tokens": inputs.randint(-1, 301, 6, 20),
        "sample_ids": inputs.tensor([9, 2, 9, 0, 4, 4], torch.int64),
        "positions": inputs.tensor([0, 1, 1, 7, 2, 2], torch.int64),
    }


def test_a_row_does_not_depend_on_its_batch():
    batch = _mixed_batch()
    together = tilewise.sample(**batch, seed=6)
    for order in ([3], [5, 0], [4, 3, 2, 1, 0]):
        part = {name: value[order] for name, value in batch.items()}
        assert torch.equal(tilewise.sample(**part, seed=6), together[order])


def test_numbers_act_as_tensors_do():
    logits = Inputs().randn(4, 301, scale=3)
    numbers = {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.01}
    tensors = {
        name: torch.full((4,), value, dtype=torch.int64 if name == "top_k" else torch.float32)
        for name, value in numbers.items()
    }
    for seed in range(20):
        expected = tilewise.sample(logits, seed=seed, **numbers)
        assert torch.equal(tilewise.sample(logits, seed=seed, **tensors), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_drawn_as_float32(dtype):
    logits = Inputs(dtype).randn(50, 64)
    expected = tilewise.sample(logits.float(), top_p=0.9, seed=4)
    assert torch.equal(tilewise.sample(logits, top_p=0.9, seed=4), expected)


def test_seed_sample_and_position_each_give_other_draws():
    logits = torch.zeros(1, 10_000)

    def draw(seed, sample_id, position):
        ids, positions = torch.tensor([sample_id]), torch.tensor([position])
        return int(tilewise.sample(logits, seed=seed, sample_ids=ids, positions=positions))

    calls = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0), (0, 2**32, 0)]
    assert len({draw(*call) for call in calls}) == len(calls)
    assert draw(0, 0, 0) == draw(0, 0, 0) == int(tilewise.sample(logits))


def test_the_batch_index_is_the_default_sample_id():
    logits = torch.zeros(8, 1000)
    expected = tilewise.sample(logits, sample_ids=torch.arange(8), positions=torch.zeros(8).long())
    assert torch.equal(tilewise.sample(logits), expected)


# --- single rules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_greedy_takes_the_first_of_equals(backend):
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 5.0, 5.0], [1.0, 2.0, -INFINITY]])
    tokens = tilewise.sample(logits, temperature=0, backend=backend)
    assert tokens.tolist() == [1, 0, 1]


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, 1), (0.125, 1), (0.5, 4), (0.51, 5), (0.9, 8)])
def test_top_p_takes_as_few_as_reach_it(top_p, kept):
    logits = torch.zeros(300, 8)  # of 1/8 each
    assert sorted(set(tilewise.sample(logits, top_p=top_p).tolist())) == list(range(kept))


def test_top_p_is_of_what_top_k_left():
    logits = torch.zeros(300, 8)  # after top_k=4 of 1/4 each
    assert sorted(set(tilewise.sample(logits, top_k=4, top_p=0.5).tolist())) == [0, 1]


def test_top_k_takes_the_first_of_equals():
    """Enough of them that an unstable sort would mix them up."""
    logits = torch.zeros(100, 3000)
    assert sorted(set(tilewise.sample(logits, top_k=5).tolist())) == [0, 1, 2, 3, 4]


def test_a_nan_is_never_chosen():
    logits = torch.tensor([[math.nan, -30.0, math.nan]]).expand(200, 3)
    assert (tilewise.sample(logits) == 1).all()
    assert dispatch.OPS["sample"].select("auto", (logits,), {"temperature": 0}).name != "torch"
    assert (tilewise.sample(logits, temperature=0) == 1).all()


def test_infinite_logits_share_the_draw():
    logits = torch.tensor([[INFINITY, 5.0, INFINITY, -INFINITY]]).expand(2000, 4)
    counts = tilewise.sample(logits, seed=1).bincount(minlength=4)
    assert counts[1] == counts[3] == 0
    assert 900 < counts[0] < 1100


def test_a_penalty_counts_a_token_once():
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.5]])
    options = {"temperature": 0, "repetition_penalty": 1.9}
    for previous, expected in (([0], 1), ([0, 0, 1], 0), ([0, -1, 9], 1), ([-1], 0)):
        tokens = tilewise.sample(logits, previous_tokens=torch.tensor([previous]), **options)
        assert tokens.tolist() == [expected]
    # A negative logit is multiplied: dividing would reward the repetition.
    tokens = tilewise.sample(logits[:, 2:], previous_tokens=torch.tensor([[0]]), **options)
    assert tokens.tolist() == [1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "PyTorch has no counter-based sampling: only temperature=0"),
        (
            {
                "temperature": 0,
                "repetition_penalty": 1.1,
                "previous_tokens": torch.ones(2, 1).long(),
            },
            "PyTorch has no repetition penalty",
        ),
    ],
)
def test_torch_says_what_it_cannot_draw(options, reason):
    with pytest.raises(dispatch.BackendError, match=reason):
        tilewise.sample(torch.ones(2, 8), backend="torch", **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": [0.0]}, "logits: must be a torch.Tensor, got list"),
        (
            {"logits": torch.ones(2, 8).long()},
            "logits: dtype must be float32 or float16 or bfloat16 or float64, got int64",
        ),
        ({"logits": torch.ones(8)}, "logits: shape must be (batch, vocabulary), got (8,)"),
        ({"logits": torch.ones(2, 0)}, "logits: vocabulary must be >= 1, got shape (2, 0)"),
        ({"temperature": -1.0}, "temperature: must be >= 0, got -1.0"),
        ({"temperature": math.nan}, "temperature: must be >= 0, got nan"),
        ({"top_k": -1}, "top_k: must be >= 0, got -1"),
        ({"top_k": 2**63}, f"top_k: must be a 64-bit integer, got {2**63}"),
        ({"top_k": 2.5}, "top_k: must be an int, got float"),
        ({"top_k": True}, "top_k: must be an int, got bool"),
        ({"temperature": "hot"}, "temperature: must be a number, got str"),
        ({"top_p": None}, "top_p: must be a number, got NoneType"),
        ({"min_p": [0.1]}, "min_p: must be a number, got list"),
        ({"seed": 1.0}, "seed: must be an int, got float"),
        ({"seed": torch.tensor(1)}, "seed: must be an int, got Tensor"),
        ({"top_p": 0.0}, "top_p: must be > 0 and <= 1, got 0.0"),
        ({"top_p": 1.5}, "top_p: must be > 0 and <= 1, got 1.5"),
        ({"min_p": 2}, "min_p: must be >= 0 and <= 1, got 2"),
        (
            {"repetition_penalty": 0.0, "previous_tokens": torch.ones(2, 1).long()},
            "repetition_penalty: must be > 0, got 0.0",
        ),
        (
            {"repetition_penalty": 1.5},
            "previous_tokens: a repetition_penalty needs them, got None",
        ),
        (
            {"temperature": torch.ones(3)},
            "temperature: shape must be (2,) (one per row of logits), got (3,)",
        ),
        (
            {"top_k": torch.ones(2)},
            "top_k: dtype must be int64 or int32, got float32",
        ),
        (
            {"top_p": torch.ones(2).half()},
            "top_p: dtype must be float32 or float64, got float16",
        ),
        (
            {"min_p": torch.ones(2, device="meta")},
            "min_p: must be on the device of logits (cpu), got meta",
        ),
        (
            {"previous_tokens": torch.ones(2, 1)},
            "previous_tokens: dtype must be int64, got float32",
        ),
        (
            {"previous_tokens": torch.ones(2).long()},
            "previous_tokens: shape must be (batch, tokens), got (2,)",
        ),
        (
            {"previous_tokens": torch.ones(3, 1).long()},
            "previous_tokens: shape must be (2, 1) (one row per row of logits), got (3, 1)",
        ),
        ({"seed": 2**63}, f"seed: must be a 64-bit integer, got {2**63}"),
        ({"seed": -(2**63) - 1}, f"seed: must be a 64-bit integer, got {-(2**63) - 1}"),
        (
            {"sample_ids": torch.ones(2)},
            "sample_ids: dtype must be int64, got float32",
        ),
        (
            {"positions": torch.ones(1).long()},
            "positions: shape must be (2,) (one per row of logits), got (1,)",
        ),
    ],
)
def test_names_the_bad_argument(change, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        tilewise.sample(**{"logits": torch.ones(2, 8)} | change)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"logits": torch.tensor([[0.0, 0.0], [math.nan, -INFINITY]])},
            "logits: row 1 has no token to choose, all are NaN or -inf",
        ),
        (
            {"temperature": torch.tensor([0.0, -0.5])},
            "temperature: must be >= 0, got -0.5 in row 1",
        ),
        (
            {"top_p": torch.tensor([0.5, math.nan])},
            "top_p: must be > 0 and <= 1, got nan in row 1",
        ),
        ({"top_k": torch.tensor([-3, 1])}, "top_k: must be >= 0, got -3 in row 0"),
        (
            {"previous_tokens": torch.tensor([[-1, 0], [1, 2]])},
            "previous_tokens: must be below the vocabulary, 2, got 2 in row 1",
        ),
    ],
)
def test_validate_names_the_bad_value(change, message):
    arguments = {"logits": torch.zeros(2, 2)} | change
    tilewise.sample(**arguments)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        tilewise.sample(**arguments, validate=True)
    assert str(caught.value) == message
