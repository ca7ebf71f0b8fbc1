// Products of operands as they lie: C (M x N) = or += A (M x K) B (K x N), where A may be stored
// transposed and the depth may differ from tile to tile. K counts elements as in gemm.h: floats, or
// pairs of bfloat16.
//
// The backward pass multiplies every block twice or three times, as left operand, as right one and
// transposed. Rows an odd number of cache lines apart spread over all sets of the level-1 cache,
// so a panel of B streams as well from them as from the packed copies of gemm.h, which would cost
// this pass more than they save. The tile in registers is gemm.h's.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/gemm.h"
#include "cpu/simd.h"

namespace tilewise {

enum class Stored { rows, columns };  // A's (i, k) is a[i * stride + k], or a[k * stride + i]

// A matrix in memory; its rows are 64-byte aligned and padded to whole panels.
template <class T>
struct MatrixOf {
  T* data;
  int64_t stride;

  T* row(int64_t i) const { return data + i * stride; }
};

using Matrix = MatrixOf<float>;

// Elements of 4 bytes from one row of `columns` to the next: whole panels, in an odd number of cache
// lines.
constexpr int64_t odd_stride(int64_t columns) { return (round_up(columns, PANEL) / 16 | 1) * 16; }

struct Range {
  int64_t begin, end;
};

template <int ROWS, Stored A, class T>
inline void multiply_strided_tile(const T* __restrict a, int64_t a_stride, const T* __restrict b,
                                  int64_t b_stride, int64_t depth,
                                  float* __restrict c, int64_t c_stride, bool accumulate) {
  constexpr int W = F32::WIDTH;
  F32 sum[ROWS][2];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) sum[r][0] = sum[r][1] = F32::zero();
  for (int64_t k = 0; k < depth; ++k) {
    const Lanes<T> b0 = load(b), b1 = load(b + W);
    b += b_stride;
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Lanes<T> x =
          broadcast(A == Stored::rows ? a + r * a_stride + k : a + k * a_stride + r);
      sum[r][0] = fma(x, b0, sum[r][0]);
      sum[r][1] = fma(x, b1, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    float* row = c + r * c_stride;
    store(row, accumulate ? load(row) + sum[r][0] : sum[r][0]);
    store(row + W, accumulate ? load(row + W) + sum[r][1] : sum[r][1]);
  }
}

template <Stored A, int ROWS = TILE_ROWS, class T>
inline void multiply_strided_tile(int64_t rows, const T* a, int64_t a_stride, const T* b,
                                  int64_t b_stride, int64_t depth, float* c, int64_t c_stride,
                                  bool accumulate) {
  if (rows == ROWS) {
    multiply_strided_tile<ROWS, A>(a, a_stride, b, b_stride, depth, c, c_stride, accumulate);
  } else if constexpr (ROWS > 1) {
    multiply_strided_tile<A, ROWS - 1>(rows, a, a_stride, b, b_stride, depth, c, c_stride,
                                       accumulate);
  }
}

// C = or += A B for m rows of C and n columns, rounded up to whole panels. Tile t, the rows from
// t * TILE_ROWS on, sums over k in depths[t] alone.
//
// The sum of a call is formed on its own and then added, so that long sums are sums of short ones.
template <Stored A, class T>
inline void multiply_strided(MatrixOf<T> a, MatrixOf<T> b, int64_t m, int64_t n, const Range* depths,
                             Matrix c, bool accumulate) {
  for (int64_t column = 0; column < n; column += PANEL) {
    const Range* depth = depths;
    for (int64_t i = 0; i < m; i += TILE_ROWS, ++depth) {
      const T* a_tile = A == Stored::rows ? a.row(i) + depth->begin : a.row(depth->begin) + i;
      multiply_strided_tile<A>(std::min<int64_t>(m - i, TILE_ROWS), a_tile, a.stride,
                               b.row(depth->begin) + column, b.stride, depth->end - depth->begin,
                               c.row(i) + column, c.stride, accumulate);
    }
  }
}

// C = A B for those panels of C that meet columns[t], for each tile t of its m rows.
template <class T>
inline void multiply_strided_columns(MatrixOf<T> a, MatrixOf<T> b, int64_t m, int64_t n, int64_t depth,
                                     const Range* columns, Matrix c) {
  const int64_t length = chain_length<T>(depth);
  for (int64_t column = 0; column < n; column += PANEL) {
    const Range* wanted = columns;
    for (int64_t i = 0; i < m; i += TILE_ROWS, ++wanted) {
      if (wanted->end <= column || wanted->begin >= column + PANEL) continue;
      for (int64_t k = 0; k < depth; k += length) {
        multiply_strided_tile<Stored::rows>(std::min<int64_t>(m - i, TILE_ROWS), a.row(i) + k,
                                            a.stride, b.row(k) + column, b.stride,
                                            std::min(depth - k, length), c.row(i) + column, c.stride,
                                            k > 0);
      }
    }
  }
}

}  // namespace tilewise
