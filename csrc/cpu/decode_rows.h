// The inner loops of decode attention: a few query rows against key and value rows as they lie.
//
// A key or value row is loaded and converted once for up to ROWS query rows. Every (query row, key)
// product is summed in one vector over ascending elements, and every (query row, element) of the
// output in one lane over ascending keys: how many rows are taken together never changes a bit.
//
// In memory here, a row is `padded` to whole vectors. An int4 row is two runs, the low nibbles and
// then the high ones, each padded for itself.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/simd.h"

namespace tilewise {

struct Int4 {};  // of a cache; its rows are read as Nibble<0>, then Nibble<1>

constexpr int ROWS = 4;  // query rows that share a load

template <class KV>
int64_t padded(int64_t dim) {
  constexpr int64_t RUNS = std::is_same<KV, Int4>::value ? 2 : 1;
  return RUNS * round_up(dim / RUNS, F32::WIDTH);
}

// Calls f(tag, begin, n) for each run of a row: n elements of the tag's type, at `begin` in padded
// memory.
template <class KV, class F>
inline void for_runs(int64_t dim, const F& f) {
  if constexpr (std::is_same<KV, Int4>::value) {
    f(Nibble<0>{}, int64_t{0}, dim / 2);
    f(Nibble<1>{}, round_up(dim / 2, F32::WIDTH), dim / 2);
  } else {
    f(KV{}, int64_t{0}, dim);
  }
}

template <class T>
inline const T* row_at(const void* p, int64_t offset) {
  return reinterpret_cast<const T*>(static_cast<const char*>(p) + offset);
}

// out = row in float32, padded. Returns whether all is finite.
template <class KV>
bool expand_row(const void* row, int64_t dim, float* out) {
  F32 zeros = F32::zero();
  for_runs<KV>(dim, [&](auto tag, int64_t begin, int64_t n) {
    const auto* p = static_cast<const decltype(tag)*>(row);
    int64_t i = 0;
    for (; i + F32::WIDTH <= n; i += F32::WIDTH) {
      const F32 x = load(p + i);
      zeros = fma(x, F32::zero(), zeros);  // infinity times zero is NaN
      store(out + begin + i, x);
    }
    if (i < n) {
      const F32 x = load_partial(p + i, static_cast<int>(n - i));
      zeros = fma(x, F32::zero(), zeros);
      store(out + begin + i, x);
    }
  });
  return reduce_add(zeros) == 0.0f;
}

// Rows that will be needed soon. Asked for all at once they would fill the buffers for misses and
// hold up the loads behind them: the loops below ask for one after the other as they go.
struct Ahead {
  const void* const* rows;
  int64_t count, offset, bytes;

