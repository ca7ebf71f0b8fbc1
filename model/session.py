"""What one call of `generate` leaves to the next: a cache, and recordings of calls on it.

Recording takes as long as a short prompt, and a large cache has to be asked of the system page by
page, so both are kept while the model and all that a recording depends on stay as they were.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tilewise.dispatch import OPS
from tilewise.model.decode import Decoder, Sampler
from tilewise.model.gpt import GPT
from tilewise.model.prefill import Prefill
from tilewise.model.recorded import RecordedModel
from tilewise.paged import PagedKVCache

__all__ = ["Session"]

_PAGE_SIZE = 16

_PAGES_AT_A_TIME = 64
"""On a CPU, where memory is not taken before it is written to: a longer text may be next."""

_MOST_KEPT = 256 << 20
"""Bytes of a cache that may wait for the next call."""

_MOST_PREFILLS = 2
"""For so many numbers of prompts at once: each holds the activations of a chunk."""


class Session:
    """A cache for the sequences of one call of `generate`, and what computes on it.

    Args:
        gpt: the model.
        tokens: how many the cache has to hold, by sequence.
        dtype: of the cache, as `PagedKVCache` takes it.
    """

    def __init__(self, gpt: GPT, tokens: list[int], dtype: torch.dtype | str) -> None:
        pages = max(_pages(tokens), 1)
        if gpt.device.type == "cpu":
            pages = -(-pages // _PAGES_AT_A_TIME) * _PAGES_AT_A_TIME
        config = gpt.config
        self._gpt, self._dtype = gpt, dtype
        with torch.inference_mode(False):  # it may outlive it
            self.cache = PagedKVCache(
                config.layers,
                pages,
                _PAGE_SIZE,
                config.kv_heads,
                config.head_dim,
                dtype=dtype,
                device=gpt.device,
            )
        self._prefills: dict[tuple[int, int], Prefill] = {}
        self._decoders: dict[tuple[object, ...], tuple[Decoder, Sampler]] = {}
        self._used: dict[object, None] = {}  # keys of both, in the order of this call
        self._model = _Snapshot(gpt)

    def prefill(self, size: int, tokens: int) -> Prefill:
        """What computes up to so many tokens of so many prompts."""
        key = (size, tokens)
        prefill = self._prefills.pop(key, None)
        if prefill is None:
            while len(self._prefills) >= _MOST_PREFILLS:
                del self._prefills[next(iter(self._prefills))]  # the one not used for longest
            with torch.inference_mode(False):
                prefill = Prefill(self._gpt, self.cache, size, tokens)
        self._prefills[key] = prefill
        self._used.setdefault(key)
        return prefill

    def decoder(
        self, size: int, longest: int, sampling: Mapping[str, Any]
    ) -> tuple[Decoder, Sampler]:
        """What continues so many texts of up to `longest` tokens, and chooses how."""
        if sampling["repetition_penalty"] == 1:
            longest = 0  # nobody will read the texts
        key = (size, longest, *sampling.items())
        if key not in self._decoders:
            with torch.inference_mode(False):
                sampler = Sampler(size, longest, self.cache.device, sampling)
                self._decoders[key] = Decoder(self._gpt, self.cache, size, sampler), sampler
        self._used.setdefault(key)
        return self._decoders[key]

    def tidy(self) -> bool:
        """Let go of all but what the next call is likely to begin with: what this one began with.

        Returns:
            Whether it is worth keeping.
        """
        allocator = self.cache.allocator
        if allocator.num_free_pages < allocator.num_pages or self.cache.nbytes > _MOST_KEPT:
            return False
        _keep_first(self._prefills, self._used)
        _keep_first(self._decoders, self._used)
        self._used = {}
        return any(model.has_recording for model in self._recordings())

    def fits(self, gpt: GPT, tokens: list[int], dtype: torch.dtype | str) -> bool:
        """Whether it can take the place of a new one."""
        return (
            gpt is self._gpt
            and _pages(tokens) <= self.cache.allocator.num_pages
            and dtype == self._dtype
            and self._model.is_as_it_was()
            and all(model.is_recorded for model in self._recordings() if model.has_recording)
        )

    def _recordings(self) -> list[RecordedModel]:
        return [*self._prefills.values(), *(decoder for decoder, _ in self._decoders.values())]


def _pages(tokens: list[int]) -> int:
    return sum(-(-count // _PAGE_SIZE) for count in tokens)


def _keep_first(held: dict[Any, Any], used: Iterable[object]) -> None:
    """Forget all but the first that was used, if any was."""
    first = next((key for key in used if key in held), None)
    for key in list(held):
        if first is not None and key != first:
            del held[key]


class _Snapshot:
    """Which modules a model has, their settings, and what stands behind the operations.

    Weights are not part of it: a recording looks after those that it reads.
    """

    def __init__(self, gpt: GPT) -> None:
        self._modules = []
        for module in gpt.modules():
            held = vars(module)
            # At least two names, of which it makes a tuple.
            public = [name for name in held if not name.startswith("_")]
            settings = operator.itemgetter("_modules", "_parameters", *public)
            self._modules.append((module, held, settings))
        self._objects = self._look()  # held on to: a new object must not have an old one's id
        self._ids = _ids(self._objects)

    def is_as_it_was(self) -> bool:
        try:
            return _ids(self._look()) == self._ids
        except KeyError:  # a setting is gone
            return False

    def _look(self) -> list[tuple[Any, ...]]:
        looks: list[tuple[Any, ...]] = [tuple(op.impls for op in OPS.values())]
        for module, held, settings in self._modules:
            kind = type(module)
            sizes = len(held), len(held["_parameters"]), len(held["_buffers"])
            looks.append((kind, kind.forward, *sizes, *settings(held), *held["_modules"].values()))
        return looks


def _ids(objects: list[tuple[Any, ...]]) -> list[list[int]]:
    return [list(map(id, some)) for some in objects]
