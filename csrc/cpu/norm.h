#pragma once

#include "params.h"

namespace tilewise {

// Rows have a stride; what has none is contiguous.
struct Norm {
  DType dtype;
  int64_t tokens, heads, dim;  // rows are tokens times heads
  const void* x;               // (tokens, heads, dim)
  int64_t x_stride, x_head_stride;
  const void* residual;  // (rows, dim) or null
  int64_t residual_stride;
  const void* weight;  // (dim,)
  const void* bias;    // (dim,) or null; layer norm only
  void* out;           // (rows, dim)
  void* sum;           // x + residual, where there is a residual
  float eps;

  int64_t rows() const { return tokens * heads; }
};

struct NormBackward {
  DType dtype;
  int64_t rows, dim;
  const void* grad_out;  // (rows, dim)
  int64_t grad_out_stride;
  const void* grad_sum;  // (rows, dim), what arrives at x + residual by itself, or null
  int64_t grad_sum_stride;
  const void* x;  // (rows, dim), the residual added already
  int64_t x_stride;
  const void* weight;
  void* grad_x;       // (rows, dim)
  void* grad_weight;  // (dim,)
  void* grad_bias;    // (dim,) or null
  float eps;
};

void rms_norm(const Norm& norm);
void layer_norm(const Norm& norm);
void rms_norm_backward(const NormBackward& norm);
void layer_norm_backward(const NormBackward& norm);

}  // namespace tilewise
