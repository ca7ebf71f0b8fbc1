// Products of quantized weights with activations that are bytes: see quant_activations.h.
//
// A strip of the weight is decoded, into registers where x has few rows and else into a buffer in the
// first-level cache, and multiplied with all rows of x: 16 rows of the weight in the lanes, four
// consecutive elements of a row of x broadcast to them. Sums over a strip are exact integers, which one
// multiply-add per strip brings to float32.
//
// With one row this is bound by memory: on AVX2 a strip of 4-bit codes (256 bytes) costs about 60
// instructions with one digit and 140 with three.
//
// Formats, digits and rows make hundreds of kernels, which take long to compile: quant_bytes_*.cpp have
// those of a number of digits each, and formats that are multiplied alike share what does not decode.
#pragma once

#include <atomic>
#include <cstring>

#include "cpu/quant_activations.h"
#include "cpu/quant_kernels.h"
#include "cpu/quant_strips.h"

namespace tilewise {
namespace {

constexpr int W = F32::WIDTH, VECTORS = PANEL_ROWS / W;
constexpr int CHUNK = 2;                       // strips that are decoded at a time
// Of the weight where x has few rows, and it streams: long tasks read faster, if there are enough.
constexpr int64_t LEAST_BYTES = 32 << 10, MOST_BYTES = 128 << 10, ENOUGH_TASKS = 64;
constexpr int64_t SHARED_PANELS = 8;           // of a task with more rows
constexpr int64_t AHEAD = 4096;                // bytes from what is decoded to what is asked for
constexpr int64_t SMALL_DEPTH = 4096;          // rows of x up to here are split on the stack

// Sums of rows of x with the 16 rows of a panel: in memory where there are many, else in registers.
struct SumsInMemory {
  float* data;
  int64_t stride;
  F32 get(int r, int v) const { return load(data + r * stride + v * W); }
  void set(int r, int v, F32 x) { store(data + r * stride + v * W, x); }
};
template <int ROWS>
struct SumsInRegisters {
  F32 data[ROWS][VECTORS];
  F32 get(int r, int v) const { return data[r][v]; }
  void set(int r, int v, F32 x) { data[r][v] = x; }
};

// One strip of codes times ROWS rows of x, which are CHUNK strips apart, added to 16 sums a row.
// `Sums` is SumsInMemory, by value because stores might change what is referred to, or a reference.
template <class F, int DIGITS, int ROWS, class Sums>
inline void multiply_strip(const Strip& w, const SplitStrip<DIGITS>* x, Sums sums) {
  constexpr int EACH = QUADS / F::GROUPS;
  constexpr int ROOM = std::min(Products<F::BITS>::ROOM, EACH);
  // With many rows a step is not unrolled: compilers then multiply first and add later, and run out
  // of registers.
  constexpr int STEP = W == 8 && ROOM == EACH && ROWS * DIGITS > 3 ? 1 : ROOM;
#pragma GCC unroll 2
  for (int g = 0; g < F::GROUPS; ++g) {
    Products<F::BITS> products[ROWS][DIGITS][VECTORS];
#pragma GCC unroll 1
    for (int step = 0; step < EACH; step += STEP) {
#pragma GCC unroll 8
      for (int q = g * EACH + step; q < g * EACH + step + STEP; ++q) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
          for (int d = 0; d < DIGITS; ++d) {
            int32_t four;
            std::memcpy(&four, x[r * CHUNK].codes[d] + q * 4, 4);
            const I32 all = I32::all(four);
            for (int v = 0; v < VECTORS; ++v) products[r][d][v].add(w.codes[q][v], all);
          }
        }
      }
      if constexpr (ROOM < EACH) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
          for (int d = 0; d < DIGITS; ++d) {
            for (int v = 0; v < VECTORS; ++v) products[r][d][v].widen();
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const SplitStrip<DIGITS>& row = x[r * CHUNK];
      for (int v = 0; v < VECTORS; ++v) {
        F32 value = F32::zero();
#pragma GCC unroll 8
        for (int d = DIGITS - 1; d >= 0; --d) {
          F32 digit = to_f32(products[r][d][v].take());
          if constexpr (F::HAS_ZERO) {  // an exact difference: both are integers below 2^24
            digit = fma(F32::all(-row.sums[g][d]), w.zero[g][v], digit);
          }
          value = d == DIGITS - 1 ? digit : fma(value, F32::all(1 / DIGIT_BASE), digit);
        }
        const F32 scale = w.scale[g][v] * F32::all(row.scale);
        F32 before = sums.get(r, v);
        if constexpr (F::HAS_SHIFT) before = fma(w.shift[g][v], F32::all(row.totals[g]), before);
        sums.set(r, v, fma(value, scale, before));
      }
    }
  }
}

// The rows of x as bytes, CHUNK strips of all rows behind each other: a pass over the rows with a few
// decoded strips of the weight then reads memory in one direction.
template <int DIGITS>
class SplitRows {
 public:
  using Chunk = SplitStrip<DIGITS>[CHUNK];

