// The softmax of decode attention: from the products of a block to the weights of its values.
#pragma once

#include <cfloat>
#include <cmath>

#include "cpu/attention.h"
#include "cpu/decode_block.h"
#include "cpu/decode_loops.h"
#include "cpu/decode_plan.h"
#include "cpu/simd.h"

namespace tilewise {

class DecodeWeights {
 public:
  // Scales of one head's keys and values in a block; behind its end zero, up to a multiple of STEP.
  struct Scales {
    float k[BLOCK], v[BLOCK];
  };

  explicit DecodeWeights(const Attention& a)
      : a_(a), arithmetic_(arithmetic_of(a)), element_size_(arithmetic_ == Arithmetic::floats ? 4 : 2) {}

  // Weights take the place of scores, and need not be as wide.
  const void* at(const float* scores, int64_t j) const {
    return reinterpret_cast<const char*>(scores) + j * element_size_;
  }

  void set(float* scores, int64_t j, float weight) const {
    if (arithmetic_ == Arithmetic::pairs) {
      from_float(weight, reinterpret_cast<BFloat16*>(scores) + j);
    } else {
      scores[j] = weight;
    }
  }

  bool sees(const DecodeRow& row, const Block& block, int64_t j) const {
    const int64_t key = block.begin + j;
    return key >= row.span.first && key < row.span.end &&
           !(block.any_missing && block.is_missing[j]) &&
           !(a_.bias && bias_at(row, key) == -INFINITY);
  }

  // Those of all heads. Where a key's lie side by side, as in a cache of ours, they are loaded together
  // and turned, 16 keys at a time.
  void take_scales(const Block& block, int64_t heads, Scales* scales) const {
    if (!a_.k.scale) return;
    const int64_t end = round_up(block.count, STEP);
    int64_t h = 0;
#if defined(__AVX512F__)
    const bool are_neighbours = a_.k.scale_head_stride == 1 && a_.v.scale_head_stride == 1;
    constexpr int64_t HALF = F32::WIDTH / 2, LEAST = 3;  // heads; fewer are faster one by one
    for (; are_neighbours && h + LEAST <= heads; h += HALF) {
      const int n = static_cast<int>(std::min(heads - h, HALF));
      for (int64_t j = block.first; j < end; j += F32::WIDTH) {
        F32 rows[F32::WIDTH];
        for (int i = 0; i < F32::WIDTH; ++i) {
          rows[i] = j + i < block.count
                        ? load_halves(block.k_scale[j + i] + h, block.v_scale[j + i] + h, n)
                        : F32::zero();
        }
        transpose(rows);
        for (int i = 0; i < n; ++i) {
          store(scales[h + i].k + j, rows[i]);
          store(scales[h + i].v + j, rows[HALF + i]);
        }
      }
    }
#endif
    for (; h < heads; ++h) {
      for (int64_t j = block.first; j < block.count; ++j) {
        scales[h].k[j] = block.k_scale_of(a_, j, h);
        scales[h].v[j] = block.v_scale_of(a_, j, h);
      }
      std::fill(scales[h].k + block.count, scales[h].k + end, 0.0f);
      std::fill(scales[h].v + block.count, scales[h].v + end, 0.0f);
    }
  }

