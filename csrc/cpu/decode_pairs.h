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

  template <class T, int J>
  static void read_keys(const T* const* keys, int64_t d, int /* tail */, Vector* out) {
    if constexpr (std::is_same<T, Float8>::value) {
      for (int c = 0; c < J; c += 2) load_pairs(keys[c] + d, keys[c + 1] + d, out[c], out[c + 1]);
    } else {
      for (int c = 0; c < J; ++c) out[c] = load_pairs(keys[c] + d);
    }
  }
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
