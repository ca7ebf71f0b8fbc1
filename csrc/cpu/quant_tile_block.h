// What products of quantized weights on AMX tiles share: blocks of up to 2 x 2 tiles whose sums stay in
// tiles over all the depth, and rows of x cut so that they stay in the second-level cache.
//
// From the first-level cache such a block multiplies at the unit's rate, 16 cycles a product, in whatever
// order its loads and products stand (measured, 128 deep); to store its sums takes 160 cycles a tile.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/quant_kernels.h"
#include "cpu/tiles.h"

namespace tilewise {

struct Bfloat16Products {
  using Sum = float;
  template <int C, int A, int B>
  static void dot() { tile_dot_bf16<C, A, B>(); }
};
struct SignedByteProducts {
  using Sum = int32_t;
  template <int C, int A, int B>
  static void dot() { tile_dot_i8<C, A, B>(); }
};
struct ByteProducts {  // of B's unsigned ones
  using Sum = int32_t;
  template <int C, int A, int B>
  static void dot() { tile_dot_i8_u8<C, A, B>(); }
};

template <class Products>
struct TileOperands {
  const char* a;  // tile (i, k) at i * TILE_SIZE + k * a_step
  int64_t a_step;
  const char* b;  // tile (k, j) at k * b_step + j * b_column
  int64_t b_step, b_column;
  typename Products::Sum* c;  // tile (i, j) at i * c_row + j * c_column
  int64_t c_row, c_column, c_stride;
};

// C = A B, or += where `add`, `depth` tiles deep.
template <class Products, int ROWS, int COLUMNS>
void multiply_tiles_in(int64_t depth, bool add, TileOperands<Products> x) {
  constexpr int A = 4, B = 6;
  const int64_t bytes = x.c_stride * 4;
  const auto for_c = [&](auto tile_00, auto tile_01, auto tile_10, auto tile_11) {
    tile_00(x.c);
    if constexpr (COLUMNS == 2) tile_01(x.c + x.c_column);
    if constexpr (ROWS == 2) tile_10(x.c + x.c_row);
    if constexpr (ROWS == 2 && COLUMNS == 2) tile_11(x.c + x.c_row + x.c_column);
  };
  if (add) {
    for_c([&](auto* p) { tile_load<0>(p, bytes); }, [&](auto* p) { tile_load<1>(p, bytes); },
          [&](auto* p) { tile_load<2>(p, bytes); }, [&](auto* p) { tile_load<3>(p, bytes); });
  } else {
    for_c([](auto*) { tile_zero<0>(); }, [](auto*) { tile_zero<1>(); },
          [](auto*) { tile_zero<2>(); }, [](auto*) { tile_zero<3>(); });
  }
  for (int64_t k = 0; k < depth; ++k, x.a += x.a_step, x.b += x.b_step) {
    tile_load<A>(x.a, TILE_BYTES);
    tile_load<B>(x.b, TILE_BYTES);
    Products::template dot<0, A, B>();
    if constexpr (ROWS == 2) {
      tile_load<A + 1>(x.a + TILE_SIZE, TILE_BYTES);
      Products::template dot<2, A + 1, B>();
    }
    if constexpr (COLUMNS == 2) {
      tile_load<B + 1>(x.b + x.b_column, TILE_BYTES);
      Products::template dot<1, A, B + 1>();
      if constexpr (ROWS == 2) Products::template dot<3, A + 1, B + 1>();
    }
  }
  for_c([&](auto* p) { tile_store<0>(p, bytes); }, [&](auto* p) { tile_store<1>(p, bytes); },
        [&](auto* p) { tile_store<2>(p, bytes); }, [&](auto* p) { tile_store<3>(p, bytes); });
}

template <class Products>
void multiply_tile_block(int row_tiles, int columns, int64_t depth, bool add,
                         const TileOperands<Products>& x) {
  if (row_tiles == 2) {
    columns == 2 ? multiply_tiles_in<Products, 2, 2>(depth, add, x)
                 : multiply_tiles_in<Products, 2, 1>(depth, add, x);
  } else {
    columns == 2 ? multiply_tiles_in<Products, 1, 2>(depth, add, x)
                 : multiply_tiles_in<Products, 1, 1>(depth, add, x);
  }
}

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

}  // namespace tilewise
