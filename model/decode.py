"""Decoding steps without Python: the kernel calls for one token each, recorded and replayed.

The model is the one of `gpt.py`. All that a step reads, the tokens and where they stand, lies in
tensors that stay; before the first step it is recorded what the model calls (`CpuGraph`), and every
step replays it. Where the model runs something that cannot be recorded, every step runs the model.

Choosing the next token is part of a step, and so is feeding it to the next one: after a replay,
whose weights have taken the place of all else in the caches, whatever Python does takes several
times as long as usual, so it is asked once for several steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tilewise import native
from tilewise.dispatch import requests
from tilewise.fused import sample
from tilewise.graph import CaptureError, CpuGraph
from tilewise.model.gpt import GPT, PagedBatch
from tilewise.paged import PagedKVCache

__all__ = ["MOST_STEPS", "Decoder", "Sampler"]

MOST_STEPS = 8
"""How many steps `Decoder.steps` takes at most: they cost Python as much as one."""

_MOST_ATTEMPTS = 2
"""How often recording is tried: the first time a model runs, it may lay out weights and make
tables, which PyTorch computes and a recording should not repeat."""


class _Input:
    """A tensor that stays, written from Python through NumPy, which takes far less time."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, device: torch.device | str) -> None:
        self.host = np.zeros(shape, dtype)
        self._host_tensor = torch.from_numpy(self.host)
        self.tensor = self._host_tensor.to(device)  # the same memory, on a CPU

    def written(self) -> None:
        """To be called after `host` was."""
        if self.tensor is not self._host_tensor:
            self.tensor.copy_(self._host_tensor)


class Sampler:
    """Chooses the next tokens of a number of texts, reading from tensors that stay.

    Args:
        size: how many texts.
        longest: how many tokens one may have.
        device: where the logits are.
        options: of `tilewise.sample`.
    """

    def __init__(
        self, size: int, longest: int, device: torch.device | str, options: Mapping[str, Any]
    ) -> None:
        self._options = options
        self._sample_ids = _Input((size,), np.int64, device)
        self._lengths = _Input((size,), np.int64, device)
        self._previous: _Input | None = None
        if options["repetition_penalty"] != 1:
            self._previous = _Input((size, longest), np.int64, device)

    def read(self, sample_ids: Sequence[int], texts: Sequence[Sequence[Sequence[int]]]) -> None:
        """Take in the texts, each in pieces, and the numbers of their random streams."""
        self._sample_ids.host[:] = sample_ids
        self._sample_ids.written()
        self._lengths.host[:] = [sum(map(len, text)) for text in texts]
        self._lengths.written()
        if self._previous is not None:
            self._previous.host.fill(-1)
            for row, text in zip(self._previous.host, texts, strict=True):
                ids = [token for piece in text for token in piece]
                row[: len(ids)] = ids
            self._previous.written()

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token of each text, (size,) int64."""
        return sample(
            logits,
            previous_tokens=self.previous_tokens,
            sample_ids=self._sample_ids.tensor,
            positions=self.lengths,
            **self._options,
        )

    @property
    def lengths(self) -> torch.Tensor:
        """How many tokens each text has, (size,) int64; a token's place in its random stream."""
        return self._lengths.tensor

    @property
    def previous_tokens(self) -> torch.Tensor | None:
        """The tokens of each text, (size, longest) int64, filled up with -1; None if not needed."""
        return None if self._previous is None else self._previous.tensor


