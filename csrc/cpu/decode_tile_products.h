// The same as decode_products.h on AMX tiles, for a bfloat16 cache and query rows that share its keys.
#pragma once

#include <cmath>
#include <utility>

#include "cpu/decode_buffers.h"
#include "cpu/decode_tiles.h"
#include "cpu/decode_weights.h"

namespace tilewise {

class DecodeTileProducts {
 public:
  // A single row for each key is as fast without tiles. Products are chosen by what is a model's, not
  // a batch's, since their bits differ.
  static bool takes(const Attention& a) {
    return arithmetic_of(a) == Arithmetic::pairs && a.kv_dtype == DType::bf16 && group_size(a) > 1;
  }

  // Tiles that are copied, because pages are small, had better stay in the first-level cache.
  static int64_t near_bytes(const Attention& a) {
    return a.block_table && a.page_size % TILE_KEYS ? NEAR_BYTES : 2 * NEAR_BYTES;
  }

  // Where everything is in a task's memory, in floats; numbers of tiles are a head's.
  struct Layout {
    Layout(int64_t heads, int64_t count, const DecodeSizes& sizes)
        : count(count),
          columns(score_columns(count)),
          rows(value_rows(count)),
          query_tiles(groups_of(count, SCORE_QUERIES) * (sizes.k_size / TILE_ROW)),
          weight_tiles(groups_of(count, SUM_QUERIES) * (BLOCK / TILE_KEYS)),
          sum_tiles(groups_of(count, SUM_QUERIES) * (sizes.v_size / TILE_ROW)) {
      const auto take = [&](int64_t floats) {
        return std::exchange(size, size + round_up(floats, F32::WIDTH));
      };
      const int64_t all = heads * count;
      queries_at = take(heads * query_tiles * TILE_HEIGHT * columns);
      weights_at = take(2 * weight_tiles * tile_size());
      tile_sums_at = take(heads * sum_tiles * tile_size());
      tile_scores_at = take(2 * BLOCK * columns);
      room_at = take(2 * room_size(sizes) / 4);
      out_at = take(all * sizes.v_size);
      scores_at = take(all * SCORE_STRIDE);
      rows_at = take(3 * all);
    }

    int64_t tile_size() const { return rows * (TILE_BYTES / 4); }  // of weights and sums

    int64_t count, columns, rows, query_tiles, weight_tiles, sum_tiles, size = 0;
    int64_t queries_at, weights_at, tile_sums_at, tile_scores_at, room_at, out_at, scores_at, rows_at;
  };

  struct Buffers : Layout {
    Buffers(float* memory, int64_t heads, int64_t count, const DecodeSizes& sizes)
        : Layout(heads, count, sizes),
          queries(memory + queries_at),
          weights(memory + weights_at),
          tile_sums(memory + tile_sums_at),
          tile_scores(memory + tile_scores_at),
          out(memory + out_at),
          scores(memory + scores_at),
          maxima(memory + rows_at),
          sums(maxima + heads * count),
          factors(sums + heads * count),
          room(reinterpret_cast<char*>(memory + room_at)),
          scoring(score_shapes(columns)),
          summing(value_shapes(rows)),
          tiles(scoring) {}

    static int64_t size(int64_t heads, int64_t count, const DecodeSizes& sizes) {
      return Layout(heads, count, sizes).size;
    }

    float *queries, *weights, *tile_sums, *tile_scores, *out, *scores, *maxima, *sums, *factors;
    static constexpr float* scales = nullptr;  // a bfloat16 cache has none
    char* room;  // for keys or values that are copied
    TileShapes scoring, summing;
    Tiles tiles;
  };

  DecodeTileProducts(const Attention& a, const DecodeSizes& sizes, const DecodeWeights& weights)
      : a_(a),
        sizes_(sizes),
        weights_(weights),
        depth_(a.dim / TILE_ROW),
        v_depth_(a.v_dim / TILE_ROW) {}

  void take_query(const char* q, int64_t r, Buffers& b) const {
    const int64_t i = r % b.count;
    put_query(q, a_.dim, b.columns, queries_of(r / b.count, i, b) + i % SCORE_QUERIES);
  }

