"""The C++ kernels of the fused operations: draws of every kind, and rows that stand alone."""

import math
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tilewise
from tilewise import cpu
from tilewise.testing import Inputs

pytestmark = pytest.mark.skipif(
    cpu.why_not(torch.ones(1)) is not None, reason="no C++ kernels here"
)


# --- sampling equals the definition ---------------------------------------------------------------


def _logits(kind, batch, vocabulary, choose):
    inputs = Inputs(seed=choose.randrange(2**31))
    x = inputs.randn(batch, vocabulary, scale=choose.choice([1e-3, 0.3, 3.0, 10.0]))
    if kind == "ties":
        return inputs.randint(0, 4, batch, vocabulary).float()
    if kind == "equal":
        return torch.full((batch, vocabulary), 1.5)
    if kind == "peak":
        x[:, choose.randrange(vocabulary)] += 20
    if kind == "not finite":
        uniform = inputs.rand(batch, vocabulary)
        x[uniform < 0.5] = -math.inf
        x[uniform < 0.1] = math.nan
        x[uniform < 0.01] = math.inf
    return x


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "peak", "not finite"])
def test_every_draw_is_the_definitions(kind):
    """About 500 draws of each kind, with filters at random."""
    choose = random.Random(kind)
    for _ in range(50):
        batch, vocabulary = choose.choice([1, 9, 20]), choose.choice([1, 2, 17, 64, 65, 333, 2049])
        logits = _logits(kind, batch, vocabulary, choose)
        logits = logits.to(choose.choice([torch.float32, torch.float16, torch.bfloat16]))
        options = {
            "temperature": choose.choice([0, 0.3, 0.8, 1.0, 50.0]),
            "top_k": choose.choice([0, 0, 1, 2, 50, vocabulary]),
            "top_p": choose.choice([1.0, 1.0, 1e-6, 0.25, 0.5, 0.75, 0.9, 0.999]),
            "min_p": choose.choice([0.0, 0.0, 1e-5, 0.1, 0.5, 1.0]),
            "seed": choose.randrange(-(2**63), 2**63),
        }
        if choose.random() < 0.3:
            previous = torch.randint(-2, vocabulary + 2, (batch, 7))
            options |= {"repetition_penalty": 1.3, "previous_tokens": previous}
        tokens, expected = (
            tilewise.sample(logits, **options, backend=backend) for backend in ("cpu", "naive")
        )
        assert tokens.tolist() == expected.tolist(), (batch, vocabulary, options)


def test_values_that_no_check_has_seen_act_as_in_the_definition():
    logits = Inputs().randn(8, 50)
    values = torch.tensor([-1.0, 0.0, 0.5, 1.0, 1.5, math.nan, math.inf, 1e-40])
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        options = {name: values, "previous_tokens": torch.arange(8)[:, None]}
        tokens, expected = (
            tilewise.sample(logits, **options, backend=backend) for backend in ("cpu", "naive")
        )
        assert tokens.tolist() == expected.tolist(), name


# --- a row stands alone ---------------------------------------------------------------------------


def _norm(x):
    weight = torch.linspace(-1, 1, x.shape[-1]).to(x)
    residual = x.flip(-1)
    return torch.cat(tilewise.rms_norm(x, weight, residual=residual, backend="cpu"), -1)


def _layer_norm(x):
    weight = torch.linspace(-1, 1, x.shape[-1]).to(x)
    return tilewise.layer_norm(x, weight, weight, backend="cpu")


def _rotary(x):
    tables = tilewise.rotary_tables(x.shape[-1] // 2 * 2, 10)
    positions = torch.full((x.shape[0],), 7)
    return tilewise.rotary_embedding(x[:, None], tables, positions, backend="cpu")[:, 0]


def _gated(x):
    return tilewise.geglu(x, x.flip(-1), approximate="none", backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("call", [_norm, _layer_norm, _rotary, _gated])
def test_a_row_has_the_same_bits_in_any_batch(call, dtype):
    for dim in (3, 63, 577):
        x = Inputs(dtype).randn(90, dim)
        together = call(x)
        for rows in (slice(0, 1), slice(41, 42), slice(13, 90)):
            assert torch.equal(call(x[rows]), together[rows])


def test_the_exact_gelu_has_digits_left_in_the_tail():
    """Where 1 + erf(x) has none: relative to the float64 truth, not to its largest element."""
    x = torch.linspace(-12, 12, 4001)
    actual = tilewise.geglu(x, torch.ones_like(x), approximate="none", backend="cpu").double()
    truth = 0.5 * x.double() * torch.erfc(-x.double() / math.sqrt(2))
    error = ((actual - truth) / truth.where(truth != 0, 1)).abs()
    assert error.max() < 1e-5  # the rounding of x^2 / 2 <= 72 in the exponent
    assert error[x.abs() < 1].max() < 1e-6


def test_activations_end_at_0_and_at_infinity():
    x = torch.cat([torch.tensor([-3e38, -1e38, -1e30, 1e38]), torch.linspace(-95, -80, 301)])
    for call in (tilewise.swiglu, tilewise.geglu):
        actual, expected = (call(x, torch.ones_like(x), backend=b) for b in ("cpu", "naive"))
        assert (actual - expected).abs().max() <= 1e-37  # results below 2^-126 are flushed to 0
    minus_infinity = torch.full((3,), -math.inf)
    assert tilewise.swiglu(minus_infinity, torch.ones(3), backend="cpu").isnan().all()


SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


@pytest.mark.parametrize("name", ["swiglu", "geglu"])
@pytest.mark.parametrize("dtype", SMALLEST)
def test_an_activation_of_16_bits_is_the_nearest_number(dtype, name):
    """Of every one, though e^-x and the division are no longer those of float32."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
    y = x.double()
    if name == "geglu":  # x (1 + tanh(u)) / 2, which is x sigmoid(2 u)
        y = 2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)
    actual = getattr(tilewise, name)(x, torch.ones_like(x), backend="cpu")
    truth = x.double() * torch.sigmoid(y)
    assert torch.equal(actual.isnan(), truth.isnan())
    expected = truth.to(dtype)
    assert torch.equal(actual.isinf(), expected.isinf())
    number = expected.isfinite() & (expected.abs() > 1e-30)
    steps = (actual[number].view(torch.int16) - expected[number].view(torch.int16)).abs()
    assert steps.max() <= 1
    assert (steps != 0).sum() <= 8
    tiny = expected.abs() <= 1e-30
    assert (actual[tiny].double() - truth[tiny]).abs().max() <= max(1e-30, 2 * SMALLEST[dtype])


# --- past the dispatcher, but not past who watches it ---------------------------------------------


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operator():
    x = torch.ones(2, 4)
    with _Seen() as seen:
        tilewise.swiglu(x, x, backend="cpu")
    assert seen.names[0] == "tilewise.gated_activation.default"


# --- rounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_rounded_as_pytorch_rounds(dtype):
    """Of every number: subnormals stay what they are, and every NaN becomes the same one."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(64, 1024)
    other = x.flip(0).roll(77, dims=1)
    weight = torch.ones(1024, dtype=dtype)
    _, total = tilewise.rms_norm(x, weight, residual=other, backend="cpu")
    expected = (x.float() + other.float()).to(dtype)
    assert torch.equal(total.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(total[number].view(torch.int16), expected[number].view(torch.int16))
    if dtype == torch.bfloat16:
        assert total[~number].view(torch.int16).unique().tolist() == [0x7FC0]
