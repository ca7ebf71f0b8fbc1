// Activations for quant_blocks.cpp: digits as in quant_activations.h but unsigned, in blocks of some
// strips of which all rows lie behind each other.
//
// A row is split 16 strips at a time, so that largest elements and sums are found for 16 strips at
// once: one by one, finding them takes as long as all else. It is divided by its scales without a
// division, and sums of codes are products of bytes by 1.
#pragma once

#include <atomic>

#include "cpu/quant_scales.h"
#include "cpu/quant_kernels.h"

namespace tilewise {

// Strips of a block at most. The codes of 18 strips of two panels and what stands beside them are 25 KB,
// which the first-level cache holds. With several digits there are fewer, so that 768 rows of x take
// about as much of the second level.
constexpr int MOST_STRIPS = 18;
template <int DIGITS>
constexpr int BLOCK = DIGITS == 1 ? MOST_STRIPS : 24 / DIGITS;
constexpr int LONGEST_SPAN = 8;  // strips that share a scale

constexpr int OFFSET = 128;  // what a code is more than its digit
constexpr int32_t ONES = 0x01010101, OFFSETS = static_cast<int32_t>(uint32_t{OFFSET} * ONES);

template <int DIGITS>
struct alignas(64) RowBlock {
  uint8_t codes[DIGITS][BLOCK<DIGITS> * STRIP];
  float scale[BLOCK<DIGITS>];       // of the last digit, by strip
  float totals[BLOCK<DIGITS> * 2];  // of x by unit, a strip or half of one; of a span at its first
  float sums[BLOCK<DIGITS>][DIGITS];  // of the digits of a span
};

template <int DIGITS>
class RowBlocks {
 public:
  // `groups` units of a strip; or `span` strips, a power of two up to LONGEST_SPAN, that share all
  // scales.
  RowBlocks(const QuantizedMatmul& call, int groups, int span)
      : rows_(call.rows), groups_(groups), span_(span) {
    const int64_t strips = strips_of(call.weight.depth), filled = round_up(strips, TOGETHER);
    shared_ = DIGITS == 1 ? activation_strips(call) : span;
    // As few blocks as can be, of one depth, with whole spans and whole pairs of strips.
    const int64_t unit = std::max(span, 2), most = BLOCK<DIGITS> / unit * unit;
    const int64_t blocks = std::max<int64_t>((strips + most - 1) / most, 1);
    deep_ = std::max(round_up((strips + blocks - 1) / blocks, unit), unit);
    data_ = make_workspace<RowBlock<DIGITS>>(rows_ * blocks);
    std::atomic<bool> possible{true};
    const int64_t each = rows_per_task(strips * STRIP);
    parallel((rows_ + each - 1) / each, [&](int64_t task) {
      const auto row = make_workspace<float>(filled * STRIP), scales = make_workspace<float>(filled);
      for (int64_t m = task * each; m < std::min(rows_, (task + 1) * each); ++m) {
        load_row(call, m, row.get());
        std::fill_n(row.get() + strips * STRIP, strips % 2 * STRIP, 0.0f);
        const bool is_normal = find_scales(row.get(), strips, shared_, scales.get());
        if (!is_normal && DIGITS > 1) possible = false;
        for (int64_t s = 0; s < strips; s += TOGETHER) {
          split(row.get() + s * STRIP, scales.get() + s, is_normal, m, s,
                static_cast<int>(std::min(strips - s, TOGETHER)));
        }
      }
    });
    is_possible = possible;
  }

  // All rows of the block that begins with strip `first`.
  const RowBlock<DIGITS>* block(int64_t first) const { return data_.get() + first / deep_ * rows_; }
  // Strips of a block; the last one may have fewer.
  int64_t deep() const { return deep_; }

  bool is_possible;  // false if a row has no digits

 private:
  static constexpr int W = F32::WIDTH;
  static constexpr int64_t TOGETHER = SCALES_TOGETHER;