  // b.scores = queries . keys
  void score(const Block& block, const TaskRows& rows, Buffers& b, bool) const {
    Turn last{};
    int64_t turns = 0;
    configure_tiles(b.scoring);
    const auto take = [&](Step& s) { take_rows(sizes_.keys(block, s.j, s.h), a_.dim, s); };
    for_steps(block, rows, b, take, [&](const Step& s) {
      const CacheRows keys = sizes_.keys(block, s.j, s.h);
      Ahead ahead = sizes_.after_keys(block, s.j, s.end, s.h, rows.heads);
      for (int64_t i = 0; i < rows.count; i += SCORE_QUERIES, ahead = sizes_.nothing(keys)) {
        float* to = b.tile_scores + turns++ % 2 * BLOCK * b.columns;
        for (int64_t t = 0; t < s.tiles; t += TILES_TOGETHER) {
          SCORE_TILES[std::min(s.tiles - t, TILES_TOGETHER) - 1](
              s.rows + t, depth_, queries_of(s.h, i, b), b.columns, ahead,
              to + t * TILE_HEIGHT * b.columns);
        }
        // What a tile has just stored takes long to be read: the turn before is there.
        turn(last);
        last = {to, b.columns, b.scores + (s.h * rows.count + i) * SCORE_STRIDE + s.j, s.tiles,
                std::min(rows.count - i, SCORE_QUERIES)};
      }
    });
    turn(last);
  }

  // Row r's weights of a block have taken the place of its scores.
  void take_weights(const Block&, int64_t r, float factor, Buffers& b) const {
    b.factors[r] = factor;
  }

  // b.out = b.out * factors + weights . values
  void accumulate(const Block& block, const Block& next, const TaskRows& rows, Buffers& b,
                  bool careful) const {
    configure_tiles(b.summing);
    const auto take = [&](Step& s) {
      for (int64_t i = 0; i < rows.count; ++i) {
        const float* weights = b.scores + (s.h * rows.count + i) * SCORE_STRIDE;
        put_weights(reinterpret_cast<const BFloat16*>(weights), s.j, s.end, b.tile_size(),
                    weights_of(s.h, i, s.j, b));
      }
      if (careful) {
        take_finite_rows(block, rows, b, s);
      } else {
        take_rows(sizes_.values(block, s.j, s.h), a_.v_dim, s);
      }
    };
    for_steps(block, rows, b, take, [&](const Step& s) {
      const CacheRows values = sizes_.values(block, s.j, s.h);
      Ahead ahead = sizes_.after_values(block, s.j, s.end, next, s.h, rows.heads);
      for (int64_t i = 0; i < rows.count; i += SUM_QUERIES, ahead = sizes_.nothing(values)) {
        for (int64_t d = 0; d < v_depth_; d += TILES_TOGETHER) {
          ACCUMULATE_TILES[std::min(v_depth_ - d, TILES_TOGETHER) - 1](
              s.rows, s.tiles, d * TILE_BYTES, weights_of(s.h, i, s.j, b), b.rows, ahead,
              s.j > block.first, sums_of(s.h, i, d, b));
        }
      }
    });
    for (int64_t r = 0; r < rows.all(); ++r) {
      const F32 factor = F32::all(b.factors[r]);
      const float* sums = sums_of(r / rows.count, r % rows.count, 0, b);
      float *out = b.out + r * sizes_.v_size, *end = out + a_.v_dim;
      for (; out < end; out += TILE_ROW, sums += b.tile_size()) {
        for (int64_t i = 0; i < TILE_ROW; i += F32::WIDTH) {
          store(out + i, fma(load(out + i), factor, load(sums + i)));
        }
      }
    }
  }

  bool is_finite(int64_t rows, const Buffers& b) const {
    return are_finite(b.out, rows * sizes_.v_size, b.sums, rows);
  }

  // Row r of b.out in the order of the elements.
  void collect(int64_t r, const Buffers& b, float* out) const {
    collect_tiles(b.out + r * sizes_.v_size, a_.v_dim, out);
  }

 private:
  // Tiles of scores, a row for each key, that are to become rows of scores.
  struct Turn {
    const float* tiles;
    int64_t columns;
    float* scores;
    int64_t count, rows;
  };

  static void turn(const Turn& t) {
    for (int64_t i = 0; i < t.count; ++i) {
      turn_scores(t.tiles + i * TILE_HEIGHT * t.columns, t.columns, t.rows,
                  t.scores + i * TILE_KEYS, SCORE_STRIDE);
    }
  }

  static int64_t groups_of(int64_t count, int64_t each) { return (count + each - 1) / each; }

