// Gated activations in one pass: bound by memory, so gate and up are read once and the product is
// rounded once.
#include "cpu/activation.h"

#include <algorithm>

#include "cpu/activation_functions.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace tilewise {
namespace {

template <class Gate, class T>
void forward_row(const T* gate, const T* up, T* out, int64_t n) {
  for_vectors(n, [&](int64_t i, auto part, int) {
    part.store(out + i, Gate::template value<T>(part.load(gate + i)) * part.load(up + i));
  });
}

template <class Gate, class T>
void backward_row(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t n) {
  for_vectors(n, [&](int64_t i, auto part, int) {
    const F32 g = part.load(grad + i);
    F32 value;
    const F32 slope = Gate::slope(part.load(gate + i), &value);
    part.store(grad_gate + i, g * part.load(up + i) * slope);
    part.store(grad_up + i, g * value);
  });
}

// Calls body(row, begin, end) for pieces of rows, over all threads.
template <class F>
void for_pieces(int64_t rows, int64_t dim, const F& body) {
  constexpr int64_t PIECE = 16384;
  const int64_t rows_each = rows_per_task(dim), pieces = (dim + PIECE - 1) / PIECE;
  const int64_t groups = (rows + rows_each - 1) / rows_each;
  parallel(groups * pieces, [&](int64_t task) {
    const int64_t group = task / pieces, begin = task % pieces * PIECE;
    const int64_t end = std::min(dim, begin + PIECE);
    const int64_t last = std::min(rows, (group + 1) * rows_each);
    for (int64_t r = group * rows_each; r < last; ++r) body(r, begin, end);
  });
}

template <class Gate, class T>
void forward(const Gated& g) {
  for_pieces(g.rows, g.dim, [&](int64_t r, int64_t begin, int64_t end) {
    forward_row<Gate>(static_cast<const T*>(g.gate) + r * g.gate_stride + begin,
                      static_cast<const T*>(g.up) + r * g.up_stride + begin,
                      static_cast<T*>(g.out) + r * g.dim + begin, end - begin);
  });
}

template <class Gate, class T>
void backward(const Gated& g) {
  for_pieces(g.rows, g.dim, [&](int64_t r, int64_t begin, int64_t end) {
    backward_row<Gate>(static_cast<const T*>(g.grad_out) + r * g.grad_out_stride + begin,
                       static_cast<const T*>(g.gate) + r * g.gate_stride + begin,
                       static_cast<const T*>(g.up) + r * g.up_stride + begin,
                       static_cast<T*>(g.grad_gate) + r * g.dim + begin,
                       static_cast<T*>(g.grad_up) + r * g.dim + begin, end - begin);
  });
}

template <class Gate>
void run(const Gated& g) {
  switch (g.dtype) {
    case DType::f32: return g.grad_out ? backward<Gate, float>(g) : forward<Gate, float>(g);
    case DType::f16: return g.grad_out ? backward<Gate, Half>(g) : forward<Gate, Half>(g);
    default: return g.grad_out ? backward<Gate, BFloat16>(g) : forward<Gate, BFloat16>(g);
  }
}

// Rows without gaps are one long row.
Gated with_rows_joined(Gated gated) {
  const bool is_whole = gated.gate_stride == gated.dim && gated.up_stride == gated.dim &&
                        (!gated.grad_out || gated.grad_out_stride == gated.dim);
  if (is_whole) {
    gated.dim *= gated.rows;
    gated.rows = 1;
  }
  return gated;
}

}  // namespace

void gated_activation(const Gated& gated) {
  const Gated joined = with_rows_joined(gated);
  switch (joined.activation) {
    case Activation::silu: return run<Silu>(joined);
    case Activation::gelu_tanh: return run<GeluTanh>(joined);
    default: return run<GeluErf>(joined);
  }
}

}  // namespace tilewise
