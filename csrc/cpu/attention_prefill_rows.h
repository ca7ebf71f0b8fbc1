// A strip of prefill attention whose scores lie in memory as rows, a query's scores for the keys of a
// block side by side: for engines that multiply rows (see attention_engine.h).
#pragma once

#include <algorithm>

#include "cpu/attention_prefill_pack.h"
#include "cpu/attention_prefill_softmax.h"
#include "cpu/attention_prefill_strip.h"
#include "cpu/workspace.h"

namespace tilewise {

template <class Engine>
class RowStrips {
 public:
  using Element = typename Engine::Element;
  using Weight = typename Engine::Weight;

  RowStrips(const Attention& a, const ScoreOptions& options, const Engine& engine)
      : a_(a),
        options_(options),
        engine_(engine),
        out_stride_(Engine::out_stride(a.v_dim)),
        scores_(make_workspace<float>(Engine::ROW_STRIP * Engine::SCORE_STRIDE)),
        bias_(make_workspace<float>(Engine::KEY_BLOCK)) {
    std::fill_n(bias_.get(), Engine::KEY_BLOCK, 0.0f);
  }

  void attend(const Unit& unit, const Strip<Element>& x) const {
    engine_.scores(x.queries, x.rows(), x.keys, x.begin, x.end, scores_.get());
    for (int64_t i = 0; i < x.rows();) i += softmax(unit, x, i);
    engine_.accumulate(reinterpret_cast<const Weight*>(scores_.get()), x.rows(), x.values, x.begin,
                       x.end, x.out);
  }

  void finish(float*, int64_t) const {}

  // Where a row of the sums starts, and floats from one 16 of them to the next.
  static const float* out_row(const float* out, int64_t i, int64_t v_dim) {
    return out + i * Engine::out_stride(v_dim);
  }
  static constexpr int64_t OUT_STEP = 16;

 private:
  // Returns how many rows, from the i-th of the strip, it has done.
  int64_t softmax(const Unit& unit, const Strip<Element>& x, int64_t i) const {
    float* s = scores_.get() + i * Engine::SCORE_STRIDE;
    float* out = x.out + i * out_stride_;
#if defined(__AVX512F__)
    constexpr int TOGETHER = F32::WIDTH;
    if (options_.plain() && !x.flags && i + TOGETHER <= x.rows() && see_all(unit, x, i, TOGETHER) &&
        softmax_rows<Weight>(s, Engine::SCORE_STRIDE, x.begin, x.end, options_.factor(),
                             x.states.from(i), out, out_stride_, out_stride_)) {
      return TOGETHER;
    }
#endif
    const RowBlock row = row_block(a_, unit, x, i, Engine::KEY_BLOCK);
    change_scores(options_, unit, row, s, bias_.get(), x.states.flags[i]);
    softmax_row<Weight>(s, row, options_.factor(), x.states.from(i), out, out_stride_);
    return 1;
  }

  bool see_all(const Unit& unit, const Strip<Element>& x, int64_t i, int64_t count) const {
    const int64_t row = x.first_row + i;
    const Span keys = unit.visible_to_all(a_, row, row + count);
    return keys.first <= x.first_key + x.begin && keys.end >= x.first_key + x.end;
  }

  const Attention& a_;
  const ScoreOptions& options_;
  const Engine& engine_;
  int64_t out_stride_;
  Workspace<float> scores_, bias_;
};

}  // namespace tilewise
