"""Few queries and many keys on Triton: the keys are split, and no bit tells from what else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tilewise import flash_attention, gpu, paged_attention, testing
from tilewise.paged import triton
from tilewise.testing import Inputs

compiles = pytest.mark.skipif(
    gpu.INTERPRETED or not gpu._has_triton(), reason="compiling needs Triton, not its interpreter"
)

QKV = ("q", "k", "v")


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few keys make several splits, and twice as many longer ones."""
    monkeypatch.setattr(triton, "_MIN_SPLIT", 64)
    monkeypatch.setattr(triton, "_MAX_SPLITS", 4)


def call(
    on: str, queries: int, keys: int, *, batch: int = 3, dim: int = 16, v_dim: int = 16
) -> dict[str, Any]:
    """Four heads over two."""
    inputs = Inputs(device=on)
    return {
        "q": inputs.randn(batch, queries, 4, dim),
        "k": inputs.randn(batch, keys, 2, dim),
        "v": inputs.randn(batch, keys, 2, v_dim),
        "causal": True,
        "return_lse": True,
    }


def agrees(arguments: dict[str, Any]) -> None:
    actual = flash_attention(**arguments, backend="triton")
    naive = flash_attention(**arguments, backend="naive")
    truth = flash_attention(**testing.to_float64(arguments), backend="naive")
    for result in zip(actual, naive, truth, strict=True):
        testing.assert_agrees(*result)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("queries", [1, 3, 32])
@pytest.mark.parametrize("keys", [65, 300])
def test_splits_are_merged(on: str, queries: int, keys: int) -> None:
    agrees(call(on, queries, keys))


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"window": (100, -1)},
        {"window": (20, 7), "causal": False},
        {"softcap": 3.0},
        {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])},
        {"alibi_slopes": torch.tensor([0.1, 0.2, 0.01, 0.4])},
        {"alibi_slopes": torch.linspace(0.01, 0.5, 12).reshape(3, 4)},
        {"scale": 0.7},
    ],
    ids=lambda options: " ".join(options),
)
def test_options(on: str, queries: int, options: dict[str, Any]) -> None:
    agrees(call(on, queries, 200) | testing.map_tensors(options, lambda x: x.to(on)))


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("is_mask", [False, True], ids=["added", "mask"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(
    "shape", [(3, 4, 0, 200), (3, 1, 0, 200), (3, 1, 1, 200), (4, 0, 1), (0, 200), (200,)], ids=str
)
def test_bias(on: str, shape: tuple[int, ...], queries: int, is_mask: bool) -> None:
    """Of each query where a dimension is 0; a value behind the causal mask may be anything."""
    inputs = Inputs(device=on)
    shape = tuple(queries if n == 0 else n for n in shape)
    bias = inputs.randn(*shape)
    if is_mask:
        bias = inputs.rand(*shape) < 0.75
    else:
        bias[..., :70] = -torch.inf
        if shape[-2:] == (3, 200):
            bias[..., 0, 198:] = bias[..., 1, 199:] = torch.nan
    agrees(call(on, queries, 200) | {"bias": bias})
    agrees(call(on, queries, 200) | {"bias": bias, "softcap": 2.0})


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize(("dim", "v_dim"), [(24, 24), (80, 16), (16, 40)])
def test_heads_of_two_blocks(on: str, dim: int, v_dim: int) -> None:
    agrees(call(on, 2, 130, dim=dim, v_dim=v_dim))


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("queries", [1, 3])
def test_room_behind_the_keys_may_hold_anything(on: str, queries: int) -> None:
    """Keys are the front of a cache, whose heads lie apart."""
    arguments = call(on, queries, 150)
    expected = flash_attention(**arguments, backend="triton")
    for name in ("k", "v"):
        cache = arguments[name].new_full((3, 2, 170, 16), torch.nan)
        cache[:, :, :150] = arguments[name].transpose(1, 2)
        arguments[name] = cache.transpose(1, 2)[:, :150]
    for actual, same in zip(flash_attention(**arguments, backend="triton"), expected, strict=True):
        assert torch.equal(actual, same)


@pytest.mark.parametrize("queries", [3, 65])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 2.0}, {"scale": -0.3}])
@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_a_key_that_is_not_finite_is_no_masked_key(
    on: str, queries: int, options: dict[str, Any], value: float
) -> None:
    """Scores of -inf, which come of half of the queries, are not of keys that nobody sees."""
    inputs = Inputs(device=on)
    q, k, v = (inputs.randn(1, length, 1, 16) for length in (queries, 70, 70))
    k[0, 1, 0, 3] = value
    actual, expected = (
        flash_attention(q, k, v, **options, return_lse=True, backend=backend)
        for backend in ("triton", "naive")
    )
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.isnan(), e.isnan())


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("queries", [1, 3])
def test_no_bit_depends_on_the_batch(on: str, queries: int) -> None:
    arguments = call(on, queries, 300) | {"batch_invariant": True}
    together = flash_attention(**arguments, backend="triton")
    for i in range(3):
        alone = arguments | {name: arguments[name][i : i + 1] for name in QKV}
        for a, b in zip(together, flash_attention(**alone, backend="triton"), strict=True):
            assert torch.equal(a[i : i + 1], b)


