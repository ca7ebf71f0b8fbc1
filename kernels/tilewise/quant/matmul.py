"""The product with a quantized weight: checks, cost, dispatch and the public function."""

from __future__ import annotations

import torch

from tilewise import checks, gpu
from tilewise.dispatch import Cost, Impl, Op
from tilewise.quant import baseline, naive, native, triton
from tilewise.quant.formats import QuantizedTensor

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "swiglu")


def check_act(act: str | None, format: str) -> None:
    """Refuse a mode of activations that does not exist, or not with weights of this format.

    int8 codes go with any weight: what they are multiplied with is widened to whatever holds both.
    fp8 codes are for the instructions that multiply fp8 by fp8, and no others gain by them.
    """
    if act not in (None, *naive.LARGEST_CODE):
        raise ValueError(f"act: must be None, 'int8' or 'fp8', got {act!r}")
    if act == "fp8" and format != "fp8":
        raise ValueError(f"act: 'fp8' needs a weight in format fp8, got one in {format}")


def output_shape(
    x: torch.Tensor, weight: QuantizedTensor, activation: str | None
) -> tuple[int, ...]:
    """The shape of `quantized_matmul`'s result."""
    n = weight.shape[-2]
    return (*x.shape[:-1], n // 2 if activation == "swiglu" else n)


def _check_quantized_matmul(
    x: torch.Tensor,
    weight: QuantizedTensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    adapter: tuple[torch.Tensor, torch.Tensor] | None = None,
    act: str | None = None,
    out_dtype: torch.dtype | None = None,
    validate: bool = False,
) -> None:
    checks.has_dtype("x", x, checks.FLOATS)
    if not isinstance(weight, QuantizedTensor):
        raise TypeError(f"weight: must be a QuantizedTensor, got {type(weight).__name__}")
    if len(weight.shape) != 2:
        raise ValueError(f"weight: shape must be (N, K), got {weight.shape}")
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x: shape must be (..., {k}), weight's K, got {tuple(x.shape)}")
    checks.on_device_of("weight", weight.data, "x", x)
    if activation is not None and activation not in ACTIVATIONS:
        wanted = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation: must be None or one of {wanted}, got {activation!r}")
    if activation == "swiglu" and n % 2:
        raise ValueError(f"weight: swiglu needs an even number of rows, got {n}")
    check_act(act, weight.format)
    if out_dtype not in (None, x.dtype, torch.float32):
        wanted = "None, torch.float32 or x's dtype"
        raise ValueError(f"out_dtype: must be {wanted} ({x.dtype}), got {out_dtype!r}")
    if bias is not None:
        checks.like("bias", bias, "x", x)
        checks.has_shape("bias", bias, (n,), "weight's N")
    if residual is not None:
        checks.like("residual", residual, "x", x)
        checks.has_shape(
            "residual", residual, output_shape(x, weight, activation), "the output's shape"
        )
    if adapter is not None:
        if not isinstance(adapter, tuple) or len(adapter) != 2:
            wanted = "a pair of tensors (K, r) and (r, N)"
            raise TypeError(f"adapter: must be {wanted}, got {type(adapter).__name__}")
        for i, part in enumerate(adapter):
            checks.like(f"adapter[{i}]", part, "x", x)
            checks.has_dims(f"adapter[{i}]", part, ("K rank", "rank N")[i])
        rank = adapter[0].shape[1]
        checks.has_shape("adapter[0]", adapter[0], (k, rank), "weight's K and the rank")
        checks.has_shape("adapter[1]", adapter[1], (rank, n), "the rank and weight's N")
    if validate:
        bad = (~weight.dequantize().isfinite()).any(-1).nonzero()
        if len(bad):
            raise ValueError(f"weight: row {int(bad[0])} holds a number that is not finite")


def _cost_quantized_matmul(
    x: torch.Tensor,
    weight: QuantizedTensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    adapter: tuple[torch.Tensor, torch.Tensor] | None = None,
    act: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Cost:
    n, k = weight.shape
    rows = x.numel() // k if k else 0
    out = rows * (n // 2 if activation == "swiglu" else n)
    extra = [t for t in (bias, residual, *(adapter or ())) if t is not None]
    flops = 2 * rows * n * k
    if adapter is not None:
        flops += 2 * rows * adapter[0].shape[1] * (n + k)
    moved = (x.numel() + sum(t.numel() for t in extra)) * x.itemsize
    moved += out * naive.result_dtype(x, out_dtype).itemsize
    return Cost(flops, weight.nbytes + moved, x.dtype)


_QUANTIZED_MATMUL = Op(
    "quantized_matmul",
    naive.quantized_matmul,
    impls=(
        Impl("triton", triton.quantized_matmul, triton.why_not, gpu.why_not_auto),
        Impl("cpu", native.quantized_matmul, native.why_not),
        Impl(
            "torch",
            baseline.quantized_matmul,
            baseline.why_not,
            untraceable=baseline.UNTRACEABLE,
        ),
    ),
    check=_check_quantized_matmul,
    cost=_cost_quantized_matmul,
)


def laid_out_for(x: torch.Tensor, weight: QuantizedTensor) -> QuantizedTensor:
    """The weight, in panels if the backend that would multiply the two reads those.

    A call with a weight in rows makes panels for itself; whoever keeps the weight keeps these.
    """
    if weight.is_panels or x.device.type != "cpu" or torch.compiler.is_compiling():
        return weight
    reads_panels = _QUANTIZED_MATMUL.select("auto", (x, weight), {}).name == "cpu"
    return weight.to_panels() if reads_panels else weight


def quantized_matmul(
    x: torch.Tensor,
    weight: QuantizedTensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    adapter: tuple[torch.Tensor, torch.Tensor] | None = None,
    act: str | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    validate: bool = False,
) -> torch.Tensor:
    """Multiply by a quantized weight: activation(x W^T + x A B + bias) + residual.

    Everything is computed in float32 (float64 for float64 inputs) in this order: the product with
    the dequantized weight, the adapter, the bias, the activation, the residual; the result is
    rounded once, to `out_dtype`. The gradient flows to x, bias, residual and the adapter.

    Args:
        x: (..., K), floating point.
        weight: (N, K).
        bias: (N,), x's dtype.
        activation: None, "gelu" (exact), "gelu_tanh", "silu", or "swiglu": the first half of the
            weight's rows is the gate, the second what it multiplies, and the output has N / 2.
        residual: the output's shape, x's dtype.
        adapter: the low-rank pair A (K, r) and B (r, N) of LoRA, x's dtype; B holds its scaling.
        act: "int8" or "fp8" rounds x, before it meets the weight (not the adapter), to int8 or
            float8 E4M3 with one absmax scale per row and group: the weight's group size, the
            whole row for a per-channel weight, 32 for GGUF formats. `naive.quantize_groups` says
            exactly how. "fp8" is for weights in format "fp8" alone.
        out_dtype: None for x's dtype; float32 leaves the sums of 16-bit x as they are, as output
            heads want it. They are no more exact than those that would be rounded: a kernel may
            multiply weights rounded to x's dtype. For float64 x the result is in float64.
        backend: see `tilewise.use_backend`.
        validate: also refuse a weight that holds a NaN or an infinity.

    Returns:
        (..., N), or (..., N / 2) after "swiglu".

    Raises:
        ValueError, TypeError: for an argument that does not fit; it is named.
        BackendError: if the named backend cannot run the call.

    Source: Hu et al., LoRA, 2021 (arXiv:2106.09685) for the adapter; Shazeer, GLU Variants Improve
        Transformer, 2020 (arXiv:2002.05202) for swiglu.
    """
    if adapter is None and not validate:
        out = native.quantized_matmul_plainly(
            backend, x, weight, bias, activation, residual, act, out_dtype
        )
        if out is not None:
            return out
    _check_quantized_matmul(
        x,
        weight,
        bias,
        activation=activation,
        residual=residual,
        adapter=adapter,
        act=act,
        out_dtype=out_dtype,
        validate=validate,
    )
    return _QUANTIZED_MATMUL(
        x,
        weight,
        bias,
        activation=activation,
        residual=residual,
        adapter=adapter,
        act=act,
        out_dtype=out_dtype,
        backend=backend,
    )
