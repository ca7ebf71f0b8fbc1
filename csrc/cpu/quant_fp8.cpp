// Products of weights in fp8 with bfloat16 or fp8 activations, by vdpbf16ps.
//
// A code of float8 is exact in bfloat16, so codes are multiplied and scales applied to the sums: of a
// whole row at its end, of a group after it. No product is rounded, and a code becomes bfloat16 by a
// look-up, which pays from one row on. Otherwise as in quant_pairs.cpp.
#include "cpu/quant_pairs.h"
#include "cpu/quant_strips.h"
#include "cpu/simd_pairs.h"

#if defined(__AVX512BF16__)

namespace tilewise {
namespace {

constexpr int STRIP_PAIRS = STRIP / 2;

// Codes of strips [first, first + deep) of a panel to `out`, of which a row (one pair of k) has PANEL
// pairs.
void widen(const QuantizedWeight& w, int64_t panel, int64_t first, int deep, BFloat16Pair* out) {
  // Bytes 0 and 1 of every word first, then 2 and 3.
  const __m512i halves = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  constexpr int64_t STRIP_BYTES = STRIP * PANEL_ROWS;
  const uint8_t* data = w.data + panel * w.panel_bytes + first * STRIP_BYTES;
  for (int s = 0; s < deep; ++s, data += STRIP_BYTES) {
    prefetch<2>(data, STRIP_BYTES, deep * STRIP_BYTES);  // the next block
    for (int q = 0; q < QUADS; ++q, out += 2 * PANEL) {
      Pairs first, second;
      float8_pairs(_mm512_shuffle_epi8(load_int(data + q * 64).v, halves), first, second);
      store(&out->low, first);
      store(&out[PANEL].low, second);
    }
  }
}

// Products of rows of x with up to SIDE panels, in the memory of one task.
class CodeProduct {
 public:
  CodeProduct(const QuantizedWeight& w, const PairRows& x, int64_t most_rows)
      : w_(w), x_(x), strips_(strips_of(w.depth)), group_(std::min(w.group_strips, strips_)) {
    wide_ = make_workspace<BFloat16Pair>(BLOCK_PAIRS * PANEL);
    std::fill_n(wide_.get(), BLOCK_PAIRS * PANEL, BFloat16Pair{});  // where a panel is alone
    part_ = make_workspace<float>(group_ == strips_ ? 0 : most_rows * PANEL);
  }

  // Adds the block that begins with strip `first`, or writes it if that is 0. The sums of rows that
  // share one scale are scaled with the last block.
  void run(const int64_t* panels, int count, int64_t first, int64_t row, int64_t rows, float* to,
           int64_t stride) {
    const int64_t deep = std::min<int64_t>(strips_ - first, BLOCK);
    for (int p = 0; p < count; ++p) {
      widen(w_, panels[p], first, static_cast<int>(deep), wide_.get() + p * PANEL_ROWS);
    }
    const auto multiply_strips = [&](int64_t begin, int64_t end, float* out, int64_t out_stride,
                                     bool add) {
      multiply(x_.block(first) + row * BLOCK_PAIRS + begin * STRIP_PAIRS, BLOCK_PAIRS,
               wide_.get() + begin * STRIP_PAIRS * PANEL, BLOCK_PAIRS * PANEL, rows,
               count * PANEL_ROWS, (end - begin) * STRIP_PAIRS, out, out_stride, add);
    };
    if (group_ == strips_) {
      multiply_strips(0, deep, to, stride, first > 0);
      if (first + deep == strips_) scale(to, stride, panels, count, 0, row, rows, false, to, stride);
      return;
    }
    for (int64_t s = 0; s < deep; s += group_) {
      multiply_strips(s, std::min(deep, s + group_), part_.get(), PANEL, false);
      scale(part_.get(), PANEL, panels, count, (first + s) / group_, row, rows, first + s > 0, to,
            stride);
    }
  }

 private:
  // to = sums of group g times the scales of the weight, then of x, added to what is there where
  // `add`. The product of scales alone might be too small for float32.
  void scale(const float* sums, int64_t sums_stride, const int64_t* panels, int count, int64_t g,
             int64_t row, int64_t rows, bool add, float* to, int64_t stride) const {
    F32 of_weight[SIDE];
    for (int p = 0; p < count; ++p) {
      of_weight[p] = strips::own_scale(w_, panels[p] * w_.groups + g, 0);
    }
    for (int64_t m = 0; m < rows; ++m) {
      const F32 of_x = F32::all(x_.groups ? x_.scales[(row + m) * x_.groups + g] : 1.0f);
      for (int p = 0; p < count; ++p) {
        float* here = to + m * stride + p * PANEL_ROWS;
        const F32 sum = load(sums + m * sums_stride + p * PANEL_ROWS) * of_weight[p];
        store(here, fma(sum, of_x, add ? load(here) : F32::zero()));
      }
    }
  }

  const QuantizedWeight& w_;
  const PairRows& x_;
  const int64_t strips_, group_;  // strips of a row, and of those that share a scale
  Workspace<BFloat16Pair> wide_;
  Workspace<float> part_;
};

void multiply_codes(const QuantizedMatmul& call, const Finisher& finish, const PairRows& x) {
  for_panels(
      call, finish, even_shares(call, PAIR_PANELS, SIDE),
      [&](const Segment& segment, const int64_t* panels, int count, float* sums) {
        const int64_t stride = count * PANEL_ROWS;
        CodeProduct product(call.weight, x, std::min(segment.end - segment.begin, MOST_ROWS));
        for (int64_t m = segment.begin; m < segment.end; m += MOST_ROWS) {
          const int64_t rows = std::min(segment.end - m, MOST_ROWS);
          float* to = sums + (m - segment.begin) * stride;
          for (int64_t first = 0; first < strips_of(call.weight.depth); first += BLOCK) {
            for (int i = 0; i < count; i += SIDE) {
              product.run(panels + i, std::min(count - i, SIDE), first, m, rows, to + i * PANEL_ROWS,
                          stride);
            }
          }
        }
      });
}

}  // namespace

bool multiply_fp8_pairs(const QuantizedMatmul& call, const Finisher& finish) {
  const QuantizedWeight& w = call.weight;
  if (w.format != Format::fp8 || w.depth == 0) return false;
  if (call.rounding == Rounding::none) {
    // For more rows than a group is deep, quant_pairs.cpp is faster: it scales the weight instead.
    const bool is_few = call.rows <= w.group_strips * STRIP * call.segment_count;
    const bool is_whole = w.group_strips >= strips_of(w.depth);
    if (call.x_dtype != DType::bf16 || !(is_few || is_whole)) return false;
  } else if (call.rounding != Rounding::fp8) {
    return false;
  }
  const PairRows x(call);
  if (x.is_possible) multiply_codes(call, finish, x);
  return x.is_possible;
}

}  // namespace tilewise

#else

namespace tilewise {

bool multiply_fp8_pairs(const QuantizedMatmul&, const Finisher&) { return false; }

}  // namespace tilewise

#endif