  // Of row i of head h: where the tiles of its group begin,
  float* queries_of(int64_t h, int64_t i, Buffers& b) const {
    const int64_t tile = h * b.query_tiles + i / SCORE_QUERIES * depth_;
    return b.queries + tile * TILE_HEIGHT * b.columns;
  }

  // and within them its weights of keys from j on (those of two heads are there at a time)
  static float* weights_of(int64_t h, int64_t i, int64_t j, Buffers& b) {
    const int64_t group = i / SUM_QUERIES * (BLOCK / TILE_KEYS);
    const int64_t tile = h % 2 * b.weight_tiles + group + j / TILE_KEYS;
    return b.weights + tile * b.tile_size() + i % SUM_QUERIES * TILE_ROW;
  }

  // and its sums of values from tile d on: two rows of a tile.
  float* sums_of(int64_t h, int64_t i, int64_t d, Buffers& b) const {
    const int64_t tile = h * b.sum_tiles + i / SUM_QUERIES * v_depth_ + d;
    return b.tile_sums + tile * b.tile_size() + i % SUM_QUERIES * TILE_ROW;
  }

  // One head's keys or values [j, end) of a block.
  struct Step {
    int64_t j, end, h, tiles;
    char* room;  // for rows that are copied
    TileRows rows[BLOCK / TILE_KEYS];
  };

  // Calls take(step) and, when the next one is taken, run(step): tiles that have just been copied take
  // long to be loaded.
  template <class Take, class Run>
  void for_steps(const Block& block, const TaskRows& rows, Buffers& b, const Take& take,
                 const Run& run) const {
    Step steps[2];
    int64_t n = 0;
    for_tiles(block, sizes_.tile, rows.heads, [&](int64_t j, int64_t end, int64_t h) {
      Step& step = steps[n % 2];
      step.j = j, step.end = end, step.h = h, step.tiles = groups_of(end - j, TILE_KEYS);
      step.room = b.room + n % 2 * room_size(sizes_);
      take(step);
      if (n++ > 0) run(steps[n % 2]);
    });
    if (n > 0) run(steps[(n - 1) % 2]);
  }

  static int64_t room_size(const DecodeSizes& sizes) {
    return sizes.tile * std::max(sizes.k_bytes, sizes.v_bytes);
  }

  // Sixteen rows that are not equally far apart are copied.
  static void take_rows(CacheRows rows, int64_t dim, Step& step) {
    const int64_t bytes = dim * static_cast<int64_t>(sizeof(BFloat16));
    char* to = step.room;
    for (int64_t t = 0; t < step.tiles; ++t, rows.at += TILE_KEYS) {
      if (is_regular(rows)) {
        const char* first = rows.row<char>(0);
        step.rows[t] = {first, rows.row<char>(1) - first};
        continue;
      }
      step.rows[t] = {to, bytes};
      for (int64_t i = 0; i < TILE_KEYS; ++i, to += bytes) {
        const char* row = rows.row<char>(i);
        for (int64_t c = 0; c < bytes; c += TILE_BYTES) {
          _mm512_store_si512(to + c, _mm512_loadu_si512(row + c));
        }
      }
    }
  }

  // A value that is not finite becomes zero, and its weights NaN where they are seen.
  void take_finite_rows(const Block& block, const TaskRows& rows, Buffers& b, Step& step) const {
    const CacheRows values = sizes_.values(block, step.j, step.h);
    for (int64_t t = 0; t < step.tiles; ++t) {
      step.rows[t] = {step.room + t * TILE_KEYS * sizes_.v_bytes, sizes_.v_bytes};
    }
    for (int64_t i = 0; i < step.tiles * TILE_KEYS; ++i) {
      char* row = step.room + i * sizes_.v_bytes;
      const int64_t j = step.j + i;
      const bool exists = j < block.count;
      if (expand_row_pairs<BFloat16>(values.row<char>(i), a_.v_dim, row) && exists) continue;
      std::memset(row, 0, sizes_.v_bytes);
      if (!exists) continue;
      for (int64_t n = 0; n < rows.count; ++n) {
        const bool is_seen = weights_.sees(rows.at[step.h * rows.count + n], block, j);
        put_weight(is_seen ? NAN : 0.0f, weights_of(step.h, n, j, b) + j % TILE_KEYS);
      }
    }
  }

  const Attention& a_;
  const DecodeSizes& sizes_;
  const DecodeWeights& weights_;
  const int64_t depth_, v_depth_;  // tiles of a row
};

}  // namespace tilewise
