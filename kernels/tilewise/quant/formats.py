"""Quantized weights: the table of formats, and the tensor that carries one.

Two families. Our own formats keep codes, scales and zero points in three tensors, and a weight is

    w = (code - zero) * scale        in float32: an exact difference, then one rounding

with one scale (and zero) for each `group_size` consecutive weights of a row, or for the whole row
(`group_size=-1`). The GGUF formats keep the bytes of the file untouched in `data`.

A weight is made, stored and moved between devices as rows. The C++ kernels read panels, the same
bytes in another order (`tilewise.quant.panels`), to which and from which a weight can be turned.

Group scales are float16: 11 significant bits are far more than a 4-bit code can tell apart, and at
group 32 a float32 scale would cost a whole bit per weight. A row's single scale is float32, which
costs nothing. `quantize` falls back to float32 for a tensor whose scales float16 cannot hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from tilewise import checks
from tilewise.huge_pages import in_huge_pages
from tilewise.quant import blocks
from tilewise.quant.packing import E2M1, NF4, look_up, trim, unpack_nibbles
from tilewise.quant.panels import (
    PANEL_ROWS,
    Units,
    alternate_groups,
    groups_from_panels,
    panels_from_rows,
    rows_from_panels,
    select_rows,
)

PER_CHANNEL = -1
"""The `group_size` of one scale per row."""

_FLOAT_SCALES = (torch.float16, torch.float32)


@dataclass(frozen=True)
class Format:
    """How one format stores a row of weights.

    Args:
        name: GGUF's own name for a GGUF block format.
        data_dtype: of `QuantizedTensor.data`.
        block_size: weights that are stored together; a row is a whole number of blocks.
        block_bytes: their size in `data`.
        decode: `data` (..., bytes) to float32 (..., weights): the codes, or in a GGUF format the
            weights themselves.
        group_sizes: the weights that share one scale; the first is what `quantize` takes.
        scale_dtypes: of `scales`; empty where `data` holds the scales.
        zero: what is subtracted from the codes of a tensor without `zeros`.
        code_range: lowest and highest code of an integer format, which may have `zeros`.
        units: what stays together when rows become panels; a block of them, or 32 weights.
    """

    name: str
    data_dtype: torch.dtype
    block_size: int
    block_bytes: int
    decode: Callable[[torch.Tensor], torch.Tensor]
    group_sizes: tuple[int, ...]
    scale_dtypes: tuple[torch.dtype, ...] = ()
    zero: int = 0
    code_range: tuple[int, int] | None = None
    units: Units = ((16, 4),)

    @property
    def panel_block_bytes(self) -> int:
        """The bytes of a row that `units` describes."""
        return sum(size for size, _ in self.units)

    @property
    def is_gguf(self) -> bool:
        return not self.scale_dtypes

    def padded(self, k: int, group_size: int) -> int:
        """How many weights a row of `k` is stored as."""
        multiple = max(self.block_size, group_size)
        return math.ceil(k / multiple) * multiple

    def data_shape(self, shape: tuple[int, ...], group_size: int) -> tuple[int, ...]:
        """The shape of `data` for a weight of this shape."""
        stored = self.padded(shape[-1], group_size)
        return (*shape[:-1], stored // self.block_size * self.block_bytes)

    def scales_shape(self, shape: tuple[int, ...], group_size: int) -> tuple[int, ...]:
        """The shape of `scales`, and of `zeros`, for a weight of this shape."""
        if group_size == PER_CHANNEL:
            return (*shape[:-1], 1)
        return (*shape[:-1], self.padded(shape[-1], group_size) // group_size)


def _gguf(
    name: str, block_size: int, units: Units, decode: Callable[[torch.Tensor], torch.Tensor]
) -> Format:
    block_bytes = sum(size for size, _ in units)

    def decode_rows(data: torch.Tensor) -> torch.Tensor:
        return decode(data.unflatten(-1, (data.shape[-1] // block_bytes, block_bytes))).flatten(-2)

    return Format(
        name, torch.uint8, block_size, block_bytes, decode_rows, (block_size,), units=units
    )


def _to_float(data: torch.Tensor) -> torch.Tensor:
    return data.float()


def _nibble_codes(data: torch.Tensor) -> torch.Tensor:
    return unpack_nibbles(data).float()


def _nf4_values(data: torch.Tensor) -> torch.Tensor:
    return look_up(NF4, unpack_nibbles(data))


def _e2m1_values(data: torch.Tensor) -> torch.Tensor:
    return look_up(E2M1, unpack_nibbles(data))


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format(
            "int8",
            data_dtype=torch.int8,
            block_size=1,
            block_bytes=1,
            decode=_to_float,
            group_sizes=(PER_CHANNEL, 32, 64, 128),
            scale_dtypes=_FLOAT_SCALES,
            code_range=(-128, 127),
            units=((32, 4),),
        ),
        Format(
            "int4",
            data_dtype=torch.uint8,
            block_size=32,
            block_bytes=16,
            decode=_nibble_codes,
            group_sizes=(64, 32, 128, PER_CHANNEL),
            scale_dtypes=_FLOAT_SCALES,
            zero=8,
            code_range=(0, 15),
        ),
        Format(
            "nf4",
            data_dtype=torch.uint8,
            block_size=32,
            block_bytes=16,
            decode=_nf4_values,
            group_sizes=(64, 32, 128, PER_CHANNEL),
            scale_dtypes=_FLOAT_SCALES,
        ),
        Format(
            "fp8",
            data_dtype=torch.float8_e4m3fn,
            block_size=1,
            block_bytes=1,
            decode=_to_float,
            group_sizes=(PER_CHANNEL, 32, 64, 128),
            scale_dtypes=_FLOAT_SCALES,
            units=((32, 4),),
        ),
        Format(
            "mxfp4",
            data_dtype=torch.uint8,
            block_size=32,
            block_bytes=16,
            decode=_e2m1_values,
            group_sizes=(32,),
            scale_dtypes=(torch.uint8,),
        ),
        _gguf("Q4_0", 32, ((2, 2), (16, 4)), blocks.q4_0),
        _gguf("Q4_1", 32, ((4, 2), (16, 4)), blocks.q4_1),
        _gguf("Q5_0", 32, ((2, 2), (20, 4)), blocks.q5_0),
        _gguf("Q5_1", 32, ((4, 2), (20, 4)), blocks.q5_1),
        _gguf("Q8_0", 32, ((2, 2), (32, 4)), blocks.q8_0),
        _gguf("Q2_K", 256, ((80, 4), (4, 2)), blocks.q2_k),
        _gguf("Q3_K", 256, ((108, 4), (2, 2)), blocks.q3_k),
        _gguf("Q4_K", 256, ((4, 2), (140, 4)), blocks.q4_k),
        _gguf("Q5_K", 256, ((4, 2), (172, 4)), blocks.q5_k),
        _gguf("Q6_K", 256, ((208, 4), (2, 2)), blocks.q6_k),
    )
}
"""Every format by name."""


def find_format(name: str, argument: str = "format") -> Format:
    """The format of that name, or ValueError."""
    if name not in FORMATS:
        raise ValueError(f"{argument}: must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """A weight matrix, or a stack of them, in a quantized format.

    Args:
        format: a name in `FORMATS`.
        shape: (..., N, K), what `dequantize` gives; K need not fill the last group or block.
        group_size: consecutive weights of a row that share a scale, -1 for the whole row; for a
            GGUF format the weights of a block.
        data: the codes (int4, nf4, mxfp4: two per byte, see `tilewise.quant.packing`), or for a
            GGUF format the file's bytes, (..., N, bytes of a row); as panels uint8 (..., panels,
            blocks, bytes of a block of 16 rows), which has one dimension more.
        scales: (..., N, groups), float16 or float32; for mxfp4 uint8, the exponent of a power of
            two with bias 127 (E8M0). None for GGUF. As panels (..., panels, groups, 16).
        zeros: as `scales`, int8 or uint8: the code of 0.0 in an asymmetric int8 or int4 tensor.
            None stands for 0 (int8) and 8 (int4).

    Raises:
        ValueError: if the parts do not fit together.
        TypeError: for a part that is no tensor.
    """

    format: str
    shape: tuple[int, ...]
    group_size: int
    data: torch.Tensor
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None

    def __post_init__(self) -> None:
        form = find_format(self.format)
        if len(self.shape) < 2:
            raise ValueError(f"shape: must be (..., N, K), got {self.shape}")
        if self.group_size not in form.group_sizes:
            wanted = " or ".join(map(str, form.group_sizes))
            raise ValueError(f"group_size: must be {wanted} for {form.name}, got {self.group_size}")
        if form.is_gguf and self.shape[-1] % form.block_size:
            raise ValueError(
                f"shape: {form.name} needs K to be a multiple of {form.block_size}, "
                f"got {self.shape[-1]}"
            )
        data = form.data_shape(self.shape, self.group_size)
        grouped = form.scales_shape(self.shape, self.group_size)
        data_dtype = form.data_dtype
        if self.is_panels:
            *stack, n, row_bytes = data
            panels = -(-n // PANEL_ROWS)
            blocks = -(-row_bytes // form.panel_block_bytes)
            data = (*stack, panels, blocks, PANEL_ROWS * form.panel_block_bytes)
            grouped = (*stack, panels, grouped[-1], PANEL_ROWS)
            data_dtype = torch.uint8
        _check_part("data", self.data, form, (data_dtype,), data)
        if form.is_gguf != (self.scales is None):
            verb = "holds no" if form.is_gguf else "needs"
            raise ValueError(f"scales: {form.name} {verb} scales of its own")
        if self.scales is not None:
            _check_part("scales", self.scales, form, form.scale_dtypes, grouped)
        if self.zeros is not None:
            if form.code_range is None:
                raise ValueError(f"zeros: {form.name} has no zero points")
            _check_part("zeros", self.zeros, form, (form.data_dtype,), grouped)

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor(format={self.format!r}, shape={tuple(self.shape)}, "
            f"group_size={self.group_size}, bits_per_weight={self.bits_per_weight:.3g}, "
            f"device={str(self.device)!r})"
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights, (..., N, K): computed in float32, then rounded to `dtype`."""
        if self.is_panels:
            return self.to_rows().dequantize(dtype)
        form = FORMATS[self.format]
        values = form.decode(self.data)
        if self.scales is not None:
            size = self.group_size if self.group_size > 0 else values.shape[-1]
            values = values.unflatten(-1, (self.scales.shape[-1], size))
            if self.zeros is not None:
                values.sub_(self.zeros.float().unsqueeze(-1))
            elif form.zero:
                values.sub_(form.zero)
            values = values.mul_(decode_scales(self.scales).unsqueeze(-1)).flatten(-2)
        return trim(values, self.shape[-1]).to(dtype)

    @property
    def is_panels(self) -> bool:
        """Whether the parts lie in panels of 16 rows, as the C++ kernels read them, or in rows."""
        return self.data.dim() == len(self.shape) + 1

    def to_panels(self) -> QuantizedTensor:
        """The same weight in panels, for the C++ kernels: a copy, and exact."""
        if self.is_panels:
            return self
        form = FORMATS[self.format]
        data = panels_from_rows(self.data.view(torch.uint8), form.panel_block_bytes, form.units)
        scales_and_zeros = (
            None if part is None else in_huge_pages(alternate_groups(part))
            for part in (self.scales, self.zeros)
        )
        return self._with(data, *scales_and_zeros)

    def to_rows(self) -> QuantizedTensor:
        """The same weight in rows."""
        if not self.is_panels:
            return self
        form = FORMATS[self.format]
        n, row_bytes = form.data_shape(self.shape, self.group_size)[-2:]

        def cut(part: torch.Tensor, columns: int) -> torch.Tensor:
            return part[..., :n, :columns].contiguous()

        data = cut(rows_from_panels(self.data, form.units), row_bytes).view(form.data_dtype)
        scales, zeros = (
            None if part is None else cut(groups_from_panels(part), part.shape[-2])
            for part in (self.scales, self.zeros)
        )
        return self._with(data, scales, zeros)

    def select_rows(self, index: torch.Tensor) -> QuantizedTensor:
        """Rows of a matrix by number, int64 (n,): an (n, K) weight in rows."""
        form = FORMATS[self.format]
        shape = (len(index), self.shape[-1])
        if not self.is_panels:
            parts = {name: part[index] for name, part in self._parts().items()}
            return QuantizedTensor(self.format, shape, self.group_size, **parts)
        row_bytes = form.data_shape(shape, self.group_size)[-1]
        data = select_rows(self.data, index, form.units)[:, :row_bytes]
        panel, lane = index // PANEL_ROWS, index % PANEL_ROWS
        scales, zeros = (
            None if part is None else part[panel, :, lane] for part in (self.scales, self.zeros)
        )
        data = data.contiguous().view(form.data_dtype)
        return QuantizedTensor(self.format, shape, self.group_size, data, scales, zeros)

    def _with(
        self, data: torch.Tensor, scales: torch.Tensor | None, zeros: torch.Tensor | None
    ) -> QuantizedTensor:
        return QuantizedTensor(self.format, self.shape, self.group_size, data, scales, zeros)

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """The size of the stored parts in bytes."""
        return sum(part.nbytes for part in self._parts().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, scales and padding included, per weight."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    def __getitem__(self, index: int) -> QuantizedTensor:
        """One of a stack of matrices, without a copy."""
        if len(self.shape) < 3:
            raise IndexError(f"a single matrix of shape {self.shape} cannot be indexed")
        parts = {name: part[index] for name, part in self._parts().items()}
        return QuantizedTensor(self.format, self.shape[1:], self.group_size, **parts)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same weight on another device; away from the CPU it lies in rows."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"device: must be a device, got {device}; dequantize() takes a dtype")
        if torch.device(device).type != "cpu" and self.is_panels:
            return self.to_rows().to(device)
        parts = {name: part.to(device) for name, part in self._parts().items()}
        return QuantizedTensor(self.format, self.shape, self.group_size, **parts)

    def state_dict(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The parts in rows, for torch.save or safetensors; "format" describes them."""
        return {
            **{prefix + name: part for name, part in self.to_rows()._parts().items()},
            f"{prefix}format": self.describe(),
        }

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, torch.Tensor], prefix: str = ""
    ) -> QuantizedTensor:
        """What `state_dict` was called on.

        Raises:
            ValueError: if an entry is missing, or the entries do not fit together.
        """
        for part in ("format", "data"):
            if prefix + part not in state:
                raise ValueError(f"{prefix}{part}: missing from the state dict")
        try:
            fields = json.loads(bytes(state[f"{prefix}format"].tolist()))
            shape = tuple(int(size) for size in fields["shape"])
            name, group_size = str(fields["format"]), int(fields["group_size"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{prefix}format: not a description of a weight: {error}") from None
        parts = {
            part: state[prefix + part]
            for part in ("data", "scales", "zeros")
            if prefix + part in state
        }
        return cls(name, shape, group_size, **parts)

    def describe(self) -> torch.Tensor:
        """Format, shape and group size as JSON in a uint8 tensor, which any checkpoint can hold."""
        fields = {"format": self.format, "shape": self.shape, "group_size": self.group_size}
        return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)

    def _parts(self) -> dict[str, torch.Tensor]:
        parts = {"data": self.data, "scales": self.scales, "zeros": self.zeros}
        return {name: part for name, part in parts.items() if part is not None}


def decode_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales in float32; uint8 are E8M0: 2^(code - 127), and 255 is NaN."""
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.float()


def _check_part(
    name: str,
    part: torch.Tensor,
    form: Format,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
) -> None:
    checks.is_tensor(name, part)
    if part.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(part.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: dtype must be {wanted} for {form.name}, got {got}")
    if part.shape != shape:
        raise ValueError(f"{name}: shape must be {shape} for {form.name}, got {tuple(part.shape)}")
