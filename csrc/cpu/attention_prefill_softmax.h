// The online softmax of prefill attention: one row of scores against one block of keys.
//
// A row carries its maximum and its sum along from block to block, and rescales what it has summed
// up when the maximum moves (Milakov and Gimelshein, 2018, arXiv:1805.02867). Everything is in base
// 2: score * factor, with log2(e) in the factor, is the exponent. A score with no options on it
// stays as the product gave it, and its scale is in the factor as well.
//
// Whatever is done to a row depends on the row's own keys and block only, not on the rows around
// it: its bits are the same however the queries are divided.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/attention.h"
#include "cpu/attention_prefill_pack.h"
#include "cpu/attention_prefill_strip.h"
#include "cpu/simd.h"

namespace tilewise {

// One row's part in one block. Keys are numbered from the block's start.
struct RowBlock {
  int64_t query, head;
  int64_t first_key;       // of the block, in the sequence
  int low, high;           // the keys that causality and window leave: [low, high)
  int begin, end;          // the keys that have scores and need weights
  const uint8_t* flags;    // of the keys, or null if there are none
};

// The options that change single scores; the same for all rows of a call.
class ScoreOptions {
 public:
  explicit ScoreOptions(const Attention& a)
      : a_(a),
        // The maximum is taken before the factor is applied, which must not turn it round, nor
        // make hidden scores visible: 0 * -inf is NaN.
        plain_(!(a.softcap > 0) && !a.alibi_slopes && !a.bias && a.scale > 0) {}

  bool plain() const { return plain_; }
  float factor() const { return plain_ ? a_.scale * LOG2E : LOG2E; }

  // Scales, caps and biases the scores [low, high), in place. `bias` is room for a block's biases,
  // and holds them afterwards. Scores next to the range may change too.
  void apply(float* s, float* bias, const Sequence& sequence, const RowBlock& row) const {
    constexpr int W = F32::WIDTH;
    if (a_.bias) read_bias(bias, sequence, row);
    const F32 scale = F32::all(a_.scale), hidden = F32::all(-INFINITY);
    const F32 cap = F32::all(a_.softcap), per_cap = F32::all(1.0f / a_.softcap);
    const F32 slope = F32::all(
        a_.alibi_slopes ? a_.alibi_slopes[sequence.index * a_.alibi_batch_stride + row.head] : 0);
    const int64_t distance = sequence.position(row.query) - row.first_key;
    for (int j = row.low / W * W; j < row.high; j += W) {
      F32 x = load(s + j) * scale;
      if (a_.softcap > 0) x = cap * tanh(x * per_cap);
      if (a_.alibi_slopes) {
        x = x - slope * abs(F32::all(static_cast<float>(distance - j)) - lanes());
      }
      if (a_.bias) {
        const F32 b = load(bias + j);
        x = select_equal(b, hidden, hidden, x + b);  // whatever x is
      }
      store(s + j, x);
    }
  }

  bool hides(const float* bias, int j) const { return a_.bias && bias[j] == -INFINITY; }

 private:
  // A mask becomes a bias of 0 and -inf.
  void read_bias(float* bias, const Sequence& s, const RowBlock& row) const {
    const int64_t* stride = a_.bias_stride;
    const int64_t offset = s.index * stride[0] + row.head * stride[1] +
                           (s.q_begin + row.query) * stride[2] + row.first_key * stride[3];
    if (a_.bias_is_mask) {
      const uint8_t* from = static_cast<const uint8_t*>(a_.bias) + offset;
      for (int j = row.low; j < row.high; ++j) bias[j] = from[j * stride[3]] ? 0.0f : -INFINITY;
    } else {
      const float* from = static_cast<const float*>(a_.bias) + offset;
      for (int j = row.low; j < row.high; ++j) bias[j] = from[j * stride[3]];
    }
  }

  const Attention& a_;
  bool plain_;
};

// Hides missing keys and notes bad ones that the row sees. For blocks that have any.
inline void apply_flags(const ScoreOptions& options, float* s, const float* bias,
                        const RowBlock& row, uint8_t& seen) {
  for (int j = row.low; j < row.high; ++j) {
    if (row.flags[j] & MISSING) {
      s[j] = -INFINITY;
    } else if (row.flags[j] && !options.hides(bias, j)) {
      seen |= row.flags[j];
    }
  }
}

// The i-th row of a strip, against a block of `block` keys.
template <class Element>
inline RowBlock row_block(const Attention& a, const Unit& unit, const Strip<Element>& x, int64_t i,
                          int block) {
  const int64_t row = x.first_row + i;
  const Span span = unit.visible(a, row);
  return {unit.query(row),
          unit.head(row),
          x.first_key,
          static_cast<int>(clamp(span.first - x.first_key, 0, block)),
          static_cast<int>(clamp(span.end - x.first_key, 0, block)),
          x.begin,
          x.end,
          x.flags};
}

// Applies options and flags to a row's scores [low, high), in place. Notes the flags of what it sees.
inline void change_scores(const ScoreOptions& options, const Unit& unit, const RowBlock& row, float* s,
                          float* bias, uint8_t& seen) {
  if (!options.plain()) options.apply(s, bias, unit.s, row);
  if (row.flags) apply_flags(options, s, bias, row, seen);
}

inline void scale_row(float* x, int64_t n, float factor) {  // n is a multiple of the width
  const F32 f = F32::all(factor);
  for (int64_t i = 0; i < n; i += F32::WIDTH) store(x + i, load(x + i) * f);
}

inline float exp2(float x) {
  float result[F32::WIDTH];
  store(result, exp2(F32::all(x)));
  return result[0];
}

template <class T>
inline void clear(T* x, int begin, int end) {
  if (begin < end) std::memset(static_cast<void*>(x + begin), 0, (end - begin) * sizeof(T));
}

// The maxima of a row's vectors of scores from `first` as far as the one at `last`.
inline F32 row_maxima(const float* s, int first, int last) {
  constexpr int W = F32::WIDTH;
  const F32 none = F32::all(-INFINITY);
  F32 maxima[4] = {none, none, none, none};
  int j = first;
  for (; j + 3 * W <= last; j += 4 * W) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) maxima[i] = max(maxima[i], load(s + j + i * W));
  }
  for (; j <= last; j += W) maxima[0] = max(maxima[0], load(s + j));
  return max(max(maxima[0], maxima[1]), max(maxima[2], maxima[3]));
}

