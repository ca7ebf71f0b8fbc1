"""Recordings of C++ kernel calls: what they compute again, and what they refuse."""

from __future__ import annotations

import gc
import math
import threading

import pytest
import torch
import torch.nn.functional as F

import tilewise as tw
from tilewise import native
from tilewise.graph import CaptureError, CpuGraph
from tilewise.testing import Inputs, assert_agrees, nan_filled_empty

pytestmark = pytest.mark.skipif(
    native.why_not_cpu() is not None, reason=native.why_not_cpu() or "the C++ kernels are there"
)


class Mixture:
    """A router and its experts, on an input that stays where it is."""

    def __init__(self, rows: int = 3) -> None:
        inputs = Inputs()
        self.x, self.router = inputs.randn(rows, 64), inputs.randn(5, 64)
        self.up = tw.quantize(inputs.randn(5, 64, 64), search="minmax").to_panels()
        self.down = tw.quantize(inputs.randn(5, 64, 32), group_size=32).to_panels()

    def __call__(self) -> torch.Tensor:
        return tw.moe(self.x, tw.router_logits(self.x, self.router), self.up, self.down, top_k=2)


class Layer:
    """A norm, a projection and an activation, on an input that stays where it is."""

    def __init__(self, rows: int = 3) -> None:
        inputs = Inputs()
        self.x, self.norm = inputs.randn(rows, 64), inputs.randn(64)
        self.weight = tw.quantize(inputs.randn(512, 64), search="minmax").to_panels()

    def __call__(self) -> torch.Tensor:
        h = tw.rms_norm(self.x, self.norm, 1e-5)
        return tw.quantized_matmul(h, self.weight, activation="swiglu")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("make", [Layer, Mixture])
def test_a_replay_computes_what_a_call_does(make, threads):
    layer, before = make(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with nan_filled_empty():
            graph, out = CpuGraph.capture(layer)
        for seed in range(20):
            layer.x.copy_(Inputs(seed=seed).randn(*layer.x.shape))
            expected = layer()
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out, expected)
    finally:
        torch.set_num_threads(before)


def test_nothing_is_computed_before_a_replay():
    k, cache = Inputs().randn(3, 2, 8), torch.zeros(4, 2, 2, 8)
    slots = torch.tensor([5, 0, 3])
    graph, _ = CpuGraph.capture(lambda: tw.append_kv(k, k, cache, cache, slots))
    assert not cache.any()
    graph.replay()
    assert torch.equal(cache.flatten(0, 1)[slots], k)


def test_a_replay_needs_nothing_that_python_holds():
    layer = Layer()
    expected, x = layer(), layer.x
    graph, out = CpuGraph.capture(layer)
    del layer
    gc.collect()
    x.mul_(1)
    graph.replay()
    assert torch.equal(out, expected)


