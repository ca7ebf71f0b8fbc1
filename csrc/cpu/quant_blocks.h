// Activations for quant_blocks.cpp: digits as in quant_activations.h but unsigned, in blocks of some
// strips of which all rows lie behind each other.
//
// A row is split 16 strips at a time, so that largest elements and sums are found for 16 strips at
// once: one by one, finding them takes as long as all else.
#pragma once

#include <atomic>
#include <cfloat>

#include "cpu/quant_activations.h"
#include "cpu/quant_kernels.h"

namespace tilewise {

constexpr int64_t BLOCK = 8;  // strips
constexpr int OFFSET = 128;   // what a code is more than its digit

template <int DIGITS>
struct alignas(64) RowBlock {
  uint8_t codes[DIGITS][BLOCK * STRIP];
  float scale[BLOCK];         // of the last digit, by strip
  float totals[BLOCK * 2];    // of x by unit, a strip or half of one; of a span at its first unit
  float sums[BLOCK][DIGITS];  // of the digits of a span
};

template <int DIGITS>
class RowBlocks {
 public:
  // `groups` units of a strip; or `span` strips, a power of two, that share all scales.
  RowBlocks(const QuantizedMatmul& call, int groups, int span)
      : rows_(call.rows), groups_(groups), span_(span) {
    const int64_t strips = strips_of(call.weight.depth), filled = round_up(strips, TOGETHER);
    shared_ = DIGITS == 1 ? activation_strips(call) : span;
    data_ = make_workspace<RowBlock<DIGITS>>(rows_ * ((strips + BLOCK - 1) / BLOCK));
    std::atomic<bool> possible{true};
    const int64_t each = rows_per_task(strips * STRIP);
    parallel((rows_ + each - 1) / each, [&](int64_t task) {
      const auto row = make_workspace<float>(filled * STRIP), scales = make_workspace<float>(filled);
      for (int64_t m = task * each; m < std::min(rows_, (task + 1) * each); ++m) {
        load_row(call, m, row.get());
        std::fill_n(row.get() + strips * STRIP, (filled - strips) * STRIP, 0.0f);
        if (!find_scales(row.get(), strips, scales.get())) possible = false;
        for (int64_t s = 0; s < strips; s += TOGETHER) {
          split(row.get() + s * STRIP, scales.get() + s, m, s, std::min(strips - s, TOGETHER));
        }
      }
    });
    is_possible = possible;
  }

  // All rows of the block that begins with strip `first`.
  const RowBlock<DIGITS>* block(int64_t first) const { return data_.get() + first / BLOCK * rows_; }

  bool is_possible;  // false if a row has no digits

 private:
  static constexpr int W = F32::WIDTH;
  static constexpr int64_t TOGETHER = 16;
  static_assert(W == TOGETHER && STRIP == 2 * W, "a lane for every strip, and half a strip a vector");

  // The scale of the first digit of every strip. False where that is not normal.
  bool find_scales(const float* x, int64_t strips, float* scales) const {
    for (int64_t s = 0; s < strips; s += TOGETHER) {
      F32 most[TOGETHER];
      for (int i = 0; i < TOGETHER; ++i) {
        const float* strip = x + (s + i) * STRIP;
        most[i] = max_bits(abs(load(strip)), abs(load(strip + W)));
      }
      transpose(most);
      for (int i = 1; i < TOGETHER; ++i) most[0] = max_bits(most[0], most[i]);
      store(scales + s, most[0]);
    }
    bool is_normal = true;
    for (int64_t first = 0; first < strips; first += shared_) {
      const int64_t last = std::min(strips, first + shared_);
      float most = scales[first];
      for (int64_t s = first + 1; s < last; ++s) {
        if (!(scales[s] <= most)) most = scales[s] > most || scales[s] != scales[s] ? scales[s] : most;
      }
      if (!(most == 0 || (most >= 0x1p-100f && most <= FLT_MAX))) is_normal = false;
      const float scale = most <= FLT_MAX ? most / 127 : __builtin_nanf("");
      std::fill(scales + first, scales + last, scale);
    }
    return is_normal || DIGITS == 1;
  }

  // `count` strips of row m from strip `first` on; x goes on for TOGETHER.
  void split(const float* x, const float* scales, int64_t m, int64_t first, int64_t count) {
    constexpr float LAST = DIGITS == 1 ? 1 : DIGITS == 2 ? DIGIT_BASE : DIGIT_BASE * DIGIT_BASE;
    const F32 top = F32::all(127), bottom = F32::all(-127);
    alignas(64) F32 sums[2][DIGITS][TOGETHER];
    for (int64_t i = count; i < TOGETHER; ++i) {
      for (int d = 0; d < DIGITS; ++d) sums[0][d][i] = sums[1][d][i] = F32::zero();
    }
    for (int i = 0; i < count; ++i) {
      RowBlock<DIGITS>& to = data_[(first + i) / BLOCK * rows_ + m];
      const int s = static_cast<int>((first + i) % BLOCK);
      const F32 divisor = F32::all(scales[i] > 0 ? scales[i] : 1.0f);
      const bool is_number = scales[i] == scales[i];
      for (int h = 0; h < 2; ++h) {
        F32 rest = is_number ? load(x + i * STRIP + h * W) / divisor : F32::zero();
#pragma GCC unroll 3
        for (int d = 0; d < DIGITS; ++d) {
          const F32 digit = min(max(round(rest), bottom), top);
          store_bytes(to.codes[d] + s * STRIP + h * W, digit + F32::all(OFFSET));
          sums[h][d][i] = digit;
          rest = (rest - digit) * F32::all(DIGIT_BASE);
        }
      }
      to.scale[s] = scales[i] / LAST;
    }
    F32 total[2] = {F32::zero(), F32::zero()};
    alignas(64) float of_strip[DIGITS][TOGETHER], of_half[2][TOGETHER], of_both[TOGETHER];
    for (int d = DIGITS; d-- > 0;) {
      F32 both = F32::zero();
      for (int h = 0; h < 2; ++h) {
        const F32 sum = reduce_each(sums[h][d]);
        total[h] = fma(total[h], F32::all(1 / DIGIT_BASE), sum);
        both = both + sum;
      }
      store(of_strip[d], both);
    }
    const F32 scale = load(scales);
    for (int h = 0; h < 2; ++h) store(of_half[h], total[h] * scale);
    store(of_both, (total[0] + total[1]) * scale);
    for (int i = 0; i < count; ++i) {
      RowBlock<DIGITS>& to = data_[(first + i) / BLOCK * rows_ + m];
      const int s = static_cast<int>((first + i) % BLOCK), begin = s & -span_;
      for (int d = 0; d < DIGITS; ++d) {
        to.sums[begin][d] = s == begin ? of_strip[d][i] : to.sums[begin][d] + of_strip[d][i];
      }
      if (groups_ == 2) {
        for (int h = 0; h < 2; ++h) to.totals[2 * s + h] = of_half[h][i];
      } else {
        to.totals[begin] = s == begin ? of_both[i] : to.totals[begin] + of_both[i];
      }
    }
  }

  int64_t rows_, shared_;
  int groups_, span_;
  Workspace<RowBlock<DIGITS>> data_;
};

}  // namespace tilewise
