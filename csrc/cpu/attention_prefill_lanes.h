// A strip of prefill attention on AMX tiles, with its scores turned: a line of 16 floats has one key's
// scores with 16 queries, so a query is a lane.
//
// Maxima, sums and factors are vectors then, no sum goes across lanes, and everything that a row
// carries along is done for 16 rows at once. Keys are A as they lie, and weights B: two keys' lines
// zipped are a row of it. The sums come out turned, 16 dimensions by 16 queries a tile, and are turned
// back once, at the end.
//
// A weight is 2^(score - reference), and any reference will do that keeps it in range, if sums and
// output have the same one. It is the maximum of the first keys that the query sees: only if later
// weights grow beyond LIMIT is it raised to what is the maximum by then, and sums and output are
// rescaled. So usually nothing looks for a maximum, and scores become weights STEP keys at a time,
// from a buffer so small that it stays in the first-level cache beside all that streams through it.
// The rule is one for each lane: a query's bits do not depend on its neighbours'.
//
// Source of the rescaling that is left out: FlashAttention-4 (Dao et al., 2025).
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/attention_engine_amx.h"
#include "cpu/attention_prefill_softmax.h"
#include "cpu/attention_prefill_strip.h"
#include "cpu/bf16_rows.h"
#include "cpu/workspace.h"

namespace tilewise {

// Of a query's weights of STEP keys together. Far from overflow, whatever the values are.
constexpr float LIMIT = 65536.0f;

// 2^x with a relative error below 1.5e-7: a minimax polynomial for the fraction above the floor, which
// is 1 at 0 (its own error is 8e-8; what remains is rounding). The scaling floors by itself.
inline F32 lane_exp2(F32 x) {
  const F32 r = fraction(x);
  F32 p = F32::all(1.867141691e-3f);
  p = fma(p, r, F32::all(9.017005563e-3f));
  p = fma(p, r, F32::all(5.579993129e-2f));
  p = fma(p, r, F32::all(2.401644439e-1f));
  p = fma(p, r, F32::all(6.931512952e-1f));
  p = fma(p, r, F32::all(1.0f));
  return _mm512_scalef_ps(p.v, x.v);
}

// Turns lines of scores into rows of a tile of weights; returns the sums. `lines` is a multiple of 4.
// With every four of them goes a prefetch of `each` elements more of what products read next: the load
// ports are idle here.
inline F32 lane_weights(const float* s, int lines, F32 factor, F32 reference, BFloat16* weights,
                        const BFloat16* next, int64_t each) {
  constexpr int W = F32::WIDTH;
  const F32 minus = F32::zero() - reference;
  F32 sums[4] = {F32::zero(), F32::zero(), F32::zero(), F32::zero()};
  for (int j = 0; j < lines; j += 4) {
    for (int64_t i = 0; i < each; i += TILE_DEPTH) _mm_prefetch(next + i, _MM_HINT_T0);
    next += each;
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
      const F32 p = lane_exp2(fma(load(s + (j + i) * W), factor, minus));
      const F32 q = lane_exp2(fma(load(s + (j + i + 1) * W), factor, minus));
      sums[i] = sums[i] + p;
      sums[i + 1] = sums[i + 1] + q;
      store_zipped_half_up(p, q, weights + (j + i) * W);
    }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

inline F32 lane_maxima(const float* s, int lines) {
  constexpr int W = F32::WIDTH;
  const F32 none = F32::all(-INFINITY);
  F32 maxima[4] = {none, none, none, none};
  for (int j = 0; j < lines; j += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) maxima[i] = max(maxima[i], load(s + (j + i) * W));
  }
  return max(max(maxima[0], maxima[1]), max(maxima[2], maxima[3]));
}

template <class Engine>
class LaneStrips {
 public:
  using Element = BFloat16;

