"""A checkpoint, whatever its format: a configuration, and tensors by the names it gives them.

Each format has names of its own and keeps in pieces some matrices that the model keeps whole (q, k
and v; gate and up). A table from our names to theirs is all that differs; one loop does the rest.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from tilewise.model.config import GPTConfig, ModelError
from tilewise.model.gpt import GPT
from tilewise.model.layers import Weight, put
from tilewise.model.tokenizer import Tokenizer
from tilewise.quant import from_gguf
from tilewise.quant.matmul import laid_out_for

__all__ = ["Checkpoint", "Stored", "build"]


@dataclass(frozen=True)
class Stored:
    """A tensor as a file has it.

    Args:
        data: floats; or, of a quantized tensor, uint8 (..., bytes of a row).
        columns: elements of a row.
        ggml_type: of quantized data.
    """

    data: torch.Tensor
    columns: int
    ggml_type: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.data.shape[:-1], self.columns)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Stored:
        """The same rows in another arrangement."""
        return replace(self, data=change(self.data))


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Args:
        config: the model's shape.
        tensors: reads each tensor, by its name.
        names: our module (or parameter, where it is not called weight or bias) -> the tensors
            whose rows make it up, without ".weight" and ".bias". "{i}" is the layer, "{e}" the
            expert.
        unneeded: tensors that the model has no use for, by the end of their names.
        tokenizer, chat_template: None where the checkpoint has none.
    """

    config: GPTConfig
    tensors: Mapping[str, Callable[[], Stored]]
    names: Mapping[str, tuple[str, ...]]
    unneeded: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None


def build(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str) -> GPT:
    """Make the model and give it the checkpoint's weights.

    Raises:
        ModelError: if a tensor is missing, has the wrong shape, or has no place in the model.
    """
    config = checkpoint.config
    left = {key for key in checkpoint.tensors if not key.endswith(checkpoint.unneeded)}
    if config.layers > len(left):  # before a damaged number has us build a million modules
        raise ModelError(f"{config.layers} layers cannot be in {len(left)} tensors")
    with torch.device("meta"):
        gpt = GPT(config)
    for path, module in list(gpt.named_modules()):
        if path == "head" and config.tied_embeddings:
            continue
        weights: dict[str, list[Weight]] = {}
        for name, parameter in module.named_parameters(recurse=False):
            blocks = []
            for keys in _keys(checkpoint, path, name):
                blocks.append(_fetch(checkpoint, keys, dtype))
                left.difference_update(keys)
            weights[name] = [
                _weight(block, dtype, device, repr(keys[0]))
                for block in _join(blocks, tuple(parameter.shape), repr(keys[0]))
            ]
        if weights:
            put(gpt, path, weights)
    if config.tied_embeddings:
        gpt.tie_head()
    if left:
        raise ModelError(f"{len(left)} tensors have no place in the model, such as {min(left)!r}")
    return gpt.eval()


def _keys(checkpoint: Checkpoint, path: str, name: str) -> Iterator[list[str]]:
    """The tensors of each block of rows of a parameter: one, or one for each expert."""
    kind = name if name in ("weight", "bias") else "weight"
    ours = path if kind == name else f"{path}.{name}"
    layer = re.search(r"\d+", ours)
    for theirs in checkpoint.names[re.sub(r"\d+", "{i}", ours)]:
        key = f"{theirs}.{kind}".replace("{i}", layer[0] if layer else "")
        experts = range(checkpoint.config.experts) if "{e}" in key else range(1)
        yield [key.replace("{e}", str(expert)) for expert in experts]


def _fetch(checkpoint: Checkpoint, keys: list[str], dtype: torch.dtype) -> Stored:
    """One block of rows: floats in `dtype`, quantized rows as they are."""
    for key in keys:
        if key not in checkpoint.tensors:
            raise ModelError(f"the tensor {key!r} is missing")
    parts = [checkpoint.tensors[key]() for key in keys]
    block = parts[0]
    if len(parts) > 1:
        if any(part.shape != block.shape for part in parts):
            raise ModelError(f"the shapes of {keys[0]!r} and its like differ")
        block = block.map(lambda _: torch.stack([part.data for part in parts]))
    if block.ggml_type is not None:
        return block
    # A vector that stayed in the mapped file would keep all of it mapped, and in memory.
    return block.map(lambda data: data.to(dtype, copy=data.dim() == 1))


def _join(blocks: list[Stored], shape: tuple[int, ...], where: str) -> list[Stored]:
    """`blocks`, neighbours of one format as one, checked to make up a tensor of `shape`."""
    rows = max(len(shape) - 2, 0)
    got = list(blocks[0].shape)
    if len({len(block.shape) for block in blocks}) == 1 and len(got) == len(shape):
        got[rows] = sum(block.shape[rows] for block in blocks)
    widths = {block.columns for block in blocks} if len(shape) > 1 else set()
    if tuple(got) != shape or len(widths) > 1:
        raise ModelError(
            f"{where} and its like must make up {shape}, got "
            + " and ".join(str(block.shape) for block in blocks)
        )
    joined = []
    for ggml_type, alike in itertools.groupby(blocks, lambda block: block.ggml_type):
        data = [block.data for block in alike]
        whole = data[0] if len(data) == 1 else torch.cat(data, dim=rows)
        joined.append(Stored(whole, shape[-1], ggml_type))
    return joined


def _weight(block: Stored, dtype: torch.dtype, device: torch.device | str, where: str) -> Weight:
    if block.ggml_type is None:
        return block.data.to(device)
    try:
        weight = from_gguf(block.data.numpy(), block.ggml_type, block.shape)
    except ValueError as error:
        raise ModelError(f"{where}: {error}") from error
    if isinstance(weight, torch.Tensor):  # of a type that has no kernels
        return weight.to(device, dtype)
    weight = weight.to(device)
    # The first call would do it, but then with all rows in memory, which would stay in pieces.
    return laid_out_for(torch.empty(1, block.columns, dtype=dtype, device=device), weight)
