#pragma once

#include "params.h"

namespace tilewise {

struct Rotary {
  DType dtype;
  int64_t tokens, heads, dim;
  const void* x;  // (tokens, heads, dim)
  int64_t x_token_stride, x_head_stride;
  void* out;                 // (tokens, heads, dim), contiguous
  const float* cos;          // (max_positions, pairs)
  const float* sin;          // the same
  const int64_t* positions;  // (tokens,)
  int64_t max_positions, pairs;
  bool interleaved;  // pair i is elements (2i, 2i + 1), otherwise (i, i + pairs)
  bool inverse;      // turn back
};

void rotary_embedding(const Rotary& rotary);

}  // namespace tilewise