  // `count` strips of row m from strip `first` on; x holds an even number of strips, and `scales`
  // TOGETHER.
  void split(const float* x, const float* scales, bool is_normal, int64_t m, int64_t first,
             int count) {
    constexpr float LAST = DIGITS == 1 ? 1 : DIGITS == 2 ? DIGIT_BASE : DIGIT_BASE * DIGIT_BASE;
    alignas(64) float inverses[TOGETHER], of_strip[DIGITS][TOGETHER], of_half[2][TOGETHER];
    alignas(64) float of_both[TOGETHER], last_scales[TOGETHER];
    const F32 scale = load(scales);
    store(inverses, select_equal(scale, F32::zero(), F32::zero(), F32::all(1) / scale));
    RowBlock<DIGITS>* const begin = &data_[first / deep_ * rows_ + m];
    const int begin_at = static_cast<int>(first % deep_);

    I32 strips[DIGITS][TOGETHER / 2];  // sums of four codes each, two strips in a vector
    for (int d = 0; d < DIGITS; ++d) std::fill_n(strips[d], TOGETHER / 2, I32::zero());
    RowBlock<DIGITS>* to = begin;
    for (int i = 0, at = begin_at; i < count; i += 2, at += 2) {
      if (at == deep_) to += rows_, at = 0;
      F32 rest[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const int s = i + v / 2;
        rest[v] = quotient(load(x + i * STRIP + v * W), scales[s], inverses[s], is_normal);
      }
#pragma GCC unroll 3
      for (int d = 0; d < DIGITS; ++d) {
        F32 digit[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          digit[v] = round(rest[v]);  // the first is at most 127, as the largest element is
          if (d > 0) digit[v] = min(max(digit[v], F32::all(-127)), F32::all(127));
          rest[v] = (rest[v] - digit[v]) * F32::all(DIGIT_BASE);
        }
        const I32 codes = to_bytes(digit);
        strips[d][i / 2] = dot_bytes(I32::zero(), I32::all(ONES), codes);
        store_int(to->codes[d] + at * STRIP, codes ^ I32::all(OFFSETS));
      }
    }
    F32 total[2] = {F32::zero(), F32::zero()};
    for (int d = DIGITS; d-- > 0;) {
      I32 sums[2];
      reduce_halves(strips[d], sums);
      for (int h = 0; h < 2; ++h) {
        total[h] = fma(total[h], F32::all(1 / DIGIT_BASE), to_f32(sums[h]));
      }
      store(of_strip[d], to_f32(sums[0] + sums[1]));
    }
    for (int h = 0; h < 2; ++h) store(of_half[h], total[h] * scale);
    store(of_both, (total[0] + total[1]) * scale);
    store(last_scales, scale / F32::all(LAST));
    to = begin;
    for (int i = 0, at = begin_at, here; i < count; i += here, at = 0, to += rows_) {
      here = static_cast<int>(std::min<int64_t>(count - i, deep_ - at));
      fill(i, here, last_scales, of_strip, of_half, of_both, at, *to);
    }
  }

  // What stands beside the codes: of `count` strips from `i` on, which are a block's from `at` on.
  void fill(int i, int count, const float* scales, const float (&of_strip)[DIGITS][TOGETHER],
            const float (&of_half)[2][TOGETHER], const float* of_both, int at,
            RowBlock<DIGITS>& to) const {
    std::copy_n(scales + i, count, to.scale + at);
    for (int s = 0; s < count; ++s) {
      for (int d = 0; d < DIGITS; ++d) to.sums[at + s][d] = of_strip[d][i + s];
    }
    if (groups_ == 2) {
      for (int s = 0; s < count; ++s) {
        for (int h = 0; h < 2; ++h) to.totals[2 * (at + s) + h] = of_half[h][i + s];
      }
      return;
    }
    std::copy_n(of_both + i, count, to.totals + at);
    for (int begin = at; span_ > 1 && begin < at + count; begin += span_) {
      for (int s = begin + 1; s < std::min(begin + span_, at + count); ++s) {
        to.totals[begin] += to.totals[s];
        for (int d = 0; d < DIGITS; ++d) to.sums[begin][d] += to.sums[s][d];
      }
    }
  }

  int64_t rows_, shared_, deep_;
  int groups_, span_;
  Workspace<RowBlock<DIGITS>> data_;
};

}  // namespace tilewise
