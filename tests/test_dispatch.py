"""Dispatch: who is asked for, who runs, and what is said when nobody can."""

import threading

import pytest
import torch

import tilewise
from tilewise import dispatch
from tilewise.dispatch import OPS, BackendError, Cost, Impl, Op, use_backend


def _double(x: torch.Tensor, *, times: int = 1) -> torch.Tensor:
    """The naive twin of a toy operation."""
    return x * 2**times


@pytest.fixture
def toy(monkeypatch):
    """An operation whose result says which implementation ran: naive 2, torch 20, cpu 200."""
    monkeypatch.setattr(dispatch, "OPS", dict(OPS))

    def impl(factor):
        def fn(x, *, times=1):
            return x * factor

        return fn

    def only_small(x, *, times=1):
        return None if x.numel() <= 4 else f"x: takes at most 4 elements, got {x.numel()}"

    def not_for_two(x, *, times=1):
        return "two would leak" if x.numel() == 2 else None

    return Op(
        "toy",
        _double,
        impls=(
            Impl("cpu", impl(200), only_small),
            Impl("torch", impl(20), dispatch.never, not_for_two),
        ),
        check=lambda *args, **kwargs: None,
        cost=lambda x, *, times=1: Cost(x.numel(), 8.0 * x.numel(), torch.float32),
    )


def test_auto_takes_the_first_that_can(toy):
    assert toy(torch.ones(4)).tolist() == [200] * 4
    assert toy(torch.ones(5)).tolist() == [20] * 5


def test_auto_passes_over_what_it_should_not_choose(toy, monkeypatch):
    monkeypatch.setattr(toy, "impls", toy.impls[1:])
    assert toy(torch.ones(2)).tolist() == [2, 2]
    assert toy(torch.ones(2), backend="torch").tolist() == [20, 20]
    assert toy.reasons((torch.ones(2),), {}, auto=True)["torch"] == "two would leak"


def test_a_named_backend_never_falls_back(toy):
    with pytest.raises(BackendError) as caught:
        toy(torch.ones(5), backend="cpu")
    message = str(caught.value)
    assert message.startswith(
        "toy: backend 'cpu' cannot run this call: x: takes at most 4 elements"
    )
    assert "naive: can run it" in message
    assert "triton: toy has no triton implementation" in message


def test_an_unknown_backend_is_named(toy):
    with pytest.raises(
        BackendError, match=r"backend: must be 'auto' or one of naive, .* got 'fast'"
    ):
        toy(torch.ones(1), backend="fast")
    with pytest.raises(ValueError, match="backend: must be 'auto' or one of"), use_backend("fast"):
        pass
    with (
        pytest.raises(ValueError, match="no_such_op: not an operation"),
        use_backend(no_such_op="cpu"),
    ):
        pass


def test_use_backend_nests_and_the_argument_wins(toy):
    x = torch.ones(1)
    with use_backend("naive"):
        assert toy(x).item() == 2
        with use_backend("torch"):
            assert toy(x).item() == 20
            assert toy(x, backend="cpu").item() == 200
        with use_backend("auto"):
            assert toy(x).item() == 200
        assert toy(x).item() == 2
    assert toy(x).item() == 200


def test_use_backend_per_operation(toy):
    x = torch.ones(1)
    with use_backend("naive", toy="torch"):
        assert toy(x).item() == 20
        with use_backend(rms_norm="naive"):
            assert toy(x).item() == 20
        with use_backend("cpu"):
            assert toy(x).item() == 200


def test_use_backend_is_undone_by_an_exception(toy):
    with pytest.raises(RuntimeError, match="boom"), use_backend("naive"):
        raise RuntimeError("boom")
    assert toy(torch.ones(1)).item() == 200


def test_use_backend_stays_in_its_thread(toy):
    seen = []
    with use_backend("naive"):
        thread = threading.Thread(target=lambda: seen.append(toy(torch.ones(1)).item()))
        thread.start()
        thread.join()
    assert seen == [200]


