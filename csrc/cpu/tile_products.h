// Products of matrices that lie in memory as AMX tiles: C = A B, or +=.
//
// They go in blocks of 2 x 2 tiles of C: as many accumulators as have to be in flight (tiles.h),
// and four loads for four products. Sums stay in tiles over the whole depth. From the first-level
// cache such a block multiplies at the unit's rate, 16 cycles a product, in whatever order loads and
// products stand (Emerald Rapids, 128 tiles deep; a shallow one pays more for its beginning and its
// end). Accumulators in pairs, of which one begins when the other is half through, are no faster.
//
// Every number of C is a sum of its own over ascending depth: which block it is in changes no bit.
//
// Decoding has loops of its own (decode_tiles.h): it multiplies rows of a cache as they lie, every
// sixteen of them somewhere else, in tiles of other shapes, and fetches the next between products.
#pragma once

#include <cstdint>

#include "cpu/tiles.h"

namespace tilewise {

// What is multiplied: C += A B.
struct Bfloat16Products {
  using Sum = float;
  template <int C, int A, int B>
  static void add() { tile_dot_bf16<C, A, B>(); }
};
struct SignedByteProducts {
  using Sum = int32_t;
  template <int C, int A, int B>
  static void add() { tile_dot_i8<C, A, B>(); }
};
struct ByteProducts {  // of B's unsigned ones
  using Sum = int32_t;
  template <int C, int A, int B>
  static void add() { tile_dot_i8_u8<C, A, B>(); }
};

// Tiles of A or B: the one in row i and column j is i * row + j * column bytes behind the first.
// The rows of a tile are one behind the other.
struct OperandTiles {
  const void* first;
  int64_t row, column;

  const char* at(int64_t i, int64_t j) const {
    return static_cast<const char*>(first) + i * row + j * column;
  }
  OperandTiles from(int64_t i, int64_t j) const { return {at(i, j), row, column}; }
};

// Tiles of C in the same way, but counted in sums, and rows of a tile are `stride` apart.
template <class Sum>
struct SumTiles {
  Sum* first;
  int64_t row, column, stride = TILE_WIDTH;

  Sum* at(int64_t i, int64_t j) const { return first + i * row + j * column; }
  SumTiles from(int64_t i, int64_t j) const { return {at(i, j), row, column, stride}; }
};

// Those of a matrix whose rows are `stride` apart.
template <class Sum>
inline SumTiles<Sum> tiles_of_rows(Sum* matrix, int64_t stride) {
  return {matrix, TILE_HEIGHT * stride, TILE_WIDTH, stride};
}

// The tiles of a block by their numbers: C's are 0 to 3, A's and B's two each.
constexpr int TILES_OF_A = 4, TILES_OF_B = 6;

// Tiles of A whose rows have `row_bytes`, and those of B to fit.
inline TileShapes block_shapes(int64_t row_bytes) {
  TileShapes shapes;
  for (int i = 0; i < 2; ++i) {
    shapes.row_bytes[TILES_OF_A + i] = static_cast<uint16_t>(row_bytes);
    shapes.rows[TILES_OF_B + i] = static_cast<uint8_t>(row_bytes / 4);
  }
  return shapes;
}

template <int C, bool ADD>
inline void begin_sums(const void* p, int64_t stride) {
  if constexpr (ADD) {
    tile_load<C>(p, stride);
  } else {
    tile_zero<C>();
  }
}

// A block of ROWS x COLUMNS tiles of C.
template <class Products, bool ADD, int ROWS, int COLUMNS>
inline void multiply_tile_block(int64_t depth, OperandTiles a, OperandTiles b,
                                SumTiles<typename Products::Sum> c) {
  constexpr bool TALL = ROWS == 2, WIDE = COLUMNS == 2;
  constexpr int A = TILES_OF_A, B = TILES_OF_B;
  const int64_t stride = c.stride * static_cast<int64_t>(sizeof(typename Products::Sum));
  begin_sums<0, ADD>(c.at(0, 0), stride);
  if constexpr (TALL) begin_sums<1, ADD>(c.at(1, 0), stride);
  if constexpr (WIDE) begin_sums<2, ADD>(c.at(0, 1), stride);
  if constexpr (TALL && WIDE) begin_sums<3, ADD>(c.at(1, 1), stride);
  for (int64_t k = 0; k < depth; ++k) {
    tile_load<B>(b.at(k, 0), TILE_BYTES);
    tile_load<A>(a.at(0, k), TILE_BYTES);
    Products::template add<0, A, B>();
    if constexpr (TALL) {
      tile_load<A + 1>(a.at(1, k), TILE_BYTES);
      Products::template add<1, A + 1, B>();
    }
    if constexpr (WIDE) {
      tile_load<B + 1>(b.at(k, 1), TILE_BYTES);
      Products::template add<2, A, B + 1>();
    }
    if constexpr (TALL && WIDE) Products::template add<3, A + 1, B + 1>();
  }
  tile_store<0>(c.at(0, 0), stride);
  if constexpr (TALL) tile_store<1>(c.at(1, 0), stride);
  if constexpr (WIDE) tile_store<2>(c.at(0, 1), stride);
  if constexpr (TALL && WIDE) tile_store<3>(c.at(1, 1), stride);
}

// A row of such blocks.
template <class Products, bool ADD, int ROWS>
inline void multiply_tile_row(int64_t columns, int64_t depth, OperandTiles a, OperandTiles b,
                              SumTiles<typename Products::Sum> c) {
  for (int64_t j = 0; j < columns; j += 2, b = b.from(0, 2), c = c.from(0, 2)) {
    j + 1 < columns ? multiply_tile_block<Products, ADD, ROWS, 2>(depth, a, b, c)
                    : multiply_tile_block<Products, ADD, ROWS, 1>(depth, a, b, c);
  }
}

template <class Products, bool ADD>
inline void multiply_tiles_in(int64_t rows, int64_t columns, int64_t depth, OperandTiles a,
                              OperandTiles b, SumTiles<typename Products::Sum> c) {
  for (int64_t i = 0; i < rows; i += 2, a = a.from(2, 0), c = c.from(2, 0)) {
    i + 1 < rows ? multiply_tile_row<Products, ADD, 2>(columns, depth, a, b, c)
                 : multiply_tile_row<Products, ADD, 1>(columns, depth, a, b, c);
  }
}

// C (rows x columns) = A (rows x depth) B (depth x columns), or += where `add`, counted in tiles.
//
// Attention's strips take it inlined. Gradients and quantized weights have functions of their own for it,
// which are not: their constants are the loops' then, and all that these need is in registers.
template <class Products>
inline void multiply_tiles(int64_t rows, int64_t columns, int64_t depth, bool add,
                           OperandTiles a, OperandTiles b, SumTiles<typename Products::Sum> c) {
  add ? multiply_tiles_in<Products, true>(rows, columns, depth, a, b, c)
      : multiply_tiles_in<Products, false>(rows, columns, depth, a, b, c);
}

}  // namespace tilewise
