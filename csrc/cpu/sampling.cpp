// Sampling: temperature, filters and the Gumbel-max draw, equal to the definition bit for bit.
//
// The draw wants the largest score + noise, and the noise is two logarithms. Almost all of them
// are never computed: noise above y has a probability of at most e^-y, so that score + noise can
// pass the best so far only if 1 - u <= e^(score - best), where u is the uniform number that the
// noise is made of. To test that takes one exponential; about log(vocabulary) tokens of a row pass.
//
// Scores here are the definition's: logits, penalised and divided, less the largest.
#include "cpu/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "cpu/parallel.h"
#include "cpu/philox.h"
#include "cpu/rows.h"

namespace tilewise {
namespace {

constexpr int W = F32::WIDTH;
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float LARGEST = std::numeric_limits<float>::max();

// NaN as -inf and inf as the largest number: min and max return their second operand if one is NaN.
inline F32 tame(F32 x) { return min(max(x, F32::all(-INFINITE)), F32::all(LARGEST)); }
inline float tame(float x) { return std::isnan(x) ? -INFINITE : std::min(x, LARGEST); }

// --- the largest ---------------------------------------------------------------------------------

struct Largest {
  float value;
  int64_t token;  // the first that has it
};

// Blocks first, so that only one has to be searched for the token.
template <class T>
Largest largest_of(const T* logits, int64_t n) {
  constexpr int64_t BLOCK = 1024;
  Largest best{-INFINITE, 0};
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    F32 ways[WAYS];
    std::fill(ways, ways + WAYS, F32::all(-INFINITE));
    const int64_t size = std::min(BLOCK, n - begin);
    for_vectors(size, [&](int64_t i, auto part, int way) {
      const F32 x = part.load(logits + begin + i);
      ways[way] = max(part.or_beyond(tame(x), -INFINITE), ways[way]);
    });
    const float value = reduce_max(max(max(ways[0], ways[1]), max(ways[2], ways[3])));
    if (value > best.value) best = {value, begin};
  }
  while (best.token < n && tame(to_float(logits[best.token])) != best.value) ++best.token;
  return best;
}

// --- scores --------------------------------------------------------------------------------------

// The logits of the row over the temperature, penalised; the definition's operations in its order.
template <class T>
void write_logits(const Sampling& s, int64_t row, float divisor, float* scores) {
  const T* logits = static_cast<const T*>(s.logits) + row * s.stride;
  for_vectors(s.vocabulary, [&, by = F32::all(divisor)](int64_t i, auto part, int) {
    part.store(scores + i, tame(part.load(logits + i) / by));
  });
  if (!s.previous_tokens) return;
  const float penalty = s.repetition_penalty[row];
  const int64_t* previous = s.previous_tokens + row * s.previous_stride;
  for (int64_t i = 0; i < s.previous; ++i) {
    const int64_t token = previous[i];
    if (token < 0 || token >= s.vocabulary) continue;
    // From the logit, not from the score: a token counts once however often it came.
    const float logit = to_float(logits[token]);
    const float penalised = logit > 0.0f ? logit / penalty : logit * penalty;
    scores[token] = tame(penalised / divisor);
  }
}

// The least score of which the float32 exponential is not below min_p: its logarithm, but for the
// rounding of the exponential.
float least_score(float min_p) {
  const double below = std::nextafter(min_p, 0.0f);
  const double least = std::log((min_p + below) / 2);
  const float rounded = static_cast<float>(least);
  return rounded < least ? std::nextafter(rounded, INFINITE) : rounded;
}

// --- the draw ------------------------------------------------------------------------------------

// Whether any of the scores may pass `best`: 1 - u <= e^(score - best), and a little more for the
// rounding of both sides.
bool may_pass(const float* scores, const uint32_t* words, float best) {
  alignas(64) float tails[DRAWN];  // 1 - u or less; half a word is a signed integer
  for (int64_t i = 0; i < DRAWN; ++i) {
    tails[i] = static_cast<float>(static_cast<int32_t>(~words[i] >> 1)) * 0x1p-31f;
  }
  F32 most = F32::all(-1.0f);
  for (int64_t i = 0; i < DRAWN; i += W) {
    const F32 bound = exp(load(scores + i) - F32::all(best)) * F32::all(1.001f);
    most = max(most, bound - load(tails + i));
  }
  return reduce_max(most) >= 0.0f;
}

// The token with the largest sum of score and noise, the first of equals. `scores` are padded with
// -inf to whole blocks; `top` is the token with the largest score.
int64_t draw(const Stream& stream, const float* scores, int64_t vocabulary, int64_t top,
             const Kept& kept) {
  constexpr float MOST_NOISE = 23.0f;
  alignas(64) uint32_t words[DRAWN];
  draw_words(stream, top - top % DRAWN, words);
  Largest best{scores[top] + gumbel(words[top % DRAWN]), top};
  for (int64_t begin = 0; begin < vocabulary; begin += DRAWN) {
    const float* block = scores + begin;
    F32 largest = load(block);
    for (int64_t i = W; i < DRAWN; i += W) largest = max(largest, load(block + i));
    if (reduce_max(largest) < std::max(kept.least, best.value - MOST_NOISE)) continue;
    draw_words(stream, begin, words);
    if (!may_pass(block, words, best.value)) continue;
    for (int64_t i = 0; i < DRAWN; ++i) {
      const int64_t token = begin + i;
      if (block[i] < best.value - MOST_NOISE || !kept.has(block[i], token)) continue;
      const float value = block[i] + gumbel(words[i]);
      const bool is_first = value == best.value && token < best.token;
      if (value > best.value || is_first) best = {value, token};
    }
  }
  return best.token;
}

Stream stream_of(const Sampling& s, int64_t row) {
  const uint64_t id = s.sample_ids.data ? s.sample_ids[row] : row, seed = s.seed;
  const uint64_t position = s.positions.data ? s.positions[row] : 0;
  return {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
          static_cast<uint32_t>(position),
          {static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32)}};
}

