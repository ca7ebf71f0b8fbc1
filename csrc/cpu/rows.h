// A row as vectors: whole ones, and a part of one at the end. A kernel's body is written once, for
// both, as a generic lambda `body(i, part, way)`: `part` loads and stores at element i, and `way`
// (0 to 3, a constant once inlined) picks one of four accumulators, so that a sum is bound by the
// loads and not by the latency of one addition after the other.
#pragma once

#include "cpu/simd.h"

namespace tilewise {

constexpr int WAYS = 4;

struct Whole {
  template <class T>
  F32 load(const T* p) const {
    return tilewise::load(p);
  }
  template <class T>
  void store(T* p, F32 x) const {
    tilewise::store(p, x);
  }
  F32 zero_beyond(F32 x) const { return x; }
  F32 or_beyond(F32 x, float) const { return x; }
};

struct Part {
  int n;
  template <class T>
  F32 load(const T* p) const {
    return load_partial(p, n);
  }
  template <class T>
  void store(T* p, F32 x) const {
    store_partial(p, x, n);
  }
  F32 zero_beyond(F32 x) const { return or_beyond(x, 0.0f); }
  F32 or_beyond(F32 x, float other) const { return select_below(n, x, F32::all(other)); }
};

template <class F>
inline void for_vectors(int64_t n, const F& body) {
  constexpr int W = F32::WIDTH;
  int64_t i = 0;
  for (; i + WAYS * W <= n; i += WAYS * W) {
    body(i, Whole{}, 0);
    body(i + W, Whole{}, 1);
    body(i + 2 * W, Whole{}, 2);
    body(i + 3 * W, Whole{}, 3);
  }
  for (; i + W <= n; i += W) body(i, Whole{}, 0);
  if (i < n) body(i, Part{static_cast<int>(n - i)}, 1);
}

// A sum over a row, in an order that depends on the row's length alone.
struct RowSum {
  F32 ways[WAYS] = {F32::zero(), F32::zero(), F32::zero(), F32::zero()};
  float total() const { return reduce_add((ways[0] + ways[1]) + (ways[2] + ways[3])); }
};

// x as it is once stored as T.
template <class T>
inline F32 rounded(F32 x, const T*) {
  T buffer[F32::WIDTH];
  store(buffer, x);
  return load(buffer);
}
inline F32 rounded(F32 x, const float*) { return x; }

}  // namespace tilewise
