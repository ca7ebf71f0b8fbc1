"""Weights side by side in huge pages: copies that share nothing but the pages."""

import itertools

import pytest
import torch

from tilewise.quant import huge_pages
from tilewise.quant.huge_pages import in_huge_pages

pytestmark = pytest.mark.skipif(not hasattr(huge_pages.mmap, "MADV_HUGEPAGE"), reason="not Linux")


def tensor(nbytes: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.randint(256, (nbytes,), dtype=torch.uint8).view(dtype)


def test_copies_are_equal_and_lie_side_by_side():
    originals = [tensor(100_000 + 7), tensor(1 << 20, torch.float16).view(-1, 64), tensor(70_000)]
    copies = [in_huge_pages(t) for t in originals]
    for original, copy in zip(originals, copies, strict=True):
        assert torch.equal(original.view(torch.uint8), copy.view(torch.uint8))
        assert copy.data_ptr() != original.data_ptr()
        assert copy.data_ptr() % 64 == 0
        assert copy.untyped_storage().nbytes() == original.nbytes
    spans = sorted((c.data_ptr(), c.data_ptr() + c.nbytes) for c in copies)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_a_tensor_larger_than_a_region_has_one_of_its_own(monkeypatch):
    monkeypatch.setattr(huge_pages, "_REGION", 1 << 20)
    monkeypatch.setattr(huge_pages, "_region", None)
    original = tensor((1 << 20) + 1)
    assert torch.equal(in_huge_pages(original), original)


def test_what_is_small_stays():
    small, meta = tensor(1000), torch.empty(1 << 20, device="meta")
    assert in_huge_pages(small) is small
    assert in_huge_pages(meta) is meta
