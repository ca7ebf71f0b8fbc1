// Products of quantized weights with many rows of bfloat16, by vdpbf16ps: two multiply-adds where one
// of float32 would be.
//
// The weight is rounded to bfloat16 as well, as PyTorch's product with the weight in bfloat16 has it;
// this adds to a result about as much error as its own rounding. Otherwise as in quant_blocks.cpp: a
// block of the weight is widened into the first-level cache once, and all rows of x run over it.
#include "cpu/quant_activations.h"
#include "cpu/quant_kernels.h"
#include "cpu/quant_strips.h"

#if defined(__AVX512BF16__)

#include <atomic>
#include <cstring>

namespace tilewise {
namespace {

constexpr int BLOCK = 8;              // strips that are widened at a time
constexpr int BLOCK_DEPTH = BLOCK * STRIP, BLOCK_PAIRS = BLOCK_DEPTH / 2;
constexpr int64_t MOST_ROWS = 768;    // of x in a pass: what one reads stays in the second level
constexpr int64_t SHARED_PANELS = 8;  // of a task, about
constexpr int PAIR = 2;               // panels of a block
constexpr int ROWS_AT_ONCE = 12;      // of x: with two panels their sums fill the register file

struct Block {
  I32 pairs[BLOCK_PAIRS];  // weights 2 k and 2 k + 1 of each row
};

template <class F>
__attribute__((flatten)) void widen_block(const QuantizedWeight& w, int64_t panel, int64_t first,
                                          int deep, Block& out) {
  const int64_t strip_bytes = w.panel_bytes / strips_of(w.depth);
  const uint8_t* data = w.data + panel * w.panel_bytes + first * strip_bytes;
  for (int s = 0; s < deep; ++s) {
    prefetch<2>(data + s * strip_bytes, strip_bytes, deep * strip_bytes);  // the next block
    Strip strip;
    decode_strip<F>(w, panel, first + s, strip);
    for (int i = 0; i < STRIP / 2; ++i) {
      const int q = i / 2, k = i % 2 * 2;
      out.pairs[s * STRIP / 2 + i] =
          bf16_pairs(strip_values<F>(strip, q, k, 0), strip_values<F>(strip, q, k + 1, 0));
    }
  }
}

// A block of PANELS panels with ROWS rows of x, BLOCK_DEPTH apart, added to their sums.
template <int PANELS, int ROWS>
void multiply_tile(const Block* w, const BFloat16* x, int pairs, float* sums, int64_t sums_stride,
                   bool is_first) {
  F32 sum[ROWS][PANELS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) sum[r][p] = F32::zero();
  }
  for (int k = 0; k < pairs; ++k) {
    I32 weights[PANELS];
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) weights[p] = w[p].pairs[k];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      int32_t two;
      std::memcpy(&two, x + r * BLOCK_DEPTH + 2 * k, 4);
      const I32 all = I32::all(two);
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) sum[r][p] = dot_bf16(sum[r][p], all, weights[p]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) {
      float* to = sums + r * sums_stride + p * PANEL_ROWS;
      store(to, is_first ? sum[r][p] : sum[r][p] + load(to));
    }
  }
}

template <int PANELS, int ROWS = ROWS_AT_ONCE>
void multiply_rows(const Block* w, const BFloat16* x, int64_t rows, int pairs, float* sums,
                   int64_t sums_stride, bool is_first) {
  for (; rows >= ROWS; rows -= ROWS, x += ROWS * BLOCK_DEPTH, sums += ROWS * sums_stride) {
    multiply_tile<PANELS, ROWS>(w, x, pairs, sums, sums_stride, is_first);
  }
  if constexpr (ROWS > 1) {
    if (rows > 0) {
      multiply_rows<PANELS, ROWS - 1>(w, x, rows, pairs, sums, sums_stride, is_first);
    }
  }
}

// x in blocks, all rows of one behind each other, and zeros up to a whole strip.
class Rows {
 public:
  explicit Rows(const QuantizedMatmul& call) : rows_(call.rows) {
    const int64_t depth = call.weight.depth, filled = strips_of(depth) * STRIP;
    data_ = make_workspace<BFloat16>(rows_ * round_up(filled, BLOCK_DEPTH));
    std::atomic<bool> possible{true};
    parallel_rows(rows_, filled, [&](int64_t m) {
      const BFloat16* row = static_cast<const BFloat16*>(call.x) + m * call.x_stride;
      F32 most = F32::zero(), bad = F32::zero();
      for (int64_t first = 0; first < filled; first += BLOCK_DEPTH) {
        BFloat16* to = data_.get() + first * rows_ + m * BLOCK_DEPTH;
        const int64_t deep = std::min<int64_t>(depth - first, BLOCK_DEPTH);
        std::memcpy(to, row + first, deep * sizeof(BFloat16));
        std::fill_n(to + deep, round_up(deep, STRIP) - deep, BFloat16{0});
        for (int64_t k = 0; k < deep; k += F32::WIDTH) {
          const F32 v = load(to + k);
          most = max(most, abs(v));
          bad = fma(v, F32::zero(), bad);  // what is finite adds zero
        }
      }
      // Products of tiny numbers would be lost: what is subnormal is zero here.
      const float largest = reduce_max(most);
      if (!(reduce_add(bad) == 0 && (largest == 0 || (largest >= 0x1p-90f && largest <= 0x1p100f)))) {
        possible = false;
      }
    });
    is_possible = possible;
  }

  // All rows of the block that begins with strip `first`.
  const BFloat16* block(int64_t first) const { return data_.get() + first * STRIP * rows_; }

  bool is_possible;

 private:
  int64_t rows_;
  Workspace<BFloat16> data_;
};

template <class F>
void multiply_all(const QuantizedMatmul& call, const Finisher& finish, const Rows& x) {
  const QuantizedWeight& w = call.weight;
  const int64_t strips = strips_of(w.depth);
  for_panels(
      call, finish, even_shares(call, SHARED_PANELS, PAIR),
      [&](const Segment& segment, const int64_t* panels, int count, float* sums) {
        const int64_t all = segment.end - segment.begin, stride = count * PANEL_ROWS;
        const auto blocks = make_workspace<Block>(PAIR);
        for (int64_t m = 0; m < all; m += MOST_ROWS) {
          const int64_t rows = std::min(all - m, MOST_ROWS);
          for (int64_t first = 0; first < strips; first += BLOCK) {
            const int deep = static_cast<int>(std::min<int64_t>(strips - first, BLOCK));
            const BFloat16* row = x.block(first) + (segment.begin + m) * BLOCK_DEPTH;
            for (int i = 0; i < count; i += PAIR) {
              const bool is_pair = i + 1 < count;
              for (int p = 0; p <= is_pair; ++p) {
                widen_block<F>(w, panels[i + p], first, deep, blocks[p]);
              }
              const auto run = is_pair ? multiply_rows<2> : multiply_rows<1>;
              run(blocks.get(), row, rows, deep * STRIP / 2, sums + m * stride + i * PANEL_ROWS,
                  stride, first == 0);
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
