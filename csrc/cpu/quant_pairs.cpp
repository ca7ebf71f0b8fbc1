// Products of quantized weights with many rows of bfloat16, by vdpbf16ps: two multiply-adds where one
// of float32 would be.
//
// The weight is rounded to bfloat16 as well, as PyTorch's product with the weight in bfloat16 has it;
// this adds to a result about as much error as its own rounding. Otherwise as in quant_blocks.cpp: a
// block of the weight is widened into the first-level cache once, and all rows of x run over it.
#include "cpu/gemm.h"
#include "cpu/quant_activations.h"
#include "cpu/quant_kernels.h"
#include "cpu/quant_strips.h"

#if defined(__AVX512BF16__)

#include <atomic>

namespace tilewise {
namespace {

constexpr int BLOCK = 8;              // strips that are widened at a time
constexpr int64_t BLOCK_PAIRS = BLOCK * STRIP / 2;
constexpr int64_t MOST_ROWS = 768;    // of x in a pass: what one reads stays in the second level
constexpr int64_t SHARED_PANELS = 8;  // of a task, about
constexpr int SIDE = PANEL / PANEL_ROWS;  // panels of the weight in one of gemm.h

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

// Of lanes 0, 16, ..., 1, 17, ... and so on; a NaN is larger than all. Zeros fill up what is not there.
inline F32 largest_of(const BFloat16* x, int64_t n) {
  F32 most = F32::zero();
  for (int64_t i = 0; i < n; i += F32::WIDTH) most = max_bits(most, abs(load(x + i)));
  return most;
}

// x in blocks, all rows of one behind each other, and zeros up to a whole strip.
class Rows {
 public:
  explicit Rows(const QuantizedMatmul& call) : rows_(call.rows) {
    constexpr int64_t DEEP = BLOCK * STRIP;
    const int64_t depth = call.weight.depth;
    data_ = make_workspace<BFloat16Pair>(rows_ * round_up(depth, DEEP) / 2);
    std::atomic<bool> possible{true};
    parallel_rows(rows_, depth, [&](int64_t m) {
      const BFloat16* row = static_cast<const BFloat16*>(call.x) + m * call.x_stride;
      F32 most = F32::zero();
      for (int64_t first = 0; first < depth; first += DEEP) {
        BFloat16* to = &data_[first / 2 * rows_ + m * BLOCK_PAIRS].low;
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

  // All rows of the block that begins with strip `first`.
  const BFloat16Pair* block(int64_t first) const { return data_.get() + first * STRIP / 2 * rows_; }

  bool is_possible;

 private:
  int64_t rows_;
  Workspace<BFloat16Pair> data_;
};

template <class F>
void multiply_all(const QuantizedMatmul& call, const Finisher& finish, const Rows& x) {
  const QuantizedWeight& w = call.weight;
  const int64_t strips = strips_of(w.depth);
  for_panels(
      call, finish, even_shares(call, SHARED_PANELS, SIDE),
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
  const Rows x(call);
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
