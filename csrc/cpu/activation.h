#pragma once

#include "params.h"

namespace tilewise {

enum class Activation { silu, gelu_tanh, gelu_erf };

// out = activation(gate) * up, or its gradients if there is a grad_out. Rows have strides; out and
// the gradients are contiguous.
struct Gated {
  DType dtype;
  Activation activation;
  int64_t rows, dim;
  const void* gate;  // (rows, dim)
  const void* up;    // (rows, dim)
  int64_t gate_stride, up_stride;
  void* out;             // (rows, dim)
  const void* grad_out;  // (rows, dim) or null
  int64_t grad_out_stride;
  void* grad_gate;  // (rows, dim)
  void* grad_up;    // (rows, dim)
};

void gated_activation(const Gated& gated);

}  // namespace tilewise
