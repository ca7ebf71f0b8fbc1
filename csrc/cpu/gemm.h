// Register-blocked products of small matrices with sums in float32:
//
//   C (M x N) = or += A (M x K) B (K x N)
//
// K counts floats, or with AVX-512 also pairs of bfloat16: whoever packs pairs of k into 32 bits has
// both multiplied and added by one instruction.
//
// B is packed into panels of PANEL columns, one row of a panel after the other, so that the inner
// loop streams it; A stays where it is, and its elements are broadcast. A tile of C stays in
// registers for the whole depth: TILE_ROWS x 2 vectors of it, two of B and one of A fill the
// register file, and its 12 (or 24) independent chains hide the latency of a multiply-add.
//
// Every element of C is a chain of multiply-adds over k = 0, 1, 2, ... which begins with zero and is
// added to C at its end, every PANEL_DEPTH at the latest: its bits depend on nothing but its own row of
// A and column of B, wherever in a tile it falls. A chain that went on from call to call would round
// worse: its error grows with its length, and thousands of keys are summed.
//
// Source: Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/simd.h"

namespace tilewise {

constexpr int PANEL = 2 * F32::WIDTH;                          // columns of a panel of B
constexpr int TILE_ROWS = F32::WIDTH == 16 ? 12 : 6;           // rows of C in registers
constexpr int64_t PANEL_DEPTH = 256;                           // of B in the first-level cache

// How long the chains of scores are, and of their gradients. An exponential function turns what is an
// absolute error in its argument into a relative one, so in float32 chains of more than 192 dimensions
// are cut into equal ones of up to 128.
template <class T>
constexpr int64_t chain_length(int64_t depth) {
  if (!std::is_same<T, float>::value) return PANEL_DEPTH;
  if (depth <= 192) return depth;
  const int64_t chains = (depth + 127) / 128;
  return (depth + chains - 1) / chains;
}

// How many elements `columns` columns take once packed.
constexpr int64_t packed_size(int64_t depth, int64_t columns) {
  return depth * round_up(columns, PANEL);
}

// One tile of C, over one panel of B. `columns` <= PANEL are written.
template <int ROWS, class T>
inline void multiply_tile(const T* __restrict a, int64_t a_stride, const T* __restrict b,
                          int64_t depth, float* __restrict c, int64_t c_stride, int columns,
                          bool accumulate) {
  constexpr int W = F32::WIDTH;
  F32 sum[ROWS][2];
  const int right = columns - W;
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) sum[r][0] = sum[r][1] = F32::zero();
  for (int64_t k = 0; k < depth; ++k) {
    const Lanes<T> b0 = load(b + k * PANEL), b1 = load(b + k * PANEL + W);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Lanes<T> x = broadcast(a + r * a_stride + k);
      sum[r][0] = fma(x, b0, sum[r][0]);
      sum[r][1] = fma(x, b1, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    float* row = c + r * c_stride;
    if (accumulate) {
      sum[r][0] = sum[r][0] + (right >= 0 ? load(row) : load_partial(row, columns));
      if (right > 0) {
        sum[r][1] = sum[r][1] + (right >= W ? load(row + W) : load_partial(row + W, right));
      }
    }
    if (right >= W) {
      store(row, sum[r][0]);
      store(row + W, sum[r][1]);
    } else if (right > 0) {
      store(row, sum[r][0]);
      store_partial(row + W, sum[r][1], right);
    } else {
      store_partial(row, sum[r][0], columns);
    }
  }
}

// The same for a number of rows that is only known at run time, at most ROWS.
template <int ROWS = TILE_ROWS, class T>
inline void multiply_tile(int rows, const T* a, int64_t a_stride, const T* b, int64_t depth, float* c,
                          int64_t c_stride, int columns, bool accumulate) {
  if (rows == ROWS) {
    multiply_tile<ROWS>(a, a_stride, b, depth, c, c_stride, columns, accumulate);
  } else if constexpr (ROWS > 1) {
    multiply_tile<ROWS - 1>(rows, a, a_stride, b, depth, c, c_stride, columns, accumulate);
  }
}

// C (m x n) = A (m x depth) B, or += where `accumulate`. B's panels are `panel_stride` elements apart
// (depth * PANEL unless they were packed deeper). Nothing outside of C's m x n is written.
//
// A panel is used for all rows of A before the next: B is read once, and the few rows of A that a
// tile needs come from the second-level cache in time.
template <class T>
inline void multiply(const T* a, int64_t a_stride, const T* b, int64_t panel_stride, int64_t m,
                     int64_t n, int64_t depth, float* c, int64_t c_stride, bool accumulate) {
  for (int64_t column = 0; column < n; column += PANEL, b += panel_stride) {
    const int columns = static_cast<int>(std::min<int64_t>(n - column, PANEL));
    for (int64_t k = 0; k == 0 || k < depth; k += PANEL_DEPTH) {
      const int64_t ks = std::min(depth - k, PANEL_DEPTH);
      for (int64_t i = 0; i < m; i += TILE_ROWS) {
        const int rows = static_cast<int>(std::min<int64_t>(m - i, TILE_ROWS));
        multiply_tile(rows, a + i * a_stride + k, a_stride, b + k * PANEL, ks,
                      c + i * c_stride + column, c_stride, columns, accumulate || k > 0);
      }
    }
  }
}

// --- packing ---------------------------------------------------------------------------------

// B (depth x n) from its rows. Columns past n are filled up with zeros. Panels are `panel_stride`
// floats apart.
inline void pack_rows(const float* const* rows, int64_t depth, int64_t n, float* out,
                      int64_t panel_stride) {
  constexpr int W = F32::WIDTH;
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t column = 0; column < n; column += W) {
      const int64_t panel = column / PANEL;
      const int left = static_cast<int>(std::min<int64_t>(n - column, W));
      const float* from = rows[k] + column;
      store(out + panel * panel_stride + k * PANEL + column % PANEL,
            left == W ? load(from) : load_partial(from, left));
    }
    if (n % PANEL != 0 && n % PANEL <= W) {
      store(out + n / PANEL * panel_stride + k * PANEL + W, F32::zero());
    }
  }
}

// B (depth x n) from its columns: columns[j] has `depth` elements. Columns past n are zeros.
inline void pack_columns(const float* const* columns, int64_t depth, int64_t n, float* out) {
  constexpr int W = F32::WIDTH;
  for (int64_t first = 0; first < n; first += W) {
    float* panel = out + first / PANEL * PANEL * depth + first % PANEL;
    const int count = static_cast<int>(std::min<int64_t>(n - first, W));
    for (int64_t k = 0; k < depth; k += W) {
      const int deep = static_cast<int>(std::min<int64_t>(depth - k, W));
      F32 block[W];
      for (int j = 0; j < W; ++j) {
        block[j] = j >= count  ? F32::zero()
                   : deep == W ? load(columns[first + j] + k)
                               : load_partial(columns[first + j] + k, deep);
      }
      transpose(block);
      for (int i = 0; i < deep; ++i) store(panel + (k + i) * PANEL, block[i]);
    }
  }
  if (n % PANEL != 0 && n % PANEL <= W) {
    float* panel = out + n / PANEL * PANEL * depth + W;
    for (int64_t k = 0; k < depth; ++k) store(panel + k * PANEL, F32::zero());
  }
}

}  // namespace tilewise