class Decoder:
    """Decodes a fixed number of sequences, one token of each at a time.

    Args:
        gpt: the model.
        cache: holds the sequences, which have at least one token each.
        size: how many sequences there are in a step.
        sampler: chooses the next tokens, which are a step's result then; without one it is logits.
    """

    def __init__(
        self, gpt: GPT, cache: PagedKVCache, size: int, sampler: Sampler | None = None
    ) -> None:
        self._gpt, self._cache, self._sampler = gpt, cache, sampler
        allocator = cache.allocator
        device = cache.device
        self._token_ids = _Input((size,), np.int64, device)
        self._positions = _Input((size,), np.int64, device)
        self._slot_mapping = _Input((size,), np.int64, device)
        self._block_table = _Input((size, allocator.num_pages), np.int32, device)
        self._cache_seqlens = _Input((size,), np.int32, device)
        self._taken = _Input((1,), np.int64, device)  # steps of a call that are in the history
        self._inputs = (
            self._token_ids,
            self._positions,
            self._slot_mapping,
            self._block_table,
            self._cache_seqlens,
            self._taken,
        )
        self._batch = PagedBatch(
            cache=cache,
            positions=self._positions.tensor,
            slot_mapping=self._slot_mapping.tensor,
            block_table=self._block_table.tensor,
            cache_seqlens=self._cache_seqlens.tensor,
            cu_seqlens_q=None,
            last=torch.arange(size, device=device),
            # For all steps to come, so that the tables of positions are made once.
            length=min(allocator.num_pages * allocator.page_size, gpt.config.max_positions),
        )
        self._history = torch.empty(MOST_STEPS, size, dtype=torch.int64, device=device)
        self._attempts = 0
        self._graph: CpuGraph | None = None
        self._recorded_in: tuple[object, ...] = ()
        modules = list(gpt.modules())
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._weights = [
            (held, name)
            for module in modules
            for held in (module._parameters, module._buffers)
            for name, x in held.items()
            if x is not None
        ]
        self._result = torch.empty(0)
        self.why_not_recorded: str | None = None

    @torch.no_grad()
    def step(self, sequences: Sequence[int], token_ids: Sequence[int]) -> torch.Tensor:
        """Append a token to each sequence and score what could follow.

        Args:
            sequences: of the cache, as many as `size`.
            token_ids: one for each.

        Returns:
            Logits (size, vocab_size), or the tokens that the sampler chose, (size,); the next step
            may overwrite it.

        Raises:
            OutOfPages: if the cache is full.
        """
        graph = self._recorded()
        self._write(sequences, token_ids, 1)
        if graph is None:
            return self._run()
        graph.replay()
        return self._result

    @torch.no_grad()
    def steps(self, sequences: Sequence[int], token_ids: Sequence[int], count: int) -> torch.Tensor:
        """A number of steps, each of which is fed what the one before chose.

        Args:
            sequences, token_ids: as in `step`.
            count: how many steps at most, from 1 to `MOST_STEPS`. It is one where nothing is
                recorded.

        Returns:
            Tokens, (steps taken, size); the next call may overwrite it. All but the last are in
            the cache then.

        Raises:
            ValueError: for another count, or where there is no sampler.
            OutOfPages: if the cache has no room for `count` more tokens of each.
        """
        if self._sampler is None:
            raise ValueError("sampler: must be there for several steps, got None")
        if not 1 <= count <= MOST_STEPS:
            raise ValueError(f"count: must be from 1 to {MOST_STEPS}, got {count}")
        graph = self._recorded()
        self._write(sequences, token_ids, 1 if graph is None else count)
        if graph is None:
            return self._run()[None]
        graph.replay(count)
        return self._history[:count]

    def _write(self, sequences: Sequence[int], token_ids: Sequence[int], count: int) -> None:
        """What the first of `count` steps reads, and the pages of all."""
        allocator = self._cache.allocator
        slots = self._cache.append(sequences, [count] * len(sequences)).cpu()
        self._slot_mapping.host[:] = slots[::count]
        lengths = [allocator.length(sequence) - count + 1 for sequence in sequences]
        self._cache_seqlens.host[:] = lengths
        self._positions.host[:] = lengths
        self._positions.host -= 1
        self._token_ids.host[:] = token_ids
        self._taken.host[:] = 0
        for row, sequence in zip(self._block_table.host, sequences, strict=True):
            pages = allocator.pages(sequence)
            row[: len(pages)] = pages
            row[len(pages) :] = -1  # as `PagedKVCache.block_table` fills it up
        for inputs in self._inputs:
            inputs.written()

    def _run(self) -> torch.Tensor:
        logits = self._gpt(self._token_ids.tensor, self._batch)
        return logits if self._sampler is None else self._sampler(logits)

    def _run_and_go_on(self) -> torch.Tensor:
        """A step that also writes what the next one reads."""
        result, sampler = self._run(), self._sampler
        if sampler is not None:
            native.cpu_ops().next_step(
                result,
                self._token_ids.tensor,
                self._positions.tensor,
                self._cache_seqlens.tensor,
                self._slot_mapping.tensor,
                self._block_table.tensor,
                self._cache.allocator.page_size,
                sampler.lengths,
                sampler.previous_tokens,
                self._history,
                self._taken.tensor,
            )
        return result

    def _record(self) -> None:
        """Record a step, if it can be recorded."""
        if self._attempts < _MOST_ATTEMPTS:
            self._attempts += 1
            try:
                self._graph, self._result = CpuGraph.capture(self._run_and_go_on)
            except CaptureError as error:
                self.why_not_recorded = str(error)
            else:
                self.why_not_recorded = None
                self._recorded_in = self._circumstances()

    def _recorded(self) -> CpuGraph | None:
        """The recording, if there can be one and the model would do the same now."""
        if any(self._hooks):
            self.why_not_recorded = "a forward hook is to see every call"
            return None
        if self._graph is None:
            self._record()
        return self._graph if self._recorded_in == self._circumstances() else None

    def _circumstances(self) -> tuple[object, ...]:
        """What decides, besides its arguments, what a step calls and reads.

        A recording holds addresses: where a weight was that has been replaced, anything may be.
        """
        is_cast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if is_cast else None
        places = [
            0 if (x := held.get(name)) is None else x.data_ptr() for held, name in self._weights
        ]
        return requests(), dtype, places
