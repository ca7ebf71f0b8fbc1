"""Projections that are stored as several blocks of rows, and the router of a mixture of experts."""

import pytest
import torch

import tilewise
from tilewise.model.layers import Router, RowBlocks, linear, project_parts, put


@pytest.mark.parametrize("rows", [(8,), (2, 6), (3, 5), (1, 1, 6), (7, 1)])
@pytest.mark.parametrize("sizes", [(2, 4, 2), (8,), (1, 7)])
def test_parts_of_a_projection_are_those_of_the_whole(rows, sizes):
    weight, bias, x = torch.randn(8, 5), torch.randn(8), torch.randn(2, 3, 5)
    projection = linear(list(weight.split(rows)), bias)
    assert isinstance(projection, RowBlocks) == (len(rows) > 1)
    expected = torch.nn.functional.linear(x, weight, bias).split(sizes, dim=-1)
    parts = project_parts(projection, x, sizes)
    assert [part.shape for part in parts] == [part.shape for part in expected]
    for part, wanted in zip(parts, expected, strict=True):
        torch.testing.assert_close(part, wanted)


def test_a_part_within_a_block_is_a_view():
    projection = linear([torch.randn(6, 5), torch.randn(2, 5)])
    q, k, v = project_parts(projection, torch.randn(5), (4, 2, 2))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert v.untyped_storage().data_ptr() != k.untyped_storage().data_ptr()


def test_a_router_rounds_nothing_and_stays_as_it_is():
    model = torch.nn.ModuleDict({"router": Router(24, 5, bias=False)})
    weight, x = torch.randn(5, 24), torch.randn(3, 24).bfloat16()
    put(model, "router", {"weight": [weight]})
    tilewise.quantize_(model, "int8")
    seen = []
    model.router.register_forward_hook(lambda module, args, logits: seen.append(logits))
    logits = model.router(x)
    assert logits.dtype == torch.float32
    assert seen == [logits]
    torch.testing.assert_close(logits, x.float() @ weight.mT)
