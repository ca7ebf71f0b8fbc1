// Two partial results of the same queries become one: each weighs what its softmax summed to.
//
// Source: Ye et al., FlashInfer, 2025 (arXiv:2501.01005), section 2.2.
#include <cmath>

#include "cpu/attention.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace tilewise {
namespace {

constexpr int W = F32::WIDTH;

// A side that saw nothing may hold anything: weighed with zero, a NaN would stay.
template <class T>
F32 weighted(const T* x, float weight, int n) {
  if (weight == 0.0f) return F32::zero();
  return F32::all(weight) * (n == W ? load(x) : load_partial(x, n));
}

template <class T>
void merge_row(const MergeStates& m, int64_t row) {
  const float lse_a = m.lse_a[row], lse_b = m.lse_b[row];
  const float larger = lse_a > lse_b || lse_a != lse_a ? lse_a : lse_b;
  const bool nothing = larger == -INFINITY && !(lse_b != lse_b);
  const float shift = nothing ? 0.0f : larger;
  float weight_a = std::exp(lse_a - shift), weight_b = std::exp(lse_b - shift);
  const float sum = weight_a + weight_b;
  m.lse[row] = shift + std::log(sum);
  const float scale = nothing ? 0.0f : 1.0f / sum;
  weight_a *= scale;
  weight_b *= scale;
  const T* a = static_cast<const T*>(m.out_a) + row * m.dim;
  const T* b = static_cast<const T*>(m.out_b) + row * m.dim;
  T* out = static_cast<T*>(m.out) + row * m.dim;
  int64_t i = 0;
  for (; i + W <= m.dim; i += W) {
    store(out + i, weighted(a + i, weight_a, W) + weighted(b + i, weight_b, W));
  }
  if (const int n = static_cast<int>(m.dim - i)) {
    store_partial(out + i, weighted(a + i, weight_a, n) + weighted(b + i, weight_b, n), n);
  }
}

template <class T>
void merge_rows(const MergeStates& m) {
  const int64_t rows = rows_per_task(m.dim);
  parallel((m.rows + rows - 1) / rows, [&](int64_t task) {
    const int64_t end = std::min(m.rows, (task + 1) * rows);
    for (int64_t row = task * rows; row < end; ++row) merge_row<T>(m, row);
  });
}

}  // namespace

void merge_states(const MergeStates& m) {
  switch (m.dtype) {
    case DType::f32: return merge_rows<float>(m);
    case DType::f16: return merge_rows<Half>(m);
    default: return merge_rows<BFloat16>(m);
  }
}

}  // namespace tilewise
