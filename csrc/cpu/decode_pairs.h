// Products of decode attention with bfloat16 queries, where the processor multiplies pairs: keys as
// neighbours in a row lie, values as two rows interleaved, with the weights of two keys. The weights
// are rounded to bfloat16, as every kernel for matrix units does; their sums are not.
//
// Rows are whole vectors here: `dim` is a multiple of Pairs::WIDTH.
#pragma once

#include "cpu/decode_rows.h"
#include "cpu/simd_pairs.h"

#if defined(__AVX512BF16__)

namespace tilewise {

struct BFloat16Pairs {
  using Element = BFloat16;
  using Vector = Pairs;
  using Sum = F32;
  using SumElement = float;
  static constexpr int WIDTH = Pairs::WIDTH;
  static constexpr int KEYS = 2;
  static constexpr int depth(int r) { return r <= 2 ? 4 : 2; }

  static Vector read(const BFloat16* p, int /* tail */) { return load_pairs(p); }
  static Vector query(const BFloat16* p) { return load_pairs(p); }
  static Vector weight(const BFloat16* p) {
    return broadcast(reinterpret_cast<const BFloat16Pair*>(p));
  }
  // Of two values. Their sums are in the order that `interleave` makes.
  template <class T, int D>
  static void read_values(CacheRows rows, int64_t d, int /* tail */, Vector* out) {
    const T *a = rows.row<T>(0) + d, *b = rows.row<T>(1) + d;
    for (int c = 0; c < D; ++c) {
      load_interleaved(a + c * WIDTH, b + c * WIDTH, out[2 * c], out[2 * c + 1]);
    }
  }
};

// dot_products for codes of fp8, two keys of which are converted together.
//
// That takes some 20 cycles from a load to a product. Were it begun behind the instructions that reduce
// the sums of the keys before, which wait for the last products, they would leave no room for it in
// the processor's queues. So the next keys are converted first. Sums of a single row are of 16 keys,
// and leave no registers for that.
template <int R>
void dot_codes(const void* queries, int64_t query_bytes, CacheRows keys, Ahead ahead, int64_t count,
               int64_t dim, float* scores, int64_t score_stride) {
  constexpr int J = keys_together(R);
  constexpr bool IS_EARLY = R > 1;
  const auto* q = static_cast<const BFloat16*>(queries);
  const int64_t query_stride = query_bytes / sizeof(BFloat16);
  const Float8 *key[J], *near[J];
  Pairs k[J];
  const auto convert = [&](const Float8* const* rows, int64_t d) {
    for (int c = 0; c < J; c += 2) load_pairs(rows[c] + d, rows[c + 1] + d, k[c], k[c + 1]);
  };
  for (int c = 0; c < J; ++c) near[c] = keys.row<Float8>(c);
  if (IS_EARLY) convert(near, 0);
  for (int64_t j = 0; j < count; j += J) {
    F32 sums[F32::WIDTH];
    for (F32& sum : sums) sum = F32::zero();
    for (int c = 0; c < J; ++c) {
      key[c] = near[c];
      near[c] = keys.row<Float8>(j + J + c);
    }
    const auto multiply = [&](const auto& fetch_far) {
      for (int64_t d = 0;;) {
        if (!IS_EARLY) convert(key, d);
        for (int c = 0; c < J; ++c) {
          fetch_near(near[c], d);
          fetch_far(c, d);
        }
        for (int r = 0; r < R; ++r) {
          const Pairs x = held(load_pairs(q + r * query_stride + d));
          for (int c = 0; c < J; ++c) sums[r * J + c] = fma(x, k[c], sums[r * J + c]);
        }
        d += Pairs::WIDTH;
        if (d == dim) break;
        if (IS_EARLY) convert(key, d);
      }
    };
    const char* rows[J];
    const auto multiply_with_rows = [&] {
      multiply([&](int c, int64_t d) __attribute__((always_inline)) {
        if (begins_line<Float8>(d)) _mm_prefetch(rows[c] + d, _MM_HINT_T1);
      });
    };
    if (ahead.is_row_by_row(dim)) {
      for (int c = 0; c < J; ++c) rows[c] = ahead.row(j + c);
      multiply_with_rows();
    } else if (ahead.exceed_row(J * dim)) {
      for (int c = 0; c < J; ++c) rows[c] = ahead.take(dim);
      multiply_with_rows();
    } else {
      const char* far = ahead.at();
      multiply([&](int c, int64_t) __attribute__((always_inline)) {
        if (!begins_line<Float8>(c * Pairs::WIDTH)) return;
        _mm_prefetch(far, _MM_HINT_T1);
        far += Ahead::LINE;
      });
      ahead.advance(far);
    }
    if (IS_EARLY) convert(near, 0);
    store_reduced<R>(sums, scores + j, score_stride);
  }
}

template <int R>
constexpr auto dot_loop<BFloat16Pairs, Float8, R> = &dot_codes<R>;

// out = row in bfloat16. Returns whether all is finite.
template <class KV>
bool expand_row_pairs(const void* row, int64_t dim, void* out) {
  F32 zeros = F32::zero();
  const auto* p = static_cast<const KV*>(row);
  auto* to = static_cast<BFloat16*>(out);
  for (int64_t i = 0; i < dim; i += Pairs::WIDTH) {
    store(to + i, load_pairs(p + i));
    for (int64_t c = i; c < i + Pairs::WIDTH; c += F32::WIDTH) {
      zeros = fma(load(to + c), F32::zero(), zeros);
    }
  }
  return reduce_add(zeros) == 0.0f;
}

// The sums of interleaved values in the order of the elements.
inline void collect_pairs(const float* sums, int64_t dim, float* out) {
  for (int64_t i = 0; i < dim; i += Pairs::WIDTH) {
    store_interleaved(out + i, load(sums + i), load(sums + i + F32::WIDTH));
  }
}

}  // namespace tilewise

#endif