  // From products to weights exp(score - maximum), in place, bringing the row's maximum and sum up to
  // date. Returns what the row's output so far is to be multiplied by. For products of integers the
  // weights are still float32, but none is NaN because of a value that is not seen.
  float weigh(const Block& block, const DecodeRow& row, const Scales& scales, float* scores,
              float& row_maximum, float& row_sum) const {
    constexpr int W = F32::WIDTH;
    const int begin = static_cast<int>(block.first);
    const int end = static_cast<int>(round_up(block.count, STEP));
    const int first = static_cast<int>(clamp(row.span.first - block.begin, begin, end));
    const int last = static_cast<int>(clamp(row.span.end - block.begin, begin, block.count));
    if (first >= last) {
      for (int j = begin; j < end; j += W) store_weights(arithmetic_, scores, j, F32::zero());
      return 1.0f;
    }
    alignas(64) float bias[BLOCK];
    const bool has_bias = a_.bias || block.any_missing;
    if (has_bias) {
      std::fill(bias + begin, bias + end, 0.0f);
      for (int j = first; j < last; ++j) {
        const bool exists = !block.any_missing || !block.is_missing[j];
        bias[j] = !exists ? -INFINITY : a_.bias ? bias_at(row, block.begin + j) : 0.0f;
      }
    }
    const Sequence& s = row.request->sequence;
    const bool has_alibi = a_.alibi_slopes;
    const F32 slope = F32::all(
        has_alibi ? a_.alibi_slopes[s.index * a_.alibi_batch_stride + row.head] : 0.0f);
    const float distance = static_cast<float>(s.position(row.query) - block.begin);
    const F32 scale = F32::all(a_.scale), softcap = F32::all(a_.softcap);
    const bool has_softcap = a_.softcap > 0, has_scales = a_.k.scale;

    F32 maximum = F32::all(-INFINITY);
    for (int j = begin; j < end; j += W) {
      F32 x = load(scores + j) * scale;
      if (has_scales) x = x * load(scales.k + j);
      // Infinity here comes from a query or a key that is not finite, which means NaN.
      x = fma(x, F32::zero(), x);
      if (has_softcap) x = softcap * tanh(x / softcap);
      if (has_alibi) x = x - slope * abs(F32::all(distance - static_cast<float>(j)) - lanes());
      if (has_bias) {
        const F32 y = load(bias + j);
        x = select_less(y, F32::all(-FLT_MAX), F32::all(-INFINITY), x + y);
      }
      if (j < first) x = select_below(first - j, F32::all(-INFINITY), x);
      if (j + W > last) x = select_below(last - j, x, F32::all(-INFINITY));
      store(scores + j, x);
      maximum = max(x, maximum);  // passes over NaN, which the sum will not
    }
    const float old_maximum = row_maximum;
    const float new_maximum = std::max(old_maximum, reduce_max(maximum));
    const F32 shift = F32::all(new_maximum == -INFINITY ? 0.0f : new_maximum);
    F32 sum = F32::zero();
    const Arithmetic arithmetic = arithmetic_;
    for (int j = begin; j < end; j += W) {
      const F32 score = load(scores + j);
      F32 weight = exp2_unclamped((score - shift) * F32::all(LOG2E));
      sum = sum + weight;
      if (has_scales) weight = weight * load(scales.v + j);
      if (arithmetic == Arithmetic::integers) {
        weight = select_equal(score, F32::all(-INFINITY), F32::zero(), weight);
      }
      store_weights(arithmetic, scores, j, weight);
    }
    float factor = 1.0f;
    if (new_maximum != old_maximum) {
      factor = exp2_of((old_maximum - new_maximum) * LOG2E);
      row_maximum = new_maximum;
      row_sum *= factor;
    }
    row_sum += reduce_add(sum);
    return factor;
  }

 private:
  // The bias of a row's key 0 on.
  template <class T>
  const T* bias_of(const DecodeRow& row) const {
    const Sequence& s = row.request->sequence;
    return static_cast<const T*>(a_.bias) + s.index * a_.bias_stride[0] +
           row.head * a_.bias_stride[1] + (s.q_begin + row.query) * a_.bias_stride[2];
  }

  float bias_at(const DecodeRow& row, int64_t key) const {
    const int64_t at = key * a_.bias_stride[3];
    if (a_.bias_is_mask) return bias_of<uint8_t>(row)[at] ? 0.0f : -INFINITY;
    return bias_of<float>(row)[at];
  }

  // Never reaches a score that has not been read: a weight is no wider.
  static void store_weights(Arithmetic arithmetic, float* scores, int64_t j, F32 weights) {
    if (arithmetic == Arithmetic::pairs) {
      store_flushed(reinterpret_cast<BFloat16*>(scores) + j, weights);
    } else {
      store(scores + j, weights);
    }
  }

  static float exp2_of(float x) {
    float lanes[F32::WIDTH];
    store(lanes, exp2(F32::all(x)));
    return lanes[0];
  }

  const Attention& a_;
  const Arithmetic arithmetic_;
  const int64_t element_size_;
};

}  // namespace tilewise
