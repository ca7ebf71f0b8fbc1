"""Rotary embedding: the tables against plain Python, the layouts, and positions out of range."""

import math

import pytest
import torch

import tilewise
from tilewise import LinearScaling, Llama3Scaling, RotaryTables, dispatch, rotary_tables
from tilewise.testing import Inputs, assert_agrees

BACKENDS = dispatch.OPS["rotary_embedding"].backends_on("cpu")


def _assert_tables(tables, frequencies, max_positions):
    """Every entry is the float64 value rounded to float32."""
    angles = [[p * f for f in frequencies] for p in range(max_positions)]
    for actual, function in ((tables.cos, math.cos), (tables.sin, math.sin)):
        truth = torch.tensor([[function(a) for a in row] for row in angles], dtype=torch.float64)
        assert actual.dtype == torch.float32
        assert_agrees(actual[..., None], truth.float()[..., None], truth[..., None])


def test_tables_are_exact_far_out():
    tables = rotary_tables(8, 100_001, base=500_000.0)
    last = RotaryTables(tables.cos[100_000:], tables.sin[100_000:])
    angles = [100_000 * 500_000 ** (-i / 8) for i in (0, 2, 4, 6)]
    for actual, function in ((last.cos, math.cos), (last.sin, math.sin)):
        truth = torch.tensor([[function(a)] for a in angles], dtype=torch.float64)
        assert_agrees(actual.mT, truth.float(), truth)


def test_linear_scaling_stretches_the_positions():
    frequencies = [100.0 ** (-i / 6) / 4 for i in (0, 2, 4)]
    _assert_tables(rotary_tables(6, 9, base=100.0, scaling=LinearScaling(4)), frequencies, 9)


