// The products of prefill attention on AMX tiles, for bfloat16, turned: S^T = K Q^T and O^T += V^T P^T
// (see attention_prefill_lanes.h for why).
//
// Keys are A as they lie, queries B; values are turned once, when they are packed. All tiles lie in
// one piece, those of scores and sums as well.
#pragma once

#include <cstdint>

#include "cpu/attention.h"
#include "cpu/tile_packing.h"
#include "cpu/tile_products.h"

namespace tilewise {

template <int ROWS, int STRIP, int KEYS, int STEP>
class AmxEngineOf {
 public:
  using Element = BFloat16;
  static constexpr int ROW_BLOCK = ROWS;
  static constexpr int LEAST_ROWS = 64;
  static constexpr int ROW_STRIP = STRIP;
  static constexpr int KEY_BLOCK = KEYS;
  static constexpr int KEY_STEP = TILE_DEPTH;
  static constexpr int SCORE_STEP = STEP;  // a multiple of KEY_STEP: keys that `scores` takes at once

  // Weights are rounded to bfloat16. A row of fewer than 16 sums may by chance be so much smaller
  // than what it is summed from that this shows in the result.
  static bool takes(const Attention& a) {
    return a.dtype == DType::bf16 && a.kv_dtype == DType::bf16 && a.v_dim >= TILE_WIDTH;
  }

  static int64_t query_size(int64_t dim) { return ROW_BLOCK * tile_depth_of(dim) * TILE_DEPTH; }
  static int64_t key_size(int64_t dim) { return KEY_BLOCK * tile_depth_of(dim) * TILE_DEPTH; }
  static int64_t value_size(int64_t v_dim) { return KEY_BLOCK * out_stride(v_dim); }
  static int64_t out_stride(int64_t v_dim) { return tile_columns_of(v_dim) * TILE_WIDTH; }

  AmxEngineOf(int64_t dim, int64_t v_dim) : dim_(dim), v_dim_(v_dim) {}

  void pack_queries(const Element* const* rows, int64_t count, Element* out) const {
    pack_tile_columns(rows, round_up(count, TILE_WIDTH), dim_, out);
  }

  void pack_keys(const Element* const* rows, int64_t count, Element* out) const {
    pack_tile_rows(rows, count, dim_, out);
  }

  void pack_values(const Element* const* rows, int64_t count, Element* out) const {
    pack_tile_turned(rows, count, v_dim_, KEY_BLOCK, out);
  }

  // 16 queries have SCORE_STEP lines of 16 scores, from `begin` on, then come the next 16.
  void scores(const Element* queries, int64_t count, const Element* keys, int64_t begin,
              int64_t end, float* s) const {
    const int64_t depth = tile_depth_of(dim_);
    multiply_tiles<Bfloat16Products>(
        (end - begin) / TILE_HEIGHT, tile_columns_of(count), depth, false,
        {keys + begin * depth * TILE_DEPTH, depth * TILE_SIZE, TILE_SIZE},
        {queries, TILE_SIZE, depth * TILE_SIZE},
        {s, TILE_SUMS, SCORE_STEP * TILE_WIDTH});
  }

  // 16 queries have KEY_BLOCK / 32 tiles of weights, then come the next 16; so with their sums.
  void accumulate(const Element* weights, int64_t count, const Element* values, int64_t begin,
                  int64_t end, float* out) const {
    constexpr int64_t BLOCK_SIZE = KEY_BLOCK / TILE_DEPTH * TILE_SIZE;
    const int64_t rows = tile_columns_of(v_dim_);  // O^T has a row for each dimension
    multiply_tiles<Bfloat16Products>(
        rows, tile_columns_of(count), (end - begin) / TILE_DEPTH, true,
        {values + begin * TILE_WIDTH, BLOCK_SIZE, TILE_SIZE},
        {weights + begin * TILE_WIDTH, TILE_SIZE, BLOCK_SIZE},
        {out, TILE_SUMS, rows * TILE_SUMS});
  }

 private:
  int64_t dim_, v_dim_;
  Tiles tiles_;
};

using AmxEngine = AmxEngineOf<512, 32, 256, 32>;

}  // namespace tilewise