  LaneStrips(const Attention& a, const ScoreOptions& options, const Engine& engine)
      : a_(a),
        options_(options),
        engine_(engine),
        depth_(tile_depth_of(a.dim)),
        columns_(tile_columns_of(a.v_dim)),
        scores_(make_workspace<float>(STEP * Engine::ROW_STRIP)),
        weights_(make_workspace<Element>(KEYS * Engine::ROW_STRIP)),
        rows_(make_workspace<float>(TILE_WIDTH * ROW_STRIDE)),
        bias_(make_workspace<float>(KEYS)) {
    std::fill_n(bias_.get(), KEYS, 0.0f);
  }

  void attend(const Unit& unit, const Strip<Element>& x) const {
    const Span whole = unit.visible_to_all(a_, x.first_row, x.end_row);
    int pending = x.begin;  // weights from here on are not in the sums yet
    const auto accumulate = [&](int end) {
      engine_.accumulate(weights_.get(), x.rows(), x.values, pending, end, x.out);
      pending = end;
    };
    for (int begin = x.begin, end; begin < x.end; begin = end) {
      end = std::min(begin / STEP * STEP + STEP, x.end);  // steps are the same for all strips
      engine_.scores(x.queries, x.rows(), x.keys, begin, end, scores_.get());
      const Element* next = end < x.end ? x.keys + end * depth_ * TILE_DEPTH : x.values;
      for (int64_t i = 0; i < x.rows(); i += TILE_WIDTH) {
        float* s = scores_.get() + i * STEP;
        if (!options_.plain() || x.flags) {
          change_by_rows(unit, x, i, begin, end, s);
        } else if (whole.first > x.first_key + begin || whole.end < x.first_key + end) {
          hide(unit, x, i, begin, end, s);
        }
        softmax(x, i, begin, end, s, next + i * (end - begin) / Engine::ROW_STRIP * depth_ * TILE_DEPTH,
                accumulate);
      }
    }
    accumulate(x.end);
  }

  // Turns the sums of `count` rows back.
  void finish(float* out, int64_t count) const {
    for (int64_t i = 0; i < tile_columns_of(count) * columns_; ++i) {
      turn(out + i * TILE_SUMS, TILE_WIDTH, out + i * TILE_SUMS, TILE_WIDTH);
    }
  }

  // Where a row of the sums starts once it is finished, and floats from one 16 of them to the next.
  static const float* out_row(const float* out, int64_t i, int64_t v_dim) {
    return out + (i / TILE_WIDTH * tile_columns_of(v_dim) * TILE_HEIGHT + i % TILE_WIDTH) * TILE_WIDTH;
  }
  static constexpr int64_t OUT_STEP = TILE_SUMS;

 private:
  static constexpr int KEYS = Engine::KEY_BLOCK, STEP = Engine::SCORE_STEP;
  static constexpr int64_t ROW_STRIDE = KEYS + 16;  // not a power of two: sets of the cache

  // 16 x 16 floats.
  static void turn(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    F32 block[TILE_WIDTH];
    for (int i = 0; i < TILE_WIDTH; ++i) block[i] = load(from + i * from_stride);
    transpose(block);
    for (int i = 0; i < TILE_WIDTH; ++i) store(to + i * to_stride, block[i]);
  }

  static int64_t count_at(const Strip<Element>& x, int64_t i) {
    return std::min<int64_t>(TILE_WIDTH, x.rows() - i);
  }

