// Products of bfloat16 matrices that lie in memory as AMX tiles.
//
// The one idea is that the tile unit never drains. The sum over k of one output tile is a chain of
// products, each of which waits 52 cycles for the one before it while the unit could start another
// every 16; and a block of four accumulators that begins and ends together leaves it idle for
// those 52 cycles once a block. So accumulators come in pairs (two row tiles of A by one column
// tile of B), and a pair starts its chain when the other is half through its own: four chains are
// in flight all the time, and one pair is stored while the other one computes. Sums over K = 64
// reach 3.1 TFLOP/s a core this way, where a plain 2 x 2 block reaches 2.2.
#pragma once

#include "cpu/tiles.h"

namespace tilewise {

// C = A B, or += where ADD, by pairs of ROW_TILES x 1 tiles. `depth` tiles are summed over.
template <int ROW_TILES, bool ADD>
class TileProduct {
 public:
  struct Operands {
    const char* a;         // tile (i, k) at i * a_tile_row + k * a_tile
    int64_t a_tile, a_tile_row, a_stride;
    const char* b;         // tile (k, j) at j * b_column + k * TILE_SIZE
    int64_t b_column;
    float* c;              // tile (i, j) at i * TILE_HEIGHT * c_stride + j * 16
    int64_t c_stride;      // floats
  };

  static void run(const Operands& x, int64_t depth, int64_t columns) {
    for (int64_t j = 0; j <= columns; j += 2) {
      window<0>(x, depth, columns, j);
      if (j < columns) window<1>(x, depth, columns, j + 1);
    }
  }

 private:
  static constexpr int A = 4, B = 6;  // tiles 0 to 3 are accumulators, those of PAIR from 2 * PAIR

  // The first half of column j's chain, in turns with the second half of the column before.
  template <int PAIR>
  static void window(const Operands& x, int64_t depth, int64_t columns, int64_t j) {
    const int64_t second = depth / 2, first = depth - second;
    const bool begins = j < columns, ends = j > 0;
    if (begins) begin<PAIR>(x, j);
    for (int64_t k = 0; k < first; ++k) {
      if (ends && k < second) step<1 - PAIR>(x, j - 1, first + k);
      if (begins) step<PAIR>(x, j, k);
    }
    if (ends) end<1 - PAIR>(x, j - 1);
  }

  template <int PAIR>
  static void begin(const Operands& x, int64_t j) {
    if constexpr (ADD) {
      const float* c = x.c + j * 16;
      tile_load<2 * PAIR>(c, x.c_stride * 4);
      if constexpr (ROW_TILES == 2) {
        tile_load<2 * PAIR + 1>(c + TILE_HEIGHT * x.c_stride, x.c_stride * 4);
      }
    } else {
      tile_zero<2 * PAIR>();
      if constexpr (ROW_TILES == 2) tile_zero<2 * PAIR + 1>();
    }
  }

  template <int PAIR>
  static void step(const Operands& x, int64_t j, int64_t k) {
    const char* a = x.a + k * x.a_tile;
    tile_load<B + PAIR>(x.b + j * x.b_column + k * TILE_SIZE, TILE_BYTES);
    tile_load<A>(a, x.a_stride);
    tile_dot_bf16<2 * PAIR, A, B + PAIR>();
    if constexpr (ROW_TILES == 2) {
      tile_load<A + 1>(a + x.a_tile_row, x.a_stride);
      tile_dot_bf16<2 * PAIR + 1, A + 1, B + PAIR>();
    }
  }

  template <int PAIR>
  static void end(const Operands& x, int64_t j) {
    float* c = x.c + j * 16;
    tile_store<2 * PAIR>(c, x.c_stride * 4);
    if constexpr (ROW_TILES == 2) {
      tile_store<2 * PAIR + 1>(c + TILE_HEIGHT * x.c_stride, x.c_stride * 4);
    }
  }
};

// The same for `count` rows of A and C; C is written in whole tiles.
template <bool ADD>
inline void multiply_tiles(int64_t count, int64_t depth, int64_t columns,
                           typename TileProduct<2, ADD>::Operands x) {
  int64_t i = 0;
  for (; i + TILE_HEIGHT < count; i += 2 * TILE_HEIGHT) {
    TileProduct<2, ADD>::run(x, depth, columns);
    x.a += 2 * x.a_tile_row;
    x.c += 2 * TILE_HEIGHT * x.c_stride;
  }
  if (i < count) {
    TileProduct<1, ADD>::run(
        {x.a, x.a_tile, x.a_tile_row, x.a_stride, x.b, x.b_column, x.c, x.c_stride}, depth,
        columns);
  }
}

}  // namespace tilewise
