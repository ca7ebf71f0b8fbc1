"""The Triton kernels of the fused operations, where their cases do not reach."""

import importlib.util
import math

import pytest
import torch

import tilewise
from tilewise import dispatch, gpu
from tilewise.cases import public_function
from tilewise.fused import philox, triton_sampling
from tilewise.fused.tables import rotary_tables
from tilewise.testing import Inputs

compiles = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or gpu.INTERPRETED,
    reason="needs Triton, and that it was not imported as an interpreter",
)


# --- sampling -------------------------------------------------------------------------------------


def _assert_same_tokens(logits, **options):
    expected = tilewise.sample(logits, **options, backend="naive")
    actual = tilewise.sample(logits, **options, backend="triton")
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("scale", [0.0, 0.5, 8.0])
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 2500},
        {"top_p": 1e-6},
        {"top_p": 0.5},
        {"top_p": 0.999},
        {"top_k": 40, "top_p": 0.7},
        {"top_k": 3000, "top_p": 0.4, "min_p": 0.01},
        {"top_p": 0.9, "min_p": 1.0},
        {"min_p": 0.3, "temperature": 3.0},
    ],
    ids=str,
)
def test_filters_over_several_tiles(on, scale, options):
    """Flat rows, where the first winners are mostly not kept, to steep ones."""
    logits = Inputs(device=on, seed=3).randn(4, 5003, scale=scale)
    _assert_same_tokens(logits, seed=7, **options)


@pytest.mark.parametrize("top_k", [0, 100, 3000])
@pytest.mark.parametrize("top_p", [0.25, 0.5, 1.0])
def test_ties_are_kept_in_the_order_of_tokens(on, top_k, top_p):
    logits = Inputs(device=on).randint(0, 3, 4, 4096).float()
    _assert_same_tokens(logits, top_k=top_k, top_p=top_p, seed=1)
    _assert_same_tokens(torch.zeros_like(logits), top_k=top_k, top_p=top_p, seed=2)


def test_what_is_no_number(on):
    logits = Inputs(device=on).randn(6, 2100)
    logits[0] = -math.inf
    logits[1] = math.nan
    logits[2, ::2] = math.nan
    logits[3, 5:] = -math.inf
    logits[4, [7, 2090]] = math.inf
    logits[5, 1] = 3e38
    for options in ({}, {"temperature": 0}, {"top_k": 9}, {"top_p": 0.8}, {"temperature": 1e-3}):
        _assert_same_tokens(logits, seed=4, **options)


def test_parameters_that_no_token_satisfies(on):
    """Only tensors, whose values nobody checks, can hold them."""
    logits = Inputs(device=on).randn(5, 70)

    def row_values(*values):
        return torch.tensor(values, device=on)

    nan = math.nan
    _assert_same_tokens(
        logits,
        temperature=row_values(1.0, 1.0, nan, 1.0, -1.0),
        top_p=row_values(0.0, 1.0, 0.5, nan, 0.5),
        min_p=row_values(0.0, 1.5, 0.0, nan, 0.0),
        top_k=torch.tensor([3, 3, 3, -3, 3], device=on),
    )


def test_a_long_history(on):
    inputs = Inputs(device=on)
    previous = inputs.randint(-1, 2500, 3, 700)
    previous[0, 0], previous[1, 1] = 2**40, -(2**40)
    for penalty in (1.7, 0.5):
        _assert_same_tokens(
            inputs.randn(3, 2500, scale=3),
            repetition_penalty=penalty,
            previous_tokens=previous,
            top_k=50,
            seed=2,
        )


@pytest.mark.parametrize("seed", [-1, 1, 2**63 - 1, -(2**63), 2**32])
def test_streams_of_64_bits(on, seed):
    ids = torch.tensor([0, -1, 2**62, 2**32 - 1], device=on)
    logits = torch.zeros(4, 3000, device=on)
    _assert_same_tokens(logits, seed=seed, sample_ids=ids, positions=ids.flip(0))


def test_groups_of_rows(on, monkeypatch):
    """A row's number, which is its stream, does not begin anew with the next group."""
    monkeypatch.setattr(triton_sampling, "_LOGITS_AT_ONCE", 200)
    logits = Inputs(device=on).randn(7, 100)
    _assert_same_tokens(logits, top_p=0.9, previous_tokens=torch.ones(7, 1, device=on).long())


@compiles
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_the_noise_is_not_contracted(target):
    with gpu.compiling_for(target) as kernels:
        tilewise.sample(torch.zeros(2, 128256), backend="triton")
    code = {kernel.kernel: kernel.triton.asm["ptx"] for kernel in kernels}
    assert "div.rn.f32" in code["draw"]
    for kernel in ("maxima", "draw"):
        assert "fma.rn.f32" not in code[kernel]
        assert "div.full.f32" not in code[kernel]


@compiles
def test_a_growing_history_and_other_seeds_need_no_other_kernel():
    with gpu.compiling_for("sm_80") as kernels:
        for count, seed in ((1, 0), (7, 1), (16, 16), (33, 2**40), (32, -5)):
            previous = torch.zeros(3, count, dtype=torch.int64)
            logits = torch.zeros(3, 5000)
            tilewise.sample(logits, seed=seed, previous_tokens=previous, backend="triton")
    assert len(kernels) == 15
    assert len({id(kernel.triton) for kernel in kernels}) == 3


def test_noise_is_that_of_the_definition(on):
    """Of equal logits the noise alone chooses, so that a row of zeros tells the largest."""
    rows = 64
    ids, positions = torch.arange(rows, device=on), torch.arange(rows, device=on) * 3
    noise = philox.gumbel_noise(11, ids, positions, 37)
    tokens = tilewise.sample(
        torch.zeros(rows, 37, device=on), seed=11, positions=positions, backend="triton"
    )
    assert tokens.tolist() == noise.argmax(-1).tolist()


# --- rotary embedding -----------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_position_outside_the_tables(on, interleaved):
    tables = rotary_tables(6, 10, interleaved=interleaved, device=on)
    x = Inputs(device=on).randn(5, 3, 9)
    positions = torch.tensor([0, -1, 10, 9, 2**62], device=on)
    out = tilewise.rotary_embedding(x, tables, positions, backend="triton")
    assert out[[0, 3]].isfinite().all()
    assert out[[1, 2, 4], :, :6].isnan().all()
    assert torch.equal(out[..., 6:], x[..., 6:])


def test_float64_tables_are_refused(device):
    tables = rotary_tables(4, 10, device=device)
    wide = tables._replace(cos=tables.cos.double(), sin=tables.sin.double())
    x, positions = torch.zeros(2, 1, 4, device=device), torch.zeros(2, device=device).long()
    reasons = dispatch.OPS["rotary_embedding"].reasons((x, wide, positions), {})
    assert reasons["triton"] == "needs float32 tables"


# --- gated activations ----------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["swiglu", "geglu"])
def test_the_ends_of_the_range(on, op):
    gate = torch.tensor([0.0, -0.0, 200.0, -200.0, 3e38, -1e30], device=on)
    up = torch.ones_like(gate)
    function = public_function(op)
    for options in [{}] if op == "swiglu" else [{"approximate": a} for a in ("none", "tanh")]:
        out = function(gate, up, **options, backend="triton")
        assert torch.allclose(out, gate.clamp(min=0))
