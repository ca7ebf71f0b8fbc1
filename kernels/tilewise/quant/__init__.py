"""Quantized weights and the fused matrix product with them.

Weights are stored in 4 to 8 bits and widened next to the multiplication, so that a product with
few rows, which is bound by memory, moves a fraction of the bytes.
"""

from tilewise.quant.embedding import quantized_embedding
from tilewise.quant.formats import FORMATS, PER_CHANNEL, Format, QuantizedTensor
from tilewise.quant.gguf import from_gguf
from tilewise.quant.linear import QuantLinear, quantize_
from tilewise.quant.matmul import quantized_matmul
from tilewise.quant.operators import QUANTIZED_MATMUL
from tilewise.quant.quantizer import (
    SCHEMES,
    FormatError,
    error_by_format,
    quantization_error,
    quantize,
)

__all__ = [
    "FORMATS",
    "PER_CHANNEL",
    "QUANTIZED_MATMUL",
    "SCHEMES",
    "Format",
    "FormatError",
    "QuantLinear",
    "QuantizedTensor",
    "error_by_format",
    "from_gguf",
    "quantization_error",
    "quantize",
    "quantize_",
    "quantized_embedding",
    "quantized_matmul",
]
