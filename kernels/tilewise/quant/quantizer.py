"""Rounding a weight to a quantized format, and how much that loses.

Min-max scales each group so that its extremes are the last codes. That wastes codes on outliers: a
scale that clips the few largest weights and rounds all others more finely has a smaller squared
error. The search tries a grid of smaller scales, then alternates between the best codes for a
scale (rounding) and the best scale for the codes (least squares), and keeps what is better group
by group, so it is never worse than min-max.

Source: Choukroun et al., Low-bit Quantization of Neural Networks for Efficient Inference, 2019
(arXiv:1902.06822) for minimising the squared error; the alternation is Lloyd's (1957).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tilewise import checks
from tilewise.fused.naive import divide
from tilewise.quant.formats import FORMATS, PER_CHANNEL, Format, QuantizedTensor
from tilewise.quant.packing import E2M1, NF4, look_up, nearest_e2m1, nearest_nf4, pack_nibbles

SCHEMES = tuple(name for name, form in FORMATS.items() if not form.is_gguf)
"""What `quantize` can make."""

_SHRINKS = tuple(1 - i / 20 for i in range(1, 12))
_REFITS = 2
_FP8_MAX = 448.0
_CHUNK = 2**17  # weights at a time: a search makes many passes, and they stay in the cache


# What is made in inference mode does not count writes to it (see `quant.native.as_panels`).
@torch.inference_mode(False)
def quantize(
    weight: torch.Tensor,
    scheme: str = "int4",
    *,
    group_size: int | None = None,
    symmetric: bool = False,
    search: str = "mse",
) -> QuantizedTensor:
    """Round a weight to one of our own formats.

    Args:
        weight: (..., N, K), floating point and finite.
        scheme: "int8", "int4", "nf4", "fp8" (E4M3) or "mxfp4".
        group_size: weights of a row that share a scale: 32, 64, 128, or -1 for the whole row. None
            is the scheme's usual: 64 for int4 and nf4, 32 for mxfp4 (it has no other), -1 for int8
            and fp8.
        symmetric: int8 and int4 without zero points; the other schemes have none anyway.
        search: "minmax", or "mse" for the least squared error that a clip search finds.

    Returns:
        The quantized weight, on weight's device.

    Raises:
        ValueError: for a scheme, group size or search that does not exist, or a weight that is not
            finite or not a matrix.

    Source: the module's docstring; nf4: arXiv:2305.14314; mxfp4: the OCP MX specification 1.0,
        whose conversion rule (section 6.3) is our "minmax".
    """
    checks.has_dtype("weight", weight, checks.FLOATS)
    if weight.dim() < 2 or weight.shape[-1] == 0:
        wanted = "(..., N, K) with K > 0"
        raise ValueError(f"weight: shape must be {wanted}, got {tuple(weight.shape)}")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    form = FORMATS[scheme]
    if group_size is None:
        group_size = form.group_sizes[0]
    checks.is_integer("group_size", group_size)
    checks.is_bool("symmetric", symmetric)
    if group_size not in form.group_sizes:
        wanted = " or ".join(map(str, form.group_sizes))
        raise ValueError(f"group_size: must be {wanted} for {scheme}, got {group_size}")
    if search not in ("minmax", "mse"):
        raise ValueError(f"search: must be 'minmax' or 'mse', got {search!r}")
    weight = weight.detach().float()
    if not weight.isfinite().all():
        raise ValueError("weight: must be finite, got NaN or infinity")

    shape = tuple(weight.shape)
    stored = form.padded(shape[-1], group_size)
    size = stored if group_size == PER_CHANNEL else group_size
    groups = F.pad(weight, (0, stored - shape[-1])).reshape(-1, size)
    rounder = _Rounder(form, symmetric, _scale_dtype(form, group_size, groups))
    chunks = [rounder.fit(chunk, search) for chunk in groups.split(max(1, _CHUNK // size))]
    codes, scales, zeros = (torch.cat(parts) for parts in zip(*chunks, strict=True))

    codes = codes.reshape(*shape[:-1], stored)
    grouped = form.scales_shape(shape, group_size)
    return QuantizedTensor(
        scheme,
        shape,
        group_size,
        codes if form.block_size == 1 else pack_nibbles(codes),
        rounder.stored(scales).reshape(grouped),
        zeros.to(form.data_dtype).reshape(grouped) if rounder.has_zeros else None,
    )


def _scale_dtype(form: Format, group_size: int, groups: torch.Tensor) -> torch.dtype:
    """float16 for groups, unless the largest scale of the tensor is out of its normal range.

    The smallest scales may be subnormal: they lose digits, but a step of float16's subnormals
    (2^-24) is then at most 1/1024 of the largest scale, below what its own group is rounded by.
    """
    if form.scale_dtypes == (torch.uint8,):
        return torch.uint8
    if group_size == PER_CHANNEL:
        return torch.float32
    if groups.numel() == 0:
        return torch.float16
    largest = _Rounder(form, True, torch.float32).minmax(groups)[0].abs().amax()
    half = torch.finfo(torch.float16)
    fits = largest == 0 or half.smallest_normal <= largest <= half.max / 2
    return torch.float16 if fits else torch.float32


class _Fit(NamedTuple):
    codes: torch.Tensor  # (groups, size), as they will be packed
    scales: torch.Tensor  # (groups, 1) float32, but exactly what will be stored
    zeros: torch.Tensor  # (groups, 1) float32


@dataclass(frozen=True)
class _Rounder:
    """Rounds groups, float32 (groups, size), to codes."""

    form: Format
    symmetric: bool
    scale_dtype: torch.dtype

    @property
    def has_zeros(self) -> bool:
        return self.form.code_range is not None and not self.symmetric

    def fit(self, w: torch.Tensor, search: str) -> _Fit:
        """Codes, scales and zeros for each group."""
        scale, zero = self.minmax(w)
        best = self._round(w, scale, zero)
        if search == "minmax":
            return best
        error = self._error(w, best)
        for candidate in self._candidates(scale):
            best, error = self._better(w, best, error, candidate, zero)
        if self.scale_dtype != torch.uint8:
            for _ in range(_REFITS):
                values = self._values(best)
                dot = (w * values).sum(-1, keepdim=True)
                square = values.square().sum(-1, keepdim=True)
                refit = torch.where(square > 0, dot / square, best.scales)
                best, error = self._better(w, best, error, refit, best.zeros)
        return best

    def minmax(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The scale that just reaches the extremes, and the code of 0."""
        low = w.amin(-1, keepdim=True).clamp(max=0)
        high = w.amax(-1, keepdim=True).clamp(min=0)
        largest = torch.maximum(high, -low)
        zero = torch.full_like(low, self.form.zero)
        if self.form.code_range is None:
            if self.form.name == "fp8":
                return divide(largest, _FP8_MAX), zero
            if self.form.name == "nf4":
                return largest, zero
            # MX: the largest power of two in the group, over the largest in E2M1, 2^2.
            exponent = torch.frexp(largest).exponent - 3
            return torch.where(largest > 0, torch.ldexp(torch.ones_like(low), exponent), 0), zero
        first, last = self.form.code_range
        if self.symmetric:
            # There is one more code below the zero than above: turn the larger side there.
            smaller = torch.minimum(high, -low)
            scale = torch.maximum(largest / (zero - first), smaller / (last - zero))
            return torch.where(high > -low, -scale, scale), zero
        scale = divide(high, last - first) - divide(low, last - first)
        zero = first + (-low / _nonzero(scale)).round().clamp(0, last - first)
        return scale, zero

    def _candidates(self, scale: torch.Tensor) -> Iterable[torch.Tensor]:
        if self.scale_dtype == torch.uint8:
            return (scale * 2, scale / 2)
        return (scale * shrink for shrink in _SHRINKS)

    def _better(
        self,
        w: torch.Tensor,
        best: _Fit,
        error: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor,
    ) -> tuple[_Fit, torch.Tensor]:
        """For each group the better of `best` and this scale."""
        trial = self._round(w, scale, zero)
        trial_error = self._error(w, trial)
        is_better = trial_error < error
        chosen = (torch.where(is_better, t, b) for t, b in zip(trial, best, strict=True))
        return _Fit(*chosen), torch.where(is_better, trial_error, error)

    def _round(self, w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> _Fit:
        scale = self._representable(scale)
        v = w / _nonzero(scale)
        if self.form.code_range is not None:
            codes = (v + zero).round().clamp(*self.form.code_range).to(self.form.data_dtype)
        elif self.form.name == "fp8":
            codes = v.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
        elif self.form.name == "nf4":
            codes = nearest_nf4(v)
        else:
            codes = nearest_e2m1(v)
        return _Fit(codes, scale, zero)

    def _values(self, fit: _Fit) -> torch.Tensor:
        """The codes as numbers, before the scale."""
        if self.form.name == "nf4":
            return look_up(NF4, fit.codes)
        if self.form.name == "mxfp4":
            return look_up(E2M1, fit.codes)
        return fit.codes.float() - fit.zeros

    def _error(self, w: torch.Tensor, fit: _Fit) -> torch.Tensor:
        return (self._values(fit) * fit.scales - w).square().sum(-1, keepdim=True)

    def _representable(self, scale: torch.Tensor) -> torch.Tensor:
        """The nearest scale that can be stored; one that is not 0 does not become 0."""
        if self.scale_dtype == torch.uint8:
            return torch.where(scale > 0, scale.clamp(2.0**-127, 2.0**127), scale)
        if self.scale_dtype == torch.float32:
            return scale
        rounded = scale.half().float()
        return torch.where((rounded == 0) & (scale != 0), scale.sign() * 2.0**-24, rounded)

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        """Scales in the dtype they are stored in; of mxfp4 the exponent, biased by 127."""
        if self.scale_dtype == torch.uint8:
            return torch.where(scale > 0, torch.frexp(scale).exponent + 126, 0).to(torch.uint8)
        return scale.to(self.scale_dtype)


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    """What to divide by: a group of zeros has scale 0, and its codes do not matter."""
    return torch.where(scale == 0, 1.0, scale)


# --- what it loses --------------------------------------------------------------------------------


def quantization_error(weight: torch.Tensor, quantized: QuantizedTensor) -> float:
    """The root-mean-square rounding error over the root mean square of the weight.

    Args:
        weight: (..., N, K), what was quantized.
        quantized: the result.

    Returns:
        0 for a lossless format; about 0.1 for 4 bits.

    Raises:
        ValueError: if the shapes differ.
    """
    checks.has_shape("weight", weight, quantized.shape, "the quantized weight's")
    exact = weight.detach().double()
    error = quantized.dequantize(torch.float64) - exact
    norm = float(exact.norm())
    return float(error.norm()) / norm if norm else float(error.norm())


class FormatError(NamedTuple):
    """One row of `error_by_format`."""

    scheme: str
    group_size: int
    symmetric: bool
    search: str
    bits_per_weight: float
    relative_error: float


def error_by_format(weight: torch.Tensor) -> list[FormatError]:
    """What each format, at its usual settings, costs and loses on this weight.

    Args:
        weight: (..., N, K), floating point and finite.

    Returns:
        One row for each setting, from the most bits to the fewest.
    """
    rows = []
    for scheme, group_size, symmetric in _SETTINGS:
        for search in ("minmax", "mse"):
            q = quantize(weight, scheme, group_size=group_size, symmetric=symmetric, search=search)
            error = quantization_error(weight, q)
            rows.append(
                FormatError(scheme, group_size, symmetric, search, q.bits_per_weight, error)
            )
    return sorted(rows, key=lambda row: -row.bits_per_weight)


_SETTINGS = (
    ("int8", PER_CHANNEL, True),
    ("int8", 32, True),
    ("fp8", PER_CHANNEL, True),
    ("int4", 32, False),
    ("int4", 32, True),
    ("int4", 64, False),
    ("int4", 64, True),
    ("int4", 128, False),
    ("int4", 128, True),
    ("int4", PER_CHANNEL, True),
    ("nf4", 64, True),
    ("mxfp4", 32, True),
)
