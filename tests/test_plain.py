"""Plain calls, which one C++ operator makes whole: they must not be told from ordinary ones.

A call counts as plain if it comes back although the ordinary way is barred.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tilewise
from tilewise import cpu, dispatch, native, testing
from tilewise.cases import Case, all_cases, public_function
from tilewise.fused.tables import RotaryTables, rotary_tables
from tilewise.library import Recorder
from tilewise.quant import QuantizedTensor, quantize
from tilewise.testing import Inputs

OPS = ("flash_attention", "paged_attention", "append_kv", "rms_norm", "quantized_matmul")
OPS += ("rotary_embedding",)
CALLS = (*OPS, "paged_attention ragged", "paged_attention int4")
CALLS += ("append_kv rotary", "append_kv int4", "append_kv int8 rotary")
CASES = [case for case in all_cases() if case.op in OPS]
DTYPES = (torch.bool, torch.int8, torch.int32, torch.int64, torch.uint16, torch.float8_e4m3fn)
DTYPES += (torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e8m0fnu)


@pytest.fixture(autouse=True)
def _needs_kernels() -> None:
    if native.why_not_cpu():
        pytest.skip(native.why_not_cpu())


class NotPlainError(Exception):
    """The ordinary way was taken."""


@contextlib.contextmanager
def _only_plain() -> Iterator[None]:
    def bar(*args: Any, **kwargs: Any) -> Any:
        raise NotPlainError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch.Op, "__call__", bar)
        yield


@contextlib.contextmanager
def _only_ordinary() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "plain_operators", lambda *args, **kwargs: None)
        yield


def _is_plain(op: str, arguments: dict[str, Any]) -> bool:
    with _only_plain():
        try:
            public_function(op)(**arguments)
        except NotPlainError:
            return False
    return True


def _arguments(call: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A plain call of each operation, some of them in several ways."""
    inputs = Inputs(dtype, "cpu")
    op, *ways = call.split()
    arguments = _simple_arguments(op, inputs)
    if "ragged" in ways:
        arguments["q"] = inputs.randn(5, 4, 8)
        arguments["cu_seqlens_q"] = inputs.tensor([0, 3, 5], torch.int32)
    if "rotary" in ways:
        positions = inputs.tensor([5, 0, 6], torch.int64)
        arguments |= {"rotary": rotary_tables(6, 7), "positions": positions}
    if "int8" in ways or "int4" in ways:
        stored = torch.uint8 if "int4" in ways else torch.int8
        for name in ("k", "v"):
            cache = arguments[f"{name}_cache"]
            width = cache.shape[3] // (2 if "int4" in ways else 1)
            codes = torch.arange(5 * 3 * 2 * width).view(5, 3, 2, width) * 7 % 127
            arguments[f"{name}_cache"] = codes.to(stored)
            arguments[f"{name}_scale"] = Inputs(torch.float32, "cpu").randn(5, 3, 2).abs()
    return arguments


def _simple_arguments(op: str, inputs: Inputs) -> dict[str, Any]:
    if op == "flash_attention":
        q, k, v = inputs.randn(2, 3, 4, 8), inputs.randn(2, 5, 2, 8), inputs.randn(2, 5, 2, 6)
        return {"q": q, "k": k, "v": v}
    if op == "rotary_embedding":
        positions = inputs.tensor([5, 0, 9], torch.int64)
        return {"x": inputs.randn(3, 2, 8), "tables": rotary_tables(6, 7), "positions": positions}
    if op == "rms_norm":
        return {"x": inputs.randn(3, 8), "weight": inputs.randn(8), "residual": inputs.randn(3, 8)}
    if op == "quantized_matmul":
        x, bias, residual = inputs.randn(3, 64), inputs.randn(10), inputs.randn(3, 10)
        weight = quantize(torch.randn(10, 64)).to_panels()
        return {"x": x, "weight": weight, "bias": bias, "residual": residual}
    if op == "append_kv":
        return {
            "k": inputs.randn(3, 2, 8),
            "v": inputs.randn(3, 2, 6),
            "k_cache": inputs.randn(5, 3, 2, 8),
            "v_cache": inputs.randn(5, 3, 2, 6),
            "slot_mapping": inputs.tensor([4, -1, 9], torch.int64),
        }
    return {
        "q": inputs.randn(2, 4, 8),
        "k_cache": inputs.randn(5, 3, 2, 8),
        "v_cache": inputs.randn(5, 3, 2, 6),
        "block_table": inputs.tensor([[4, 0, 1], [2, 3, 0]], torch.int32),
        "cache_seqlens": inputs.tensor([7, 5], torch.int32),
    }


