"""Which pages belong to which sequence: a data structure without tensors.

Pages are counted by reference. A fork shares all pages of its parent at the price of one count
each; a page is copied only when a sequence is about to write to it while others hold it as well,
and since tokens are only ever added at the end, that can only be a sequence's last page. The
allocator says which pages to copy; moving the bytes is the cache's work.

Source: Kwon et al., PagedAttention, 2023 (arXiv:2309.06180), sections 4.2 to 4.4.
"""

from __future__ import annotations

import operator
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, SupportsIndex


class OutOfPages(RuntimeError):
    """More pages were wanted than are free; nothing was changed.

    Args:
        wanted: pages that the call needed.
        free: pages that there were.
    """

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(f"out of pages: {wanted} wanted, {free} free")
        self.wanted = wanted
        self.free = free


class Appended(NamedTuple):
    """What `PageAllocator.append` did.

    Args:
        slots: page * page_size + slot within the page of every new token, sequence by sequence.
        copies: (source, destination) pages, to be copied before anything is written.
    """

    slots: list[int]
    copies: list[tuple[int, int]]


@dataclass
class _Sequence:
    length: int = 0
    pages: array[int] = field(default_factory=lambda: array("i"))


class PageAllocator:
    """Hands out the pages of a cache.

    Every operation takes time in proportion to the pages and slots that it names, whatever the
    size of the cache.

    Args:
        num_pages: how many pages there are, numbered from 0.
        page_size: tokens per page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if _integer(name, value) < 1:
                raise ValueError(f"{name}: must be >= 1, got {value}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._references = [0] * num_pages
        # A stack: the page freed last is the likeliest to be in a processor's cache still.
        self._free = list(range(num_pages - 1, -1, -1))
        self._sequences: dict[int, _Sequence] = {}
        self._next_sequence = 0

    @property
    def num_free_pages(self) -> int:
        """How many pages no sequence holds."""
        return len(self._free)

    def add_sequence(self) -> int:
        """A new empty sequence; its number is never used again."""
        return self._add(_Sequence())

    def fork(self, seq: int) -> int:
        """A new sequence with the tokens of `seq`, sharing its pages."""
        parent = self._find(seq)
        for page in parent.pages:
            self._references[page] += 1
        return self._add(_Sequence(parent.length, parent.pages[:]))

    def free(self, seq: int) -> None:
        """Forget a sequence; pages that no other holds are free again."""
        self._release(self._find(seq).pages)
        del self._sequences[operator.index(seq)]

    def truncate(self, seq: int, length: int) -> None:
        """Forget the tokens from `length` on, such as drafts that were rejected."""
        sequence, length = self._find(seq), _integer("length", length)
        if not 0 <= length <= sequence.length:
            raise ValueError(
                f"length: must be from 0 to {sequence.length}, sequence {seq}'s, got {length}"
            )
        kept = -(-length // self.page_size)
        self._release(sequence.pages[kept:])
        del sequence.pages[kept:]
        sequence.length = length

    def append(self, seqs: Sequence[int], counts: Sequence[int]) -> Appended:
        """Make room for `counts[i]` more tokens in sequence `seqs[i]`, for all of them or none.

        Raises:
            OutOfPages: if they do not all fit; nothing is changed then.
            ValueError: for an unknown or repeated sequence, or a negative count.
        """
        for name, numbers in (("seqs", seqs), ("counts", counts)):
            if isinstance(numbers, int):
                raise TypeError(f"{name}: must be a sequence of ints, got {numbers}")
        # Before anything changes: a count that cannot be added would leave half of an append.
        seqs = [_integer("seqs", seq) for seq in seqs]
        counts = [_integer("counts", count) for count in counts]
        if len(seqs) != len(counts):
            raise ValueError(f"counts: must be as many as seqs, {len(seqs)}, got {len(counts)}")
        if len(set(seqs)) != len(seqs):
            raise ValueError(f"seqs: must all be different, got {list(seqs)}")
        for count in counts:
            if count < 0:
                raise ValueError(f"counts: must be >= 0, got {count}")
        growing = [(self._find(seq), count) for seq, count in zip(seqs, counts, strict=True)]
        wanted = self._pages_wanted(growing)
        if wanted > len(self._free):
            raise OutOfPages(wanted, len(self._free))
        slots: list[int] = []
        copies: list[tuple[int, int]] = []
        for sequence, count in growing:
            if count:
                self._own_last_page(sequence, copies)
                self._grow(sequence, count, slots)
        return Appended(slots, copies)

    def length(self, seq: int) -> int:
        """How many tokens a sequence has."""
        return self._find(seq).length

    def pages(self, seq: int) -> array[int]:
        """A sequence's pages in order, as 32-bit integers; not to be changed."""
        return self._find(seq).pages

    def references(self, page: int) -> int:
        """How many sequences hold a page."""
        return self._references[page]

    def _add(self, sequence: _Sequence) -> int:
        seq = self._next_sequence
        self._next_sequence += 1
        self._sequences[seq] = sequence
        return seq

    def _find(self, seq: int) -> _Sequence:
        seq = _integer("seq", seq)
        sequence = self._sequences.get(seq)
        if sequence is None:
            was_freed = 0 <= seq < self._next_sequence
            raise ValueError(
                f"seq: {seq} has been freed" if was_freed else f"seq: there is no sequence {seq}"
            )
        return sequence

    def _allocate(self) -> int:
        page = self._free.pop()
        self._references[page] = 1
        return page

    def _release(self, pages: array[int]) -> None:
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def _pages_wanted(self, growing: list[tuple[_Sequence, int]]) -> int:
        wanted = 0
        writers: Counter[int] = Counter()
        for sequence, count in growing:
            wanted += -(-(sequence.length + count) // self.page_size) - len(sequence.pages)
            if count and sequence.length % self.page_size:
                writers[sequence.pages[-1]] += 1
        # If all who hold a page write to it, the last one can keep it.
        return wanted + sum(min(n, self._references[page] - 1) for page, n in writers.items())

    def _own_last_page(self, sequence: _Sequence, copies: list[tuple[int, int]]) -> None:
        """Replace the last page by a copy if it will be written to and others hold it."""
        if sequence.length % self.page_size == 0:
            return
        shared = sequence.pages[-1]
        if self._references[shared] > 1:
            self._references[shared] -= 1
            sequence.pages[-1] = self._allocate()
            copies.append((shared, sequence.pages[-1]))

    def _grow(self, sequence: _Sequence, count: int, slots: list[int]) -> None:
        position, end = sequence.length, sequence.length + count
        while position < end:
            offset = position % self.page_size
            if offset == 0:
                sequence.pages.append(self._allocate())
            taken = min(self.page_size - offset, end - position)
            first = sequence.pages[-1] * self.page_size + offset
            slots.extend(range(first, first + taken))
            position += taken
        sequence.length = end


def _integer(name: str, value: SupportsIndex) -> int:
    """An int, of NumPy's or a tensor of one element too."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: must be an int, got {type(value).__name__}") from None
