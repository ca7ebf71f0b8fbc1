"""Weights side by side in huge pages, caches in their own: tensors that share nothing but pages."""

import itertools

import pytest
import torch

from tilewise import huge_pages
from tilewise.huge_pages import in_huge_pages

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_a_large_tensor_has_memory_of_its_own(monkeypatch, dtype):
    monkeypatch.setattr(huge_pages, "_LARGE", 4096)
    tensors = [huge_pages.empty((3, 5, 1024), dtype) for _ in range(2)]
    for t, value in zip(tensors, (1, 2), strict=True):
        assert (t.shape, t.dtype, t.stride()) == ((3, 5, 1024), dtype, (5120, 1024, 1))
        t.copy_(torch.full(t.shape, value, dtype=torch.float32))
    assert [t.float().unique().tolist() for t in tensors] == [[1], [2]]
    copy = tensors[0].clone()
    del tensors
    assert copy.float().unique().tolist() == [1]


def test_only_large_tensors_on_the_cpu_are_in_huge_pages(monkeypatch):
    monkeypatch.setattr(huge_pages, "_map", lambda nbytes: pytest.fail(f"{nbytes} bytes"))
    assert huge_pages.empty((2, 3), torch.float16).shape == (2, 3)
    assert huge_pages.empty((1 << 26,), torch.float32, "meta").device.type == "meta"