def _llama3_frequency(frequency, factor, low, high, context):
    """As the model card puts it: by the wavelength, against two of them."""
    wavelength = 2 * math.pi / frequency
    if wavelength < context / high:
        return frequency
    if wavelength > context / low:
        return frequency / factor
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def test_llama3_scaling_keeps_fast_pairs_and_slows_slow_ones():
    plain = [500_000.0 ** (-i / 64) for i in range(0, 64, 2)]
    frequencies = [_llama3_frequency(f, 8.0, 1.0, 4.0, 8192) for f in plain]
    kinds = [round(f / g, 6) for f, g in zip(plain, frequencies, strict=True)]
    assert kinds.count(1.0) > 0
    assert kinds.count(8.0) > 0
    assert len(set(kinds)) > 2, "no pair is between"
    tables = rotary_tables(64, 50, base=500_000.0, scaling=Llama3Scaling())
    _assert_tables(tables, frequencies, 50)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("interleaved", "pairs"), [(False, [(0, 2), (1, 3)]), (True, [(0, 1), (2, 3)])]
)
def test_turns_the_pairs_of_its_layout(backend, interleaved, pairs):
    tables = rotary_tables(4, 10, base=100.0, interleaved=interleaved)
    x = Inputs().randn(1, 1, 6)
    y = tilewise.rotary_embedding(x, tables, torch.tensor([7]), backend=backend)
    expected = x.double()  # elements 4 and 5 are past rotary_dim
    for i, (a, b) in enumerate(pairs):
        cos, sin = tables.cos[7, i].double(), tables.sin[7, i].double()
        x_a, x_b = x[0, 0, a].double(), x[0, 0, b].double()
        expected[0, 0, a] = x_a * cos - x_b * sin
        expected[0, 0, b] = x_b * cos + x_a * sin
    assert_agrees(y, expected.float(), expected)
    assert torch.equal(y[..., 4:], x[..., 4:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_position_outside_the_tables_shows(backend, interleaved):
    tables = rotary_tables(4, 10, interleaved=interleaved)
    x = Inputs().randn(5, 2, 6)
    positions = torch.tensor([-1, 9, 10, 2**40, -(2**40)])
    y = tilewise.rotary_embedding(x, tables, positions, backend=backend)
    for row in (0, 2, 3, 4):
        assert y[row, :, :4].isnan().all()
    assert y[1].isfinite().all()
    assert torch.equal(y[..., 4:], x[..., 4:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_unused_rows_of_the_tables_may_be_nan(backend, interleaved):
    tables = rotary_tables(6, 10, interleaved=interleaved)
    x, positions = Inputs().randn(3, 2, 6), torch.tensor([0, 4, 9])
    expected = tilewise.rotary_embedding(x, tables, positions, backend=backend)
    for table in tables[:2]:
        table[[1, 2, 3, 5, 6, 7, 8]] = math.nan
    y = tilewise.rotary_embedding(x, tables, positions, backend=backend)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_depend_on_the_distance_alone(backend):
    """What the embedding is for; exact up to the rounding of the tables."""
    tables = rotary_tables(64, 300)
    q, k = Inputs().randn(2, 1, 64)

    def score(i, j):
        at = [
            tilewise.rotary_embedding(x[None], tables, torch.tensor([p]), backend=backend)
            for x, p in ((q, i), (k, j))
        ]
        return (at[0] * at[1]).sum()[None].float()

    for distance in (0, 1, 63):
        near, far = score(distance, 0), score(200 + distance, 200)
        assert_agrees(far, near, near.double(), floor=float(q.norm() * k.norm()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x: must be a torch.Tensor, got NoneType"),
        ({"x": torch.ones(8)}, "x: shape must be (..., heads, head_dim), got (8,)"),
        (
            {"x": torch.ones(3, 2, 4)},
            "tables.cos: rotary_dim must be <= x's head_dim, 4, got 8",
        ),
        ({"tables": torch.ones(4, 4)}, "tables: must be RotaryTables, got Tensor"),
        (
            {"tables": RotaryTables(torch.ones(9, 4).half(), torch.ones(9, 4))},
            "tables.cos: dtype must be float32 or float64, got float16",
        ),
        (
            {"tables": RotaryTables(torch.ones(9), torch.ones(9))},
            "tables.cos: shape must be (max_positions, rotary_dim/2), got (9,)",
        ),
        (
            {"tables": RotaryTables(torch.ones(9, 4), torch.ones(9, 3))},
            "tables.sin: shape must be (9, 4) (that of cos), got (9, 3)",
        ),
        (
            {"tables": RotaryTables(torch.ones(0, 4), torch.ones(0, 4))},
            "tables.cos: must have at least one position, got none",
        ),
        (
            {"positions": torch.zeros(3, dtype=torch.int32)},
            "positions: dtype must be int64, got int32",
        ),
        (
            {"positions": torch.zeros(2, dtype=torch.int64)},
            "positions: shape must be (3,) (x without heads and head_dim), got (2,)",
        ),
        (
            {"positions": torch.tensor([0, 20, 0]), "validate": True},
            "positions: must be from 0 to 19, the table's last, got 20 at (1,)",
        ),
    ],
)
def test_names_the_bad_argument(change, message):
    arguments = {
        "x": torch.ones(3, 2, 8),
        "tables": rotary_tables(8, 20),
        "positions": torch.arange(3),
    }
    with pytest.raises((TypeError, ValueError)) as caught:
        tilewise.rotary_embedding(**arguments | change)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rotary_tables(7, 4), "rotary_dim: must be even and >= 2, got 7"),
        (lambda: rotary_tables(0, 4), "rotary_dim: must be even and >= 2, got 0"),
        (lambda: rotary_tables(4, 0), "max_positions: must be >= 1, got 0"),
        (lambda: rotary_tables(4, 4, base=0.0), "base: must be > 0, got 0.0"),
        (lambda: LinearScaling(0.5), "factor: must be >= 1, got 0.5"),
        (lambda: Llama3Scaling(math.nan), "factor: must be >= 1, got nan"),
        (
            lambda: Llama3Scaling(8, 4, 4),
            "low_freq_factor: must be above 0 and below high_freq_factor (4), got 4",
        ),
        (
            lambda: Llama3Scaling(original_max_positions=0),
            "original_max_positions: must be >= 1, got 0",
        ),
    ],
)
def test_tables_name_the_bad_argument(make, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_may_begin_anywhere(backend):
    x, tables, positions = Inputs().randn(3, 2, 9)[..., 1:], rotary_tables(8, 5), torch.arange(3)
    tables = tables._replace(interleaved=True)
    expected = tilewise.rotary_embedding(x.clone(), tables, positions, backend="naive")
    actual = tilewise.rotary_embedding(x, tables, positions, backend=backend)
    assert_agrees(actual, expected, expected.double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_dim": 8.0}, "rotary_dim: must be an int, got float"),
        ({"max_positions": "9"}, "max_positions: must be an int, got str"),
        ({"base": None}, "base: must be a number, got NoneType"),
        ({"interleaved": 1}, "interleaved: must be a bool, got int"),
        ({"scaling": 8.0}, "scaling: must be None, LinearScaling or Llama3Scaling, got float"),
    ],
)
def test_tables_name_the_bad_type(change, message):
    with pytest.raises(TypeError) as caught:
        rotary_tables(**{"rotary_dim": 8, "max_positions": 9} | change)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearScaling("2"), "factor: must be a number, got str"),
        (
            lambda: Llama3Scaling(low_freq_factor=None),
            "low_freq_factor: must be a number, got NoneType",
        ),
        (
            lambda: Llama3Scaling(original_max_positions=8192.0),
            "original_max_positions: must be an int, got float",
        ),
    ],
)
def test_scalings_name_the_bad_type(make, message):
    with pytest.raises(TypeError) as caught:
        make()
    assert str(caught.value) == message
