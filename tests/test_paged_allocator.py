"""The page allocator as a data structure, against a model that keeps every token in a list."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tilewise.paged.allocator import OutOfPages, PageAllocator


class Allocator(RuleBasedStateMachine):
    """Sequences of distinct tokens, and a memory that the allocator's answers are applied to."""

    @initialize(num_pages=st.integers(1, 12), page_size=st.integers(1, 4))
    def start(self, num_pages, page_size):
        self.allocator = PageAllocator(num_pages, page_size)
        self.memory = [None] * (num_pages * page_size)
        self.tokens = {}  # of each sequence
        self.family = {}  # of each sequence: the one it was forked from, over generations
        self.written = 0

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.tokens)))

    def holders(self):
        return Counter(page for seq in self.tokens for page in self.allocator.pages(seq))

    def pages_wanted(self, seqs, counts):
        """By doing what `append` would, one sequence after the other."""
        size, wanted, holders = self.allocator.page_size, 0, self.holders()
        for seq, count in zip(seqs, counts, strict=True):
            length = len(self.tokens[seq])
            if count and length % size:
                last = self.allocator.pages(seq)[-1]
                if holders[last] > 1:
                    holders[last] -= 1
                    wanted += 1
            wanted += sum(position % size == 0 for position in range(length, length + count))
        return wanted

    @rule()
    def add_sequence(self):
        seq = self.allocator.add_sequence()
        assert seq not in self.family
        self.tokens[seq], self.family[seq] = [], seq

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def fork(self, data):
        parent = self.pick(data)
        free = self.allocator.num_free_pages
        seq = self.allocator.fork(parent)
        assert seq not in self.family
        assert self.allocator.num_free_pages == free
        self.tokens[seq], self.family[seq] = list(self.tokens[parent]), self.family[parent]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free(self, data):
        seq = self.pick(data)
        self.allocator.free(seq)
        del self.tokens[seq]
        with pytest.raises(ValueError, match=f"seq: {seq} has been freed"):
            self.allocator.free(seq)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def truncate(self, data):
        seq = self.pick(data)
        length = data.draw(st.integers(0, len(self.tokens[seq])))
        self.allocator.truncate(seq, length)
        del self.tokens[seq][length:]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def append(self, data):
        seqs = data.draw(st.lists(st.sampled_from(sorted(self.tokens)), unique=True, max_size=4))
        counts = [data.draw(st.integers(0, 6)) for _ in seqs]
        free, wanted = self.allocator.num_free_pages, self.pages_wanted(seqs, counts)
        if wanted > free:
            with pytest.raises(OutOfPages) as caught:
                self.allocator.append(seqs, counts)
            assert (caught.value.wanted, caught.value.free) == (wanted, free)
            return
        slots, copies = self.allocator.append(seqs, counts)
        assert self.allocator.num_free_pages == free - wanted
        size = self.allocator.page_size
        for source, destination in copies:
            page = self.memory[source * size : (source + 1) * size]
            self.memory[destination * size : (destination + 1) * size] = page
        assert len(slots) == sum(counts)
        slots = iter(slots)
        for seq, count in zip(seqs, counts, strict=True):
            for _ in range(count):
                self.written += 1
                self.memory[next(slots)] = self.written
                self.tokens[seq].append(self.written)

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        size = self.allocator.page_size
        for seq, tokens in self.tokens.items():
            pages = self.allocator.pages(seq)
            assert self.allocator.length(seq) == len(tokens)
            assert len(pages) == -(-len(tokens) // size)
            slots = [pages[i // size] * size + i % size for i in range(len(tokens))]
            assert [self.memory[slot] for slot in slots] == tokens

    @invariant()
    def references_count_the_holders(self):
        holders = self.holders()
        for page in range(self.allocator.num_pages):
            assert self.allocator.references(page) == holders[page]
        assert self.allocator.num_free_pages == self.allocator.num_pages - len(holders)

    @invariant()
    def only_forks_share_pages(self):
        family_of_page = {}
        for seq in self.tokens:
            for page in self.allocator.pages(seq):
                assert family_of_page.setdefault(page, self.family[seq]) == self.family[seq]


Allocator.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAllocator = Allocator.TestCase


def test_out_of_pages_says_how_many_and_changes_nothing():
    allocator = PageAllocator(num_pages=4, page_size=2)
    a, b = allocator.add_sequence(), allocator.add_sequence()
    allocator.append([a], [3])
    with pytest.raises(OutOfPages, match=r"^out of pages: 3 wanted, 2 free$"):
        allocator.append([a, b], [2, 3])
    assert (allocator.length(a), allocator.length(b)) == (3, 0)
    assert allocator.num_free_pages == 2
    assert allocator.append([a, b], [1, 3]).slots == [3, 4, 5, 6]


def test_the_last_holder_keeps_the_page():
    allocator = PageAllocator(num_pages=3, page_size=4)
    parent = allocator.add_sequence()
    allocator.append([parent], [2])
    children = [allocator.fork(parent), allocator.fork(parent)]
    slots, copies = allocator.append([parent, *children], [1, 1, 1])
    assert copies == [(0, 1), (0, 2)]
    assert slots == [6, 10, 2]


def test_appending_nothing_copies_nothing():
    allocator = PageAllocator(num_pages=1, page_size=4)
    parent = allocator.add_sequence()
    allocator.append([parent], [2])
    child = allocator.fork(parent)
    assert allocator.append([child], [0]) == ([], [])
    assert allocator.references(0) == 2


def test_truncating_into_a_shared_page_copies_it_before_the_next_write():
    allocator = PageAllocator(num_pages=3, page_size=2)
    parent = allocator.add_sequence()
    allocator.append([parent], [4])
    child = allocator.fork(parent)
    allocator.truncate(child, 1)
    assert allocator.append([child], [1]) == ([5], [(0, 2)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: PageAllocator(0, 4), "num_pages: must be >= 1, got 0"),
        (lambda a: PageAllocator(4, 0), "page_size: must be >= 1, got 0"),
        (lambda a: a.fork(7), "seq: there is no sequence 7"),
        (lambda a: a.length(-1), "seq: there is no sequence -1"),
        (lambda a: a.append([0, 0], [1, 1]), r"seqs: must all be different, got \[0, 0\]"),
        (lambda a: a.append([0], [1, 2]), "counts: must be as many as seqs, 1, got 2"),
        (lambda a: a.append([0], [-1]), "counts: must be >= 0, got -1"),
        (lambda a: a.append(0, [1]), "seqs: must be a sequence of ints, got 0"),
        (lambda a: a.append([0], 1), "counts: must be a sequence of ints, got 1"),
        (lambda a: a.append([0, 9], [1, 1]), "seq: there is no sequence 9"),
        (lambda a: a.append([0], [1.5]), "counts: must be an int, got float"),
        (lambda a: a.append(["0"], [1]), "seqs: must be an int, got str"),
        (lambda a: a.append([0], [[1]]), "counts: must be an int, got list"),
        (lambda a: a.pages("0"), "seq: must be an int, got str"),
        (lambda a: a.truncate(0, 1.0), "length: must be an int, got float"),
        (lambda a: PageAllocator(4.0, 4), "num_pages: must be an int, got float"),
        (lambda a: a.truncate(0, 4), "length: must be from 0 to 3, sequence 0's, got 4"),
        (lambda a: a.truncate(0, -1), "length: must be from 0 to 3, sequence 0's, got -1"),
    ],
)
def test_names_the_bad_argument(call, message):
    allocator = PageAllocator(num_pages=4, page_size=2)
    allocator.append([allocator.add_sequence()], [3])
    with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
        call(allocator)
    assert allocator.length(0) == 3
    assert allocator.num_free_pages == 2


@pytest.mark.parametrize("number", [np.int64, lambda n: torch.tensor(n)], ids=["numpy", "torch"])
def test_takes_the_integers_of_arrays_and_keeps_ints(number):
    allocator = PageAllocator(num_pages=4, page_size=2)
    seq = allocator.add_sequence()
    assert allocator.append([number(seq)], [number(3)]) == ([0, 1, 2], [])
    assert type(allocator.length(number(seq))) is int
    allocator.truncate(number(seq), number(1))
    assert allocator.append([seq], [1]).slots == [1]
    assert list(allocator.pages(allocator.fork(number(seq)))) == [0]
    allocator.free(number(seq))
    with pytest.raises(ValueError, match="seq: 0 has been freed"):
        allocator.length(number(seq))


def test_needs_no_torch():
    import tilewise.paged.allocator as module

    code = (
        "import runpy, sys; sys.modules['torch'] = None; "
        f"runpy.run_path({module.__file__!r})['PageAllocator'](1, 1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
