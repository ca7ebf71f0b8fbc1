"""Decoding steps without Python: the kernel calls for one token each, recorded and replayed.

The model is the one of `gpt.py`. All that a step reads, the tokens and where they stand, lies in
tensors that stay; the first step runs the model on them, the second records it (`CpuGraph`), and
all others replay the recording. Where the model runs something that cannot be recorded, every step
runs the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tilewise.dispatch import requests
from tilewise.graph import CaptureError, CpuGraph
from tilewise.model.gpt import GPT, PagedBatch
from tilewise.paged import PagedKVCache

__all__ = ["Decoder"]


class Decoder:
    """Decodes a fixed number of sequences, one token of each at a time.

    Args:
        gpt: the model.
        cache: holds the sequences, which have at least one token each.
        size: how many sequences there are in a step.
    """

    def __init__(self, gpt: GPT, cache: PagedKVCache, size: int) -> None:
        self._gpt, self._cache = gpt, cache
        allocator = cache.allocator
        device = cache.device
        self._token_ids = torch.zeros(size, dtype=torch.int64, device=device)
        self._batch = PagedBatch(
            cache=cache,
            positions=torch.zeros(size, dtype=torch.int64, device=device),
            slot_mapping=torch.zeros(size, dtype=torch.int64, device=device),
            block_table=torch.full(
                (size, allocator.num_pages), -1, dtype=torch.int32, device=device
            ),
            cache_seqlens=torch.zeros(size, dtype=torch.int32, device=device),
            cu_seqlens_q=None,
            last=torch.arange(size, device=device),
            # For all steps to come, so that the tables of positions are made once.
            length=min(allocator.num_pages * allocator.page_size, gpt.config.max_positions),
        )
        self._steps = 0
        self._graph: CpuGraph | None = None
        self._requests: Mapping[str, str] = {}
        self._logits = torch.empty(0)
        self.why_not_recorded: str | None = None

    @torch.no_grad()
    def step(self, sequences: Sequence[int], token_ids: Sequence[int]) -> torch.Tensor:
        """Append a token to each sequence and score what could follow.

        Args:
            sequences: of the cache, as many as `size`.
            token_ids: one for each.

        Returns:
            Logits (size, vocab_size), which the next step may overwrite.

        Raises:
            OutOfPages: if the cache is full.
        """
        batch, cache = self._batch, self._cache
        batch.slot_mapping.copy_(cache.append(sequences, [1] * len(sequences)))
        lengths = cache.seqlens(sequences)
        batch.cache_seqlens.copy_(lengths)
        batch.positions.copy_(lengths - 1)
        table = cache.block_table(sequences)
        batch.block_table[:, : table.shape[1]] = table
        self._token_ids.copy_(torch.tensor(token_ids))
        self._steps += 1
        if self._graph is None and self._steps > 1:  # the first one lays out weights, makes tables
            self._graph = self._record()
        if self._graph is not None and self._requests == requests():
            self._graph.replay()
            return self._logits
        logits: torch.Tensor = self._gpt(self._token_ids, batch)
        return logits

    def _record(self) -> CpuGraph | None:
        """The step as a recording; computing it once for that does no harm."""
        if self.why_not_recorded is None:
            try:
                graph, self._logits = CpuGraph.capture(
                    lambda: self._gpt(self._token_ids, self._batch)
                )
            except CaptureError as error:
                self.why_not_recorded = str(error)
            else:
                self._requests = requests()
                return graph
        return None