  // `is_possible` is false if a row cannot be split.
  SplitRows(const QuantizedMatmul& call, bool halves) : rows_(call.rows) {
    const int64_t depth = call.weight.depth, strips = strips_of(depth);
    const int64_t group = DIGITS == 1 ? activation_strips(call) : 1;
    data_ = make_workspace<Chunk>(rows_ * ((strips + CHUNK - 1) / CHUNK));
    std::atomic<bool> possible{true};
    parallel_rows(rows_, strips * STRIP, [&](int64_t m) {
      const SmallWorkspace<float, SMALL_DEPTH> row(strips * STRIP);
      const SmallWorkspace<SplitStrip<DIGITS>, SMALL_DEPTH / STRIP> split(strips);
      load_row(call, m, row.get());
      if (!split_row(row.get(), depth, group, halves, split.get())) possible = false;
      for (int64_t s = 0; s < strips; ++s) data_[s / CHUNK * rows_ + m][s % CHUNK] = split[s];
    });
    is_possible = possible;
  }

  // All rows of the chunk that begins with strip `first`.
  const Chunk* chunk(int64_t first) const { return data_.get() + first / CHUNK * rows_; }

  bool is_possible;

 private:
  int64_t rows_;
  Workspace<Chunk> data_;
};

template <class Kind, int DIGITS, int ROWS>
void multiply_strips(const Strip* w, int strips, const SplitStrip<DIGITS> (*x)[CHUNK], int64_t rows,
                     SumsInMemory sums) {
  for (; rows >= ROWS; rows -= ROWS, x += ROWS, sums.data += ROWS * sums.stride) {
    for (int s = 0; s < strips; ++s) {
      multiply_strip<Kind, DIGITS, ROWS, SumsInMemory>(w[s], x[0] + s, sums);
    }
  }
  if constexpr (ROWS > 1) multiply_strips<Kind, DIGITS, ROWS / 2>(w, strips, x, rows, sums);
}

// Rows of x at a time, as many as leave the sums in registers.
template <int DIGITS>
constexpr int ROWS_AT_ONCE = W == 16 ? (DIGITS == 1 ? 8 : 4) : (DIGITS == 1 ? 4 : DIGITS == 2 ? 2 : 1);

// Some panels with the rows [begin, end) of x: a chunk of x is read once for all of them.
template <class F, int DIGITS>
void multiply_panels(const QuantizedWeight& w, const int64_t* panels, int count,
                     const SplitRows<DIGITS>& x, int64_t begin, int64_t end, float* sums,
                     int64_t sums_stride) {
  const int64_t strips = strips_of(w.depth);
  const int64_t strip_bytes = strips ? w.panel_bytes / strips : 0;
  Strip decoded[CHUNK];
  for (int64_t first = 0; first < strips; first += CHUNK) {
    const int deep = static_cast<int>(std::min<int64_t>(strips - first, CHUNK));
    for (int i = 0; i < count; ++i) {
      prefetch<1>(w.data + panels[i] * w.panel_bytes + first * strip_bytes, deep * strip_bytes, AHEAD);
      for (int s = 0; s < deep; ++s) decode_strip<F>(w, panels[i], first + s, decoded[s]);
      multiply_strips<typename F::Kind, DIGITS, ROWS_AT_ONCE<DIGITS>>(
          decoded, deep, x.chunk(first) + begin, end - begin, {sums + i * PANEL_ROWS, sums_stride});
    }
  }
}

// A panel that lies in the second-level cache may be read twice.
template <int DIGITS>
constexpr int STREAMED = std::min<int>(ROWS_AT_ONCE<DIGITS>, STREAMED_ROWS);
constexpr int PASSES = W == 16 ? 2 : 1;

// One panel with as many rows as leave everything in registers: no strip is written to memory, if
// all that it is made of is inlined.
template <class F, int DIGITS, int ROWS>
__attribute__((flatten)) inline void stream_panel(const QuantizedWeight& w, int64_t panel,
                                                  const SplitRows<DIGITS>& x, int64_t begin,
                                                  float* sums, int64_t sums_stride) {
  const int64_t strips = strips_of(w.depth);
  const int64_t strip_bytes = strips ? w.panel_bytes / strips : 0;
  const uint8_t* data = w.data + panel * w.panel_bytes;
  SumsInRegisters<ROWS> kept;
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) kept.data[r][v] = F32::zero();
  }
  for (int64_t s = 0; s < strips; ++s) {
    prefetch<1>(data + s * strip_bytes, strip_bytes, AHEAD);
    Strip strip;
    decode_strip<F>(w, panel, s, strip);
    multiply_strip<F, DIGITS, ROWS, SumsInRegisters<ROWS>&>(
        strip, x.chunk(s)[begin] + s % CHUNK, kept);
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) store(sums + r * sums_stride + v * W, kept.data[r][v]);
  }
}

