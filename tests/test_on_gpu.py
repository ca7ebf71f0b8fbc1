"""What only a GPU can show: CUDA graphs, inductor, addresses beyond 32 bits, full-size calls.

The contracts of `test_contracts.py` run there as well, on every device that is at hand.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tilewise
from tilewise import dispatch, testing
from tilewise.cases import (
    Case,
    all_cases,
    all_compiled_calls,
    check_case,
    floor_of,
    public_function,
    run_case,
    run_function,
)
from tilewise.testing import Inputs

CASES = [case for case in all_cases() if "triton" in dispatch.OPS[case.op].backends]
FULL_SIZE = all_compiled_calls()


def _of_each_op(cases: list[Case], count: int) -> list[Case]:
    taken: dict[str, list[Case]] = {}
    for case in cases:
        taken.setdefault(case.op, []).append(case)
    return [case for some in taken.values() for case in some[:count]]


def _ids(case: Case) -> str:
    return f"{case.op}-{case.id}"


def _arguments(case: Case, seed: int = 0) -> dict[str, Any]:
    arguments = case.make(Inputs(case.dtypes[0], "cuda", seed))
    reason = dispatch.OPS[case.op].reasons((), arguments)["triton"]
    if reason:
        pytest.skip(f"triton: {reason}")
    return arguments


def _tensors(arguments: dict[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    testing.map_tensors(arguments, lambda x: found.append(x) or x)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*_of_each_op(CASES, 2), *FULL_SIZE], ids=_ids)
def test_a_captured_call_follows_its_arguments(case: Case) -> None:
    """A CUDA graph, replayed after all numbers have changed: lengths, tables and slots among them.

    A weight stays as it is: graphs are of one model.
    """
    captured, others = _arguments(case), _arguments(case, seed=1)
    for name, value in captured.items():
        if not isinstance(value, torch.Tensor | tuple):
            others[name] = value
    expected = run_case(case, others, "triton")
    call = functools.partial(public_function(case.op), backend="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        call(**captured)  # compiles what a capture may not
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        returned = call(**captured)
    for old, new in zip(_tensors(captured), _tensors(others), strict=True):
        old.copy_(new)
    graph.replay()
    for name, result in case.results(captured, returned).items():
        assert torch.equal(_bits(result), _bits(expected[name])), name


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.gpu
@pytest.mark.parametrize("case", _of_each_op(CASES, 1), ids=_ids)
def test_inductor_compiles_without_a_break(case: Case) -> None:
    arguments = _arguments(case)
    torch.compiler.reset()
    function = torch.compile(public_function(case.op), fullgraph=True, dynamic=False)
    compiled = functools.partial(function, backend="triton")
    actual = run_function(case, arguments, compiled)
    naive = run_case(case, arguments, "naive")
    truth = run_case(case, testing.to_float64(arguments), "naive")
    for name, value in naive.items():
        floor = floor_of(case, name, truth[name])
        testing.assert_agrees(actual[name], value, truth[name], name=name, floor=floor)


@pytest.mark.gpu
@pytest.mark.parametrize("case", FULL_SIZE, ids=_ids)
def test_full_size_calls_agree(case: Case) -> None:
    """Those that are compiled ahead of time, in 16 bits where models compute so."""
    _arguments(case)
    for dtype in case.dtypes:
        check_case(case, "triton", dtype, device="cuda", grad=bool(case.grad))


# --- more than 2^31 elements ----------------------------------------------------------------------

PAGE = (16, 8, 128)
FAR = 2**31 // (16 * 8 * 128) + 64
"""Pages of a cache whose last ones begin behind element 2^31."""


@pytest.fixture
def far_caches() -> list[torch.Tensor]:
    """Keys and values, full of NaN but for the last 64 pages, which are beyond 32 bits."""
    needed = 3 * 2 * (FAR * 16 * 8 * 128)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory")
    inputs = Inputs(torch.bfloat16, "cuda")
    caches = []
    for _ in range(2):
        cache = torch.full((FAR, *PAGE), torch.nan, dtype=torch.bfloat16, device="cuda")
        cache[-64:] = inputs.randn(64, *PAGE)
        caches.append(cache)
    return caches


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [None, (70, 3)], ids=["decode", "ragged"])
def test_pages_beyond_32_bits_are_read(
    far_caches: list[torch.Tensor], queries: tuple[int, ...] | None
) -> None:
    k_cache, v_cache = far_caches
    inputs = Inputs(torch.bfloat16, "cuda")
    near = inputs.permutation(64, dtype=torch.int32).reshape(2, 32)
    arguments = {
        "q": inputs.randn(2 if queries is None else sum(queries), 32, 128),
        "cache_seqlens": inputs.tensor([500, 77], torch.int32),
        "causal": True,
        "return_lse": True,
        "backend": "triton",
    }
    if queries is not None:
        arguments["cu_seqlens_q"] = inputs.tensor([0, queries[0], sum(queries)], torch.int32)
    far = tilewise.paged_attention(
        k_cache=k_cache, v_cache=v_cache, block_table=near + FAR - 64, **arguments
    )
    expected = tilewise.paged_attention(
        k_cache=k_cache[-64:].clone(), v_cache=v_cache[-64:].clone(), block_table=near, **arguments
    )
    for actual, wanted in zip(far, expected, strict=True):
        assert not wanted.isnan().any()
        assert torch.equal(actual, wanted)


@pytest.mark.gpu
def test_slots_beyond_32_bits_are_written(far_caches: list[torch.Tensor]) -> None:
    k_cache, v_cache = far_caches
    inputs = Inputs(torch.bfloat16, "cuda")
    k, v = inputs.randn(40, 8, 128), inputs.randn(40, 8, 128)
    slots = FAR * 16 - 1 - inputs.permutation(64 * 16)[:40]
    before = [cache[:64].clone() for cache in far_caches]
    tilewise.append_kv(k, v, k_cache, v_cache, slots, backend="triton")
    for x, cache, low in zip((k, v), far_caches, before, strict=True):
        assert torch.equal(cache.view(-1, 8, 128)[slots], x)
        assert torch.equal(_bits(cache[:64]), _bits(low))


@pytest.mark.gpu
def test_batch_rows_beyond_32_bits_are_read() -> None:
    apart, shape = 2**31 + 128, (300, 8, 128)
    if torch.cuda.mem_get_info()[0] < 3 * 2 * apart:
        pytest.skip(f"needs {3 * 2 * apart >> 30} GiB of GPU memory")
    inputs = Inputs(torch.bfloat16, "cuda")
    q = inputs.randn(2, *shape)
    far = []
    for _ in range(2):
        size = apart + q[0].numel()
        buffer = torch.full((size,), torch.nan, dtype=torch.bfloat16, device="cuda")
        x = buffer.as_strided((2, *shape), (apart, *q.stride()[1:]))
        far.append(x.copy_(inputs.randn(2, *shape)))
    near = [x.clone(memory_format=torch.contiguous_format) for x in far]
    actual = tilewise.flash_attention(q, *far, causal=True, backend="triton")
    expected = tilewise.flash_attention(q, *near, causal=True, backend="triton")
    assert torch.equal(actual, expected)


# --- without one ----------------------------------------------------------------------------------


def test_the_contracts_would_run_on_a_gpu(tmp_path: Path) -> None:
    """`-m gpu` selects every contract of every Triton kernel, natively."""
    (tmp_path / "pretended_gpu.py").write_text(
        "import torch\ntorch.cuda.is_available = lambda: True\n"
    )
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu"]
    command += ["-p", "pretended_gpu", "-p", "no:cacheprovider", "test_contracts.py"]
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env=environment | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for case in CASES:
        name = f"test_agrees_with_naive[cuda-{_ids(case)}-triton-"
        assert name in done.stdout, name
    assert "[cpu-" not in done.stdout
