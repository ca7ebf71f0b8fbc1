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

// Rows of a cache, each `offset` bytes behind its pointer.
struct CacheRows {
  const void* const* at;
  int64_t offset;

  template <class T>
  const T* row(int64_t i) const {
    return reinterpret_cast<const T*>(static_cast<const char*>(at[i]) + offset);
  }
};

// out = row in float32, padded. Returns whether all is finite.
template <class KV>
bool expand_row(const void* row, int64_t dim, void* expanded) {
  auto* out = static_cast<float*>(expanded);
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

// Behind the row that is being loaded come two that are fetched, each with the same elements: a near
// one to the first-level cache, and one of the next tile to the second level. From memory straight to
// the first level would be too much: it holds too few lines, and too few of its misses can be under
// way. Asked for in bursts they would fill the buffers for misses and hold up the loads behind.
//
// Inline before all else: GCC takes a function that only prefetches for one without effects, and
// leaves its calls out.
template <class T>
__attribute__((always_inline)) inline void fetch(const T* near, const T* far, int64_t elements) {
  constexpr int64_t LINE = 64 / sizeof(T);
  if (std::is_same<T, Nibble<1>>::value) return;  // of the same bytes as Nibble<0>
  if (sizeof(T) > 1 || elements % LINE == 0) {
    _mm_prefetch(near + elements, _MM_HINT_T0);
    _mm_prefetch(far + elements, _MM_HINT_T1);
  }
}

constexpr int NEAR_VALUES = 4;  // rows

// scores[r][j] = queries[r] . keys[j]. Reads keys and writes scores up to the next multiple of
// F32::WIDTH behind `count`, and fetches as many rows `ahead`; pointers to F32::WIDTH more keys exist.
// Query rows are `query_bytes` apart.
template <class KV, int R, bool FETCHES = true>
void dot_rows(const void* queries, int64_t query_bytes, CacheRows keys, CacheRows ahead,
              int64_t count, int64_t dim, float* scores, int64_t score_stride) {
  // Keys at a time: one vector of sums for each query row and key, and all of them reduced at once.
  constexpr int J = F32::WIDTH / (R == 3 ? 4 : R);
  constexpr int W = F32::WIDTH;
  const int64_t query_stride = query_bytes / 4;
  for (int64_t j = 0; j < count; j += J) {
    F32 sums[W];
    for (int i = 0; i < W; ++i) sums[i] = F32::zero();
    for_runs<KV>(dim, [&](auto tag, int64_t begin, int64_t n) {
      using T = decltype(tag);
      const T *key[J], *near[J], *far[J];
      for (int c = 0; c < J; ++c) {
        key[c] = keys.row<T>(j + c);
        near[c] = FETCHES ? keys.row<T>(j + J + c) : nullptr;
        far[c] = FETCHES ? ahead.row<T>(j + c) : nullptr;
      }
      const float* q = static_cast<const float*>(queries) + begin;
      int64_t d = 0;
      for (; d + W <= n; d += W) {
        F32 k[J];
        for (int c = 0; c < J; ++c) {
          k[c] = load(key[c] + d);
          if (FETCHES) fetch(near[c], far[c], d);
        }
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
inline void accumulate_vectors(const float* weights, int64_t weight_stride, CacheRows values,
                               CacheRows ahead, int64_t count, int64_t d, int tail, float* out,
                               int64_t out_stride) {
  constexpr int W = F32::WIDTH;
  F32 sums[R * D];
#pragma GCC unroll 16
  for (int i = 0; i < R * D; ++i) sums[i] = load(out + i / D * out_stride + i % D * W);
  for (int64_t j = 0; j < count; ++j) {
    const T* value = values.row<T>(j) + d;
    const T *near = values.row<T>(j + NEAR_VALUES), *far = ahead.row<T>(j);
    F32 v[D];
    for (int c = 0; c < D; ++c) {
      v[c] = tail ? load_partial(value, tail) : load(value + c * W);
      fetch(near, far, d + c * W);
    }
    for (int r = 0; r < R; ++r) {
      const F32 weight = F32::all(weights[r * weight_stride + j]);
      for (int c = 0; c < D; ++c) sums[r * D + c] = fma(weight, v[c], sums[r * D + c]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * D; ++i) store(out + i / D * out_stride + i % D * W, sums[i]);
}

// out[r] += sum over j < count of weights[r][j] * values[j]; pointers to NEAR_VALUES more exist. Rows
// of weights are `weight_bytes` apart.
template <class KV, int R>
void accumulate_rows(const void* weights, int64_t weight_bytes, CacheRows values, CacheRows ahead,
                     int64_t count, int64_t dim, float* out, int64_t out_stride) {
  // As many sums as hide the latency of an addition and still leave registers for the values.
  constexpr int W = F32::WIDTH;
  constexpr int D = R == 1 ? 8 : R == 2 ? 4 : W == 8 ? 2 : 4;
  const auto* w = static_cast<const float*>(weights);
  for_runs<KV>(dim, [&](auto tag, int64_t begin, int64_t n) {
    using T = decltype(tag);
    int64_t d = 0;
    for (; d + D * W <= n; d += D * W) {
      accumulate_vectors<T, R, D>(w, weight_bytes / 4, values, ahead, count, d, 0, out + begin + d,
                                  out_stride);
    }
    for (; d < n; d += W) {
      const int tail = d + W <= n ? 0 : static_cast<int>(n - d);
      accumulate_vectors<T, R, 1>(w, weight_bytes / 4, values, ahead, count, d, tail,
                                  out + begin + d, out_stride);
    }
  });
}

inline void collect_rows(const float* sums, int64_t dim, float* out) {
  std::memcpy(out, sums, dim * 4);
}

}  // namespace tilewise
