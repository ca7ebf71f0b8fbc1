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

#include "cpu/attention.h"
#include "cpu/tile_packing.h"
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
    return a.dtype == DType::bf16 && a.kv_dtype == DType::bf16 && a.v_dim >= TILE_WIDTH;
  }

  static int64_t query_size(int64_t dim) { return ROW_BLOCK * tile_depth_of(dim) * TILE_DEPTH; }
  static int64_t key_size(int64_t dim) { return KEY_BLOCK * tile_depth_of(dim) * TILE_DEPTH; }
  static int64_t value_size(int64_t v_dim) { return KEY_BLOCK * tile_columns_of(v_dim) * TILE_WIDTH; }
  static int64_t out_stride(int64_t v_dim) { return (tile_columns_of(v_dim) | 1) * TILE_WIDTH; }

  AmxEngineOf(int64_t dim, int64_t v_dim) : dim_(dim), v_dim_(v_dim) {}

  void pack_queries(const Element* const* rows, int64_t count, Element* out) const {
    pack_tile_rows(rows, count, dim_, out);
  }

  void pack_keys(const Element* const* rows, int64_t count, Element* out) const {
    pack_tile_columns(rows, count, dim_, out);
  }

  void pack_values(const Element* const* rows, int64_t count, Element* out) const {
    pack_tile_pairs(rows, count, v_dim_, KEY_BLOCK, out);
  }

  void scores(const Element* queries, int64_t count, const Element* keys, int64_t begin,
              int64_t end, float* s) const {
    const int64_t depth = tile_depth_of(dim_);
    const int64_t panel = std::max<int64_t>(2, PANEL_TILES / depth) * TILE_WIDTH;
    for (int64_t j = begin; j < end; j += panel) {
      const int64_t columns = std::min(panel, end - j) / TILE_WIDTH;
      const Element* b = keys + j * depth * TILE_DEPTH;
      multiply_tiles<false>(
          count, depth, columns,
          {bytes(queries), TILE_SIZE, depth * TILE_SIZE, TILE_BYTES, bytes(b), depth * TILE_SIZE,
           s + j, SCORE_STRIDE});
    }
  }

  void accumulate(const Element* weights, int64_t count, const Element* values, int64_t begin,
                  int64_t end, float* out) const {
    constexpr int64_t STRIDE = SCORE_STRIDE * sizeof(float);
    multiply_tiles<true>(count, (end - begin) / TILE_DEPTH, tile_columns_of(v_dim_),
                       {bytes(weights + begin), TILE_BYTES, TILE_HEIGHT * STRIDE, STRIDE,
                        bytes(values + begin * TILE_WIDTH), KEY_BLOCK * TILE_WIDTH * 2, out,
                        out_stride(v_dim_)});
  }

 private:
  static constexpr int64_t PANEL_TILES = 16;  // of keys, kept in the first-level cache

  static const char* bytes(const Element* p) { return reinterpret_cast<const char*>(p); }

  int64_t dim_, v_dim_;
  Tiles tiles_;
};

using AmxEngine = AmxEngineOf<64, 128>;

}  // namespace tilewise
