// x as pairs of bfloat16, for products by vdpbf16ps.
#pragma once

#include "cpu/gemm.h"
#include "cpu/quant_activations.h"
#include "cpu/quant_kernels.h"

#if defined(__AVX512BF16__)

#include <atomic>

namespace tilewise {

constexpr int BLOCK = 8;  // strips that are widened at a time
constexpr int64_t BLOCK_PAIRS = BLOCK * STRIP / 2;
constexpr int64_t MOST_ROWS = 768;  // of x in a pass: what one reads stays in the second level
constexpr int64_t PAIR_PANELS = 8;  // of a task, about
constexpr int SIDE = PANEL / PANEL_ROWS;  // panels of the weight in one of gemm.h

// Of lanes 0, 16, ..., 1, 17, ... and so on; a NaN is larger than all. Zeros fill up what is not there.
inline F32 largest_of(const BFloat16* x, int64_t n) {
  F32 most = F32::zero();
  for (int64_t i = 0; i < n; i += F32::WIDTH) most = max_bits(most, abs(load(x + i)));
  return most;
}

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
      F32 most = F32::zero();
      for (int64_t first = 0; first < depth; first += DEEP) {
        BFloat16* to = at(m, first);
        const int64_t deep = std::min(depth - first, DEEP);
        std::copy_n(row + first, deep, to);
        std::fill_n(to + deep, round_up(deep, STRIP) - deep, BFloat16{0});
        most = max_bits(most, largest_of(to, deep));
      }
      float of_lane[F32::WIDTH];
      store(of_lane, most);
      // Products of tiny numbers would be lost: what is subnormal is zero here.
      const float largest = *std::max_element(
          of_lane, of_lane + F32::WIDTH, [](float a, float b) { return a < b || b != b; });
      if (!(largest == 0 || (largest >= 0x1p-90f && largest <= 0x1p100f))) possible = false;
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
