// The matrix engine of prefill attention for bfloat16 on AVX-512 without AMX (see attention_engine.h).
//
// vdpbf16ps multiplies two pairs of bfloat16 and adds both products, in as many cycles as a float32
// multiply-add takes: twice the work, from half the bytes. To gemm.h a pair is one element: pairs of
// a query's or key's dimensions in the product of scores, pairs of keys in the other one. Keys are
// turned like float32 ones, since a row of bfloat16 is a row of pairs as it lies.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/attention.h"
#include "cpu/bf16_rows.h"
#include "cpu/gemm.h"

namespace tilewise {

class PairsEngine {
 public:
  using Element = BFloat16;
  using Weight = BFloat16;
  static constexpr int ROW_BLOCK = 96;
  static constexpr int LEAST_ROWS = ROW_BLOCK;
  static constexpr int ROW_STRIP = 12;
  static constexpr int KEY_BLOCK = 512;  // as many bytes as 256 in float32
  static constexpr int KEY_STEP = PANEL;
  static constexpr int SCORE_STRIDE = KEY_BLOCK + 16;

  // Rows of an odd number of elements are no rows of pairs. Weights are rounded to bfloat16; a row of
  // fewer than 16 sums may by chance be so much smaller than what it is summed from that this shows.
  static bool takes(const Attention& a) {
    return a.dtype == DType::bf16 && a.kv_dtype == DType::bf16 && a.dim % 2 == 0 && a.v_dim >= 16;
  }

  static int64_t query_size(int64_t dim) { return ROW_BLOCK * 2 * query_stride(dim); }
  static int64_t key_size(int64_t dim) { return 2 * packed_size(dim / 2, KEY_BLOCK); }
  static int64_t value_size(int64_t v_dim) { return 2 * packed_size(KEY_BLOCK / 2, v_dim); }
  static int64_t out_stride(int64_t v_dim) { return round_up(v_dim, PANEL); }

  PairsEngine(int64_t dim, int64_t v_dim) : depth_(dim / 2), v_dim_(v_dim) {}

  void pack_queries(const Element* const* rows, int64_t count, Element* out) const {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(static_cast<void*>(out + i * 2 * query_stride(2 * depth_)), rows[i], depth_ * 4);
    }
  }

  void pack_keys(const Element* const* rows, int64_t count, Element* out) const {
    pack_columns(reinterpret_cast<const float* const*>(rows), depth_, count,
                 reinterpret_cast<float*>(out));
  }

  void pack_values(const Element* const* rows, int64_t count, Element* out) const {
    for (int64_t j = 0; j < count; j += 2, out += 2 * PANEL) {
      for (int64_t n = 0; n < v_dim_; n += PANEL) {
        Element* to = out + n * KEY_BLOCK;  // a panel has KEY_BLOCK / 2 rows of pairs
        zip_rows(rows[j] + n, rows[j + 1] + n, v_dim_ - n, to, to + PANEL);
      }
    }
  }

  void scores(const Element* queries, int64_t count, const Element* keys, int64_t begin,
              int64_t end, float* s) const {
    multiply(pairs(queries), query_stride(2 * depth_), pairs(keys) + begin * depth_, depth_ * PANEL,
             count, end - begin, depth_, s + begin, SCORE_STRIDE, false);
  }

  void accumulate(const Element* weights, int64_t count, const Element* values, int64_t begin,
                  int64_t end, float* out) const {
    const int64_t stride = out_stride(v_dim_);
    multiply(pairs(weights + begin), SCORE_STRIDE, pairs(values) + begin / 2 * PANEL,
             KEY_BLOCK / 2 * PANEL, count, stride, (end - begin) / 2, out, stride, true);
  }

 private:
  static int64_t query_stride(int64_t dim) { return round_up(dim / 2, 16) + 16; }  // pairs
  static const BFloat16Pair* pairs(const Element* p) {
    return reinterpret_cast<const BFloat16Pair*>(p);
  }

  int64_t depth_;  // pairs of a query
  int64_t v_dim_;
};

}  // namespace tilewise