  void fetch(int64_t begin, int64_t end) const {
    for (; begin < std::min(end, count); ++begin) {
      for (int64_t i = 0; i < bytes; i += 64) {
        _mm_prefetch(static_cast<const char*>(rows[begin]) + offset + i, _MM_HINT_T1);
      }
    }
  }
};

// scores[r][j] = queries[r] . keys[j], which is `offset` bytes behind the pointer. Reads keys and writes scores up to the next multiple of
// F32::WIDTH behind `count`.
template <class KV, int R>
void dot_rows(const float* queries, int64_t query_stride, const void* const* keys, int64_t offset,
              int64_t count, int64_t dim, float* scores, int64_t score_stride, const Ahead& ahead) {
  // Keys at a time: one vector of sums for each query row and key, and all of them reduced at once.
  constexpr int J = F32::WIDTH / (R == 3 ? 4 : R);
  constexpr int W = F32::WIDTH;
  for (int64_t j = 0; j < count; j += J) {
    ahead.fetch(j, j + J);
    F32 sums[W];
    for (int i = 0; i < W; ++i) sums[i] = F32::zero();
    for_runs<KV>(dim, [&](auto tag, int64_t begin, int64_t n) {
      using T = decltype(tag);
      const T* key[J];
      for (int c = 0; c < J; ++c) key[c] = row_at<T>(keys[j + c], offset);
      const float* q = queries + begin;
      int64_t d = 0;
      for (; d + W <= n; d += W) {
        F32 k[J];
        for (int c = 0; c < J; ++c) k[c] = load(key[c] + d);
        for (int r = 0; r < R; ++r) {
          const F32 x = held(load(q + r * query_stride + d));
          for (int c = 0; c < J; ++c) sums[r * J + c] = fma(x, k[c], sums[r * J + c]);
        }
      }
      if (d < n) {
        for (int c = 0; c < J; ++c) {
          const F32 k = load_partial(key[c] + d, static_cast<int>(n - d));
          for (int r = 0; r < R; ++r) {
            sums[r * J + c] = fma(load(q + r * query_stride + d), k, sums[r * J + c]);
          }
        }
      }
    });
    float reduced[W];
    store(reduced, reduce_each(sums));
    for (int r = 0; r < R; ++r) std::memcpy(scores + r * score_stride + j, reduced + r * J, J * 4);
  }
}

// out[r][d .. d + D vectors] += sum over j of weights[r][j] * values[j][...].
template <class T, int R, int D>
inline void accumulate_vectors(const float* weights, int64_t weight_stride,
                               const void* const* values, int64_t offset, int64_t count,
                               int64_t d, int tail,
                               float* out, int64_t out_stride) {
  constexpr int W = F32::WIDTH;
  F32 sums[R][D];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < D; ++c) sums[r][c] = load(out + r * out_stride + c * W);
  }
  for (int64_t j = 0; j < count; ++j) {
    const T* value = row_at<T>(values[j], offset) + d;
    F32 v[D];
    for (int c = 0; c < D; ++c) v[c] = tail ? load_partial(value, tail) : load(value + c * W);
    for (int r = 0; r < R; ++r) {
      const F32 weight = F32::all(weights[r * weight_stride + j]);
      for (int c = 0; c < D; ++c) sums[r][c] = fma(weight, v[c], sums[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < D; ++c) store(out + r * out_stride + c * W, sums[r][c]);
  }
}

// out[r] += sum over j < count of weights[r][j] * values[j].
template <class KV, int R>
void accumulate_rows(const float* weights, int64_t weight_stride, const void* const* values,
                     int64_t offset, int64_t count, int64_t dim, float* out, int64_t out_stride,
                     const Ahead& ahead) {
  // As many sums as hide the latency of an addition and still leave registers for the values.
  constexpr int W = F32::WIDTH;
  constexpr int D = R == 1 ? 8 : R == 2 ? 4 : W == 8 ? 2 : 4;
  const int64_t step = (ahead.count * D * W + dim - 1) / dim;
  for_runs<KV>(dim, [&](auto tag, int64_t begin, int64_t n) {
    using T = decltype(tag);
    int64_t d = 0;
    for (; d + D * W <= n; d += D * W) {
      ahead.fetch((begin + d) / (D * W) * step, ((begin + d) / (D * W) + 1) * step);
      accumulate_vectors<T, R, D>(weights, weight_stride, values, offset, count, d, 0, out + begin + d,
                                  out_stride);
    }
    for (; d < n; d += W) {
      const int tail = d + W <= n ? 0 : static_cast<int>(n - d);
      accumulate_vectors<T, R, 1>(weights, weight_stride, values, offset, count, d, tail, out + begin + d,
                                  out_stride);
    }
  });
}

// The loops for one type of cache; [r - 1] is for r query rows.
struct RowLoops {
  decltype(&dot_rows<float, 1>) dot[ROWS];
  decltype(&accumulate_rows<float, 1>) accumulate[ROWS];
  decltype(&expand_row<float>) expand;
  decltype(&padded<float>) padded_size;
  int64_t element_size;
  bool is_float;
};

template <class KV>
constexpr RowLoops row_loops() {
  return {{dot_rows<KV, 1>, dot_rows<KV, 2>, dot_rows<KV, 3>, dot_rows<KV, 4>},
          {accumulate_rows<KV, 1>, accumulate_rows<KV, 2>, accumulate_rows<KV, 3>,
           accumulate_rows<KV, 4>},
          expand_row<KV>,
          padded<KV>,
          sizeof(KV),
          std::is_same<KV, float>::value};
}

inline RowLoops row_loops_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return row_loops<float>();
    case DType::f16: return row_loops<Half>();
    case DType::bf16: return row_loops<BFloat16>();
    case DType::i8: return row_loops<int8_t>();
    case DType::f8e4m3: return row_loops<Float8>();
    default: return row_loops<Int4>();
  }
}

}  // namespace tilewise
