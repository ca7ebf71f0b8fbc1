"""Decoding: one token of each sequence at a time, recorded.

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
from tilewise.fused import sample
from tilewise.model.gpt import GPT
from tilewise.model.recorded import Input, RecordedModel
from tilewise.paged import PagedKVCache

__all__ = ["MOST_STEPS", "Decoder", "Sampler"]

MOST_STEPS = 8
"""How many steps `Decoder.steps` takes at most: they cost Python as much as one."""


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
        self._sample_ids = Input((size,), np.int64, device)
        self._lengths = Input((size,), np.int64, device)
        self._previous: Input | None = None
        if options["repetition_penalty"] != 1:
            self._previous = Input((size, longest), np.int64, device)

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


class Decoder(RecordedModel):
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
        super().__init__(gpt, cache, size, size, has_prompts=False)
        self._sampler = sampler
        self._taken = Input((1,), np.int64, cache.device)  # steps of a call that are in the history
        self._history = torch.empty(MOST_STEPS, size, dtype=torch.int64, device=cache.device)

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
        for inputs in (
            self._token_ids,
            self._positions,
            self._slot_mapping,
            self._block_table,
            self._cache_seqlens,
            self._taken,
        ):
            inputs.written()

    def _run(self) -> torch.Tensor:
        logits = super()._run()
        return logits if self._sampler is None else self._sampler(logits)

    def _run_recorded(self) -> torch.Tensor:
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
