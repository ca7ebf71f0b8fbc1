// Products of quantized weights with many rows of bfloat16, by vdpbf16ps: two multiply-adds where one
// of float32 would be.
//
// The weight is rounded to bfloat16 as well, as PyTorch's product with the weight in bfloat16 has it;
// this adds to a result about as much error as its own rounding. Otherwise as in quant_blocks.cpp: a
// block of the weight is widened into the first-level cache once, and all rows of x run over it.
#include "cpu/quant_pairs.h"

#include "cpu/quant_strips.h"

#if defined(__AVX512BF16__)

namespace tilewise {
namespace {

// Strips [first, first + deep) of a panel to `out`, of which a row (one pair of k) has PANEL pairs.
template <class F>
__attribute__((flatten)) void widen(const QuantizedWeight& w, int64_t panel, int64_t first, int deep,
                                    BFloat16Pair* out) {
  const int64_t strip_bytes = w.panel_bytes / strips_of(w.depth);
  const uint8_t* data = w.data + panel * w.panel_bytes + first * strip_bytes;
  for (int s = 0; s < deep; ++s) {
    prefetch<2>(data + s * strip_bytes, strip_bytes, deep * strip_bytes);  // the next block
    Strip strip;
    decode_strip<F>(w, panel, first + s, strip);
    for (int q = 0; q < QUADS; ++q) {
      for (int i = 0; i < 4; i += 2, out += PANEL) {
        store_int(out, to_pairs(strip_values<F>(strip, q, i, 0), strip_values<F>(strip, q, i + 1, 0)));
      }
    }
  }
}

template <class F>
void multiply_all(const QuantizedMatmul& call, const Finisher& finish, const PairRows& x) {
  const QuantizedWeight& w = call.weight;
  const int64_t strips = strips_of(w.depth);
  for_panels(
      call, finish, even_shares(call, PAIR_PANELS, SIDE),
      [&](const Segment& segment, const int64_t* panels, int count, float* sums) {
        const int64_t all = segment.end - segment.begin, stride = count * PANEL_ROWS;
        const auto wide = make_workspace<BFloat16Pair>(BLOCK_PAIRS * PANEL);
        std::fill_n(wide.get(), BLOCK_PAIRS * PANEL, BFloat16Pair{});  // where a panel is alone
        for (int64_t m = 0; m < all; m += MOST_ROWS) {
          const int64_t rows = std::min(all - m, MOST_ROWS);
          for (int64_t first = 0; first < strips; first += BLOCK) {
            const int deep = static_cast<int>(std::min<int64_t>(strips - first, BLOCK));
            for (int i = 0; i < count; i += SIDE) {
              const int here = std::min(count - i, SIDE);
              for (int p = 0; p < here; ++p) {
                widen<F>(w, panels[i + p], first, deep, wide.get() + p * PANEL_ROWS);
              }
              multiply(x.block(first) + (segment.begin + m) * BLOCK_PAIRS, BLOCK_PAIRS, wide.get(),
                       BLOCK_PAIRS * PANEL, rows, here * PANEL_ROWS, deep * STRIP / 2,
                       sums + m * stride + i * PANEL_ROWS, stride, first > 0);
            }
          }
        }
      });
}

}  // namespace

bool multiply_pairs(const QuantizedMatmul& call, const Finisher& finish) {
  // A row of few results may by chance be much smaller than what it is summed from.
  if (call.weight.depth == 0 || call.weight.rows < PANEL_ROWS) return false;
  const PairRows x(call);
  if (!x.is_possible) return false;
  with_format(call.weight.format,
              [&](auto format) { multiply_all<decltype(format)>(call, finish, x); });
  return true;
}

}  // namespace tilewise

#else

namespace tilewise {

bool multiply_pairs(const QuantizedMatmul&, const Finisher&) { return false; }

}  // namespace tilewise

#endif
