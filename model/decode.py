"""Decoding steps without Python: the kernel calls for one token each, recorded and replayed.

The model is the one of `gpt.py`. All that a step reads, the tokens and where they stand, lies in
tensors that stay; the first step runs the model on them, the second records it (`CpuGraph`), and
all others replay the recording. Where the model runs something that cannot be recorded, every step
runs the model.

Choosing the next token is part of a step: after a replay, whose weights have taken the place of all
else in the caches, each call from Python takes several times as long as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tilewise.dispatch import requests
from tilewise.fused import sample
from tilewise.graph import CaptureError, CpuGraph
from tilewise.model.gpt import GPT, PagedBatch
from tilewise.paged import PagedKVCache

__all__ = ["Decoder", "Sampler"]


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
        self._positions = _Input((size,), np.int64, device)
        self._previous: _Input | None = None
        if options["repetition_penalty"] != 1:
            self._previous = _Input((size, longest), np.int64, device)

    def read(self, sample_ids: Sequence[int], texts: Sequence[Sequence[Sequence[int]]]) -> None:
        """Take in the texts, each in pieces, and the numbers of their random streams."""
        self._sample_ids.host[:] = sample_ids
        self._sample_ids.written()
        self._positions.host[:] = [sum(map(len, text)) for text in texts]
        self._positions.written()
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
            previous_tokens=None if self._previous is None else self._previous.tensor,
            sample_ids=self._sample_ids.tensor,
            positions=self._positions.tensor,
            **self._options,
        )


class Decoder:
    """Decodes a fixed number of sequences, one token of each at a time.

    Args:
        gpt: the model.
        cache: holds the sequences, which have at least one token each.
        size: how many sequences there are in a step.
        choose: makes the result of a step of the logits, such as a `Sampler`.
    """

    def __init__(
        self,
        gpt: GPT,
        cache: PagedKVCache,
        size: int,
        choose: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
    ) -> None:
        self._gpt, self._cache, self._choose = gpt, cache, choose
        allocator = cache.allocator
        device = cache.device
        self._token_ids = _Input((size,), np.int64, device)
        self._positions = _Input((size,), np.int64, device)
        self._slot_mapping = _Input((size,), np.int64, device)
        self._block_table = _Input((size, allocator.num_pages), np.int32, device)
        self._cache_seqlens = _Input((size,), np.int32, device)
        self._inputs = (
            self._token_ids,
            self._positions,
            self._slot_mapping,
            self._block_table,
            self._cache_seqlens,
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
        self._steps = 0
        self._graph: CpuGraph | None = None
        self._requests: Mapping[str, str] = {}
        self._result = torch.empty(0)
        self.why_not_recorded: str | None = None

    @torch.no_grad()
    def step(self, sequences: Sequence[int], token_ids: Sequence[int]) -> torch.Tensor:
        """Append a token to each sequence and score what could follow.

        Args:
            sequences: of the cache, as many as `size`.
            token_ids: one for each.

        Returns:
            Logits (size, vocab_size), or what `choose` makes of them; the next step may overwrite
            it.

        Raises:
            OutOfPages: if the cache is full.
        """
        self._write(sequences, token_ids)
        self._steps += 1
        if self._graph is None and self._steps > 1:  # the first one lays out weights, makes tables
            self._graph = self._record()
        if self._graph is not None and self._requests == requests():
            self._graph.replay()
            return self._result
        return self._run()

    def _write(self, sequences: Sequence[int], token_ids: Sequence[int]) -> None:
        allocator = self._cache.allocator
        self._slot_mapping.host[:] = self._cache.append(sequences, [1] * len(sequences)).cpu()
        lengths = [allocator.length(sequence) for sequence in sequences]
        self._cache_seqlens.host[:] = lengths
        self._positions.host[:] = lengths
        self._positions.host -= 1
        self._token_ids.host[:] = token_ids
        for row, sequence in zip(self._block_table.host, sequences, strict=True):
            pages = allocator.pages(sequence)
            row[: len(pages)] = pages
            row[len(pages) :] = -1  # as `PagedKVCache.block_table` fills it up
        for inputs in self._inputs:
            inputs.written()

    def _run(self) -> torch.Tensor:
        return self._choose(self._gpt(self._token_ids.tensor, self._batch))

    def _record(self) -> CpuGraph | None:
        """The step as a recording; computing it once for that does no harm."""
        if self.why_not_recorded is None:
            try:
                graph, self._result = CpuGraph.capture(self._run)
            except CaptureError as error:
                self.why_not_recorded = str(error)
            else:
                self._requests = requests()
                return graph
        return None
