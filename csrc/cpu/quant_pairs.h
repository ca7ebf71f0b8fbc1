// x as pairs of bfloat16, for products by vdpbf16ps.
#pragma once

#include "cpu/gemm.h"
#include "cpu/quant_activations.h"
#include "cpu/quant_kernels.h"

#if defined(__AVX512BF16__)

#include <atomic>

#include "cpu/bf16_rows.h"

namespace tilewise {

constexpr int BLOCK = 8;  // strips that are widened at a time
constexpr int64_t BLOCK_PAIRS = BLOCK * STRIP / 2;
constexpr int64_t MOST_ROWS = 768;  // of x in a pass: what one reads stays in the second level
constexpr int64_t PAIR_PANELS = 8;  // of a task, about
constexpr int SIDE = PANEL / PANEL_ROWS;  // panels of the weight in one of gemm.h

// x in bfloat16, or its codes in fp8, which are exact there: in blocks, all rows of one behind each
// other, and zeros up to a whole strip.
class PairRows {
 public:
  explicit PairRows(const QuantizedMatmul& call) : rows_(call.rows) {
    data_ = make_workspace<BFloat16Pair>(rows_ * round_up(call.weight.depth, DEEP) / 2);
    call.rounding == Rounding::fp8 ? encode(call) : copy(call);
  }

  // All rows of the block that begins with strip `first`.
  const BFloat16Pair* block(int64_t first) const { return data_.get() + first * STRIP / 2 * rows_; }

  bool is_possible = true;
  int64_t groups = 0;       // of a row, where x is rounded
  Workspace<float> scales;  // (rows, groups)

 private:
  static constexpr int64_t DEEP = BLOCK * STRIP;

  BFloat16* at(int64_t row, int64_t k) { return &data_[k / 2 * rows_ + row * BLOCK_PAIRS].low; }

  void copy(const QuantizedMatmul& call) {
    const int64_t depth = call.weight.depth;
    std::atomic<bool> possible{true};
    parallel_rows(rows_, depth, [&](int64_t m) {
      const BFloat16* row = static_cast<const BFloat16*>(call.x) + m * call.x_stride;
      LargestBfloat16 largest;
      for (int64_t first = 0; first < depth; first += DEEP) {
        BFloat16* to = at(m, first);
        for (int64_t i = first; i < std::min(depth, first + DEEP); i += STRIP) {
          const I32 strip = load_row(row + i, depth - i);
          store_int(to + i - first, strip);
          largest.add(strip.v);
        }
      }
      if (!fits_bfloat16(largest.get())) possible = false;
    });
    is_possible = possible;
  }

  void encode(const QuantizedMatmul& call) {
    const int64_t depth = call.weight.depth, filled = strips_of(depth) * STRIP;
    const int64_t group = activation_strips(call);
    groups = (strips_of(depth) + group - 1) / group;
    scales = make_workspace<float>(rows_ * groups);
    parallel_rows(rows_, depth, [&](int64_t m) {
      const auto row = make_workspace<float>(filled);
      load_row(call, m, row.get());
      encode_float8(row.get(), depth, group, scales.get() + m * groups);
      for (int64_t first = 0; first < filled; first += DEEP) {
        BFloat16* to = at(m, first);
        for (int64_t i = 0; i < std::min(filled - first, DEEP); i += F32::WIDTH) {
          store(to + i, load(row.get() + first + i));
        }
      }
    });
  }

  int64_t rows_;
  Workspace<BFloat16Pair> data_;
};

}  // namespace tilewise

#endif