// In a function of its own it has the registers for itself; one row, which needs few, is faster inlined.
template <class F, int DIGITS, int ROWS>
__attribute__((flatten, noinline)) void stream_panel_apart(const QuantizedWeight& w, int64_t panel,
                                                           const SplitRows<DIGITS>& x, int64_t begin,
                                                           float* sums, int64_t sums_stride) {
  stream_panel<F, DIGITS, ROWS>(w, panel, x, begin, sums, sums_stride);
}

// The same for a number of rows that is only known at run time, at most ROWS.
template <class F, int DIGITS, int ROWS = STREAMED<DIGITS>>
void stream_panel(const QuantizedWeight& w, int64_t panel, const SplitRows<DIGITS>& x, int64_t begin,
                  int64_t rows, float* sums, int64_t sums_stride) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) {
      return stream_panel<F, DIGITS, ROWS - 1>(w, panel, x, begin, rows, sums, sums_stride);
    }
    stream_panel_apart<F, DIGITS, ROWS>(w, panel, x, begin, sums, sums_stride);
  } else {
    stream_panel<F, DIGITS, 1>(w, panel, x, begin, sums, sums_stride);
  }
}

template <class F, int DIGITS>
bool multiply(const QuantizedMatmul& call, const Finisher& finish) {
  const QuantizedWeight& w = call.weight;
  const int64_t share = panels_of(w.rows) * w.panel_bytes * call.segment_count / ENOUGH_TASKS;
  const int64_t task_bytes = std::clamp(share, LEAST_BYTES, MOST_BYTES);
  const SplitRows<DIGITS> x(call, F::GROUPS == 2);
  if (!x.is_possible) return false;
  // With few rows a panel at a time, in the order in which memory holds them.
  const bool few = has_few_rows(call, STREAMED_ROWS);
  for_panels(
      call, finish, few ? panels_in(call, task_bytes) : SHARED_PANELS,
      [&](const Segment& rows, const int64_t* panels, int count, float* sums) {
        const int64_t stride = count * PANEL_ROWS, x_rows = rows.end - rows.begin;
        if (few && x_rows <= PASSES * STREAMED<DIGITS>) {
          const int64_t each = x_rows <= STREAMED<DIGITS> ? x_rows : (x_rows + 1) / 2;
          for (int i = 0; i < count; ++i) {
            for (int64_t m = 0; m < x_rows; m += each) {
              stream_panel<F, DIGITS>(w, panels[i], x, rows.begin + m, std::min(x_rows - m, each),
                                      sums + m * stride + i * PANEL_ROWS, stride);
            }
          }
          return;
        }
        std::fill_n(sums, x_rows * stride, 0.0f);
        const int together = few ? 1 : count;
        for (int i = 0; i < count; i += together) {
          multiply_panels<F, DIGITS>(w, panels + i, together, x, rows.begin, rows.end,
                                     sums + i * PANEL_ROWS, stride);
        }
      });
  return true;
}

}  // namespace

template <int DIGITS>
bool multiply_bytes(const QuantizedMatmul& call, const Finisher& finish) {
  bool done = false;
  with_format(call.weight.format, [&](auto format) {
    using F = decltype(format);
    if constexpr (F::IS_INTEGER) done = multiply<F, DIGITS>(call, finish);
  });
  return done;
}

}  // namespace tilewise
