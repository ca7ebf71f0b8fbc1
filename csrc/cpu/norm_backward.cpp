// The gradients of the norms. With n the normed row, s its scale and g the gradient times weight:
// grad x = s (g - mean(g n) n), for layer norm less mean(g) as well.
//
// The gradient of the weight is a sum over all rows. Rows are summed in at most `MAX_SUMS` groups,
// and the groups in order: how they are cut depends on the shape alone, never on the threads. A
// group is summed `BLOCK_ROWS` at a time, so that rounding grows with neither number by itself.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/norm.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace tilewise {
namespace {

constexpr int64_t MAX_SUMS = 64;
constexpr int64_t BLOCK_ROWS = 32;

// Adds to the sums of the weight's gradient and, behind them, of the bias's.
template <bool CENTER, class T>
void backward_row(const NormBackward& norm, int64_t r, float* weight_sum, float* bias_sum) {
  const int64_t dim = norm.dim;
  const float inverse = 1.0f / static_cast<float>(dim);
  const T* grad = static_cast<const T*>(norm.grad_out) + r * norm.grad_out_stride;
  const T* x = static_cast<const T*>(norm.x) + r * norm.x_stride;
  const T* weight = static_cast<const T*>(norm.weight);
  T* grad_x = static_cast<T*>(norm.grad_x) + r * dim;
  float mean = 0.0f;
  if constexpr (CENTER) {
    RowSum sum;
    for_vectors(dim, [&](int64_t i, auto part, int way) {
      sum.ways[way] = sum.ways[way] + part.load(x + i);
    });
    mean = sum.total() / static_cast<float>(dim);
  }
  const F32 center = F32::all(mean);
  // All three sums need x - mean only, not the scale, so one pass gives them.
  RowSum squares, along, across;
  for_vectors(dim, [&](int64_t i, auto part, int way) {
    F32 d = part.load(x + i);
    if constexpr (CENTER) d = part.zero_beyond(d - center);
    const F32 g = part.load(grad + i) * part.load(weight + i);
    squares.ways[way] = fma(d, d, squares.ways[way]);
    along.ways[way] = fma(g, d, along.ways[way]);
    if constexpr (CENTER) across.ways[way] = across.ways[way] + g;
  });
  const float s = 1.0f / std::sqrt(squares.total() / static_cast<float>(dim) + norm.eps);
  const F32 scale = F32::all(s), tilt = F32::all(along.total() * s * inverse);
  const F32 shift = F32::all(across.total() * inverse);
  const T* grad_sum = static_cast<const T*>(norm.grad_sum);
  if (grad_sum) grad_sum += r * norm.grad_sum_stride;
  for_vectors(dim, [&](int64_t i, auto part, int) {
    F32 d = part.load(x + i);
    if constexpr (CENTER) d = d - center;
    const F32 normed = d * scale, g = part.load(grad + i);
    F32 result = g * part.load(weight + i);
    if constexpr (CENTER) result = result - shift;
    result = (result - normed * tilt) * scale;
    if (grad_sum) result = result + part.load(grad_sum + i);
    part.store(grad_x + i, result);
    part.store(weight_sum + i, fma(g, normed, part.load(weight_sum + i)));
    if (bias_sum) part.store(bias_sum + i, part.load(bias_sum + i) + g);
  });
}

void move_to(float* sum, std::vector<float>& block) {
  for (size_t i = 0; i < block.size(); ++i) sum[i] += block[i];
  std::fill(block.begin(), block.end(), 0.0f);
}

template <class T>
void add_groups(const float* sums, int64_t groups, int64_t stride, int64_t dim, void* grad) {
  T* out = static_cast<T*>(grad);
  for_vectors(dim, [&](int64_t i, auto part, int) {
    F32 total = F32::zero();
    for (int64_t group = 0; group < groups; ++group) {
      total = total + part.load(sums + group * stride + i);
    }
    part.store(out + i, total);
  });
}

template <bool CENTER, class T>
void backward_rows(const NormBackward& norm) {
  const int64_t dim = norm.dim, parameters = norm.grad_bias ? 2 : 1;
  const int64_t rows = std::max(rows_per_task(dim), (norm.rows + MAX_SUMS - 1) / MAX_SUMS);
  const int64_t groups = (norm.rows + rows - 1) / rows, stride = parameters * dim;
  std::vector<float> sums(groups * stride);
  parallel(groups, [&](int64_t group) {
    std::vector<float> block(stride);
    float* weight_sum = block.data();
    float* bias_sum = norm.grad_bias ? weight_sum + dim : nullptr;
    const int64_t end = std::min(norm.rows, (group + 1) * rows);
    for (int64_t r = group * rows; r < end; ++r) {
      backward_row<CENTER, T>(norm, r, weight_sum, bias_sum);
      if (r + 1 == end || (r + 1) % BLOCK_ROWS == 0) move_to(sums.data() + group * stride, block);
    }
  });
  add_groups<T>(sums.data(), groups, stride, dim, norm.grad_weight);
  if (norm.grad_bias) add_groups<T>(sums.data() + dim, groups, stride, dim, norm.grad_bias);
}

template <bool CENTER>
void backward_of_dtype(const NormBackward& norm) {
  switch (norm.dtype) {
    case DType::f32: return backward_rows<CENTER, float>(norm);
    case DType::f16: return backward_rows<CENTER, Half>(norm);
    default: return backward_rows<CENTER, BFloat16>(norm);
  }
}

}  // namespace

void rms_norm_backward(const NormBackward& norm) { backward_of_dtype<false>(norm); }
void layer_norm_backward(const NormBackward& norm) { backward_of_dtype<true>(norm); }

}  // namespace tilewise