  // Turns 16 queries' scores with keys [begin, end) into weights, and prefetches their share of as many
  // packed keys, from `next` on. `accumulate` adds the weights before `begin` to the sums.
  template <class Accumulate>
  void softmax(const Strip<Element>& x, int64_t i, int begin, int end, const float* s,
               const Element* next, const Accumulate& accumulate) const {
    constexpr int64_t TOGETHER = Engine::ROW_STRIP / TILE_WIDTH;
    const int64_t each = 4 * depth_ * TILE_DEPTH / TOGETHER;
    const int lines = end - begin;
    const F32 factor = F32::all(options_.factor()), none = F32::all(-INFINITY);
    Element* weights = weights_.get() + i * KEYS + begin * TILE_WIDTH;
    const RowStates states = x.states.from(i);
    const F32 before = load(states.max);
    F32 sum = load(states.sum), added = F32::all(INFINITY);
    if (any_less(none, before)) {
      added = lane_weights(s, lines, factor, finite_or_zero(before), weights, next, each);
      added = select_equal(before, none, F32::all(INFINITY), added);
    }
    if (!all_less(added, F32::all(LIMIT))) {
      accumulate(begin);
      const F32 maxima = max(before, lane_maxima(s, lines) * factor);
      const F32 reference = select_less(added, F32::all(LIMIT), before, maxima);
      const F32 rescale = exp2(before - finite_or_zero(reference));
      float* out = x.out + i * columns_ * TILE_WIDTH;
      for (int64_t n = 0; n < columns_ * TILE_SUMS; n += F32::WIDTH) {
        store(out + n, load(out + n) * rescale);
      }
      sum = sum * rescale;
      store(states.max, reference);
      added = lane_weights(s, lines, factor, finite_or_zero(reference), weights, next, each);
    }
    store(states.sum, sum + added);
  }

  // A query that has seen nothing yet has the reference -inf, and -inf - -inf must not be computed.
  static F32 finite_or_zero(F32 reference) {
    return select_equal(reference, F32::all(-INFINITY), F32::zero(), reference);
  }

  // Hides what causality and window hide of 16 queries' scores.
  void hide(const Unit& unit, const Strip<Element>& x, int64_t i, int begin, int end,
            float* s) const {
    alignas(ALIGNMENT) float lows[TILE_WIDTH], highs[TILE_WIDTH];
    const int64_t row = x.first_row + i;
    int64_t query = unit.query(row), place = row % unit.group;  // counted on: divisions are slow
    for (int lane = 0; lane < TILE_WIDTH; ++lane) {
      const Span seen = visible_keys(a_, unit.s, query);
      if (++place == unit.group) place = 0, ++query;
      lows[lane] = static_cast<float>(clamp(seen.first - x.first_key - begin, 0, KEYS));
      highs[lane] = static_cast<float>(clamp(seen.end - x.first_key - begin, 0, KEYS));
    }
    const F32 low = load(lows), high = load(highs), hidden = F32::all(-INFINITY);
    for (int j = 0; j < end - begin; ++j) {
      float* line = s + j * TILE_WIDTH;
      const F32 key = F32::all(static_cast<float>(j));
      store(line, select_less(key, low, hidden, select_less(key, high, load(line), hidden)));
    }
  }

  // Options and flags change rows: the scores of 16 queries are turned for it, and back.
  void change_by_rows(const Unit& unit, const Strip<Element>& x, int64_t i, int begin, int end,
                      float* s) const {
    for (int j = begin; j < end; j += TILE_HEIGHT) {
      turn(s + (j - begin) * TILE_WIDTH, TILE_WIDTH, rows_.get() + j, ROW_STRIDE);
    }
    for (int64_t r = 0; r < count_at(x, i); ++r) {
      RowBlock row = row_block(a_, unit, x, i + r, KEYS);
      row.low = std::clamp(row.low, begin, end);
      row.high = std::clamp(row.high, begin, end);
      float* scores = rows_.get() + r * ROW_STRIDE;
      change_scores(options_, unit, row, scores, bias_.get(), x.states.flags[i + r]);
      std::fill(scores + begin, scores + row.low, -INFINITY);
      std::fill(scores + row.high, scores + end, -INFINITY);
    }
    for (int j = begin; j < end; j += TILE_HEIGHT) {
      turn(rows_.get() + j, ROW_STRIDE, s + (j - begin) * TILE_WIDTH, TILE_WIDTH);
    }
  }

  const Attention& a_;
  const ScoreOptions& options_;
  const Engine& engine_;
  int64_t depth_, columns_;
  Workspace<float> scores_;      // STEP lines of 16 queries, then of the next 16
  Workspace<Element> weights_;
  Workspace<float> rows_, bias_;
};

}  // namespace tilewise
