"""Weights and caches in huge pages.

A product with one row of x reads all of a weight, once, at the speed of memory, and with pages of
4 KB a processor spends half of that time on finding out where they are: its table of addresses has
room for a few MB of them, and under a hypervisor every miss is looked up twice. Linux gives pages
of 2 MB to who asks for them, but only where a whole one fits: so weights, most of which are
smaller, lie side by side. A large cache has its own.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from collections.abc import Sequence

import torch

_SMALLEST = 64 << 10
"""Bytes below which a tensor stays where it is."""

_REGION = 64 << 20
"""Bytes of addresses asked for at a time; what is never written to takes no memory."""

_LARGE = 32 << 20
"""Bytes from which `malloc`, too, asks the system for new memory each time."""

_ALIGNMENT = 64
_HAS_HUGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE")
_lock = threading.Lock()
_region: mmap.mmap | None = None
_used = 0


def new_empty(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """`like.new_empty(shape)`, in huge pages where that is large and on the CPU.

    The memory is freed with the last of the tensors that lie beside each other in it.
    """
    nbytes = math.prod(shape) * like.element_size()
    if not _is_worth_it(like, nbytes):
        return like.new_empty(shape)
    region, offset = _reserve(nbytes)
    place = torch.frombuffer(region, dtype=torch.uint8, count=nbytes, offset=offset)
    return place.view(like.dtype).view(shape)


def in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the tensor in huge pages; the tensor itself where it is small or not on the CPU."""
    if not _is_worth_it(tensor, tensor.nbytes):
        return tensor
    return new_empty(tensor, tensor.shape).copy_(tensor)


def empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """`torch.empty`, in huge pages of its own where that is large and on the CPU."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LARGE or torch.device(device).type != "cpu" or not _HAS_HUGE_PAGES:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(_map(nbytes), dtype=torch.uint8, count=nbytes).view(dtype).view(shape)


def _is_worth_it(tensor: torch.Tensor, nbytes: int) -> bool:
    if type(tensor) is not torch.Tensor or tensor.device.type != "cpu":
        return False
    return nbytes >= _SMALLEST and _HAS_HUGE_PAGES


def _map(nbytes: int) -> mmap.mmap:
    """New memory, for which huge pages are asked."""
    # Private: memory that could be shared with other processes has small pages.
    region = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        region.madvise(mmap.MADV_HUGEPAGE)
    return region


def _reserve(size: int) -> tuple[mmap.mmap, int]:
    """A region with `size` free bytes from the returned offset on."""
    global _region, _used
    with _lock:
        if _region is None or _used + size > len(_region):
            _region, _used = _map(max(size, _REGION)), 0
        offset = _used
        _used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return _region, offset