def test_a_compiled_function_follows_use_backend(toy):
    torch.compiler.reset()
    compiled = torch.compile(lambda x: toy(x), fullgraph=True, backend="eager")
    x = torch.ones(1)
    assert compiled(x).item() == 200
    with use_backend("naive"):
        assert compiled(x).item() == 2
        with use_backend("torch"):
            assert compiled(x).item() == 20
    assert compiled(x).item() == 200


def test_the_environment_reaches_a_new_process_and_is_the_weakest(run_python):
    code = (
        "import torch, tilewise\n"
        "call = ('rms_norm', torch.ones(1, 4), torch.ones(4))\n"
        "print(tilewise.explain(*call).chosen)\n"
        "with tilewise.use_backend('auto'):\n"
        "    print(tilewise.explain(*call).chosen)\n"
    )
    asked, chosen = run_python(code, TILEWISE_BACKEND="naive").stdout.split()
    assert asked == "naive"
    assert chosen != "naive"


def test_a_typo_in_the_environment_is_said_by_the_first_call(run_python):
    code = (
        "import torch, tilewise\n"
        "print('imported')\n"
        "tilewise.rms_norm(torch.ones(1, 4), torch.ones(4))\n"
    )
    failed = run_python(code, TILEWISE_BACKEND="fast", check=False)
    assert failed.stdout.strip() == "imported"
    assert "BackendError: TILEWISE_BACKEND: must be 'auto' or one of naive," in failed.stderr


def test_an_implementation_must_have_the_naive_signature():
    with pytest.raises(ValueError, match="toy2: cpu must have the naive function's signature"):
        Op(
            "toy2",
            _double,
            impls=(Impl("cpu", lambda x: x),),
            check=lambda: None,
            cost=lambda: Cost(0, 0, torch.float32),
        )
    assert "toy2" not in OPS


def test_untraceable_implementations_are_left_to_eager_mode(toy, monkeypatch):
    fast = Impl("cpu", toy.impls[0].fn, untraceable="it reads values")
    monkeypatch.setattr(toy, "impls", (fast, *toy.impls[1:]))
    x = torch.ones(1)
    assert toy(x).item() == 200
    torch.compiler.reset()
    assert torch.compile(lambda x: toy(x), fullgraph=True, backend="eager")(x).item() == 20


def test_explain_says_what_was_asked_and_why_not():
    x, weight = torch.ones(2, 4), torch.ones(4)
    said = tilewise.explain(tilewise.rms_norm, x, weight, backend="cuda")
    assert said.chosen is None
    assert "nothing can run this (asked: cuda)" in str(said)
    with use_backend("naive"):
        assert tilewise.explain("rms_norm", x, weight).chosen == "naive"
    with pytest.raises(ValueError, match=r"weight: shape must be \(4,\)"):
        tilewise.explain("rms_norm", x, torch.ones(3))
    with pytest.raises(ValueError, match=r"op: must be one of .*, got 'matmul'"):
        tilewise.explain("matmul", x)
    with pytest.raises(TypeError, match="rms_norm: missing a required argument: 'weight'"):
        tilewise.explain("rms_norm", x)
    assert tilewise.explain("rms_norm", x, weight, validate=True).chosen


def test_the_roofline_is_the_slower_of_memory_and_compute():
    from tilewise.machine import Ceilings

    ceilings = Ceilings("cpu", 1, {1000: 100.0, 4000: 50.0}, {"float32": 10.0, "bfloat16": 2.0})
    assert ceilings.seconds(Cost(5.0, 2000.0, torch.float32)) == 20.0
    assert ceilings.seconds(Cost(5.0, 8000.0, torch.float32)) == 160.0
    assert ceilings.seconds(Cost(500.0, 2000.0, torch.float32)) == 50.0
    # A dtype that is slow by itself can be converted to float32 first.
    assert ceilings.flops_of(torch.bfloat16) == 10.0


def test_one_call_costs_little_python():
    """Dispatch adds a bounded number of Python function calls, whatever the machine's speed."""
    import cProfile
    import pstats

    x, weight = torch.ones(1, 4), torch.ones(4)
    tilewise.rms_norm(x, weight)
    profile = cProfile.Profile()
    profile.runcall(tilewise.rms_norm, x, weight)
    assert pstats.Stats(profile).total_calls < 50