def test_two_recordings_on_two_threads():
    layers = [Layer(2), Layer(5)]
    graphs = [CpuGraph.capture(layer) for layer in layers]
    expected = [layer() for layer in layers]

    def replay(graph):
        for _ in range(50):
            graph.replay()

    threads = [threading.Thread(target=replay, args=(graph,)) for graph, _ in graphs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (_, out), values in zip(graphs, expected, strict=True):
        assert torch.equal(out, values)


@pytest.mark.parametrize(
    ("compute", "what"),
    [
        (lambda x: tw.swiglu(x, x) + 1, "aten.add"),
        (lambda x: tw.swiglu(x, x) * float(x[0, 0]), "aten._local_scalar_dense"),
        (lambda x: tw.swiglu(x, x).contiguous().mT.contiguous(), "aten.clone"),
        (lambda x: tw.swiglu(x, x, backend="naive"), "aten.silu"),
        (lambda x: x.zero_(), "aten.zero_"),
    ],
)
def test_what_pytorch_computes_is_refused(compute, what):
    x = Inputs().randn(3, 8)
    with pytest.raises(CaptureError, match=f"{what}.* only C\\+\\+ kernels can be recorded"):
        CpuGraph.capture(lambda: compute(x))
    layer = Layer()  # and the thread no longer records
    graph, out = CpuGraph.capture(layer)
    graph.replay()
    assert torch.equal(out, layer())


def test_views_are_no_calls():
    x = Inputs().randn(4, 6, 8)
    graph, out = CpuGraph.capture(lambda: tw.swiglu(*x.unflatten(-1, (2, 4)).unbind(-2)).mT[1:])
    x.neg_()
    graph.replay()
    assert torch.equal(out, tw.swiglu(*x.unflatten(-1, (2, 4)).unbind(-2)).mT[1:])


def test_an_error_of_the_function_ends_the_recording():
    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        CpuGraph.capture(fail)
    CpuGraph.capture(Layer())


def test_an_error_in_a_kernel_reaches_python():
    table = tw.quantize(Inputs().randn(16, 32)).to_panels()
    ids = torch.tensor([3])
    graph, out = CpuGraph.capture(lambda: tw.quantized_embedding(ids, table))
    ids.fill_(16)
    with pytest.raises(RuntimeError, match="token_ids: out of range"):
        graph.replay()
    ids.fill_(5)
    graph.replay()
    assert torch.equal(out, table.dequantize()[ids])


@pytest.mark.parametrize("make", [Layer, Mixture])
def test_a_replay_may_be_about_the_first_rows_alone(make):
    layer, short = make(40), make(40)
    graph, out = CpuGraph.capture(layer, rows=40)
    x = layer.x.clone()
    for rows in (1, 7, 16, 39, 40):
        layer.x.fill_(torch.nan)
        layer.x[:rows] = x[:rows]
        short.x = x[:rows]
        out.fill_(-1)
        graph.replay(rows=rows)
        assert torch.equal(out[:rows], short())
        assert rows == 40 or (out[rows:] == -1).any()  # not all of them are computed


def test_heads_are_rows_of_their_tokens():
    inputs = Inputs()
    q, norm, tables = inputs.randn(12, 3, 8), inputs.randn(8), tw.rotary_tables(8, 20)
    positions, slots = torch.arange(12), torch.arange(12)
    cache = torch.zeros(2, 8, 3, 8)

    def turned(rows: int) -> torch.Tensor:
        h = tw.rms_norm(q[:rows], norm, 1e-5)
        tw.append_kv(h, h, cache, cache, slots[:rows])
        return tw.swiglu(h, tw.rotary_embedding(h, tables, positions[:rows]))

    graph, out = CpuGraph.capture(lambda: turned(12), rows=12)
    graph.replay(rows=5)
    written = cache.flatten(0, 1).any(-1).any(-1)
    assert written.tolist() == [True] * 5 + [False] * 11
    assert torch.equal(out[:5], turned(5))


def test_numbers_of_rows_that_are_not_there_are_not_looked_at():
    x, numbers = Inputs().randn(60, 3), torch.arange(40)
    graph, out = CpuGraph.capture(lambda: x[numbers], rows=40)
    numbers[5:] = 10**6
    graph.replay(rows=5)
    assert torch.equal(out[:5], x[:5])


@pytest.mark.parametrize("rows", [0, 41, -1])
def test_rows_that_were_not_recorded_are_refused(rows):
    graph, _ = CpuGraph.capture(Layer(40), rows=40)
    with pytest.raises(RuntimeError, match="rows: from 1 to what was recorded"):
        graph.replay(rows=rows)
    graph, _ = CpuGraph.capture(Layer(40))
    with pytest.raises(RuntimeError, match="rows: from 1 to what was recorded"):
        graph.replay(rows=3)


def test_results_that_nobody_holds_share_memory():
    x, norm = Inputs().randn(4, 64), Inputs().randn(64)
    places, held = [], []

    def chain() -> torch.Tensor:
        h = x
        for i in range(20):
            h = tw.rms_norm(h, norm, 1e-5)
            places.append(h.data_ptr())
            if i % 5 == 0:
                held.append(h.view(-1)[3:])  # a view holds all of it
        return h

    graph, out = CpuGraph.capture(chain)
    assert len(set(places)) == len(held) + 2
    graph.replay()
    expected = x
    for i in range(20):
        expected = tw.rms_norm(expected, norm, 1e-5)
        if i % 5 == 0:
            assert torch.equal(held[i // 5], expected.view(-1)[3:])
    assert torch.equal(out, expected)
    del graph
    gc.collect()
    assert torch.equal(out, expected)  # and outlives the recording


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_rows_by_number_are_recorded(dtype):
    x = torch.arange(60).view(5, 3, 4).to(dtype)
    numbers = torch.tensor([4, 0, -1, 2])
    for of in (x, x[:, 1], x[::2], x[:, 0, 0], x.new_empty(3, 0)):
        numbers.copy_(torch.tensor([2, 0, -1, 2]))
        graph, out = CpuGraph.capture(lambda of=of: of[numbers])
        graph.replay()
        assert torch.equal(out, of[numbers])
        numbers[0] = -3
        graph.replay()
        assert torch.equal(out, of[numbers])
        numbers[0] = len(of)
        with pytest.raises(RuntimeError, match="index: out of range"):
            graph.replay()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [1, 31, 64, 577])
def test_linear_layers_of_a_few_rows_are_recorded(dtype, has_bias, rows, depth):
    inputs = Inputs(dtype)
    x, weight = inputs.randn(rows, depth + 3)[:, :depth], inputs.randn(70, depth)
    bias = inputs.randn(70) if has_bias else None

    def layer() -> torch.Tensor:
        return F.linear(x, weight, bias)

    for grad_mode in (torch.no_grad, torch.inference_mode):
        with grad_mode():
            graph, out = CpuGraph.capture(layer)
        for factor in (1, -2):
            x *= factor
            graph.replay()
            args = (x, weight, *([] if bias is None else [bias]))
            truth = F.linear(*(t.double() for t in args))
            assert_agrees(out, F.linear(*args), truth)


def test_tiny_and_infinite_numbers_come_through_a_recorded_linear_layer():
    weight = torch.ones(3, 64, dtype=torch.bfloat16)
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    graph, out = CpuGraph.capture(lambda: F.linear(x, weight))
    for value in (2.0**-133, 2.0**-126, math.inf, -math.inf, math.nan, 3e38):
        x[0, 5] = value
        graph.replay()
        torch.testing.assert_close(out, F.linear(x, weight), rtol=0, atol=0, equal_nan=True)


def test_an_embedding_is_recorded():
    table, ids = Inputs().randn(20, 6), torch.tensor([3, 0, 19])
    graph, out = CpuGraph.capture(lambda: F.embedding(ids, table))
    graph.replay()
    assert torch.equal(out, table[ids])
    for bad in (20, -1):
        ids[1] = bad
        with pytest.raises(RuntimeError, match="index: out of range"):
            graph.replay()
    with pytest.raises(CaptureError, match=r"aten\.embedding"):
        CpuGraph.capture(lambda: torch.ops.aten.embedding(table[0], ids))
    CpuGraph.capture(lambda: torch.ops.aten.embedding(table, ids, -1, True, True))


W, B = torch.ones(4, 8), torch.ones(4)


@pytest.mark.parametrize(
    "layer",
    [
        lambda x: F.linear(x.expand(5, 8), W),
        lambda x: x @ W.view(8, 4),
        lambda x: F.linear(x, W[:, :7]),
        lambda x: torch.mm(x, W.view(2, 16).mT),
        lambda x: torch.mm(x[:, :7], W.mT),
        lambda x: F.linear(x, W[0]),
        lambda x: torch.addmm(B[None], x, W.mT),
        lambda x: torch.addmm(B[:1], x, W.mT),
        lambda x: torch.addmm(B, x, W.mT, beta=2),
        lambda x: F.linear(x, W, B.view(torch.int32)),
        lambda x: F.linear(x.view(torch.float64), W.view(torch.float64)),
    ],
    ids=[
        *("rows", "not turned", "strides", "depth", "depth of x", "vector"),
        *("bias of rows", "one bias", "beta", "integers", "float64"),
    ],
)
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_other_products_are_refused(layer, grad_mode):
    x = Inputs().randn(1, 8)
    wanted = r"aten\.(linear|mm|addmm|mv|matmul|_unsafe_view|mul|sum|dot|reshape|clone)"
    with grad_mode(), pytest.raises(CaptureError, match=wanted):
        CpuGraph.capture(lambda: layer(x))


@pytest.mark.parametrize("layer", [lambda x: F.linear(x, W), lambda x: torch.mm(x, W.mT)])
def test_who_asks_for_another_backend_gets_no_other_product(layer):
    x = Inputs().randn(1, 8)
    for backend in ("cpu", "auto"):
        with tw.use_backend(backend):
            CpuGraph.capture(lambda: layer(x))
    with tw.use_backend(moe="torch"), pytest.raises(CaptureError, match=r"aten\.(linear|mm)"):
        CpuGraph.capture(lambda: layer(x))


@pytest.mark.parametrize(
    "take",
    [
        lambda x: x[x[:, 0] > 0],
        lambda x: x[torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)],
        lambda x: x[:, torch.zeros(2, dtype=torch.int64)],
        lambda x: x.mT[torch.zeros(2, dtype=torch.int64)],
        lambda x: x[torch.zeros(2, 2, dtype=torch.int64)],
        lambda x: x[:0][torch.zeros(0, dtype=torch.int64)],
    ],
    ids=["mask", "elements", "columns", "scattered", "table", "no rows"],
)
def test_what_is_not_rows_by_number_is_refused(take):
    x = Inputs().randn(3, 8)
    with pytest.raises(CaptureError, match="only C\\+\\+ kernels can be recorded"):
        CpuGraph.capture(lambda: take(x))
