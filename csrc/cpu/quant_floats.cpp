// Products of quantized weights in float32: a block of the weight is widened once, to panels in the
// order of gemm.h, and all rows of x run over it.
//
// Widening costs about two instructions a weight, a product with a row of x a quarter or an eighth
// (one multiply-add of 4 or 8 weights each): it is lost in the noise from a hundred rows on, and below
// a handful the dot products of bytes are faster (quant_bytes.h).
#include "cpu/gemm.h"
#include "cpu/quant_activations.h"
#include "cpu/quant_kernels.h"
#include "cpu/quant_strips.h"

namespace tilewise {
namespace {

constexpr int W = F32::WIDTH;
constexpr int64_t SHARED_PANELS = 8;              // of the weight, in a pass over x
constexpr int64_t ROWS_AT_ONCE = 16 * TILE_ROWS;  // of x, for the second-level cache
constexpr int64_t DEPTH_STRIPS = PANEL_DEPTH / STRIP;

// Strips [first, last) of a panel to `out`, of which a row (one k) has PANEL floats.
template <class F>
void widen(const QuantizedWeight& w, int64_t panel, int64_t first, int64_t last, float* out) {
  Strip strip;
  for (int64_t s = first; s < last; ++s) {
    decode_strip<F>(w, panel, s, strip);
    for (int q = 0; q < QUADS; ++q) {
      for (int i = 0; i < 4; ++i, out += PANEL) {
        for (int lane = 0; lane < PANEL_ROWS; lane += W) {
          store(out + lane, strip_values<F>(strip, q, i, lane));
        }
      }
    }
  }
}

template <class F>
void multiply_all(const QuantizedMatmul& call, const Finisher& finish, const float* x,
                  int64_t x_stride) {
  const QuantizedWeight& w = call.weight;
  const int64_t strips = strips_of(w.depth);
  constexpr int64_t SIDE = PANEL / PANEL_ROWS;  // panels of the weight in one of gemm.h
  constexpr int64_t BLOCK = PANEL_DEPTH * PANEL;
  for_panels(
      call, finish, SHARED_PANELS,
      [&](const Segment& segment, const int64_t* panels, int count, float* sums) {
        const int64_t rows = segment.end - segment.begin;
        const float* of_segment = x + segment.begin * x_stride;
        const int64_t blocks = (count + SIDE - 1) / SIDE, stride = count * PANEL_ROWS;
        const auto wide = make_workspace<float>(blocks * BLOCK);
        if (strips == 0) std::fill_n(sums, rows * stride, 0.0f);
        if (count % SIDE) std::fill_n(wide.get() + (blocks - 1) * BLOCK, BLOCK, 0.0f);
        for (int64_t first = 0; first < strips; first += DEPTH_STRIPS) {
          const int64_t last = std::min(strips, first + DEPTH_STRIPS), k = first * STRIP;
          for (int i = 0; i < count; ++i) {
            widen<F>(w, panels[i], first, last,
                     wide.get() + i / SIDE * BLOCK + i % SIDE * PANEL_ROWS);
          }
          const int64_t depth = std::min(w.depth, last * STRIP) - k;
          for (int64_t m = 0; m < rows; m += ROWS_AT_ONCE) {
            multiply(of_segment + m * x_stride + k, x_stride, wide.get(), BLOCK,
                     std::min(rows - m, ROWS_AT_ONCE), stride, depth, sums + m * stride, stride,
                     first > 0);
          }
        }
      });
}

}  // namespace

void multiply_floats(const QuantizedMatmul& call, const Finisher& finish, const float* x,
                     int64_t x_stride) {
  with_format(call.weight.format,
              [&](auto format) { multiply_all<decltype(format)>(call, finish, x, x_stride); });
}

}  // namespace tilewise