template <class T>
int64_t sample_row(const Sampling& s, int64_t row) {
  const float temperature = s.temperature[row], min_p = s.min_p[row], top_p = s.top_p[row];
  const bool is_greedy = !(temperature > 0.0f);
  if (min_p > 1.0f || top_p <= 0.0f) return 0;  // no token satisfies that
  if (is_greedy && !s.previous_tokens) {
    return largest_of(static_cast<const T*>(s.logits) + row * s.stride, s.vocabulary).token;
  }
  const int64_t n = s.vocabulary, padded = (n + DRAWN - 1) / DRAWN * DRAWN;
  const std::unique_ptr<float[]> scores(new float[padded]);
  write_logits<T>(s, row, is_greedy ? 1.0f : temperature, scores.get());
  const Largest top = largest_of(scores.get(), n);
  if (is_greedy || top.value == -INFINITE) return top.token;
  for_vectors(n, [&, largest = F32::all(top.value)](int64_t i, auto part, int) {
    part.store(scores.get() + i, part.load(scores.get() + i) - largest);
  });
  std::fill(scores.get() + n, scores.get() + padded, -INFINITE);
  Kept kept{-INFINITE, -1};
  if (!keep_top(scores.get(), n, s.top_k[row], top_p, &kept)) return 0;
  if (min_p > 0.0f) {
    const float least = least_score(min_p);
    if (least > kept.least) kept = {least, n};
  }
  return draw(stream_of(s, row), scores.get(), n, top.token, kept);
}

template <class T>
void sample_rows(const Sampling& s) {
  const int64_t rows = rows_per_task(s.vocabulary);
  parallel((s.batch + rows - 1) / rows, [&](int64_t task) {
    const int64_t end = std::min(s.batch, (task + 1) * rows);
    for (int64_t row = task * rows; row < end; ++row) s.tokens[row] = sample_row<T>(s, row);
  });
}

}  // namespace

void sample(const Sampling& sampling) {
  switch (sampling.dtype) {
    case DType::f32: return sample_rows<float>(sampling);
    case DType::f16: return sample_rows<Half>(sampling);
    default: return sample_rows<BFloat16>(sampling);
  }
}

}  // namespace tilewise
