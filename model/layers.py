"""The parts of a decoder that hold weights. A weight is a tensor, or stays quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from tilewise.fused import layer_norm, rms_norm
from tilewise.model.config import GPTConfig
from tilewise.moe import moe, router_logits
from tilewise.quant import QuantizedTensor, QuantLinear, quantized_embedding
from tilewise.quant.matmul import check_act, laid_out_for

__all__ = [
    "Experts",
    "HeadNorm",
    "Norm",
    "QuantEmbedding",
    "Router",
    "RowBlocks",
    "TiedHead",
    "Weight",
    "linear",
    "project_heads",
    "project_parts",
    "put",
    "set_act",
]

Weight: TypeAlias = torch.Tensor | QuantizedTensor


class Norm(nn.Module):
    """RMSNorm or LayerNorm, which also adds what the last sublayer found to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.kind, self.eps = config.norm, config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.dim))
        if config.norm == "layer_norm":
            self.bias = nn.Parameter(torch.zeros(config.dim))

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns norm(x + residual) and x + residual."""
        if self.kind == "rms_norm":
            y = rms_norm(x, self.weight, self.eps, residual=residual)
        else:
            y = layer_norm(x, self.weight, self.bias, self.eps, residual=residual)
        return y if isinstance(y, tuple) else (y, x)


class HeadNorm(nn.Module):
    """RMSNorm of every head by itself, as Qwen3 does to queries and keys."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.head_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, rms_norm(x, self.weight, self.eps))


