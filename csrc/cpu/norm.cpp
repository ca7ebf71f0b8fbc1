// Root mean square norm and layer norm, with the residual added in the same pass.
//
// Bound by memory: a row comes from memory once, and what is needed of it after its statistics are
// known still lies in the first-level cache. Layer norm subtracts the mean before it squares: the
// difference of E[x^2] and E[x]^2 would cancel.
#include "cpu/norm.h"

#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace tilewise {
namespace {

struct Statistics {
  float mean, scale;  // normed = (x - mean) * scale; the root mean square norm has mean 0
};

template <bool CENTER, class T>
Statistics finish(const T* row, int64_t dim, float eps, float sum, float squares) {
  float mean = 0.0f;
  if constexpr (CENTER) {
    mean = sum / static_cast<float>(dim);
    RowSum deviations;
    for_vectors(dim, [&, center = F32::all(mean)](int64_t i, auto part, int way) {
      const F32 d = part.zero_beyond(part.load(row + i) - center);
      deviations.ways[way] = fma(d, d, deviations.ways[way]);
    });
    squares = deviations.total();
  }
  return {mean, 1.0f / std::sqrt(squares / static_cast<float>(dim) + eps)};
}

template <bool CENTER>
inline void gather(F32 value, F32& total) {
  total = CENTER ? total + value : fma(value, value, total);
}

template <bool CENTER, class T>
Statistics statistics_of(const T* row, int64_t dim, float eps) {
  RowSum gathered;
  for_vectors(dim, [&](int64_t i, auto part, int way) {
    gather<CENTER>(part.load(row + i), gathered.ways[way]);
  });
  const float total = gathered.total();
  return finish<CENTER>(row, dim, eps, total, total);
}

// The same of x + residual, which goes to `sum`, rounded before it counts.
template <bool CENTER, class T>
Statistics add_residual(const T* x, const T* residual, T* sum, int64_t dim, float eps) {
  RowSum gathered;
  for_vectors(dim, [&](int64_t i, auto part, int way) {
    const F32 value = part.load(x + i) + part.load(residual + i);
    part.store(sum + i, value);
    gather<CENTER>(rounded(value, sum), gathered.ways[way]);
  });
  const float total = gathered.total();
  return finish<CENTER>(sum, dim, eps, total, total);
}

template <bool CENTER, class T>
void norm_row(const Norm& norm, int64_t r) {
  const int64_t dim = norm.dim;
  const T* x = static_cast<const T*>(norm.x) + r / norm.heads * norm.x_stride +
               r % norm.heads * norm.x_head_stride;
  const T* weight = static_cast<const T*>(norm.weight);
  const T* bias = static_cast<const T*>(norm.bias);
  T* out = static_cast<T*>(norm.out) + r * dim;
  Statistics s;
  if (norm.residual) {
    const T* residual = static_cast<const T*>(norm.residual) + r * norm.residual_stride;
    T* sum = static_cast<T*>(norm.sum) + r * dim;
    s = add_residual<CENTER>(x, residual, sum, dim, norm.eps);
    x = sum;
  } else {
    s = statistics_of<CENTER>(x, dim, norm.eps);
  }
  const F32 mean = F32::all(s.mean), scale = F32::all(s.scale);
  const auto normed = [&](int64_t i, auto part) {
    const F32 value = part.load(x + i);
    return (CENTER ? value - mean : value) * scale;
  };
  if (CENTER && bias) {
    for_vectors(dim, [&](int64_t i, auto part, int) {
      part.store(out + i, fma(normed(i, part), part.load(weight + i), part.load(bias + i)));
    });
  } else {
    for_vectors(dim, [&](int64_t i, auto part, int) {
      part.store(out + i, normed(i, part) * part.load(weight + i));
    });
  }
}

template <bool CENTER, class T>
void norm_rows(const Norm& norm) {
  const int64_t rows = rows_per_task(norm.dim);
  parallel((norm.rows() + rows - 1) / rows, [&](int64_t task) {
    const int64_t end = std::min(norm.rows(), (task + 1) * rows);
    for (int64_t r = task * rows; r < end; ++r) norm_row<CENTER, T>(norm, r);
  });
}

template <bool CENTER>
void norm_of_dtype(const Norm& norm) {
  switch (norm.dtype) {
    case DType::f32: return norm_rows<CENTER, float>(norm);
    case DType::f16: return norm_rows<CENTER, Half>(norm);
    default: return norm_rows<CENTER, BFloat16>(norm);
  }
}

}  // namespace

void rms_norm(const Norm& norm) { norm_of_dtype<false>(norm); }
void layer_norm(const Norm& norm) { norm_of_dtype<true>(norm); }

}  // namespace tilewise
