// Top-k and top-p without sorting the vocabulary.
//
// One pass counts the tokens, and sums their probabilities, in buckets of equal width of the score;
// the two limits then fall into one bucket each, and only that one is sorted. Probabilities are
// summed in float64, as in the definition, but in another order: where the sum before a token is
// closer to top_p than any order could move it, the definition's own order decides, after a sort.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/sampling.h"

namespace tilewise {
namespace {

constexpr int BUCKETS = 2048;
constexpr float BUCKETS_PER_UNIT = 64.0f;  // a power of two: no two scores swap buckets by rounding
constexpr double UNCERTAIN = 1e-10;

struct Token {
  float score;
  int64_t id;
  bool operator<(const Token& other) const {  // the likelier one first, of equals the lower
    return score > other.score || (score == other.score && id < other.id);
  }
};

inline int bucket_of(float score) {
  return static_cast<int>(std::min(score * -BUCKETS_PER_UNIT, BUCKETS - 1.0f));
}

// e^x to 1e-12 relative for -690 <= x <= 0; without branches, for the vectors of the compiler.
inline double exp_double(float x) {
  constexpr double ROUND = 0x1.8p52;  // adding it leaves the integer in the lowest bits
  const double t = x * 1.4426950408889634;
  const double shifted = t + ROUND;
  const double r = (t - (shifted - ROUND)) * 0.6931471805599453;
  double p = 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  uint64_t bits;
  std::memcpy(&bits, &shifted, 8);
  bits = (bits + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, 8);
  return p * power;
}

struct Histogram {
  std::array<int64_t, BUCKETS> counts{};
  std::array<double, BUCKETS> masses{};
};

void fill(Histogram& histogram, const float* scores, int64_t n, bool with_masses) {
  constexpr int64_t BLOCK = 256;
  int buckets[BLOCK];
  float clamped[BLOCK];
  double masses[BLOCK];
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    const int64_t size = std::min(BLOCK, n - begin);
    const float* block = scores + begin;
    for (int64_t i = 0; i < size; ++i) buckets[i] = bucket_of(block[i]);
    for (int64_t i = 0; i < size; ++i) ++histogram.counts[buckets[i]];
    if (!with_masses) continue;
    for (int64_t i = 0; i < size; ++i) clamped[i] = std::max(block[i], -690.0f);
    for (int64_t i = 0; i < size; ++i) masses[i] = exp_double(clamped[i]);
    for (int64_t i = 0; i < size; ++i) histogram.masses[buckets[i]] += masses[i];
  }
}

// The tokens of buckets [first, last], less those of score -inf, which nothing can choose.
std::vector<Token> tokens_in(const float* scores, int64_t n, int first, int last) {
  constexpr int64_t BLOCK = 64;
  const float high = first / -BUCKETS_PER_UNIT;
  const float low = last < BUCKETS - 1 ? (last + 1) / -BUCKETS_PER_UNIT
                                       : -std::numeric_limits<float>::infinity();
  std::vector<Token> tokens;
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    const int64_t end = std::min(n, begin + BLOCK);
    int found = 0;  // most blocks have none, and without branches they are soon passed
    for (int64_t i = begin; i < end; ++i) found |= (scores[i] > low) & (scores[i] <= high);
    if (!found) continue;
    for (int64_t i = begin; i < end; ++i) {
      if (scores[i] > low && scores[i] <= high) tokens.push_back({scores[i], i});
    }
  }
  return tokens;
}

// The definition: tokens in order, and how much probability comes before each.
bool keep_in_order(std::vector<Token>& tokens, float top_p, Kept* kept) {
  std::sort(tokens.begin(), tokens.end());
  double total = 0.0, before = 0.0;
  for (const Token& token : tokens) total += std::exp(static_cast<double>(token.score));
  size_t count = 0;
  for (; count < tokens.size() && before < top_p; ++count) {
    before += std::exp(static_cast<double>(tokens[count].score)) / total;
  }
  if (count == 0) return false;
  *kept = {tokens[count - 1].score, tokens[count - 1].id};
  return true;
}

// The same from the sums of the buckets. False if rounding could decide.
bool keep_by_mass(const float* scores, int64_t n, float top_p, Kept* kept) {
  Histogram histogram;
  fill(histogram, scores, n, true);
  double total = 0.0, before = 0.0;
  for (const double mass : histogram.masses) total += mass;
  const double limit = top_p * total, margin = UNCERTAIN * total;
  for (int b = 0; b < BUCKETS; ++b) {
    if (before + histogram.masses[b] < limit - margin) {
      before += histogram.masses[b];
      continue;
    }
    std::vector<Token> tokens = tokens_in(scores, n, b, b);
    std::sort(tokens.begin(), tokens.end());
    for (const Token& token : tokens) {
      if (std::abs(before - limit) < margin) return false;
      if (before > limit) return true;
      *kept = {token.score, token.id};
      before += std::exp(static_cast<double>(token.score));
    }
  }
  return true;
}

// The k likeliest tokens, in any order.
std::vector<Token> likeliest(const float* scores, int64_t n, int64_t k) {
  Histogram histogram;
  fill(histogram, scores, n, false);
  int last = 0;
  for (int64_t count = histogram.counts[0]; count < k; count += histogram.counts[last]) ++last;
  std::vector<Token> tokens = tokens_in(scores, n, 0, last);
  if (static_cast<int64_t>(tokens.size()) > k) {
    std::nth_element(tokens.begin(), tokens.begin() + (k - 1), tokens.end());
    tokens.resize(k);
  }
  return tokens;
}

}  // namespace

bool keep_top(const float* scores, int64_t n, int64_t top_k, float top_p, Kept* kept) {
  const bool has_k = 0 < top_k && top_k < n, has_p = top_p < 1.0f;
  if (has_k) {
    std::vector<Token> tokens = likeliest(scores, n, top_k);
    if (has_p) return keep_in_order(tokens, top_p, kept);
    const Token last = *std::max_element(tokens.begin(), tokens.end());
    *kept = {last.score, last.id};
  } else if (has_p && !keep_by_mass(scores, n, top_p, kept)) {
    std::vector<Token> tokens = tokens_in(scores, n, 0, BUCKETS - 1);
    return keep_in_order(tokens, top_p, kept);
  }
  return true;
}

}  // namespace tilewise
