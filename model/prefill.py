"""Prompts: several new tokens of each sequence at a time, recorded.

A recording is made of as many tokens as there may be, and replayed on the first of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tilewise.model.gpt import GPT, PagedBatch
from tilewise.model.recorded import RecordedModel
from tilewise.paged import PagedKVCache

__all__ = ["MOST_TOKENS", "Prefill"]

MOST_TOKENS = 512
"""Of a recording: beside more of them Python takes little time, and their results much memory."""


class Prefill(RecordedModel):
    """Computes parts of the prompts of a fixed number of sequences.

    Args:
        gpt: the model.
        cache: holds the sequences.
        size: how many sequences have a part in a call.
        tokens: how many tokens all parts have where a call is recorded.
    """

    def __init__(self, gpt: GPT, cache: PagedKVCache, size: int, tokens: int) -> None:
        super().__init__(gpt, cache, size, tokens, has_prompts=True)

    @torch.no_grad()
    def __call__(self, sequences: Sequence[int], parts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append to each sequence the next part of its prompt, and score what could follow.

        Args:
            sequences: of the cache, as many as `size`.
            parts: token ids, at least one for each.

        Returns:
            Logits (size, vocab_size); the next call may overwrite them.

        Raises:
            OutOfPages: if the cache is full.
        """
        token_ids = [token for part in parts for token in part]
        graph = self._recorded() if len(token_ids) <= self._rows else None
        batch = PagedBatch.append(self._cache, sequences, [len(part) for part in parts])
        if graph is None:
            return self._gpt(torch.tensor(token_ids, device=self._cache.device), batch)
        self._write(token_ids, batch)
        graph.replay(rows=len(token_ids))
        return self._result

    def _write(self, token_ids: Sequence[int], batch: PagedBatch) -> None:
        # To what is recorded, which is on the CPU, where `host` is the tensor's own memory.
        tokens, pages = len(token_ids), batch.block_table.shape[1]
        self._token_ids.host[:tokens] = token_ids
        self._positions.host[:tokens] = batch.positions
        self._slot_mapping.host[:tokens] = batch.slot_mapping
        self._cache_seqlens.host[:] = batch.cache_seqlens
        self._last.host[:] = batch.last
        self._cu_seqlens_q.host[1:] = self._last.host + 1
        self._block_table.host[:, :pages] = batch.block_table
        self._block_table.host[:, pages:] = -1
