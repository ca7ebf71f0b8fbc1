// Shared by the bindings of the CPU kernels, ops_cpu_*.cpp: the only files that include PyTorch.
//
// The stable ABI of PyTorch >= 2.11, so that one library serves every Python and every later
// PyTorch. The operators write to tensors that Python has allocated, and are registered under the
// instruction set's name, so that several libraries can be loaded side by side.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "params.h"

namespace tilewise {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Char: return DType::i8;
    case ScalarType::Float8_e4m3fn: return DType::f8e4m3;
    case ScalarType::Byte: return DType::i4;  // two codes a byte
    default: STD_TORCH_CHECK(false, "a dtype that the CPU kernels do not know"); return DType::f32;
  }
}

template <class T = void>
inline const T* pointer(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

}  // namespace tilewise