@pytest.mark.usefixtures("short_splits")
def test_a_paged_cache_gives_the_same_bits(on: str) -> None:
    arguments = call(on, 1, 300)
    out, lse = flash_attention(**arguments, backend="triton")
    pages = torch.arange(3 * 300 // 10, dtype=torch.int32, device=on)
    paged = paged_attention(
        arguments["q"][:, 0],
        *(arguments[name].reshape(-1, 10, 2, 16) for name in ("k", "v")),
        pages.reshape(3, -1),
        torch.full((3,), 300, dtype=torch.int32, device=on),
        return_lse=True,
        backend="triton",
    )
    assert torch.equal(out[:, 0], paged[0])
    assert torch.equal(lse[:, 0], paged[1])


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("names", [QKV, (*QKV, "bias")], ids=["plain", "bias"])
def test_gradients(on: str, names: tuple[str, ...]) -> None:
    def gradients(arguments: dict[str, Any], backend: str) -> tuple[torch.Tensor, ...]:
        arguments = arguments | {name: arguments[name].clone() for name in names}
        leaves = [arguments[name].requires_grad_() for name in names]
        out, lse = flash_attention(**arguments, backend=backend)
        grads: tuple[torch.Tensor, ...] = torch.autograd.grad(out.sum() + lse.sum(), leaves)
        return grads

    arguments = call(on, 3, 130)
    if "bias" in names:
        arguments["bias"] = Inputs(device=on).randn(3, 1, 3, 130)
    actual = gradients(arguments, "triton")
    naive = gradients(arguments, "naive")
    truth = gradients(testing.to_float64(arguments), "naive")
    for name, *result in zip(names, actual, naive, truth, strict=True):
        # As in `attention/cases.py`; the error is the same where no key is split.
        testing.assert_agrees(*result, name=name, floor=1.25 if name == "v" else 2.5)


@compiles
@pytest.mark.parametrize(
    ("queries", "keys", "options", "expected"),
    [
        (1, 513, {}, {"paged_attention", "merge_splits"}),
        (32, 513, {}, {"paged_attention", "merge_splits"}),
        (33, 513, {}, {"forward"}),  # 66 rows
        (1, 512, {}, {"forward"}),
        (1, 513, {"bias": torch.zeros(513)}, {"paged_attention", "merge_splits"}),
    ],
)
def test_which_kernels_a_call_takes(
    queries: int, keys: int, options: dict[str, Any], expected: set[str]
) -> None:
    with gpu.compiling_for("sm_90") as kernels:
        flash_attention(**call("cpu", queries, keys), **options, backend="triton")
    assert {kernel.kernel for kernel in kernels} == expected


@compiles
@pytest.mark.parametrize(
    ("target", "dim", "dtype", "expected"),
    [
        ("sm_90", 64, torch.float16, True),
        ("sm_90", 60, torch.float16, False),  # heads are 120 bytes apart
        ("sm_90", 64, torch.float32, False),
        ("sm_80", 64, torch.float16, False),
    ],
)
def test_tiles_are_loaded_by_descriptors_where_they_can_be(
    target: str, dim: int, dtype: torch.dtype, expected: bool
) -> None:
    leaves = [torch.zeros(1, 70, 2, dim, dtype=dtype).requires_grad_() for _ in QKV]
    with gpu.compiling_for(target) as kernels:
        flash_attention(*leaves, causal=True, backend="triton").sum().backward()
    loads = {x.kernel: "cp.async.bulk.tensor" in x.triton.asm["ptx"] for x in kernels}
    assert loads.pop("row_sums") is False
    assert loads == dict.fromkeys(("forward", "grad_queries", "grad_keys"), expected)


def test_scratch_memory_leaves_the_callers_allocator_alone() -> None:
    from triton.runtime import _allocation

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(x: torch.Tensor, **options: Any) -> None:
                allocated.append(_allocation._allocator.get()(256, 128, None))

            return run

    allocated: list[Any] = []
    before = _allocation._allocator.get()
    gpu.launch(Kernel(), (1,), torch.zeros(1), needs_scratch=True)
    assert [x.shape for x in allocated] == [(256,)]
    assert _allocation._allocator.get() is before
