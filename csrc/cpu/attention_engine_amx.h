// The matrix engine of prefill attention on AMX tiles, for bfloat16 (see attention_engine.h).
//
// B is packed tile by tile in the order in which it is read. A comes as rows of tiles (queries,
// packed) or straight from the softmax, which has written its weights over the scores.
//
// Block sizes by calculation, not yet by measurement: a strip of 64 rows by a block of 128 keys, at
// dim 64 (128), against 48 KB of first-level cache and 48 bytes a cycle from the second level:
//   packed queries, 64 x dim                     8 KB  (16 KB)
//   scores, 64 x (128 + 16) floats              36 KB  (36 KB), then weights in half of each row
//   packed keys = packed values, 128 x dim      16 KB  (32 KB)
//   output sums, 64 x (dim + 16) floats         20 KB  (36 KB)
// Tiles take 64 x 128 x dim x 4 / 1024 = 2048 (4096) cycles, the softmax 5.5 cycles per 16 scores =
// 2816 and perhaps 12 a row = 768. Everything but the scores comes from the second level: 24 bytes
// a cycle while scores are computed, 54 (51, of twice as many cycles) while weights are applied.
// Strips of 32 rows by 256 keys take as much room and halve the 768, but use what they stream of
// keys and values for 32 rows only, which was seen to be bound by the second level.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/attention.h"
#include "cpu/bf16_rows.h"
#include "cpu/simd.h"
#include "cpu/tile_product.h"

namespace tilewise {

template <int STRIP, int KEYS>
class AmxEngineOf {
 public:
  using Element = BFloat16;
  using Weight = BFloat16;
  static constexpr int ROW_BLOCK = 2 * STRIP;
  static constexpr int ROW_STRIP = STRIP;
  static constexpr int KEY_BLOCK = KEYS;
  static constexpr int KEY_STEP = 32;
  // An odd number of cache lines, so that the 16 rows of a tile lie in 16 different sets; so is
  // the stride of the output sums.
  static constexpr int SCORE_STRIDE = KEY_BLOCK + 16;

  // Weights are rounded to bfloat16. A row of fewer than 16 sums may by chance be so much smaller
  // than what it is summed from that this shows in the result.
  static bool takes(const Attention& a) {
    return a.dtype == DType::bf16 && a.kv_dtype == DType::bf16 && a.v_dim >= WIDTH;
  }

  static int64_t query_size(int64_t dim) { return ROW_BLOCK * depth_of(dim) * DEPTH; }
  static int64_t key_size(int64_t dim) { return KEY_BLOCK * depth_of(dim) * DEPTH; }
  static int64_t value_size(int64_t v_dim) { return KEY_BLOCK * columns_of(v_dim) * WIDTH; }
  static int64_t out_stride(int64_t v_dim) { return columns_of(v_dim) / 2 * 2 * WIDTH + WIDTH; }

  AmxEngineOf(int64_t dim, int64_t v_dim) : dim_(dim), v_dim_(v_dim) {}

  // Tile (i, k) has rows 16 i ... and elements 32 k ..., and follows tile (i, k - 1).
  void pack_queries(const Element* const* rows, int64_t count, Element* out) const {
    const int64_t depth = depth_of(dim_);
    for (int64_t i = 0; i < count; ++i) {
      Element* to = out + i / TILE_HEIGHT * depth * TILE_ELEMENTS + i % TILE_HEIGHT * DEPTH;
      for (int64_t k = 0; k < depth; ++k) {
        store_row(to + k * TILE_ELEMENTS, load_row(rows[i] + k * DEPTH, dim_ - k * DEPTH));
      }
    }
  }

  // Tile (k, j) has elements 32 k ... of keys 16 j ..., turned: pairs of elements as rows. It
  // follows tile (k - 1, j).
  void pack_keys(const Element* const* rows, int64_t count, Element* out) const {
    for (int64_t j = 0; j < count; j += WIDTH) {
      for (int64_t k = 0; k < dim_; k += DEPTH, out += TILE_ELEMENTS) {
        F32 block[WIDTH];  // 32-bit lanes, each of them two elements
        for (int i = 0; i < WIDTH; ++i) {
          block[i] = _mm512_castsi512_ps(load_row(rows[j + i] + k, dim_ - k));
        }
        transpose(block);
        for (int i = 0; i < WIDTH; ++i) {
          store_row(out + i * DEPTH, _mm512_castps_si512(block[i].v));
        }
      }
    }
  }

  // Tile (k, n) has elements 16 n ... of values 32 k ..., each row two values zipped. It follows
  // tile (k - 1, n), and there is room for KEY_BLOCK values a column.
  void pack_values(const Element* const* rows, int64_t count, Element* out) const {
    const int64_t columns = columns_of(v_dim_);
    for (int64_t k = 0; k < count; k += 2, out += DEPTH) {
      for (int64_t n = 0; n < columns; n += 2) {
        Element* to = out + n * KEY_BLOCK * WIDTH;
        alignas(64) Element nowhere[DEPTH];
        zip_rows(rows[k] + n * WIDTH, rows[k + 1] + n * WIDTH, v_dim_ - n * WIDTH, to,
                 n + 1 < columns ? to + KEY_BLOCK * WIDTH : nowhere);
      }
    }
  }

  void scores(const Element* queries, int64_t count, const Element* keys, int64_t begin,
              int64_t end, float* s) const {
    const int64_t depth = depth_of(dim_);
    const int64_t panel = std::max<int64_t>(2, PANEL_TILES / depth) * WIDTH;
    for (int64_t j = begin; j < end; j += panel) {
      const int64_t columns = std::min(panel, end - j) / WIDTH;
      const Element* b = keys + j * depth * DEPTH;
      multiply_tiles<false>(
          count, depth, columns,
          {bytes(queries), TILE_SIZE, depth * TILE_SIZE, TILE_BYTES, bytes(b), depth * TILE_SIZE,
           s + j, SCORE_STRIDE});
    }
  }

  void accumulate(const Element* weights, int64_t count, const Element* values, int64_t begin,
                  int64_t end, float* out) const {
    constexpr int64_t STRIDE = SCORE_STRIDE * sizeof(float);
    multiply_tiles<true>(count, (end - begin) / DEPTH, columns_of(v_dim_),
                       {bytes(weights + begin), TILE_BYTES, TILE_HEIGHT * STRIDE, STRIDE,
                        bytes(values + begin * WIDTH), KEY_BLOCK * WIDTH * 2, out,
                        out_stride(v_dim_)});
  }

 private:
  static constexpr int64_t DEPTH = 32;  // elements of a row of A
  static constexpr int64_t WIDTH = 16;  // columns of B and C
  static constexpr int64_t TILE_ELEMENTS = TILE_HEIGHT * DEPTH;
  static constexpr int64_t PANEL_TILES = 16;  // of keys, kept in the first-level cache

  static int64_t depth_of(int64_t dim) { return (dim + DEPTH - 1) / DEPTH; }
  static int64_t columns_of(int64_t v_dim) { return (v_dim + WIDTH - 1) / WIDTH; }
  static const char* bytes(const Element* p) { return reinterpret_cast<const char*>(p); }

  static void store_row(Element* p, __m512i row) { _mm512_store_si512(p, row); }

  int64_t dim_, v_dim_;
  Tiles tiles_;
};

using AmxEngine = AmxEngineOf<64, 128>;

}  // namespace tilewise