class QuantEmbedding(QuantLinear):
    """A quantized embedding table, of which only the rows looked up are ever dequantized.

    `project` multiplies by the same table, where it is the output head too.
    """

    def forward(self, token_ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """token_ids (...) -> rows (..., dim)."""
        x = self.data.new_empty(1, self.in_features, dtype=dtype)
        return quantized_embedding(token_ids, self.weight_for(x), dtype)


class TiedHead(nn.Module):
    """The output head that is the embedding table: it has no weights of its own."""

    def __init__(self, embedding: QuantEmbedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # not a submodule: the table is counted and stored once

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., dim) -> logits (..., vocab_size), float32 at least."""
        return self._embedding[0].project(x, out_dtype=torch.float32)


class RowBlocks(nn.ModuleList):
    """One projection stored as several blocks of rows.

    A file may keep more bits for some rows of a fused projection (v) than for others (q and k);
    neighbours of one format are one block.
    """


def project_parts(
    projection: nn.Module, x: torch.Tensor, sizes: Sequence[int]
) -> list[torch.Tensor]:
    """A fused projection of x (..., dim) in its parts, (..., sizes[i]).

    What is in one block of rows is a view of that block's product, and nothing is copied.
    """
    if not isinstance(projection, RowBlocks):
        return list(projection(x).split(sizes, dim=-1))
    products = [block(x) for block in projection]
    parts = []
    for size in sizes:
        part: list[torch.Tensor] = []
        while size > 0:
            product = products.pop(0)
            part.append(product[..., :size])
            if product.shape[-1] > size:
                products.insert(0, product[..., size:])
            size -= part[-1].shape[-1]
        parts.append(part[0] if len(part) == 1 else torch.cat(part, dim=-1))
    return parts


def project_heads(
    projection: nn.Module, x: torch.Tensor, heads: Sequence[int], head_dim: int
) -> Sequence[torch.Tensor]:
    """The same in heads: (..., heads[i], head_dim)."""
    if not isinstance(projection, RowBlocks):
        return projection(x).unflatten(-1, (-1, head_dim)).split(heads, dim=-2)
    parts = project_parts(projection, x, [head_dim * count for count in heads])
    return [part.unflatten(-1, (-1, head_dim)) for part in parts]


class Router(nn.Linear):
    """What picks among experts: a linear layer that rounds nothing and that `quantize_` leaves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, dim) -> logits (tokens, experts), float32 at least."""
        return router_logits(x, self.weight)


class Experts(nn.Module):
    """The feed-forward networks of a mixture of experts, and the router that picks among them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.top_k = config.experts_per_token
        self.router = Router(config.dim, config.experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(config.experts, 2 * config.ffn_dim, config.dim))
        self.down = nn.Parameter(torch.empty(config.experts, config.dim, config.ffn_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)
        for name in ("gate_up", "down"):  # as `QuantLinear` does with its weight
            weight = getattr(self, name)
            if isinstance(weight, QuantizedTensor):
                setattr(self, name, laid_out_for(tokens, weight))
        y = moe(tokens, self.router(tokens), self.gate_up, self.down, top_k=self.top_k)
        return y.view(x.shape)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        for name in ("gate_up", "down"):  # quantized, they are no parameters, and only move
            if isinstance(weight := getattr(self, name), QuantizedTensor):
                setattr(self, name, weight.to(fn(torch.empty(0, device=weight.device)).device))
        return super()._apply(fn, recurse)


def linear(
    blocks: list[Weight], bias: torch.Tensor | None = None, kind: type[nn.Linear] = nn.Linear
) -> nn.Module:
    """A projection with these blocks of rows, each (rows, in_features).

    `kind` is the layer of those that are not quantized.
    """
    biases = [None] * len(blocks)
    if bias is not None:
        biases = list(bias.split([block.shape[0] for block in blocks]))
    modules = [_linear(block, part, kind) for block, part in zip(blocks, biases, strict=True)]
    return modules[0] if len(modules) == 1 else RowBlocks(modules)


def _linear(weight: Weight, bias: torch.Tensor | None, kind: type[nn.Linear]) -> nn.Module:
    if isinstance(weight, QuantizedTensor):
        return QuantLinear(weight, bias)
    module = kind(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    module.weight = _parameter(weight)
    if bias is not None:
        module.bias = _parameter(bias)
    return module


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    """A tied weight stays the one parameter that it is; a loaded one is for inference."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)


def put(model: nn.Module, path: str, weights: dict[str, list[Weight]]) -> None:
    """Give the module at `path` its weights, replacing it where it holds only tensors.

    Args:
        model: may be on the meta device.
        path: dotted, such as "blocks.0.attention.qkv".
        weights: by the names of the module's own parameters; the blocks of rows of each.
    """
    module = model.get_submodule(path)
    if isinstance(module, nn.Linear):
        bias = torch.cat(weights["bias"]) if "bias" in weights else None  # type: ignore[arg-type]
        model.set_submodule(path, linear(weights["weight"], bias, type(module)))
        return
    for name, (weight,) in weights.items():
        if isinstance(weight, torch.Tensor):
            setattr(module, name, _parameter(weight))
        elif isinstance(module, nn.Embedding):
            model.set_submodule(path, QuantEmbedding(weight))
        else:
            delattr(module, name)  # a parameter's name does not take anything else
            setattr(module, name, weight)


def set_act(model: nn.Module, act: str | None) -> None:
    """Have quantized linear layers take their activations in this mode.

    Experts have none. The output head is left alone, and takes them as they are unless its own
    `act` was assigned: nothing after it evens rounding out, and it takes a single row as long in
    either mode.

    Args:
        model: holds the layers; its head is `head`, or the embedding table.
        act: of `tilewise.quantized_matmul`: None, "int8" or "fp8".

    Raises:
        ValueError: for a mode that does not exist, or that a layer's format does not go with; no
            layer has been changed then.
    """
    layers = [
        module
        for path, module in model.named_modules()
        if isinstance(module, QuantLinear)
        and not (path == "head" or isinstance(module, QuantEmbedding))
    ]
    for format in sorted({"fp8", *(layer.format for layer in layers)}):  # fp8 goes with any mode
        check_act(act, format)
    for layer in layers:
        layer.act = act
