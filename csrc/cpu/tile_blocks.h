// Products of bfloat16 matrices all of whose tiles lie in one piece, 1 KB each, in blocks of 2 x 2
// tiles: four loads for four products.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace tilewise {

// C = A B, or += where ADD; a tile of C has TILE_HEIGHT x 16 floats in a row.
template <bool ADD>
class TileBlocks {
 public:
  struct Operands {
    const BFloat16* a;  // the i * a_row + k-th tile is (i, k)
    int64_t a_row;
    const BFloat16* b;  // the j * b_column + k-th tile is (k, j)
    int64_t b_column;
    float* c;           // the i * c_row + j * c_column-th tile is (i, j)
    int64_t c_row, c_column;
  };

  static void run(const Operands& x, int64_t rows, int64_t depth, int64_t columns) {
    for (int64_t i = 0; i < rows; i += 2) {
      if (i + 1 < rows) {
        run_row<2>(x, i, depth, columns);
      } else {
        run_row<1>(x, i, depth, columns);
      }
    }
  }

 private:
  static constexpr int A = 4, B = 6;  // tiles 0 to 3 are accumulators, (i, j) the one of 2 j + i

  template <int ROWS>
  static void run_row(const Operands& x, int64_t i, int64_t depth, int64_t columns) {
    for (int64_t j = 0; j < columns; j += 2) {
      if (j + 1 < columns) {
        block<ROWS, 2>(x, i, j, depth);
      } else {
        block<ROWS, 1>(x, i, j, depth);
      }
    }
  }

  template <int ROWS, int COLUMNS>
  static void block(const Operands& x, int64_t i, int64_t j, int64_t depth) {
    constexpr bool TALL = ROWS == 2, WIDE = COLUMNS == 2;
    const int64_t a_row = x.a_row * TILE_SIZE, b_column = x.b_column * TILE_SIZE;
    const int64_t c_row = x.c_row * TILE_SIZE, c_column = x.c_column * TILE_SIZE;
    const char* a = reinterpret_cast<const char*>(x.a) + i * a_row;
    const char* b = reinterpret_cast<const char*>(x.b) + j * b_column;
    char* c = reinterpret_cast<char*>(x.c) + i * c_row + j * c_column;
    begin<0>(c);
    if constexpr (TALL) begin<1>(c + c_row);
    if constexpr (WIDE) begin<2>(c + c_column);
    if constexpr (TALL && WIDE) begin<3>(c + c_row + c_column);
    for (int64_t k = 0; k < depth; ++k, a += TILE_SIZE, b += TILE_SIZE) {
      tile_load<B>(b, TILE_BYTES);
      tile_load<A>(a, TILE_BYTES);
      tile_dot_bf16<0, A, B>();
      if constexpr (TALL) {
        tile_load<A + 1>(a + a_row, TILE_BYTES);
        tile_dot_bf16<1, A + 1, B>();
      }
      if constexpr (WIDE) {
        tile_load<B + 1>(b + b_column, TILE_BYTES);
        tile_dot_bf16<2, A, B + 1>();
      }
      if constexpr (TALL && WIDE) tile_dot_bf16<3, A + 1, B + 1>();
    }
    tile_store<0>(c, TILE_BYTES);
    if constexpr (TALL) tile_store<1>(c + c_row, TILE_BYTES);
    if constexpr (WIDE) tile_store<2>(c + c_column, TILE_BYTES);
    if constexpr (TALL && WIDE) tile_store<3>(c + c_row + c_column, TILE_BYTES);
  }

  template <int C>
  static void begin(const char* c) {
    if constexpr (ADD) {
      tile_load<C>(c, TILE_BYTES);
    } else {
      tile_zero<C>();
    }
  }
};

}  // namespace tilewise
