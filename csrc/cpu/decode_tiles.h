// The inner loops of decode attention on AMX tiles, for a bfloat16 cache: sixteen keys or values of one
// head are a tile as they lie in memory, and nothing is converted, turned or interleaved.
//
//   Scores: tile A is 16 keys by 32 elements, B the queries, a column each, whose pairs of elements lie
//   one below the other. C is 16 keys by up to 16 query rows.
//
//   Values: tile B is 16 values by 32 elements, which the unit takes for 16 columns of pairs. What it
//   multiplies a pair with is of one key too, so a query row is two rows of A: (weight, 0) for every key,
//   which sums the even elements, and (0, weight) for the odd ones. C is up to 8 query rows by 32 elements.
//
// Every number of C is a sum of its own over ascending keys or elements, a tile's at a time: how
// many rows are taken together, or how many keys, never changes a bit.
#pragma once

#include <array>
#include <utility>

#include "cpu/decode_pairs.h"
#include "cpu/tiles.h"

namespace tilewise {

constexpr int64_t TILE_KEYS = TILE_HEIGHT;
constexpr int64_t TILE_ROW = TILE_BYTES / sizeof(BFloat16);  // elements
constexpr int64_t SCORE_QUERIES = 16;                        // query rows of a tile of scores
constexpr int64_t SUM_QUERIES = 8;                           // and of sums

// Columns of the tiles of queries and scores, for `count` query rows, and rows of those of weights and
// sums: the fewer there are, the less is read and written.
inline int64_t score_columns(int64_t count) {
  return std::min<int64_t>(round_up(count, 4), SCORE_QUERIES);
}
inline int64_t value_rows(int64_t count) { return 2 * std::min(count, SUM_QUERIES); }

// Tiles 0 to 3 are scores, 4 and 5 keys, 6 queries,
inline TileShapes score_shapes(int64_t columns) {
  TileShapes shapes;
  for (int t : {0, 1, 2, 3, 6}) shapes.row_bytes[t] = static_cast<uint16_t>(4 * columns);
  return shapes;
}
// and 0 to 3 sums, 4 weights, 5 and 6 values.
inline TileShapes value_shapes(int64_t rows) {
  TileShapes shapes;
  for (int t = 0; t < 5; ++t) shapes.rows[t] = static_cast<uint8_t>(rows);
  return shapes;
}

// Rows of a tile in memory.
struct TileRows {
  const char* at;
  int64_t stride;
};

template <class F, int... I>
inline void for_each_of(std::integer_sequence<int, I...>, const F& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
// f(0), ... f(N - 1), as types.
template <int N, class F>
__attribute__((always_inline)) inline void for_each(const F& f) {
  for_each_of(std::make_integer_sequence<int, N>{}, f);
}

// As much as a tile has.
__attribute__((always_inline)) inline void fetch_tile(Ahead& ahead) {
  if (ahead.exceed_row(TILE_SIZE)) {
    for (int i = 0; i < TILE_HEIGHT; ++i) ahead.fetch_line();
    return;
  }
  const char* far = ahead.at();
#pragma GCC unroll 16
  for (int i = 0; i < TILE_HEIGHT; ++i, far += Ahead::LINE) _mm_prefetch(far, _MM_HINT_T1);
  ahead.advance(far);
}

// Whether sixteen rows of a cache are equally far apart.
inline bool is_regular(CacheRows rows) {
  const auto at = [&](int64_t i) { return reinterpret_cast<intptr_t>(rows.at[i]); };
  const intptr_t step = at(1) - at(0);
  intptr_t differs = 0;
  for (int64_t i = 1; i < TILE_KEYS - 1; ++i) differs |= (at(i + 1) - at(i)) ^ step;
  return differs == 0;
}

// N tiles of scores; those of queries are behind each other.
template <int N>
void score_tiles(const TileRows* keys, int64_t depth, const float* queries, int64_t columns,
                 Ahead& ahead, float* scores) {
  const int64_t size = TILE_HEIGHT * columns;
  for_each<N>([](auto n) { tile_zero<n>(); });
  for (int64_t d = 0; d < depth; ++d) {
    tile_load<6>(queries + d * size, 4 * columns);
    for_each<N>([&](auto n) {
      tile_load<4 + n % 2>(keys[n].at + d * TILE_BYTES, keys[n].stride);
      tile_dot_bf16<n, 4 + n % 2, 6>();
      fetch_tile(ahead);
    });
  }
  for_each<N>([&](auto n) { tile_store<n>(scores + n * size, 4 * columns); });
}

// The sums of N tiles of values that are side by side from byte `offset` on; `adds` to what is there.
// Tiles of weights, one for 16 keys, are behind each other, and so are those of sums.
template <int N>
void accumulate_tiles(const TileRows* values, int64_t tiles, int64_t offset, const float* weights,
                      int64_t rows, Ahead& ahead, bool adds, float* sums) {
  const int64_t size = rows * (TILE_BYTES / 4);
  for_each<N>([&](auto n) {
    if (adds) {
      tile_load<n>(sums + n * size, TILE_BYTES);
    } else {
      tile_zero<n>();
    }
  });
  for (int64_t i = 0; i < tiles; ++i) {
    tile_load<4>(weights + i * size, TILE_BYTES);
    for_each<N>([&](auto n) {
      tile_load<5 + n % 2>(values[i].at + offset + n * TILE_BYTES, values[i].stride);
      tile_dot_bf16<n, 4, 5 + n % 2>();
      fetch_tile(ahead);
    });
  }
  for_each<N>([&](auto n) { tile_store<n>(sums + n * size, TILE_BYTES); });
}

// [n - 1] is for n tiles.
constexpr int64_t TILES_TOGETHER = 4;
constexpr std::array<decltype(&score_tiles<1>), TILES_TOGETHER> SCORE_TILES = {
    score_tiles<1>, score_tiles<2>, score_tiles<3>, score_tiles<4>};
constexpr std::array<decltype(&accumulate_tiles<1>), TILES_TOGETHER> ACCUMULATE_TILES = {
    accumulate_tiles<1>, accumulate_tiles<2>, accumulate_tiles<3>, accumulate_tiles<4>};

// A query row to a column of its tiles.
inline void put_query(const char* q, int64_t dim, int64_t columns, float* to) {
  for (int64_t i = 0; i < dim; i += 2, to += columns) std::memcpy(to, q + i * sizeof(BFloat16), 4);
}

// A tile of scores, a row for each of 16 keys, to one of each query row.
inline void turn_scores(const float* tile, int64_t columns, int64_t rows, float* scores,
                        int64_t stride) {
  for (int64_t r = 0; r < rows; r += 4) {
    I32 x[4];
    for (int k = 0; k < 4; ++k) {
      const float* p = tile + k * columns + r;
      x[k] = load_quarters(p, p + 4 * columns, p + 8 * columns, p + 12 * columns);
    }
    transpose_quarters(x);
    for (int64_t k = 0; k < std::min<int64_t>(rows - r, 4); ++k) {
      store_int(scores + (r + k) * stride, x[k]);
    }
  }
}

// Weights of keys [begin, end) to two rows of tiles A, `tile` floats apart; and that of one key.
inline void put_weights(const BFloat16* weights, int64_t begin, int64_t end, int64_t tile,
                        float* to) {
  for (int64_t j = begin; j < end; j += TILE_KEYS, to += tile) {
    const I32 x = _mm512_cvtepu16_epi32(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + j)));
    store_int(to, x);
    store_int(to + F32::WIDTH, x << 16);
  }
}
inline void put_weight(float weight, float* to) {
  const BFloat16Pair none{};
  BFloat16Pair even = none, odd = none;
  from_float(weight, &even.low);
  from_float(weight, &odd.high);
  std::memcpy(to, &even, 4);
  std::memcpy(to + F32::WIDTH, &odd, 4);
}

// The sums of even and then of odd elements, of every 32, in the order of the elements.
inline void collect_tiles(const float* sums, int64_t dim, float* out) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t i = 0; i < dim; i += TILE_ROW) {
    const F32 even = load(sums + i), odd = load(sums + i + F32::WIDTH);
    store(out + i, F32(_mm512_permutex2var_ps(even.v, low, odd.v)));
    store(out + i + F32::WIDTH, F32(_mm512_permutex2var_ps(even.v, high, odd.v)));
  }
}

}  // namespace tilewise
