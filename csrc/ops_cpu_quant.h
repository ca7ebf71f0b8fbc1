// How a quantized weight passes from Python.
#pragma once

#include "cpu/quant.h"
#include "ops_cpu.h"

namespace tilewise {

// data is (..., panels, blocks, bytes), scales and zeros (..., panels, groups, 16); format counts as
// the enum does.
QuantizedWeight describe(int64_t format, int64_t rows, int64_t depth, int64_t group_size,
                         const Tensor& data, const OptionalTensor& scales,
                         const OptionalTensor& zeros);

}  // namespace tilewise
