"""Choosing the next token, so that the choice depends on nothing but its own row."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tilewise import checks, gpu
from tilewise.dispatch import Cost, Impl, Op
from tilewise.fused import autograd, baseline, naive, native, triton_sampling

_FLOPS_PER_LOGIT = 50  # two logarithms of seven terms, three divisions, and the rest


# --- checks: each parameter is a number for all rows or a tensor with one per row -----------------


def _check_parameter(
    name: str,
    value: Any,
    logits: torch.Tensor,
    limits: tuple[float, float],
    *,
    validate: bool,
    is_integer: bool = False,
    is_above: bool = False,
) -> None:
    """Raise unless `value` fits and lies in the limits, above the lower one if `is_above`."""
    low, high = limits
    if isinstance(value, torch.Tensor):
        dtypes = (torch.int64, torch.int32) if is_integer else (torch.float32, torch.float64)
        _check_rows(name, value, dtypes, logits)
        if not validate:
            return
        outside = ~((value > low if is_above else value >= low) & (value <= high))
        if not outside.any():
            return
        row = int(outside.nonzero()[0])
        got = f"{value[row].item()} in row {row}"
    else:
        (checks.is_integer if is_integer else checks.is_number)(name, value)
        if (value > low if is_above else value >= low) and value <= high:
            return
        got = str(value)
    limit = f"{'>' if is_above else '>='} {low}"
    raise ValueError(f"{name}: must be {limit}{'' if high > 1 else f' and <= {high}'}, got {got}")


def _check_rows(
    name: str, value: torch.Tensor, dtypes: tuple[torch.dtype, ...], logits: torch.Tensor
) -> None:
    checks.has_dtype(name, value, dtypes)
    checks.has_shape(name, value, (logits.shape[0],), "one per row of logits")
    checks.on_device_of(name, value, "logits", logits)


def _check(
    logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    repetition_penalty: float | torch.Tensor = 1.0,
    previous_tokens: torch.Tensor | None = None,
    seed: int = 0,
    sample_ids: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    validate: bool = False,
) -> None:
    checks.has_dtype("logits", logits, checks.FLOATS)
    checks.has_dims("logits", logits, "batch vocabulary")
    if logits.shape[1] == 0:
        raise ValueError(f"logits: vocabulary must be >= 1, got shape {tuple(logits.shape)}")
    infinity = float("inf")
    for name, value, limits, options in (
        ("temperature", temperature, (0, infinity), {}),
        ("top_k", top_k, (0, infinity), {"is_integer": True}),
        ("top_p", top_p, (0, 1), {"is_above": True}),
        ("min_p", min_p, (0, 1), {}),
        ("repetition_penalty", repetition_penalty, (0, infinity), {"is_above": True}),
    ):
        _check_parameter(name, value, logits, limits, validate=validate, **options)
    if isinstance(top_k, int) and top_k >= 2**63:
        raise ValueError(f"top_k: must be a 64-bit integer, got {top_k}")
    if previous_tokens is not None:
        checks.has_dtype("previous_tokens", previous_tokens, (torch.int64,))
        checks.has_dims("previous_tokens", previous_tokens, "batch tokens")
        shape = (logits.shape[0], previous_tokens.shape[1])
        checks.has_shape("previous_tokens", previous_tokens, shape, "one row per row of logits")
        checks.on_device_of("previous_tokens", previous_tokens, "logits", logits)
    elif isinstance(repetition_penalty, torch.Tensor) or repetition_penalty != 1:
        raise ValueError("previous_tokens: a repetition_penalty needs them, got None")
    checks.is_integer("seed", seed)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: must be a 64-bit integer, got {seed}")
    if sample_ids is not None:
        _check_rows("sample_ids", sample_ids, (torch.int64,), logits)
    if positions is not None:
        _check_rows("positions", positions, (torch.int64,), logits)
    if validate:
        _validate(logits, previous_tokens)


def _validate(logits: torch.Tensor, previous_tokens: torch.Tensor | None) -> None:
    empty = ~(logits > -float("inf")).any(-1)
    if empty.any():
        row = int(empty.nonzero()[0])
        raise ValueError(f"logits: row {row} has no token to choose, all are NaN or -inf")
    if previous_tokens is not None:
        beyond = (previous_tokens >= logits.shape[1]).nonzero()
        if len(beyond):
            row, column = beyond[0].tolist()
            raise ValueError(
                f"previous_tokens: must be below the vocabulary, {logits.shape[1]}, "
                f"got {previous_tokens[row, column].item()} in row {row}"
            )


# --- the operation --------------------------------------------------------------------------------


def _cost(
    logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    repetition_penalty: float | torch.Tensor = 1.0,
    previous_tokens: torch.Tensor | None = None,
    seed: int = 0,
    sample_ids: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> Cost:
    is_greedy = not isinstance(temperature, torch.Tensor) and temperature == 0
    history = 0 if previous_tokens is None else 8 * previous_tokens.numel()
    return Cost(
        logits.numel() * (1 if is_greedy else _FLOPS_PER_LOGIT),
        logits.numel() * logits.itemsize + 8 * logits.shape[0] + history,
        torch.float32,
    )


def _why_not_torch(
    logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    repetition_penalty: float | torch.Tensor = 1.0,
    **other: Any,
) -> str | None:
    if isinstance(temperature, torch.Tensor) or temperature != 0:
        return "PyTorch has no counter-based sampling: only temperature=0"
    if isinstance(repetition_penalty, torch.Tensor) or repetition_penalty != 1:
        return "PyTorch has no repetition penalty"
    return None


def _why_not_auto(logits: torch.Tensor, **other: Any) -> str | None:
    return "a NaN logit would be chosen"


_SAMPLE = Op(
    "sample",
    naive.sample,
    impls=(
        Impl(
            "triton",
            partial(autograd.sample, "triton"),
            triton_sampling.why_not_sample,
            gpu.why_not_auto,
        ),
        Impl("cpu", partial(autograd.sample, "cpu"), native.why_not_sample),
        Impl("torch", baseline.sample, _why_not_torch, _why_not_auto),
    ),
    check=_check,
    cost=_cost,
)


def sample(
    logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    repetition_penalty: float | torch.Tensor = 1.0,
    previous_tokens: torch.Tensor | None = None,
    seed: int = 0,
    sample_ids: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    backend: str = "auto",
    validate: bool = False,
) -> torch.Tensor:
    """Draw one token per row: penalty, temperature, top-k, top-p, min-p, then a Gumbel-max draw.

    The filters apply one after the other, each to the probabilities that the one before it left,
    renormalised. Equal logits are ordered by index. At least the likeliest token always stays.
    A NaN logit counts as -inf; a row with nothing above -inf gives token 0.

    The random numbers are a function of (seed, sample id, position, token), see
    `tilewise.fused.philox`: a row's result depends neither on the rest of the batch nor on the
    device, and drawing again gives the same token.

    Args:
        logits: (batch, vocabulary), floating point.
        temperature: what the logits are divided by; 0 takes the likeliest token. This and the next
            four are a number, or a tensor (batch,) of float32 or float64 (top_k: int64 or int32).
        top_k: keep the k likeliest; 0 keeps all.
        top_p: keep the fewest likeliest tokens that together hold this probability.
        min_p: keep the tokens that are at least this fraction as likely as the likeliest.
        repetition_penalty: divides the positive and multiplies the negative logits of
            `previous_tokens`, before everything else.
        previous_tokens: (batch, n) int64, padded with -1. A token counts once however often it
            came; one beyond the vocabulary is ignored.
        seed: 64-bit integer.
        sample_ids: (batch,) int64, names each row's random stream. None: the number of the row.
        positions: (batch,) int64, which draw of the stream this is. None: 0.
        backend: see `tilewise.use_backend`.
        validate: check the values of tensors too, and that every row has a token to choose.

    Returns:
        (batch,) int64.

    Raises:
        ValueError: for a shape, dtype, device or number that does not fit.
        BackendError: if the named backend cannot run the call.

    Source: Gumbel-max: Gumbel, Statistical Theory of Extreme Values, 1954; top-k: Fan et al., 2018
    (arXiv:1805.04833); top-p: Holtzman et al., 2019 (arXiv:1904.09751); min-p: Nguyen et al., 2024
    (arXiv:2407.01082); penalty: Keskar et al., CTRL, 2019 (arXiv:1909.05858).
    """
    parameters: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "previous_tokens": previous_tokens,
        "seed": seed,
        "sample_ids": sample_ids,
        "positions": positions,
    }
    _check(logits, **parameters, validate=validate)
    return _SAMPLE(logits, **parameters, backend=backend)
