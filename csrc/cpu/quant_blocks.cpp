// Products of quantized weights with many rows of activations that are bytes, on AVX-512 VNNI.
//
// A block of the weight, a few strips of two panels, is decoded into the first-level cache once, and
// all rows of x run over it. Of the vector instructions half a core can do nothing but products
// (vpdpbusd, multiply-adds), and they are what everything else waits for, so little else is left:
//
// - Codes are multiplied as signed bytes, with their zeros subtracted, and x as unsigned ones: what 128
//   too much of x adds depends on the weight alone, is known once a strip is decoded, and is what sums
//   of integers begin with. (The usual way round, zeros cost an instruction for every row of x.)
// - Sums stay integers for as many strips as share their scales (`span`), and floats in registers for
//   the whole block.
// - Digits of x (quant_activations.h) are put together as integers.
#include "cpu/quant_kernels.h"
#include "cpu/quant_strips.h"

#if defined(__AVX512F__)

#include <cstring>

#include "cpu/quant_blocks.h"

namespace tilewise {
namespace {

constexpr int64_t MOST_ROWS = 768;         // of x in a pass: what one reads stays in the second level
constexpr int64_t SHARED_PANELS = 8;       // of a task, about
constexpr int PAIR = 2;                    // panels of a block

// Rows of x at a time: with two panels their sums fill the register file.
template <int DIGITS>
constexpr int ROWS_AT_ONCE = DIGITS == 1 ? 6 : DIGITS == 2 ? 4 : 3;

// A block of a panel. A *unit* is what shares a scale within a strip: all of it, or half. What a span
// of units shares stands at its first one.
struct Block {
  I32 codes[MOST_STRIPS * QUADS];
  I32 start[MOST_STRIPS * 2];
  F32 scale[MOST_STRIPS * 2], shift[MOST_STRIPS * 2], zero[MOST_STRIPS * 2];
};

// What is left of a format here. KEEPS_ZERO: code and zero are too far apart for a byte.
template <int GROUPS_, bool HAS_SHIFT_, bool KEEPS_ZERO_>
struct Kind {
  static constexpr int GROUPS = GROUPS_, UNIT_QUADS = QUADS / GROUPS_;
  static constexpr bool HAS_SHIFT = HAS_SHIFT_, KEEPS_ZERO = KEEPS_ZERO_;
};

inline I32 four_times(I32 byte) { return (byte & I32::all(255)) * I32::all(ONES); }

template <class F, class K>
__attribute__((flatten)) void decode_block(const QuantizedWeight& w, int64_t panel, int64_t first,
                                           int deep, int span, Block& out) {
  const int64_t strip_bytes = w.panel_bytes / strips_of(w.depth);
  const uint8_t* data = w.data + panel * w.panel_bytes + first * strip_bytes;
  I32 start = I32::zero();
  for (int s = 0; s < deep; ++s) {
    prefetch<2>(data + s * strip_bytes, strip_bytes, deep * strip_bytes);  // the next block
    Strip strip;
    decode_strip<F>(w, panel, first + s, strip);
    for (int g = 0; g < K::GROUPS; ++g) {
      const int unit = s * K::GROUPS + g, begin = unit & -span;
      I32 less = I32::zero();  // than the codes as decoded
      if constexpr (K::KEEPS_ZERO) {
        if constexpr (F::BITS == 8) less = four_times(I32::all(BYTE_OFFSET));
        out.zero[begin] = strip.zero[g][0] - F32::all(F::BITS == 8 ? BYTE_OFFSET : 0);
      } else if constexpr (F::HAS_ZERO) {
        less = four_times(to_i32(strip.zero[g][0]));
      }
      if (unit == begin) start = I32::zero();
      I32 sum = I32::zero();
      for (int q = 0; q < K::UNIT_QUADS; ++q) {
        const I32 codes = sub_bytes(strip.codes[g * K::UNIT_QUADS + q][0], less);
        out.codes[unit * K::UNIT_QUADS + q] = codes;
        sum = dot_bytes(sum, I32::all(ONES), codes);
      }
      start = start - sum * I32::all(OFFSET);
      out.start[begin] = start;
      out.scale[begin] = strip.scale[g][0];
      if constexpr (K::HAS_SHIFT) out.shift[begin] = strip.shift[g][0];
    }
  }
}

// Digits together: of the last one's scale.
template <int DIGITS>
inline F32 number(const I32 (&digits)[DIGITS]) {
  constexpr int LAST = DIGITS - 1;
  if constexpr (DIGITS == 1) return to_f32(digits[0]);
  const I32 low = (digits[LAST - 1] << 8) - digits[LAST - 1] + digits[LAST];
  if constexpr (DIGITS == 2) return to_f32(low);
  return fma(to_f32(digits[0]), F32::all(DIGIT_BASE * DIGIT_BASE), to_f32(low));
}

// A block of PANELS panels with ROWS rows of x, added to their sums.
template <class K, int DIGITS, int PANELS, int ROWS>
void multiply_tile(const Block* w, const RowBlock<DIGITS>* x, int units, int span, float* sums,
                   int64_t sums_stride, bool is_first) {
  F32 sum[ROWS][PANELS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) {
      sum[r][p] = is_first ? F32::zero() : load(sums + r * sums_stride + p * PANEL_ROWS);
    }
  }
  for (int begin = 0; begin < units; begin += span) {
    I32 products[ROWS][PANELS][DIGITS];
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) {
      const I32 start = w[p].start[begin];
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
        for (int d = 0; d < DIGITS; ++d) products[r][p][d] = start;
      }
    }
    const int end = std::min(units, begin + span) * K::UNIT_QUADS;
#pragma GCC unroll 4
    for (int q = begin * K::UNIT_QUADS; q < end; ++q) {
      I32 codes[PANELS];
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) codes[p] = w[p].codes[q];
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
        for (int d = 0; d < DIGITS; ++d) {
          int32_t four;
          std::memcpy(&four, x[r].codes[d] + q * 4, 4);
          const I32 all = I32::all(four);
#pragma GCC unroll 2
          for (int p = 0; p < PANELS; ++p) {
            products[r][p][d] = dot_bytes(products[r][p][d], all, codes[p]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const int strip = begin / K::GROUPS;
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) {
        if constexpr (K::KEEPS_ZERO) {
          // In integers, as everything here.
          const I32 zero = to_i32(w[p].zero[begin]);
#pragma GCC unroll 3
          for (int d = 0; d < DIGITS; ++d) {
            products[r][p][d] =
                products[r][p][d] - zero * I32::all(static_cast<int>(x[r].sums[strip][d]));
          }
        }
        if constexpr (K::HAS_SHIFT) {
          sum[r][p] = fma(w[p].shift[begin], F32::all(x[r].totals[begin]), sum[r][p]);
        }
        const F32 scale = w[p].scale[begin] * F32::all(x[r].scale[strip]);
        sum[r][p] = fma(number<DIGITS>(products[r][p]), scale, sum[r][p]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) store(sums + r * sums_stride + p * PANEL_ROWS, sum[r][p]);
  }
}

template <class K, int DIGITS, int PANELS, int ROWS = ROWS_AT_ONCE<DIGITS>>
void multiply_rows(const Block* w, const RowBlock<DIGITS>* x, int64_t rows, int units, int span,
                   float* sums, int64_t sums_stride, bool is_first) {
  for (; rows >= ROWS; rows -= ROWS, x += ROWS, sums += ROWS * sums_stride) {
    multiply_tile<K, DIGITS, PANELS, ROWS>(w, x, units, span, sums, sums_stride, is_first);
  }
  if constexpr (ROWS > 1) {
    if (rows > 0) {
      multiply_rows<K, DIGITS, PANELS, ROWS - 1>(w, x, rows, units, span, sums, sums_stride,
                                                 is_first);
    }
  }
}

// Strips that share all scales: a power of two, so that no block cuts them.
template <class F>
int span_of(const QuantizedMatmul& call, int digits) {
  const QuantizedWeight& w = call.weight;
  if (!w.scales) return 1;  // a GGUF format
  // Several digits are as fine as the largest of a span: for float32 it must not be long.
  const int64_t most = digits == 1 ? LONGEST_SPAN : digits == 2 ? 2 : 1;
  if (w.group_strips >= strips_of(w.depth)) return static_cast<int>(most);
  return static_cast<int>(std::min(w.group_strips & -w.group_strips, most));
}

template <class F, class K, int DIGITS>
bool multiply(const QuantizedMatmul& call, const Finisher& finish) {
  const QuantizedWeight& w = call.weight;
  const int span = span_of<F>(call, DIGITS);
  const RowBlocks<DIGITS> x(call, K::GROUPS, span);
  if (!x.is_possible) return false;
  const int64_t strips = strips_of(w.depth);
  for_panels(
      call, finish, even_shares(call, SHARED_PANELS, PAIR),
      [&](const Segment& segment, const int64_t* panels, int count, float* sums) {
        const int64_t all = segment.end - segment.begin, stride = count * PANEL_ROWS;
        if (strips == 0) std::fill_n(sums, all * stride, 0.0f);
        const auto blocks = make_workspace<Block>(PAIR);
        for (int64_t m = 0; m < all; m += MOST_ROWS) {
          const int64_t rows = std::min(all - m, MOST_ROWS);
          for (int64_t first = 0; first < strips; first += x.deep()) {
            const int deep = static_cast<int>(std::min(strips - first, x.deep()));
            const RowBlock<DIGITS>* row = x.block(first) + segment.begin + m;
            for (int i = 0; i < count; i += PAIR) {
              const bool is_pair = i + 1 < count;
              for (int p = 0; p <= is_pair; ++p) {
                decode_block<F, K>(w, panels[i + p], first, deep, span, blocks[p]);
              }
              const auto run = is_pair ? multiply_rows<K, DIGITS, 2> : multiply_rows<K, DIGITS, 1>;
              run(blocks.get(), row, rows, deep * K::GROUPS, span,
                  sums + m * stride + i * PANEL_ROWS, stride, first == 0);
            }
          }
        }
      });
  return true;
}

// Whether code - zero is a byte: always, but for zeros that are given and unusual.
template <class F>
bool keeps_zero(const QuantizedMatmul& call) {
  const QuantizedWeight& w = call.weight;
  if (!w.zeros) return false;
  if (F::BITS == 8) return true;
  int64_t stack = 1;
  for (int64_t i = 0; i < call.segment_count; ++i) {
    stack = std::max(stack, call.segments[i].weight + 1);
  }
  const int64_t count = stack * panels_of(w.rows) * w.groups * PANEL_ROWS;
  return std::any_of(w.zeros, w.zeros + count, [](uint8_t zero) { return zero > OFFSET; });
}

template <class F, class K>
bool multiply_digits(const QuantizedMatmul& call, const Finisher& finish) {
  switch (digits_of(call)) {
    case 1: return multiply<F, K, 1>(call, finish);
    case 2: return multiply<F, K, 2>(call, finish);
    // Weights far from zero make sums that cancel, and show what digits leave of an element.
    default: return !K::KEEPS_ZERO && multiply<F, K, 3>(call, finish);
  }
}

}  // namespace

bool multiply_byte_blocks(const QuantizedMatmul& call, const Finisher& finish) {
  bool done = false;
  with_format(call.weight.format, [&](auto format) {
    using F = decltype(format);
    if constexpr (std::is_same<F, strips::Int8>::value || std::is_same<F, strips::Int4>::value) {
      done = keeps_zero<F>(call) ? multiply_digits<F, Kind<1, false, true>>(call, finish)
                                 : multiply_digits<F, Kind<1, false, false>>(call, finish);
    } else if constexpr (F::IS_INTEGER) {
      done = multiply_digits<F, Kind<F::GROUPS, F::HAS_SHIFT, false>>(call, finish);
    }
  });
  return done;
}

}  // namespace tilewise

#else

namespace tilewise {

bool multiply_byte_blocks(const QuantizedMatmul&, const Finisher&) { return false; }

}  // namespace tilewise

#endif