// Turns the same scores into weights, in place, and sums them up lane by lane.
template <class Weight>
inline F32 row_weights(float* s, int first, int last, F32 factor, F32 minus_max) {
  constexpr int W = F32::WIDTH;
  Weight* weights = reinterpret_cast<Weight*>(s);  // behind the scores still to be read
  F32 sums[4] = {F32::zero(), F32::zero(), F32::zero(), F32::zero()};
  int j = first;
  for (; j + 3 * W <= last; j += 4 * W) {
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
      const F32 p = exp2_unclamped(fma(load(s + j + i * W), factor, minus_max));
      const F32 q = exp2_unclamped(fma(load(s + j + i * W + W), factor, minus_max));
      sums[i] = sums[i] + p;
      sums[i + 1] = sums[i + 1] + q;
      store_pair(weights + j + i * W, p, q);
    }
  }
  for (; j <= last; j += W) {
    const F32 p = exp2_unclamped(fma(load(s + j), factor, minus_max));
    sums[0] = sums[0] + p;
    store(weights + j, p);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Turns the scores [low, high) of a row into weights, in place, and those of the rest of
// [begin, end) into 0; rescales `out`, what the row has summed up so far. `begin` and `end` are
// multiples of the vector width.
template <class Weight>
inline void softmax_row(float* s, const RowBlock& row, float factor, const RowStates& state,
                        float* out, int64_t out_width) {
  constexpr int W = F32::WIDTH;
  Weight* weights = reinterpret_cast<Weight*>(s);  // behind the scores still to be read
  if (row.low >= row.high) return clear(weights, row.begin, row.end);

  const int first = row.low / W * W, last = (row.high - 1) / W * W;
  const F32 hidden = F32::all(-INFINITY);
  store(s + first, select_below(row.low - first, hidden, load(s + first)));
  store(s + last, select_below(row.high - last, load(s + last), hidden));

  const float block_max = reduce_max(row_maxima(s, first, last)) * factor;
  if (block_max > *state.max) {
    const float rescale = exp2(*state.max - block_max);
    *state.max = block_max;
    *state.sum *= rescale;
    scale_row(out, out_width, rescale);
  }
  // Nothing visible so far: -inf - -inf must not be computed.
  if (*state.max == -INFINITY) return clear(weights, row.begin, row.end);

  *state.sum += reduce_add_as_each(
      row_weights<Weight>(s, first, last, F32::all(factor), F32::all(-*state.max)));
  clear(weights, row.begin, first);
  clear(weights, last + W, row.end);
}

#if defined(__AVX512F__)

// The same, bit for bit, for a vector's width of rows that see all of [begin, end): what there is to do
// once a row is done for all of them at once, and no row waits for its own maximum. Returns false, with
// nothing changed, if the maximum of some row is not a number above -inf.
template <class Weight>
inline bool softmax_rows(float* s, int64_t stride, int begin, int end, float factor,
                         const RowStates& states, float* out, int64_t out_stride,
                         int64_t out_width) {
  constexpr int W = F32::WIDTH;
  const int last = end - W;
  F32 of_rows[W];
  for (int r = 0; r < W; ++r) of_rows[r] = row_maxima(s + r * stride, begin, last);
  const F32 block_max = reduce_each(of_rows, [](F32 x, F32 y) { return max(x, y); }) * F32::all(factor);
  alignas(ALIGNMENT) float maxima[W], rescales[W], sums[W];
  store(maxima, block_max);
  if (!std::all_of(maxima, maxima + W, [](float x) { return x > -INFINITY; })) return false;
  store(rescales, exp2(load(states.max) - block_max));
  for (int r = 0; r < W; ++r) {
    if (maxima[r] > states.max[r]) {
      states.max[r] = maxima[r];
      states.sum[r] *= rescales[r];
      scale_row(out + r * out_stride, out_width, rescales[r]);
    }
    of_rows[r] = row_weights<Weight>(s + r * stride, begin, last, F32::all(factor),
                                     F32::all(-states.max[r]));
  }
  store(sums, reduce_each(of_rows));
  for (int r = 0; r < W; ++r) states.sum[r] += sums[r];
  return true;
}

#endif

}  // namespace tilewise
