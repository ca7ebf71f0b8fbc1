// Products of quantized weights with activations that are bytes: see quant_activations.h.
//
// A strip of the weight is decoded into a buffer in the first-level cache and multiplied with all
// rows of x: 16 rows of the weight in the lanes, four consecutive elements of a row of x broadcast to
// them. Sums over a strip are exact integers, which one multiply-add per strip brings to float32.
//
// With one row this is bound by memory: on AVX2 a strip of 4-bit codes (256 bytes) costs about 60
// instructions with one digit and 140 with three.
#include <atomic>
#include <cstring>

#include "cpu/quant_activations.h"
#include "cpu/quant_kernels.h"
#include "cpu/quant_strips.h"

namespace tilewise {
namespace {

constexpr int W = F32::WIDTH, VECTORS = PANEL_ROWS / W;
constexpr int CHUNK = 4;                       // strips that are decoded at a time
constexpr int64_t TASK_BYTES = 32 << 10;       // of the weight
constexpr int MAX_PANELS = 16;

// One strip of codes times ROWS rows of x, added to 16 sums a row.
template <class F, int DIGITS, int ROWS>
void multiply_strip(const Strip& w, const SplitStrip<DIGITS>* const* x, float* sums,
                    int64_t sums_stride) {
  for (int g = 0; g < F::GROUPS; ++g) {
    constexpr int EACH = QUADS / F::GROUPS;
    Products<F::BITS> products[ROWS][DIGITS][VECTORS];
#pragma GCC unroll 8
    for (int q = 0; q < EACH; ++q) {
      I32 codes[VECTORS];
      for (int v = 0; v < VECTORS; ++v) codes[v] = load_int(&w.codes[g * EACH + q][v * W][0]);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
        for (int d = 0; d < DIGITS; ++d) {
          int32_t four;
          std::memcpy(&four, x[r]->codes[d] + (g * EACH + q) * 4, 4);
          const I32 all = I32::all(four);
          for (int v = 0; v < VECTORS; ++v) products[r][d][v].add(codes[v], all, q);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const SplitStrip<DIGITS>& row = *x[r];
      for (int v = 0; v < VECTORS; ++v) {
        F32 value = F32::zero();
#pragma GCC unroll 8
        for (int d = DIGITS - 1; d >= 0; --d) {
          F32 digit = to_f32(products[r][d][v].take());
          if constexpr (F::HAS_ZERO) {  // an exact difference: both are integers below 2^24
            digit = fma(F32::all(-row.sums[g][d]), load(&w.zero[g][v * W]), digit);
          }
          value = d == DIGITS - 1 ? digit : fma(value, F32::all(1 / DIGIT_BASE), digit);
        }
        F32 scale = load(&w.scale[g][v * W]) * F32::all(row.scale);
        float* sum = sums + r * sums_stride + v * W;
        if constexpr (F::HAS_SHIFT) {
          value = fma(value, scale, load(&w.shift[g][v * W]) * F32::all(row.totals[g]));
          store(sum, load(sum) + value);
        } else {
          store(sum, fma(value, scale, load(sum)));
        }
      }
    }
  }
}

template <class F, int DIGITS, int ROWS>
void multiply_strips(const Strip* w, int strips, const SplitStrip<DIGITS>* x, int64_t x_stride,
                     int64_t rows, float* sums, int64_t sums_stride) {
  for (; rows >= ROWS; rows -= ROWS, x += ROWS * x_stride, sums += ROWS * sums_stride) {
    for (int s = 0; s < strips; ++s) {
      const SplitStrip<DIGITS>* each[ROWS];
      for (int r = 0; r < ROWS; ++r) each[r] = x + r * x_stride + s;
      multiply_strip<F, DIGITS, ROWS>(w[s], each, sums, sums_stride);
    }
  }
  if constexpr (ROWS > 1) {
    multiply_strips<F, DIGITS, ROWS / 2>(w, strips, x, x_stride, rows, sums, sums_stride);
  }
}

// Rows of x at a time, as many as leave the sums in registers.
template <int DIGITS>
constexpr int ROWS_AT_ONCE = W == 16 ? (DIGITS == 1 ? 8 : 4) : (DIGITS == 1 ? 4 : DIGITS == 2 ? 2 : 1);

// Decoding waits for memory while the products of the chunk before do not, and they are too many
// instructions for a core to look past: what comes AHEAD bytes later is asked for now. The panels of
// a task lie behind each other.
inline void prefetch(const uint8_t* p, int64_t bytes) {
  constexpr int64_t AHEAD = 4096;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + AHEAD + i);
}

template <class F, int DIGITS>
void multiply_panel(const QuantizedWeight& w, int64_t panel, const SplitStrip<DIGITS>* x,
                    int64_t rows, float* sums, int64_t sums_stride) {
  const int64_t strips = strips_of(w.depth);
  const int64_t strip_bytes = strips ? w.panel_bytes / strips : 0;
  Strip decoded[CHUNK];
  for (int64_t m = 0; m < rows; ++m) std::fill_n(sums + m * sums_stride, PANEL_ROWS, 0.0f);
  for (int64_t first = 0; first < strips; first += CHUNK) {
    const int count = static_cast<int>(std::min<int64_t>(strips - first, CHUNK));
    prefetch(w.data + panel * w.panel_bytes + first * strip_bytes, count * strip_bytes);
    for (int s = 0; s < count; ++s) decode_strip<F>(w, panel, first + s, decoded[s]);
    multiply_strips<F, DIGITS, ROWS_AT_ONCE<DIGITS>>(decoded, count, x + first, strips, rows, sums,
                                                     sums_stride);
  }
}

template <int DIGITS>
bool split(const QuantizedMatmul& call, bool halves, SplitStrip<DIGITS>* out) {
  const int64_t strips = strips_of(call.weight.depth);
  const int64_t group = DIGITS == 1 ? activation_strips(call) : 1;
  std::atomic<bool> possible{true};
  parallel_rows(call.rows, strips * STRIP, [&](int64_t m) {
    const auto row = make_workspace<float>(strips * STRIP);
    load_row(call, m, row.get());
    if (!split_row(row.get(), call.weight.depth, group, halves, out + m * strips)) possible = false;
  });
  return possible;
}

template <class F, int DIGITS>
bool multiply(const QuantizedMatmul& call, const Finisher& finish) {
  const QuantizedWeight& w = call.weight;
  const auto x = make_workspace<SplitStrip<DIGITS>>(call.rows * strips_of(w.depth));
  if (!split<DIGITS>(call, F::GROUPS == 2, x.get())) return false;
  for_panels<MAX_PANELS>(call, finish, TASK_BYTES / std::max<int64_t>(w.panel_bytes, 1),
                         [&](const int64_t* panels, int count, float* sums) {
                           for (int i = 0; i < count; ++i) {
                             multiply_panel<F, DIGITS>(w, panels[i], x.get(), call.rows,
                                                       sums + i * PANEL_ROWS, count * PANEL_ROWS);
                           }
                         });
  return true;
}

}  // namespace

bool multiply_bytes(const QuantizedMatmul& call, const Finisher& finish) {
  bool done = false;
  with_format(call.weight.format, [&](auto format) {
    using F = decltype(format);
    if constexpr (F::IS_INTEGER) {
      if (call.int8_activations) {
        done = multiply<F, 1>(call, finish);
      } else if (call.dtype == DType::f32) {
        done = multiply<F, 3>(call, finish);
      } else {
        done = multiply<F, 2>(call, finish);
      }
    }
  });
  return done;
}

}  // namespace tilewise
