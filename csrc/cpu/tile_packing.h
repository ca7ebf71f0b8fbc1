// Rows of bfloat16 to operands of AMX products: 16 rows of 64 bytes a tile (see tiles.h), tiles in the
// order in which products read them. Rows come as pointers; what a tile has beyond a row's elements
// is zeros.
#pragma once

#include <cstdint>

#include "cpu/bf16_rows.h"
#include "cpu/tiles.h"

namespace tilewise {

constexpr int64_t TILE_DEPTH = 32;  // elements of a row of A: what a product sums over
constexpr int64_t TILE_ELEMENTS = TILE_HEIGHT * TILE_DEPTH;

inline int64_t tile_depth_of(int64_t n) { return (n + TILE_DEPTH - 1) / TILE_DEPTH; }
inline int64_t tile_columns_of(int64_t n) { return (n + TILE_WIDTH - 1) / TILE_WIDTH; }

// As A: tile (i, k) has rows 16 i ... and elements 32 k ..., and follows tile (i, k - 1).
inline void pack_tile_rows(const BFloat16* const* rows, int64_t count, int64_t n, BFloat16* out) {
  const int64_t depth = tile_depth_of(n);
  for (int64_t i = 0; i < count; ++i) {
    BFloat16* to = out + i / TILE_HEIGHT * depth * TILE_ELEMENTS + i % TILE_HEIGHT * TILE_DEPTH;
    for (int64_t k = 0; k < depth; ++k) {
      _mm512_store_si512(to + k * TILE_ELEMENTS,
                         load_row(rows[i] + k * TILE_DEPTH, n - k * TILE_DEPTH));
    }
  }
}

// As B, a row a column of it: tile (k, j) has elements 32 k ... of rows 16 j ..., turned: pairs of
// elements as rows. It follows tile (k - 1, j). `count` is a multiple of 16.
inline void pack_tile_columns(const BFloat16* const* rows, int64_t count, int64_t n, BFloat16* out) {
  for (int64_t j = 0; j < count; j += TILE_WIDTH) {
    for (int64_t k = 0; k < n; k += TILE_DEPTH, out += TILE_ELEMENTS) {
      F32 block[TILE_WIDTH];  // 32-bit lanes, each of them two elements
      for (int i = 0; i < TILE_WIDTH; ++i) {
        block[i] = _mm512_castsi512_ps(load_row(rows[j + i] + k, n - k));
      }
      transpose(block);
      for (int i = 0; i < TILE_WIDTH; ++i) {
        _mm512_store_si512(out + i * TILE_DEPTH, _mm512_castps_si512(block[i].v));
      }
    }
  }
}

// As B, a row a row of it: tile (k, j) has elements 16 j ... of rows 32 k ..., each of its own rows two
// of them zipped. It follows tile (k - 1, j), and there is room for `room` rows a column. `count` is
// even.
inline void pack_tile_pairs(const BFloat16* const* rows, int64_t count, int64_t n, int64_t room,
                            BFloat16* out) {
  const int64_t columns = tile_columns_of(n);
  for (int64_t k = 0; k < count; k += 2, out += TILE_DEPTH) {
    for (int64_t j = 0; j < columns; j += 2) {
      BFloat16* to = out + j * room * TILE_WIDTH;
      alignas(64) BFloat16 nowhere[TILE_DEPTH];
      zip_rows(rows[k] + j * TILE_WIDTH, rows[k + 1] + j * TILE_WIDTH, n - j * TILE_WIDTH, to,
               j + 1 < columns ? to + room * TILE_WIDTH : nowhere);
    }
  }
}

// As A, a row a column of it: tile (i, k) has elements 16 i ... of rows 32 k ..., turned. It follows
// tile (i, k - 1), and there is room for `room` rows. `count` is a multiple of 32.
//
// Zipping leaves 16 pairs of rows in two vectors each, which hold dimensions 0-3, 8-11, 16-19, 24-27
// and the other ones; turned, each vector is a row of a tile.
inline void pack_tile_turned(const BFloat16* const* rows, int64_t count, int64_t n, int64_t room,
                             BFloat16* out) {
  for (int64_t k = 0; k < count; k += TILE_DEPTH) {
    for (int64_t first = 0; first < n; first += TILE_DEPTH) {
      F32 low[TILE_HEIGHT], high[TILE_HEIGHT];
      for (int i = 0; i < TILE_HEIGHT; ++i) {
        const __m512i even = load_row(rows[k + 2 * i] + first, n - first);
        const __m512i odd = load_row(rows[k + 2 * i + 1] + first, n - first);
        low[i] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(even, odd));
        high[i] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(even, odd));
      }
      const auto put = [&](F32(&block)[TILE_HEIGHT], int half) {
        transpose(block);
        for (int i = 0; i < TILE_HEIGHT; ++i) {
          const int64_t dim = first + i / 4 * 8 + half * 4 + i % 4;
          if (dim >= round_up(n, TILE_HEIGHT)) continue;
          BFloat16* tile = out + (dim / TILE_HEIGHT * room + k) * TILE_WIDTH;
          _mm512_store_si512(tile + dim % TILE_HEIGHT * TILE_DEPTH, _mm512_castps_si512(block[i].v));
        }
      };
      put(low, 0);
      put(high, 1);
    }
  }
}

}  // namespace tilewise
