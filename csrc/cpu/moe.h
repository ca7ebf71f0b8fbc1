// A mixture of experts: what passes between the bindings and the kernel.
#pragma once

#include "cpu/quant.h"

namespace tilewise {

struct Moe {
  DType dtype;  // of x and out
  int64_t tokens, experts, top_k;
  bool normalize;
  const void* x;  // (tokens, dim)
  int64_t x_stride;
  DType logits_dtype;
  const void* logits;  // (tokens, experts) contiguous
  QuantizedWeight gate_up;  // a stack of (2 hidden, dim)
  QuantizedWeight down;     // a stack of (dim, hidden)
  void* out;  // (tokens, dim) contiguous
};

void moe(const Moe& call);

// A product with one plain weight, of which a row of the result depends on its row of x alone.
void router_logits(const QuantizedMatmul& call);

}  // namespace tilewise
