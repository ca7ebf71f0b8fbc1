// What a paged cache may be, for plain calls that read or write one.
#pragma once

#include "ops_cpu.h"

namespace tilewise {

inline bool is_quantized_cache(int32_t code) {
  return code == aoti_torch_dtype_int8() || code == aoti_torch_dtype_float8_e4m3fn() ||
         code == aoti_torch_dtype_uint8();
}

// How many elements are stored as one: two codes of int4 in a byte.
inline int64_t packed_in(int32_t code) { return code == aoti_torch_dtype_uint8() ? 2 : 1; }

// Whether there is a scale for each token and head of a quantized cache, and none for any other.
inline bool scale_fits(const OptionalTensor& scale, const Tensor& cache) {
  if (!is_quantized_cache(dtype_code(cache))) return !scale;
  return scale && has_dtype(*scale, aoti_torch_dtype_float32()) &&
         has_size(*scale, {cache.size(0), cache.size(1), cache.size(2)});
}

}  // namespace tilewise
