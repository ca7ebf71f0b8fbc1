"""The Triton backend of sampling: groups of rows, and the workspace between the kernels."""

from __future__ import annotations

from typing import Any

import torch

from tilewise import gpu
from tilewise.fused.operators import SAMPLE
from tilewise.fused.triton import power_of_2

_TILE = 2048  # tokens
_ROW_TILE = 4096  # where one program has a whole row
_LOGITS_AT_ONCE = 1 << 22  # rows are taken in groups, for which 64 MiB of workspace are enough


def why_not_sample(logits: torch.Tensor, **options: Any) -> str | None:
    """Why the Triton kernels cannot take the call."""
    if logits.shape[1] >= 2**31 - _ROW_TILE:
        return f"counts tokens in 32 bits, got a vocabulary of {logits.shape[1]}"
    return gpu.why_not(logits, dot=False)


@SAMPLE.kernel("triton")
def _sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    repetition_penalty: torch.Tensor,
    previous_tokens: torch.Tensor | None,
    seed: int,
    sample_ids: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> torch.Tensor:
    batch, vocabulary = logits.shape
    tokens = logits.new_empty(batch, dtype=torch.int64)
    rows_at_once = max(_LOGITS_AT_ONCE // vocabulary, 1)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if previous_tokens is not None and previous_tokens.stride(1) != 1:
        previous_tokens = previous_tokens.contiguous()
    workspace = _workspace(logits, min(rows_at_once, batch))
    parameters = (temperature, top_k, top_p, min_p, repetition_penalty)
    per_row = [None if x is None else x.contiguous() for x in (*parameters, sample_ids, positions)]
    for first in range(0, batch, rows_at_once):
        group = slice(first, first + rows_at_once)
        _sample_rows(
            tokens[group],
            logits[group],
            None if previous_tokens is None else previous_tokens[group],
            [None if x is None else x[group] for x in per_row],
            workspace,
            seed,
            first,
        )
    return tokens


def _workspace(logits: torch.Tensor, count: int) -> dict[str, torch.Tensor]:
    """What the kernels of sampling hand on to each other, for `count` rows."""
    tiles = -(-logits.shape[1] // _TILE)
    single, double = torch.float32, torch.float64
    return {
        "largest": logits.new_empty(count, tiles, dtype=single),
        "scores": logits.new_empty(count, logits.shape[1], dtype=single),
        "sums": logits.new_empty(count, logits.shape[1], dtype=single),
        "odds": logits.new_empty(count, logits.shape[1], dtype=double),
        "winners": logits.new_empty(count, tiles, dtype=torch.int32),
        "winning_sums": logits.new_empty(count, tiles, dtype=single),
        "totals": logits.new_empty(count, tiles, dtype=double),
    }


def _sample_rows(
    tokens: torch.Tensor,
    logits: torch.Tensor,
    previous: torch.Tensor | None,
    per_row: list[torch.Tensor | None],
    workspace: dict[str, torch.Tensor],
    seed: int,
    first_row: int,
) -> None:
    """The tokens of some rows, which are numbered from `first_row`."""
    from tilewise.fused import triton_sampling_kernels as kernels

    count, vocabulary = logits.shape
    tiles = -(-vocabulary // _TILE)
    temperature, top_k, top_p, min_p, penalty, sample_ids, positions = per_row
    largest, *drawn = workspace.values()
    history = (0, 0) if previous is None else (previous.shape[1], previous.stride(0))
    sizes = (vocabulary, logits.stride(0), *history)
    tile = {"TILE": _TILE, "PREVIOUS": 256, "num_warps": 4}
    # The noise is defined to the last bit, and its products are rounded before they are added.
    gpu.launch(
        kernels.maxima,
        (count * tiles,),
        logits,
        temperature,
        penalty,
        previous,
        largest,
        *sizes,
        tiles,
        enable_fp_fusion=False,
        **tile,
    )
    parameters = (temperature, top_k, top_p, min_p)
    gpu.launch(
        kernels.draw,
        (count * tiles,),
        logits,
        *parameters,
        penalty,
        previous,
        sample_ids,
        positions,
        largest,
        *drawn,
        *sizes,
        seed,
        first_row,
        tiles,
        TILES=power_of_2(tiles),
        enable_fp_fusion=False,
        **tile,
    )
    gpu.launch(
        kernels.choose,
        (count,),
        *drawn,
        largest,
        *parameters,
        tokens,
        vocabulary,
        tiles,
        TILE=_ROW_TILE,
        TILES=power_of_2(tiles),
        num_warps=16,
    )
