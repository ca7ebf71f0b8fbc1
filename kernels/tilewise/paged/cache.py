"""The key/value cache of a model: the allocator's pages, with tensors behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from tilewise import checks, huge_pages
from tilewise.paged import kv_formats
from tilewise.paged.allocator import PageAllocator


class LayerCache(NamedTuple):
    """One layer's part of a cache, as `append_kv` and `paged_attention` take it.

    Args:
        k, v: (pages, page_size, kv_heads, stored head_dim); views of the cache.
        k_scale, v_scale: (pages, page_size, kv_heads) float32, or None where floats are stored.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None


class PagedKVCache:
    """Keys and values of many sequences, for all layers of a model.

    All layers share one set of page numbers, so that sequences are tracked, forked and freed once.
    Pages are not cleared: what no sequence has written yet is arbitrary, and never read.

        slots = cache.append([a, b], [1, 1])
        block_table, seqlens = cache.block_table([a, b]), cache.seqlens([a, b])
        for i in range(num_layers):
            layer = cache.layer(i)
            append_kv(k, v, layer.k, layer.v, slots, ...)
            paged_attention(q, layer.k, layer.v, block_table, seqlens, ...)

    Args:
        num_layers, num_pages, page_size, kv_heads, head_dim: the cache's size.
        v_head_dim: of the values, where it is not head_dim.
        dtype: a floating-point dtype, or "int8", "fp8" or "int4" (`tilewise.paged.kv_formats`).
        device: where the tensors are.

    Raises:
        ValueError: for a size below 1, a dtype that is none of these, or an odd head_dim in int4.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        for name, size in (
            ("num_layers", num_layers),
            ("num_pages", num_pages),
            ("page_size", page_size),
            ("kv_heads", kv_heads),
            ("head_dim", head_dim),
            ("v_head_dim", v_head_dim),
        ):
            checks.is_integer(name, size)
            if size < 1:
                raise ValueError(f"{name}: must be >= 1, got {size}")
        self.allocator = PageAllocator(num_pages, page_size)
        stored = kv_formats.stored_dtype(dtype)
        slots = (num_layers, num_pages, page_size, kv_heads)

        def rows(name: str, width: int) -> torch.Tensor:
            width = kv_formats.stored_width(name, width, stored)
            return huge_pages.empty((*slots, width), stored, device)

        def scales() -> torch.Tensor | None:
            if not kv_formats.is_quantized(stored):
                return None
            return torch.empty(slots, dtype=torch.float32, device=device)

        k, v = rows("head_dim", head_dim), rows("v_head_dim", v_head_dim)
        k_scale, v_scale = scales(), scales()
        self._stacked = LayerCache(k, v, k_scale, v_scale)  # of all layers, (num_layers, ...)
        self._layers = self._split()
        self._head_dims = (head_dim, v_head_dim)
        self.device = k.device

    def _split(self) -> list[LayerCache]:
        return [
            LayerCache(*(None if x is None else x[i] for x in self._stacked))  # type: ignore[arg-type]
            for i in range(len(self._stacked.k))
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_layers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickling makes two tensors of one and a view of it, and a forked page would be copied
        # in the one that nobody reads.
        self.__dict__.update(state)
        self._layers = self._split()

    def __repr__(self) -> str:
        k, v = self._layers[0][:2]
        _, page_size, kv_heads, _ = k.shape
        return (
            f"PagedKVCache(num_layers={len(self._layers)}, num_pages={len(k)}, "
            f"page_size={page_size}, kv_heads={kv_heads}, head_dim={self._head_dims[0]}, "
            f"v_head_dim={self._head_dims[1]}, dtype={str(v.dtype).removeprefix('torch.')}, "
            f"device={str(self.device)!r}, nbytes={self.nbytes})"
        )

    def add_sequence(self) -> int:
        """A new empty sequence."""
        return self.allocator.add_sequence()

    def fork(self, seq: int) -> int:
        """A new sequence with the tokens of `seq`; both share its pages until one of them grows."""
        return self.allocator.fork(seq)

    def free(self, seq: int) -> None:
        """Forget a sequence and return the pages that only it held."""
        self.allocator.free(seq)

    def truncate(self, seq: int, length: int) -> None:
        """Forget the tokens of `seq` from `length` on, such as drafts that were rejected."""
        self.allocator.truncate(seq, length)

    def append(self, seqs: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """Make room for `counts[i]` more tokens in sequence `seqs[i]`, in every layer.

        Returns:
            slot_mapping for `append_kv`, (sum of counts,) int64, sequence by sequence.

        Raises:
            OutOfPages: if they do not all fit; nothing is changed then.
            ValueError: for an unknown or repeated sequence, or a negative count.
        """
        appended = self.allocator.append(seqs, counts)
        if appended.copies:
            self._copy_pages(appended.copies)
        return torch.tensor(appended.slots, dtype=torch.int64, device=self.device)

    def block_table(self, seqs: Sequence[int]) -> torch.Tensor:
        """The pages of each sequence, (len(seqs), most pages of one) int32, filled up with -1."""
        pages = [self.allocator.pages(seq) for seq in seqs]
        table = np.full((len(seqs), max(map(len, pages), default=0)), -1, dtype=np.int32)
        for row, own in zip(table, pages, strict=True):
            row[: len(own)] = own
        return torch.from_numpy(table).to(self.device)

    def seqlens(self, seqs: Sequence[int]) -> torch.Tensor:
        """The number of tokens of each sequence, (len(seqs),) int32."""
        lengths = [self.allocator.length(seq) for seq in seqs]
        return torch.tensor(lengths, dtype=torch.int32, device=self.device)

    def layer(self, index: int) -> LayerCache:
        """The tensors of one layer."""
        try:
            return self._layers[index]
        except IndexError:
            raise IndexError(
                f"index: must be from 0 to {len(self._layers) - 1}, the last layer, got {index}"
            ) from None

    @property
    def nbytes(self) -> int:
        """The size of all tensors, used or not."""
        return sum(x.nbytes for x in self._stacked if x is not None)

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        source, destination = torch.tensor(copies, device=self.device).unbind(1)
        for x in self._stacked:
            if x is not None:
                x[:, destination] = x[:, source]
