// What a call of decode attention works with: the sizes of its rows, and the buffers of a task.
#pragma once

#include "cpu/decode_block.h"
#include "cpu/decode_plan.h"
#include "cpu/decode_rows.h"
#include "cpu/workspace.h"

namespace tilewise {

constexpr int64_t SCORE_STRIDE = BLOCK + STEP;
// A tile of keys, and the next one that is being fetched, are in the second-level cache, with room to
// spare for what else is there.
constexpr int64_t NEAR_BYTES = 64 * 1024;

static_assert(BLOCK % STEP == 0 && STEP % F32::WIDTH == 0, "nested");

struct DecodeSizes {
  int64_t runs;                        // of a row: two in an int4 cache
  int64_t k_size, v_size;              // of a row, padded
  int64_t k_bytes, v_bytes;            // of a row in the cache
  int64_t k_head_bytes, v_head_bytes;  // from one head's to the next
  int64_t heads;                       // that a task takes, or fewer
  int64_t scales;                      // of a block of a task, as DecodeWeights takes them
  int64_t tile;  // keys that every head takes before any goes on: BLOCK or a part of it

  DecodeSizes(const Attention& a, int64_t heads_per_task, int64_t near_bytes)
      : runs(a.kv_dtype == DType::i4 ? 2 : 1),
        k_size(runs * round_up(a.dim / runs, F32::WIDTH)),
        v_size(runs * round_up(a.v_dim / runs, F32::WIDTH)),
        k_bytes(a.dim * element_size(a.kv_dtype) / runs),
        v_bytes(a.v_dim * element_size(a.kv_dtype) / runs),
        k_head_bytes(a.k.head_stride * element_size(a.kv_dtype)),
        v_head_bytes(a.v.head_stride * element_size(a.kv_dtype)),
        heads(heads_per_task),
        scales(a.k.scale ? heads_per_task * 2 * BLOCK : 0),
        tile(BLOCK) {
    while (tile > STEP && tile * heads * std::max(k_bytes, v_bytes) > near_bytes) tile /= 2;
  }

  CacheRows keys(const Block& block, int64_t j, int64_t head) const {
    return {block.k + j, head * k_head_bytes};
  }
  CacheRows values(const Block& block, int64_t j, int64_t head) const {
    return {block.v + j, head * v_head_bytes};
  }
  // What to fetch while head `h` of `heads` takes keys or values [j, end): of the next tile, at last of
  // the values, and at their end of the next block.
  Ahead after_keys(const Block& block, int64_t j, int64_t end, int64_t h, int64_t heads) const {
    if (end < block.count) return share(block.k + end, end - j, h, heads, k_bytes, k_head_bytes);
    return share(block.v + block.first, end - j, h, heads, v_bytes, v_head_bytes);
  }
  Ahead after_values(const Block& block, int64_t j, int64_t end, const Block& next, int64_t h,
                     int64_t heads) const {
    if (end < block.count) return share(block.v + end, end - j, h, heads, v_bytes, v_head_bytes);
    if (next.count == 0) return nothing(values(block, j, h));
    return share(next.k + next.first, end - j, h, heads, k_bytes, k_head_bytes);
  }

  // Something that is near already.
  static Ahead nothing(CacheRows rows) { return {rows.at, rows.at, rows.offset, INT64_MAX, 0}; }

 private:
  // A head's share of as many rows of all heads, in the order in which they lie in memory: that is
  // a fifth faster than if each head asked for its own. Of few heads it is not, and costs more.
  static Ahead share(const void* const* rows, int64_t count, int64_t h, int64_t heads,
                     int64_t row_bytes, int64_t head_bytes) {
    const void* const* last = rows + count - 1;
    constexpr int64_t FEW = 4;
    if (head_bytes != row_bytes || heads < FEW) return {rows, last, h * head_bytes, row_bytes, 0};
    const int64_t span = heads * row_bytes, begin = h * count * row_bytes;
    return {rows + begin / span, last, 0, span, begin % span};
  }
};

// Of `rows` query rows, in memory that comes from the call: uninitialised. `others` is what is behind.
struct DecodeBuffers {
  DecodeBuffers(float* memory, int64_t rows, const DecodeSizes& sizes)
      : queries(memory),
        out(queries + rows * sizes.k_size),
        scores(out + rows * sizes.v_size),
        maxima(scores + rows * SCORE_STRIDE),
        sums(maxima + rows),
        scales(memory + size(rows, sizes) - sizes.scales),
        others(memory + size(rows, sizes)) {}

  static int64_t size(int64_t rows, const DecodeSizes& sizes) {
    return rows * (sizes.k_size + sizes.v_size + SCORE_STRIDE) + round_up(2 * rows, F32::WIDTH) +
           sizes.scales;
  }

  float *queries, *out, *scores, *maxima, *sums, *scales, *others;
};

// The rows of a task: `count` of each head.
struct TaskRows {
  const DecodeRow* at;
  int64_t heads, count;

  int64_t all() const { return heads * count; }
};

// Row r of float32 or narrower elements.
inline char* row_of(float* rows, int64_t r, int64_t size) {
  return reinterpret_cast<char*>(rows + r * size);
}

// Of some rows' output, and their sums of weights.
inline bool are_finite(const float* out, int64_t count, const float* sums, int64_t rows) {
  F32 zeros = F32::zero();
  for (int64_t i = 0; i < count; i += F32::WIDTH) zeros = fma(load(out + i), F32::zero(), zeros);
  float sum = reduce_add(zeros);
  for (int64_t r = 0; r < rows; ++r) sum += sums[r] * 0.0f;
  return sum == 0.0f;
}

// Calls f(j, end, h) for each head's keys [j, end) of a block, one tile of keys after the other.
template <class F>
inline void for_tiles(const Block& block, int64_t tile, int64_t heads, const F& f) {
  for (int64_t j = block.first; j < block.count; j += tile) {
    for (int64_t h = 0; h < heads; ++h) f(j, std::min(j + tile, block.count), h);
  }
}

}  // namespace tilewise
