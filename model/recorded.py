"""Calls of a model without Python: recorded once, replayed on other tokens.

The model is the one of `gpt.py`. All that a call reads, the tokens and where they stand, lies in
tensors that stay; it is recorded what the model calls on them (`CpuGraph`), and every later call
replays that. Where the model runs something that cannot be recorded, every call runs the model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.modules import module as _modules

from tilewise import native
from tilewise.dispatch import requests
from tilewise.graph import CaptureError, CpuGraph
from tilewise.model.gpt import GPT, PagedBatch
from tilewise.paged import PagedKVCache

__all__ = ["Input", "RecordedModel"]

_MOST_ATTEMPTS = 2
"""How often recording is tried: the first time a model runs, it may lay out weights and make
tables, which PyTorch computes and a recording should not repeat."""


class Input:
    """A tensor that stays, written from Python through NumPy, which takes far less time."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, device: torch.device | str) -> None:
        self.host = np.zeros(shape, dtype)
        self._host_tensor = torch.from_numpy(self.host)
        self.tensor = self._host_tensor.to(device)  # the same memory, on a CPU

    def written(self) -> None:
        """To be called after `host` was."""
        if self.tensor is not self._host_tensor:
            self.tensor.copy_(self._host_tensor)


class RecordedModel:
    """Calls of a model on a fixed number of sequences.

    Args:
        gpt: the model.
        cache: holds the sequences.
        size: how many sequences there are in a call.
        tokens: how many tokens of theirs are new, or at most may be.
        has_prompts: whether a sequence may have several of them; it has one otherwise.
    """

    def __init__(
        self, gpt: GPT, cache: PagedKVCache, size: int, tokens: int, *, has_prompts: bool
    ) -> None:
        self._gpt, self._cache = gpt, cache
        allocator = cache.allocator
        device = cache.device
        self._token_ids = Input((tokens,), np.int64, device)
        self._positions = Input((tokens,), np.int64, device)
        self._slot_mapping = Input((tokens,), np.int64, device)
        self._block_table = Input((size, allocator.num_pages), np.int32, device)
        self._cache_seqlens = Input((size,), np.int32, device)
        self._cu_seqlens_q = Input((size + 1,), np.int32, device)
        self._last = Input((size,), np.int64, device)
        self._last.host[:] = range(size)
        self._last.written()
        self._batch = PagedBatch(
            cache=cache,
            positions=self._positions.tensor,
            slot_mapping=self._slot_mapping.tensor,
            block_table=self._block_table.tensor,
            cache_seqlens=self._cache_seqlens.tensor,
            cu_seqlens_q=self._cu_seqlens_q.tensor if has_prompts else None,
            last=self._last.tensor,
            # For all calls to come, so that the tables of positions are made once.
            length=min(allocator.num_pages * allocator.page_size, gpt.config.max_positions),
        )
        self._rows = tokens if has_prompts else 0
        self._attempts = 0
        self._graph: CpuGraph | None = None
        self._recorded_in: tuple[object, ...] = ()
        modules = list(gpt.modules())
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += [_modules._global_forward_hooks, _modules._global_forward_pre_hooks]
        self._weights = [
            (held, name)
            for module in modules
            for held in (module._parameters, module._buffers)
            for name in held
        ]
        self._result = torch.empty(0)
        self.why_not_recorded: str | None = None

    @property
    def has_recording(self) -> bool:
        """Whether there is a recording, of now or of other circumstances."""
        return self._graph is not None

    @property
    def is_recorded(self) -> bool:
        """Whether there is a recording, and the model would do the same now."""
        return self.has_recording and self._recorded_in == self._circumstances()

    def _run(self) -> torch.Tensor:
        """The call itself."""
        return self._gpt(self._token_ids.tensor, self._batch)

    def _run_recorded(self) -> torch.Tensor:
        """What is recorded of it."""
        return self._run()

    def _record(self) -> None:
        """Record a call, if it can be recorded."""
        if self._attempts < _MOST_ATTEMPTS:
            self._attempts += 1
            try:
                graph, result = CpuGraph.capture(self._run_recorded, self._rows)
            except CaptureError as error:
                self.why_not_recorded = str(error)
                return
            known = {
                x.data_ptr() for held, name in self._weights if (x := held.get(name)) is not None
            }
            if not known.issuperset(weight.data_ptr() for weight in graph.weights):
                # It may be another one the next time, and nobody would notice.
                self.why_not_recorded = "a linear layer's weight is no parameter of the model"
                return
            self.why_not_recorded = None
            self._graph, self._result = graph, result
            self._recorded_in = self._circumstances()

    def _recorded(self) -> CpuGraph | None:
        """The recording, if there can be one and the model would do the same now."""
        if self._cache.device.type != "cpu":
            self.why_not_recorded = "only C++ kernels can be recorded"
            return None
        if any(self._hooks):
            self.why_not_recorded = "a forward hook is to see every call"
            return None
        if self._graph is None:
            self._record()
        return self._graph if self.is_recorded else None

    def _circumstances(self) -> tuple[object, ...]:
        """What decides, besides its arguments, what a call runs and reads.

        A recording holds addresses: where a weight was that has been replaced, anything may be.
        """
        is_cast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if is_cast else None
        places = [
            None if (x := held.get(name)) is None else (x.data_ptr(), x.shape, x.stride())
            for held, name in self._weights
        ]
        return requests(), dtype, native.loaded_cpu_ops(), places
