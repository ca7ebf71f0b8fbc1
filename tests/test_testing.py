"""The agreement rule itself: it must fail what is wrong, and pass what is only rounded."""

import pytest
import torch

from tilewise import testing
from tilewise.cases import Case, check_case, public_function
from tilewise.testing import Inputs, assert_agrees


@pytest.fixture
def product():
    """(result in bfloat16, truth in float64) of a row-wise sum of products."""
    inputs = Inputs(torch.bfloat16)
    a, b = inputs.randn(8, 64), inputs.randn(64, 16)
    return (a.float() @ b.float()).bfloat16(), a.double() @ b.double()


def test_the_naive_result_agrees_with_itself(product):
    naive, truth = product
    worst = assert_agrees(naive, naive, truth)
    assert 0 < worst.ratio < 0.5


def test_one_more_rounding_passes_and_a_coarser_one_fails(product):
    naive, truth = product
    assert_agrees((truth * (1 + 2**-9)).bfloat16(), naive, truth)
    coarse = (truth * (1 + 2**-5)).bfloat16()
    with pytest.raises(AssertionError, match="8 of 8 rows disagree"):
        assert_agrees(coarse, naive, truth)


def test_the_rule_is_per_row(product):
    naive, truth = product
    small = truth.clone()
    small[5] *= 1e-3  # a row that a whole-tensor tolerance would not look at
    naive = small.bfloat16()
    wrong = naive.clone()
    wrong[5] = 0
    with pytest.raises(AssertionError, match=r"out: row \(5,\) is off by .* 1 of 8 rows disagree"):
        assert_agrees(wrong, naive, small, name="out")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_nonfinite_element_never_passes(product, bad):
    naive, truth = product
    wrong = naive.clone()
    wrong[3, 4] = bad
    with pytest.raises(AssertionError, match=r"1 non-finite elements are wrong, first at \(3, 4\)"):
        assert_agrees(wrong, naive, truth)


def test_nan_in_naive_excuses_nothing(product):
    naive, truth = product
    broken = naive.clone()
    broken[2] = float("nan")
    wrong = naive.clone()
    wrong[2] = 1e6
    with pytest.raises(AssertionError, match=r"row \(2,\)"):
        assert_agrees(wrong, broken, truth)


def test_a_kernel_that_is_not_ours_may_have_leeway():
    truth = torch.ones(1, 4, dtype=torch.float64)
    off = (truth + 6e-7).float()
    with pytest.raises(AssertionError, match=r"allowed 4.77e-07 = 2 x naive's 0 [+] 4 x one step"):
        assert_agrees(off, truth.float(), truth)
    assert_agrees(off, truth.float(), truth, leeway=2.0)
    with pytest.raises(AssertionError, match=r"allowed 5.25e-07 = 1.1 x \(2 x naive's 0 [+] 4 x"):
        assert_agrees(off, truth.float(), truth, leeway=1.1)


def test_minus_infinity_must_be_where_it_belongs():
    truth = torch.tensor([[1.0, -torch.inf]], dtype=torch.float64)
    assert_agrees(truth.float(), truth.float(), truth)
    with pytest.raises(AssertionError, match=r"first at \(0, 1\): expected -inf, got 0"):
        assert_agrees(torch.tensor([[1.0, 0.0]]), truth.float(), truth)


def test_a_zero_row_must_be_zero_unless_it_cancelled():
    truth = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    nearly = torch.tensor([[1e-8, 0.0], [1.0, 1.0]])
    with pytest.raises(AssertionError, match=r"row \(0,\)"):
        assert_agrees(nearly, truth.float(), truth)
    assert_agrees(nearly, truth.float(), truth, floor=1.0)


def test_integers_must_be_equal():
    a = torch.tensor([1, 2, 3])
    assert_agrees(a, a, a)
    with pytest.raises(
        AssertionError, match=r"1 of 3 elements differ, first at \(1,\): expected 2"
    ):
        assert_agrees(torch.tensor([1, 5, 3]), a, a)


def test_shape_and_dtype_must_match(product):
    naive, truth = product
    with pytest.raises(AssertionError, match=r"expected \(8, 16\) torch.bfloat16, got \(8, 15\)"):
        assert_agrees(naive[:, :15], naive, truth)
    with pytest.raises(AssertionError, match=r"got .* torch.float32"):
        assert_agrees(naive.float(), naive, truth)


def test_empty_memory_is_nan_and_mended_afterwards():
    with testing.nan_filled_empty():
        assert torch.empty(3).isnan().all()
        assert torch.ones(3).new_empty(2, 2).isnan().all()
        assert torch.empty_strided((2, 2), (5, 1)).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_strided_tensors_hold_the_same_values_apart():
    x = torch.arange(12.0).reshape(3, 4)
    (cut,) = testing.strided((x,))
    assert torch.equal(cut, x)
    assert not cut.is_contiguous()
    assert cut.stride(-1) == 1


def test_inputs_are_reproducible_and_distinct():
    first, second = Inputs(seed=3), Inputs(seed=3)
    a = first.randn(4)
    assert torch.equal(a, second.randn(4))
    assert not torch.equal(a, second.randn(4))


@pytest.mark.gpu
def test_large_inputs_are_made_on_the_gpu():
    first, second, other = (Inputs(device="cuda", seed=seed) for seed in (0, 0, 1))
    for make in (
        lambda inputs: inputs.randn(2, 2**23, scale=2.0, dtype=torch.bfloat16),
        lambda inputs: inputs.rand(2**24),
        lambda inputs: inputs.randint(-127, 128, 2**24, dtype=torch.int8),
    ):
        a, b = make(first), make(first)
        assert torch.equal(a, make(second))
        assert torch.equal(b, make(second))
        assert not torch.equal(a, b)
        assert not torch.equal(a, make(other))
    x, u, codes = first.randn(2**24, scale=2.0), first.rand(2**24), first.randint(5, 8, 2**24)
    assert x.mean().abs() < 0.01
    assert (x.std() - 2).abs() < 0.01
    assert (u.mean() - 0.5).abs() < 0.01
    assert codes.unique().tolist() == [5, 6, 7]
    # Small ones are those of the CPU.
    assert torch.equal(Inputs(device="cuda").randn(9).cpu(), Inputs().randn(9))


def test_a_wrong_kernel_is_caught_through_a_case(monkeypatch):
    """check_case runs the backend that was asked for and holds it to the rule."""
    from tilewise import dispatch, fused
    from tilewise.dispatch import Impl
    from tilewise.fused import naive

    def forgets_the_last_element(x, weight, eps=1e-6, *, residual=None):
        out = torch.empty_like(x)
        out[..., :-1] = naive.rms_norm(x, weight, eps)[..., :-1]
        return out

    op = dispatch.OPS["rms_norm"]
    monkeypatch.setattr(op, "impls", (Impl("cpu", forgets_the_last_element), *op.impls))
    case = Case(
        "rms_norm",
        "rows",
        lambda inputs: {"x": inputs.randn(4, 8), "weight": inputs.randn(8)},
        grad=("x",),
    )
    assert fused.rms_norm is public_function("rms_norm")
    check_case(case, "naive", torch.float32, grad=True)
    with pytest.raises(AssertionError, match="output: 4 non-finite elements are wrong"):
        check_case(case, "cpu", torch.float32)