def _of_case(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """A case's arguments, its weight in panels: in rows it is never plain."""
    arguments = case.make(Inputs(dtype, "cpu"))
    return {
        name: x.to_panels() if isinstance(x, QuantizedTensor) else x
        for name, x in arguments.items()
    }


def _tensors(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}


def _outcome(op: str, arguments: dict[str, Any]) -> Any:
    """What comes of a call: its results and what it wrote to, or its error."""
    caches = {
        name: x
        for name, x in arguments.items()
        if op == "append_kv" and name.endswith(("_cache", "_scale")) and x is not None
    }
    before = testing.map_tensors(caches, torch.clone)
    try:
        returned = public_function(op)(**arguments)
    except Exception as error:
        return type(error), str(error)
    if returned is None:
        results = tuple(testing.map_tensors(caches, torch.clone).values())
        for name, cache in caches.items():
            cache.copy_(before[name])
        return results
    return returned if isinstance(returned, tuple) else (returned,)


def _assert_no_difference(op: str, arguments: dict[str, Any]) -> None:
    scales = (x for name, x in _tensors(arguments).items() if name.endswith("_scale"))
    if op == "append_kv" and any(0 in x.stride() for x in scales):
        return  # heads that share a scale overwrite each other's
    actual = _outcome(op, arguments)
    with _only_ordinary():
        expected = _outcome(op, arguments)
    if not isinstance(expected[0], torch.Tensor):
        assert actual == expected
        return
    assert len(actual) == len(expected)
    for x, y in zip(actual, expected, strict=True):
        assert isinstance(x, torch.Tensor)
        assert (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride())
        assert torch.equal(*(z.contiguous().reshape(-1).view(torch.uint8) for z in (x, y)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.id}")
def test_both_ways_give_the_same(case: Case) -> None:
    for dtype in case.dtypes:
        arguments = _of_case(case, dtype)
        changes = [arguments, testing.strided(arguments)]
        if "attention" in case.op:
            changes.append(arguments | {"return_lse": True})
        for changed in changes:
            with testing.nan_filled_empty():
                _assert_no_difference(case.op, changed)


@pytest.mark.parametrize("op", OPS)
def test_many_cases_are_plain(op: str) -> None:
    """Or the test above would say nothing."""
    of_op = [case for case in CASES if case.op == op]
    plain = [case for case in of_op if _is_plain(op, _of_case(case, torch.float32))]
    assert len(plain) >= len(of_op) // 4


@pytest.mark.parametrize("call", CALLS)
def test_an_unusual_argument_makes_no_difference(call: str) -> None:
    """Each argument, and each two tensors, are something else, most often something wrong."""
    op = call.split()[0]
    numbers = (None, True, 1, 0, -2, 0.5, -0.5, math.nan, math.inf, -math.inf, "x", [1.0])
    numbers += (torch.ones(()),)
    windows = ((1, 0), [2, 2], (1,), (1.0, 0), (True, 0), (-2, 0), (0, -2), 3)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert _is_plain(op, _arguments(call, dtype))
    arguments = _arguments(call)
    options = ("causal", "scale", "softcap", "return_lse", "batch_invariant", "window")
    for name in options if "attention" in op else ("eps",) if op == "rms_norm" else ():
        for value in (*numbers, *windows):
            _assert_no_difference(op, arguments | {name: value})
    if op == "quantized_matmul":
        for activation in ("swiglu", "gelu", "x", 1, [], True, "silu"):
            _assert_no_difference(op, arguments | {"activation": activation})
            changes = {"activation": activation, "residual": arguments["x"][:, :5].contiguous()}
            _assert_no_difference(op, arguments | changes)
        for weight in (None, arguments["x"], quantize(torch.randn(9, 64)).to_panels()):
            _assert_no_difference(op, arguments | {"weight": weight, "activation": "swiglu"})
        assert _is_plain(op, arguments | {"act": "int8"})
        alone = {"x": arguments["x"].bfloat16(), "weight": arguments["weight"]}
        assert _is_plain(op, alone | {"out_dtype": torch.float32})
        for out_dtype in (torch.float32, torch.bfloat16, torch.float64, "x", 1, [], True):
            _assert_no_difference(op, alone | {"out_dtype": out_dtype})
            _assert_no_difference(op, arguments | {"out_dtype": out_dtype})
        for act in ("int8", "fp8", "x", 1, [], True):
            _assert_no_difference(op, arguments | {"act": act})
        fp8 = quantize(torch.randn(10, 64), "fp8").to_panels()
        _assert_no_difference(op, arguments | {"weight": fp8, "act": "fp8"})
    for name in {"rotary", "tables"} & {*arguments}:
        for tables in _other_tables(arguments[name]):
            _assert_no_difference(op, arguments | {name: tables})
            _assert_no_difference(op, arguments | {name: tables, "positions": None})
    tensors = _tensors(arguments)
    for name, x in tensors.items():
        for value in (None, [1.0], x.tolist(), x.to("meta"), *_other_shapes(x)):
            _assert_no_difference(op, arguments | {name: value})
        for dtype in DTYPES:
            value = torch.zeros(x.shape, dtype=torch.uint8).to(dtype)
            _assert_no_difference(op, arguments | {name: value})
    for pair in itertools.combinations(tensors, 2):
        for values in zip(*(_other_shapes(arguments[name]) for name in pair), strict=False):
            _assert_no_difference(op, arguments | dict(zip(pair, values, strict=True)))


def _other_shapes(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Tensors of `x`'s dtype with another shape or other strides."""
    yield from (x[None], x[0], x.repeat(*[1] * (x.dim() - 1), 100), x.transpose(0, -1))
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    yield from (x.repeat_interleave(2, -1)[..., ::2], x[..., :1].expand_as(x))
    for dim in range(x.dim()):
        yield from (x.narrow(dim, 0, 0), x.narrow(dim, 0, 1), torch.cat([x, x], dim))


def _other_tables(tables: RotaryTables) -> Iterator[Any]:
    yield from (None, tuple(tables), [*tables], tables[0], 3)
    yield from (tables._replace(interleaved=value) for value in (True, 1, 0, None, "x"))
    for name in ("cos", "sin"):
        x = getattr(tables, name)
        others = (None, 1.0, x.double(), x.half(), x.to("meta"), *_other_shapes(x))
        yield from (tables._replace(**{name: other}) for other in others)
    for cos, sin in zip(_other_shapes(tables.cos), _other_shapes(tables.sin), strict=True):
        yield tables._replace(cos=cos, sin=sin)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


class _Recorder(Recorder):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was shown to a recorder")


@pytest.mark.parametrize("call", CALLS)
def test_whoever_looks_sees_an_ordinary_call(call: str) -> None:
    op, arguments = call.split()[0], _arguments(call)
    assert _is_plain(op, arguments)
    assert _is_plain(op, arguments | {"backend": "cpu"})
    with tilewise.use_backend("cpu"):
        assert _is_plain(op, arguments)
    assert not _is_plain(op, arguments | {"backend": "naive"})
    with tilewise.use_backend("naive"):
        assert not _is_plain(op, arguments)
        assert _is_plain(op, arguments | {"backend": "cpu"})
    with tilewise.use_backend(**{op: "torch"}):
        assert not _is_plain(op, arguments)
    with _Mode():
        assert not _is_plain(op, arguments)
        with _Recorder():
            assert not _is_plain(op, arguments)
    with _Recorder():
        assert _is_plain(op, arguments)
        with _Mode():
            assert not _is_plain(op, arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch.OPS[op], "impls", dispatch.OPS[op].impls[1:])
        assert not _is_plain(op, arguments)
    for name, x in _tensors(arguments).items():
        if x.dtype == torch.float32:
            assert not _is_plain(op, arguments | {name: torch.nn.Parameter(x)})
            recorded = arguments | {name: x.clone().requires_grad_()}
            assert not _is_plain(op, recorded)
            with torch.no_grad():
                assert _is_plain(op, recorded)
                assert _is_plain(op, arguments | {name: torch.nn.Parameter(x)})

    def transformed(x: torch.Tensor) -> torch.Tensor:
        assert not _is_plain(op, arguments | {next(iter(arguments)): x})
        return x

    torch.func.vmap(transformed)(next(iter(arguments.values()))[None])
    if op in ("paged_attention", "append_kv"):
        assert not _is_plain(op, arguments | {"validate": True})


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_loaded_for_it(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_cpu", None)
    assert not _is_plain(op, _arguments(op))
    assert native._cpu is None
