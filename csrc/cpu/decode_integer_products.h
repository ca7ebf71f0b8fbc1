// The same as decode_products.h for the codes of an int8 or int4 cache, multiplied as integers: of a
// block, whose sums are then added to float32. No code is NaN, so nothing spreads.
#pragma once

#include "cpu/decode_buffers.h"
#include "cpu/decode_integers.h"
#include "cpu/decode_pairs.h"
#include "cpu/decode_weights.h"

#if defined(__AVX512BF16__)

namespace tilewise {

// For one type of cache; [r - 1] is for r query rows, the first of which transpose keys for the
// others.
struct IntegerLoops {
  decltype(&dot_transposing<int8_t, 1>) dot_transposing[ROWS];
  decltype(&accumulate_products<Codes, int8_t, 1>) accumulate[ROWS];
  decltype(&expand_digits<Half, int8_t>) expand_half, expand_bfloat16;
};

template <class KV>
constexpr IntegerLoops integer_loops() {
  return {{dot_transposing<KV, 1>, dot_transposing<KV, 2>, dot_transposing<KV, 3>,
           dot_transposing<KV, 4>},
          {accumulate_products<Codes, KV, 1>, accumulate_products<Codes, KV, 2>,
           accumulate_products<Codes, KV, 3>, accumulate_products<Codes, KV, 4>},
          expand_digits<Half, KV>,
          expand_digits<BFloat16, KV>};
}

class DecodeIntegerProducts {
 public:
  static int64_t near_bytes(const Attention&) { return NEAR_BYTES; }

  struct Buffers : DecodeBuffers {
    Buffers(float* memory, int64_t heads, int64_t count, const DecodeSizes& sizes)
        : DecodeBuffers(memory, heads * count, sizes),
          integers(reinterpret_cast<int32_t*>(others)),
          transposed(others + heads * count * sizes.v_size),
          factors(transposed + STEP / 4 * sizes.k_size),
          units(factors + heads * count) {
      std::fill(integers, integers + heads * count * sizes.v_size, 0);
    }

    static int64_t size(int64_t heads, int64_t count, const DecodeSizes& sizes) {
      const int64_t rows = heads * count;
      return DecodeBuffers::size(rows, sizes) + rows * (sizes.v_size + 2) + STEP / 4 * sizes.k_size;
    }

    int32_t* integers;                     // a block's sums of weights times codes
    float *transposed, *factors, *units;  // keys; of rows, what `out` and `integers` are worth
  };

  DecodeIntegerProducts(const Attention& a, const DecodeSizes& sizes, const DecodeWeights& weights)
      : a_(a),
        sizes_(sizes),
        weights_(weights),
        loops_(a.kv_dtype == DType::i8 ? integer_loops<int8_t>() : integer_loops<Int4>()) {}

  void take_query(const char* q, int64_t r, Buffers& b) const {
    const auto expand = a_.dtype == DType::f16 ? loops_.expand_half : loops_.expand_bfloat16;
    expand(q, a_.dim, row_of(b.queries, r, sizes_.k_size));
  }

  // b.scores = queries . keys
  void score(const Block& block, const TaskRows& rows, Buffers& b, bool) const {
    static constexpr decltype(&dot_transposed<1>) dot_others[ROWS] = {
        dot_transposed<1>, dot_transposed<2>, dot_transposed<3>, dot_transposed<4>};
    for_tiles(block, sizes_.tile, rows.heads, [&](int64_t j, int64_t end, int64_t h) {
      CacheRows keys = sizes_.keys(block, j, h);
      Ahead ahead = sizes_.after_keys(block, j, end, h, rows.heads);
      // Other rows take STEP keys while their transposed codes are near.
      const int64_t step = rows.count > ROWS ? STEP : end - j;
      for (; j < end; j += step, keys.at += step) {
        for (int64_t i = 0; i < rows.count; i += ROWS) {
          const int64_t r = h * rows.count + i, last = std::min<int64_t>(rows.count - i, ROWS) - 1;
          const char* queries = row_of(b.queries, r, sizes_.k_size);
          float* scores = b.scores + r * SCORE_STRIDE + j;
          if (i == 0) {
            loops_.dot_transposing[last](queries, sizes_.k_size * 4, keys, ahead, step, a_.dim,
                                         b.transposed, scores, SCORE_STRIDE);
          } else {
            dot_others[last](queries, sizes_.k_size * 4, a_.dim, b.transposed, scores,
                             SCORE_STRIDE);
          }
        }
      }
    });
  }

  // Row r's weights of a block have taken the place of its scores.
  void take_weights(const Block& block, int64_t r, float factor, Buffers& b) const {
    b.factors[r] = factor;
    b.units[r] = round_weights(b.scores + r * SCORE_STRIDE, static_cast<int>(block.first),
                               static_cast<int>(round_up(block.count, STEP)));
  }

  // b.out = b.out * factors + weights . values
  void accumulate(const Block& block, const Block& next, const TaskRows& rows, Buffers& b,
                  bool) const {
    for_tiles(block, sizes_.tile, rows.heads, [&](int64_t j, int64_t end, int64_t h) {
      const CacheRows values = sizes_.values(block, j, h);
      Ahead ahead = sizes_.after_values(block, j, end, next, h, rows.heads);
      for (int64_t i = 0; i < rows.count; i += ROWS, ahead = sizes_.nothing(values)) {
        const int64_t r = h * rows.count + i;
        loops_.accumulate[std::min<int64_t>(rows.count - i, ROWS) - 1](
            weights_.at(b.scores + r * SCORE_STRIDE, j), SCORE_STRIDE * 4, values, ahead, end - j,
            a_.v_dim, b.integers + r * sizes_.v_size, sizes_.v_size);
      }
    });
    for (int64_t r = 0; r < rows.all(); ++r) {
      add_sums(b.out + r * sizes_.v_size, b.integers + r * sizes_.v_size, sizes_.v_size,
               b.factors[r], b.units[r]);
    }
  }

  bool is_finite(int64_t, const Buffers&) const { return true; }

  // Row r of b.out in the order of the elements.
  void collect(int64_t r, const Buffers& b, float* out) const {
    collect_pairs(b.out + r * sizes_.v_size, sizes_.v_size, out);
  }

 private:
  const Attention& a_;
  const DecodeSizes& sizes_;
  const DecodeWeights& weights_;
  const IntegerLoops loops_;
};

}  // namespace tilewise

#endif
