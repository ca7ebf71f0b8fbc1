// What decode attention multiplies in float32 or in pairs: a block's queries with its keys, and its
// weights with its values.
//
// A value that nobody sees may be NaN, and zero times it would spread. That is rare: whoever meets
// something that is not finite starts again with `careful`, looking at each row.
#pragma once

#include <cmath>

#include "cpu/decode_buffers.h"
#include "cpu/decode_loops.h"
#include "cpu/decode_weights.h"

namespace tilewise {

class DecodeProducts {
 public:
  static int64_t near_bytes(const Attention&) { return NEAR_BYTES; }

  struct Buffers : DecodeBuffers {
    Buffers(float* memory, int64_t heads, int64_t count, const DecodeSizes& sizes)
        : DecodeBuffers(memory, heads * count, sizes) {
      for (int64_t j = 0; j < 2 * STEP; ++j) {
        k_tile[j] = others + j % STEP * sizes.k_size;
        v_tile[j] = others + j % STEP * sizes.v_size;
      }
    }
    static int64_t size(int64_t heads, int64_t count, const DecodeSizes& sizes) {
      return DecodeBuffers::size(heads * count, sizes) + STEP * std::max(sizes.k_size, sizes.v_size);
    }

    const void *k_tile[2 * STEP], *v_tile[2 * STEP];  // as a block's, each row twice
  };

  DecodeProducts(const Attention& a, const DecodeSizes& sizes, const DecodeWeights& weights)
      : a_(a),
        sizes_(sizes),
        weights_(weights),
        loops_(loops_of(a)),
        expanded_loops_(expanded_loops(a)),
        expand_query_(query_expansion(a)) {}

  void take_query(const char* q, int64_t r, Buffers& b) const {
    const bool is_cut = arithmetic_of(a_) == Arithmetic::floats;  // as the cache's rows
    const int64_t runs = is_cut ? sizes_.runs : 1, run = a_.dim / runs;
    for (int64_t i = 0; i < runs; ++i) {
      expand_query_(q + i * run * element_size(a_.dtype), run,
                    row_of(b.queries, r, sizes_.k_size) + i * (sizes_.k_size / runs) * 4);
    }
  }

  // b.scores = queries . keys
  void score(const Block& block, const TaskRows& rows, Buffers& b, bool careful) const {
    const bool expand = expands(rows, careful);
    for_tiles(block, expand ? STEP : sizes_.tile, rows.heads, [&](int64_t j, int64_t end, int64_t h) {
      CacheRows keys = sizes_.keys(block, j, h);
      Ahead ahead = sizes_.after_keys(block, j, end, h, rows.heads);
      if (expand) {
        for (int64_t i = 0; i < STEP; ++i) {
          loops_.expand(keys.row<char>(i), a_.dim, row_of(b.others, i, sizes_.k_size));
          fetch_row(ahead, sizes_.k_bytes);
        }
        keys = {b.k_tile, 0};
        ahead = sizes_.nothing(keys);
      }
      const RowLoops& loops = expand ? expanded_loops_ : loops_;
      for (int64_t i = 0; i < rows.count; i += ROWS, ahead = sizes_.nothing(keys)) {
        const int64_t r = h * rows.count + i;
        loops.dot[std::min<int64_t>(rows.count - i, ROWS) - 1](
            row_of(b.queries, r, sizes_.k_size), sizes_.k_size * 4, keys, ahead, end - j,
            expand ? sizes_.k_size : a_.dim, b.scores + r * SCORE_STRIDE + j, SCORE_STRIDE);
      }
    });
  }

  // Row r's weights of a block have taken the place of its scores.
  void take_weights(const Block&, int64_t r, float factor, Buffers& b) const {
    if (factor == 1.0f) return;
    float* out = b.out + r * sizes_.v_size;
    for (int64_t i = 0; i < sizes_.v_size; i += F32::WIDTH) {
      store(out + i, load(out + i) * F32::all(factor));
    }
  }

  // b.out += weights . values
  void accumulate(const Block& block, const Block& next, const TaskRows& rows, Buffers& b,
                  bool careful) const {
    const bool expand = expands(rows, careful);
    for_tiles(block, expand ? STEP : sizes_.tile, rows.heads, [&](int64_t j, int64_t end, int64_t h) {
      CacheRows values = sizes_.values(block, j, h);
      Ahead ahead = sizes_.after_values(block, j, end, next, h, rows.heads);
      if (expand) {
        for (int64_t i = 0; i < STEP; ++i) {
          expand_value(block, j, i, h, rows, b, careful);
          fetch_row(ahead, sizes_.v_bytes);
        }
        values = {b.v_tile, 0};
        ahead = sizes_.nothing(values);
      }
      const RowLoops& loops = expand ? expanded_loops_ : loops_;
      for (int64_t i = 0; i < rows.count; i += ROWS, ahead = sizes_.nothing(values)) {
        const int64_t r = h * rows.count + i;
        loops.accumulate[std::min<int64_t>(rows.count - i, ROWS) - 1](
            weights_.at(b.scores + r * SCORE_STRIDE, j), SCORE_STRIDE * 4, values, ahead, end - j,
            expand ? sizes_.v_size : a_.v_dim, b.out + r * sizes_.v_size, sizes_.v_size);
      }
    });
  }

  bool is_finite(int64_t rows, const Buffers& b) const {
    return are_finite(b.out, rows * sizes_.v_size, b.sums, rows);
  }

  // Row r of b.out in the order of the elements.
  void collect(int64_t r, const Buffers& b, float* out) const {
    loops_.collect(b.out + r * sizes_.v_size, sizes_.v_size, out);
  }

 private:
  // A few rows convert what they read again for every ROWS of them; more convert it once, to memory.
  bool expands(const TaskRows& rows, bool careful) const {
    const bool is_cheap = arithmetic_of(a_) == Arithmetic::pairs || element_size(a_.kv_dtype) > 1;
    const int64_t few = (is_cheap ? 8 : 2) * ROWS;
    return careful || (rows.count > few && !loops_.is_expanded);
  }

  static void fetch_row(Ahead& ahead, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += Ahead::LINE) ahead.fetch_line();
  }

  // Value j + i of a block to row i of b.v_tile. With care, a row that is not finite becomes zero, and
  // its weights NaN where they are seen.
  void expand_value(const Block& block, int64_t j, int64_t i, int64_t h, const TaskRows& rows,
                    Buffers& b, bool careful) const {
    char* row = row_of(b.others, i, sizes_.v_size);
    const bool exists = j + i < block.count;
    const bool finite = loops_.expand(sizes_.values(block, j, h).row<char>(i), a_.v_dim, row);
    if (!careful) return;
    if (exists && finite && std::isfinite(block.v_scale_of(a_, j + i, h))) return;
    std::memset(row, 0, sizes_.v_size * 4);
    if (!exists) return;
    for (int64_t r = h * rows.count; r < (h + 1) * rows.count; ++r) {
      const bool is_seen = weights_.sees(rows.at[r], block, j + i);
      weights_.set(b.scores + r * SCORE_STRIDE, j + i, is_seen ? NAN : 0.0f);
    }
  }

  const Attention& a_;
  const DecodeSizes& sizes_;
  const DecodeWeights& weights_;
  const RowLoops loops_, expanded_loops_;
  const decltype(RowLoops::expand) expand_query_;
};

}  // namespace tilewise
