#pragma once

#include "params.h"

namespace tilewise {

// One value per row; a stride of 0 gives all rows the same.
template <class T>
struct PerRow {
  const T* data;
  int64_t stride;
  T operator[](int64_t row) const { return data[row * stride]; }
};

struct Sampling {
  DType dtype;
  int64_t batch, vocabulary;
  const void* logits;  // (batch, vocabulary)
  int64_t stride;
  PerRow<float> temperature, top_p, min_p, repetition_penalty;
  PerRow<int64_t> top_k;
  const int64_t* previous_tokens;  // (batch, previous) or null
  int64_t previous, previous_stride;
  int64_t seed;
  PerRow<int64_t> sample_ids;  // or null: the number of the row
  PerRow<int64_t> positions;   // or null: 0
  int64_t* tokens;             // (batch,)
};

void sample(const Sampling& sampling);

// Which tokens of a row may be drawn: those with a score above `least`, and of those that have just
// that score the ones up to token `last_equal`.
struct Kept {
  float least;
  int64_t last_equal;
  bool has(float score, int64_t token) const {
    return score > least || (score == least && token <= last_equal);
  }
};

// Top-k (if top_k > 0), then top-p (if top_p < 1), of scores that are at most 0, one of them 0.
// False if nothing stays.
bool keep_top(const float* scores, int64_t vocabulary, int64_t top_k, float top_p, Kept* kept);

}  // namespace tilewise
