// The inner loops of decode attention with bfloat16 queries, where the processor multiplies pairs.
//
// The same as in decode_rows.h, 32 elements at a time. Keys are multiplied as neighbours in a row lie;
// values as two rows interleaved, with the weights of two keys. The weights are rounded to bfloat16,
// as every kernel for matrix units does; their sums are not.
//
// Rows are whole vectors here: `dim` is a multiple of Pairs::WIDTH, or twice one for int4.
#pragma once

#include "cpu/decode_rows.h"
#include "cpu/simd_pairs.h"

#if defined(__AVX512BF16__)

namespace tilewise {

// out = row in bfloat16. Returns whether all is finite.
template <class KV>
bool expand_row_pairs(const void* row, int64_t dim, void* out) {
  F32 zeros = F32::zero();
  for_runs<KV>(dim, [&](auto tag, int64_t begin, int64_t n) {
    const auto* p = static_cast<const decltype(tag)*>(row);
    BFloat16* to = static_cast<BFloat16*>(out) + begin;
    for (int64_t i = 0; i < n; i += Pairs::WIDTH) {
      store(to + i, load_pairs(p + i));
      for (int64_t c = i; c < i + Pairs::WIDTH; c += F32::WIDTH) {
        zeros = fma(load(to + c), F32::zero(), zeros);
      }
    }
  });
  return reduce_add(zeros) == 0.0f;
}

template <class KV, int R>
void dot_pairs(const void* queries, int64_t query_bytes, CacheRows keys, CacheRows ahead,
               int64_t count, int64_t dim, float* scores, int64_t score_stride) {
  constexpr int J = F32::WIDTH / (R == 3 ? 4 : R);
  constexpr int W = F32::WIDTH;
  const int64_t query_stride = query_bytes / 2;
  for (int64_t j = 0; j < count; j += J) {
    F32 sums[W];
    for (int i = 0; i < W; ++i) sums[i] = F32::zero();
    for_runs<KV>(dim, [&](auto tag, int64_t begin, int64_t n) {
      using T = decltype(tag);
      const T *key[J], *near[J], *far[J];
      for (int c = 0; c < J; ++c) {
        key[c] = keys.row<T>(j + c);
        near[c] = keys.row<T>(j + J + c);
        far[c] = ahead.row<T>(j + c);
      }
      const BFloat16* q = static_cast<const BFloat16*>(queries) + begin;
      for (int64_t d = 0; d < n; d += Pairs::WIDTH) {
        Pairs k[J];
        for (int c = 0; c < J; ++c) {
          k[c] = load_pairs(key[c] + d);
          fetch(near[c], far[c], d);
        }
        for (int r = 0; r < R; ++r) {
          const Pairs x = held(load_pairs(q + r * query_stride + d));
          for (int c = 0; c < J; ++c) sums[r * J + c] = fma(x, k[c], sums[r * J + c]);
        }
      }
    });
    float reduced[W];
    store(reduced, reduce_each(sums));
    for (int r = 0; r < R; ++r) std::memcpy(scores + r * score_stride + j, reduced + r * J, J * 4);
  }
}

// `out` holds sums in the order that `interleave` makes.
template <class T, int R, int D>
inline void accumulate_interleaved(const BFloat16* weights, int64_t weight_stride, CacheRows values,
                                   CacheRows ahead, int64_t count, int64_t d, float* out,
                                   int64_t out_stride) {
  constexpr int W = F32::WIDTH, N = 2 * D;
  F32 sums[R * N];
#pragma GCC unroll 16
  for (int i = 0; i < R * N; ++i) sums[i] = load(out + i / N * out_stride + i % N * W);
  for (int64_t j = 0; j < count; j += 2) {
    const T *a = values.row<T>(j) + d, *b = values.row<T>(j + 1) + d;
    Pairs v[N];
    for (int c = 0; c < D; ++c) {
      const int64_t at = c * Pairs::WIDTH;
      interleave(load_pairs(a + at), load_pairs(b + at), v[2 * c], v[2 * c + 1]);
      fetch(values.row<T>(j + NEAR_VALUES), ahead.row<T>(j), d + at);
      fetch(values.row<T>(j + NEAR_VALUES + 1), ahead.row<T>(j + 1), d + at);
    }
    for (int r = 0; r < R; ++r) {
      const Pairs weight =
          broadcast(reinterpret_cast<const BFloat16Pair*>(weights + r * weight_stride + j));
      for (int c = 0; c < N; ++c) sums[r * N + c] = fma(weight, v[c], sums[r * N + c]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * N; ++i) store(out + i / N * out_stride + i % N * W, sums[i]);
}

// Reads one value more where `count` is odd, whose weight is zero; pointers to NEAR_VALUES + 1 more
// exist.
template <class KV, int R>
void accumulate_pairs(const void* weights, int64_t weight_bytes, CacheRows values, CacheRows ahead,
                      int64_t count, int64_t dim, float* out, int64_t out_stride) {
  constexpr int D = R <= 2 ? 4 : 2;
  const auto* w = static_cast<const BFloat16*>(weights);
  for_runs<KV>(dim, [&](auto tag, int64_t begin, int64_t n) {
    using T = decltype(tag);
    int64_t d = 0;
    for (; d + D * Pairs::WIDTH <= n; d += D * Pairs::WIDTH) {
      accumulate_interleaved<T, R, D>(w, weight_bytes / 2, values, ahead, count, d, out + begin + d,
                                      out_stride);
    }
    for (; d < n; d += Pairs::WIDTH) {
      accumulate_interleaved<T, R, 1>(w, weight_bytes / 2, values, ahead, count, d, out + begin + d,
                                      out_stride);
    }
  });
}

// The sums of accumulate_pairs in the order of the elements.
inline void collect_pairs(const float* sums, int64_t dim, float* out) {
  for (int64_t i = 0; i < dim; i += Pairs::WIDTH) {
    store_interleaved(out + i, load(sums + i), load(sums + i + F32::WIDTH));
  }
}

}  // namespace tilewise

#endif
