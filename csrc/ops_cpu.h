// Shared by the bindings of the CPU kernels, ops_cpu_*.cpp: the only files that include PyTorch.
//
// The stable ABI of PyTorch >= 2.11, so that one library serves every Python and every later
// PyTorch. The operators write to tensors that Python has allocated, and are registered under the
// instruction set's name, so that several libraries can be loaded side by side.
//
// The operators plain_* are an exception: Python gives them a call's arguments before it has looked
// at them. They make calls without anything special about them, results allocated and all, and
// return nothing for any other, which then goes the ordinary way, past the checks that can say what
// is wrong with it. They must refuse whatever a check refuses. They are registered for the dispatch
// key Python as well: the one dispatch mode under which they are called is that of a recording, which
// need not be shown what writes itself down. Operators of recordings (ops_cpu_graph.cpp) allocate, too.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <optional>
#include <vector>

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

// Tensor::scalar_type throws at a dtype that it does not know.
inline int32_t dtype_code(const Tensor& t) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

inline bool has_dtype(const Tensor& t, int32_t code) { return dtype_code(t) == code; }

inline bool is_float_of_kernels(int32_t code) {
  return code == aoti_torch_dtype_float32() || code == aoti_torch_dtype_bfloat16() ||
         code == aoti_torch_dtype_float16();
}

inline bool has_size(const Tensor& t, const std::vector<int64_t>& size) {
  if (t.dim() != static_cast<int64_t>(size.size())) return false;
  for (std::size_t i = 0; i < size.size(); ++i) {
    if (t.size(i) != size[i]) return false;
  }
  return true;
}

inline std::vector<int64_t> size_of(const Tensor& t) {
  std::vector<int64_t> size(t.dim());
  for (std::size_t i = 0; i < size.size(); ++i) size[i] = t.size(i);
  return size;
}

// Whether heads x (tokens, heads, dim) can be turned by tables and positions that need no copy.
inline bool is_plain_rotation(const Tensor& cos, const Tensor& sin, const Tensor& positions,
                              const Tensor& x) {
  const int32_t f32 = aoti_torch_dtype_float32();
  return has_dtype(cos, f32) && has_dtype(sin, f32) && cos.dim() == 2 && cos.size(0) >= 1 &&
         2 * cos.size(1) <= x.size(2) && has_size(sin, {cos.size(0), cos.size(1)}) &&
         cos.is_contiguous() && sin.is_contiguous() &&
         has_dtype(positions, aoti_torch_dtype_int64()) && has_size(positions, {x.size(0)}) &&
         positions.is_contiguous();
}

// A contiguous tensor on the CPU, uninitialised; ops_cpu_graph.cpp says where it lies.
Tensor empty(const std::vector<int64_t>& size, int32_t dtype_code);

}  // namespace tilewise
