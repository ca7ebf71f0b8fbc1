// What products of quantized weights on AMX tiles share beside the products (tile_products.h): rows
// of x cut so that they stay in the second-level cache, their room and codes, and how far zeros go.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/quant_kernels.h"
#include "cpu/quant_scales.h"
#include "cpu/tiles.h"

namespace tilewise {

// Rows that x as tiles has room for, one strip after the other: tiles may begin at any row, and strips are
// an odd number of cache lines apart, so that they do not meet in few sets of the cache.
inline int64_t tile_rows(int64_t rows) { return (rows + TILE_HEIGHT - 1) | 1; }

// A call whose segments are cut into blocks of rows that stay in the second-level cache, if each has
// `row_bytes` in tiles.
class CutSegments {
 public:
  CutSegments(const QuantizedMatmul& from, int64_t row_bytes) : call(from) {
    constexpr int64_t CACHE = 1 << 20, FEWEST = 64, STEP = 2 * TILE_HEIGHT;
    const int64_t most = std::max(CACHE / row_bytes / STEP * STEP, FEWEST);
    for (int64_t i = 0; i < from.segment_count; ++i) {
      const Segment& all = from.segments[i];
      const int64_t rows = all.end - all.begin, count = (rows + most - 1) / most;
      const int64_t each = count ? round_up((rows + count - 1) / count, STEP) : 0;
      for (int64_t m = all.begin; m < all.end; m += each) {
        segments_.push_back({all.weight, m, std::min(all.end, m + each)});
      }
    }
    call.segments = segments_.data();
    call.segment_count = static_cast<int64_t>(segments_.size());
  }
  CutSegments(const CutSegments&) = delete;
  CutSegments& operator=(const CutSegments&) = delete;

  QuantizedMatmul call;

 private:
  std::vector<Segment> segments_;
};

// x / scale as an int8 code, for scales of find_scales.
inline F32 int8_code(F32 x, float scale, float inverse, bool is_normal) {
  const F32 code = round(quotient(x, scale, inverse, is_normal));
  return min(max(code, F32::all(-127)), F32::all(127));
}

// Of all weights that rows meet; 0 where the format has none of its own.
inline int largest_zero(const QuantizedMatmul& call) {
  const QuantizedWeight& w = call.weight;
  const int64_t count = w.zeros ? panels_of(w.rows) * w.groups * PANEL_ROWS : 0;
  int largest = 0;
  for (int64_t i = 0; count > 0 && i < call.segment_count; ++i) {
    const uint8_t* zeros = w.zeros + call.segments[i].weight * count;
    largest = std::max<int>(largest, *std::max_element(zeros, zeros + count));
  }
  return largest;
}

}  // namespace tilewise
