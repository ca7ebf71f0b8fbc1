// Products of decode attention with the codes of an int8 or int4 cache, in integers (AVX512_VNNI):
// codes are multiplied as they lie, and nothing is converted.
//
// A query row is q = unit * (65536 top + 256 middle + low), three digits of eight bits. A bfloat16
// number has eight bits itself, so `low` is zero but for numbers some 2^7 times below a row's largest: the
// two upper digits are multiplied everywhere, the lower one where it is not zero, and 23 bits
// count. Keys are transposed, 16 at a time, so that a lane is a key and four of its codes: nothing has
// to be summed across lanes, and any number of query rows shares the transposed keys.
//
// Weights are rounded to 15 bits of the largest of a row and block; a pair of them multiplies the
// codes of two values. Sums of a block are integers, so their order does not matter.
#pragma once

#include <cmath>

#include "cpu/decode_rows.h"
#include "cpu/simd_int.h"
#include "cpu/simd_pairs.h"

#if defined(__AVX512VNNI__)

namespace tilewise {

// A query row in memory, for G = dim / 4 groups of codes: then int32 upper[G][2], each four digits, and
// low[G]; and uint8 low_groups[G], those whose `low` is not zero.
struct DigitRow {
  static constexpr int DIGITS = 3;
  float unit;
  int32_t start[DIGITS];  // of the sums: what it takes off for codes that are stored with an offset
  int32_t low_count;

  int32_t* upper() { return reinterpret_cast<int32_t*>(this + 1); }
  int32_t* low(int64_t groups) { return upper() + 2 * groups; }
  uint8_t* low_groups(int64_t groups) { return reinterpret_cast<uint8_t*>(upper() + 3 * groups); }
};

// Transposed codes are unsigned bytes: this much more than their value.
template <class KV>
constexpr int CODE_OFFSET = std::is_same<KV, Int4>::value ? 8 : 128;

// The digits of a row in padded memory, which a row of at least 32 floats has room for. Returns
// whether all is finite; what is not makes `unit` NaN.
template <class Q, class KV>
bool expand_digits(const void* row, int64_t dim, void* out) {
  const auto* q = static_cast<const Q*>(row);
  auto& to = *static_cast<DigitRow*>(out);
  const int64_t groups = dim / 4;
  F32 largest = F32::zero(), zeros = F32::zero();
  for (int64_t i = 0; i < dim; i += F32::WIDTH) {
    const F32 x = load(q + i);
    largest = max(largest, abs(x));
    zeros = fma(x, F32::zero(), zeros);
  }
  const bool finite = reduce_add(zeros) == 0.0f;
  const float bound = std::max(finite ? reduce_max(largest) : 0.0f, 0x1p-100f);
  int exponent;
  const bool fits = std::frexp(bound, &exponent) <= 127 / 128.0f;  // else the top digit might be 128
  exponent -= fits;
  to.unit = finite ? std::ldexp(1.0f, exponent - 22) : NAN;
  const F32 units = F32::all(finite ? std::ldexp(1.0f, 22 - exponent) : 0.0f);
  I32 sums[DigitRow::DIGITS] = {I32::zero(), I32::zero(), I32::zero()};
  for (int64_t i = 0; i < dim; i += F32::WIDTH) {
    I32 rest = to_i32(finite ? load(q + i) * units : units);
    int32_t digits[DigitRow::DIGITS][4];
    for (int d = DigitRow::DIGITS - 1; d >= 0; --d) {
      const I32 digit = shift_signed(rest << 24, 24);
      rest = shift_signed(rest - digit, 8);
      sums[d] = sums[d] + digit;
      store_low_bytes(digits[d], digit);
    }
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t group = i / 4 + j;
      to.upper()[2 * group] = digits[0][j];
      to.upper()[2 * group + 1] = digits[1][j];
      to.low(groups)[group] = digits[2][j];
    }
  }
  for (int d = 0; d < DigitRow::DIGITS; ++d) to.start[d] = -CODE_OFFSET<KV> * reduce_add(sums[d]);
  to.low_count = 0;
  for (int64_t g = 0; g < groups; ++g) {
    to.low_groups(groups)[to.low_count] = static_cast<uint8_t>(g);
    to.low_count += to.low(groups)[g] != 0;
  }
  return finite;
}

// Sums of the products of R query rows and STEP keys.
template <int R>
struct DigitSums {
  DigitRow* q[R];
  I32 top[R], middle[R];

  DigitSums(const void* queries, int64_t query_bytes) {
    const char* at = static_cast<const char*>(queries);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r, at += query_bytes) {
      q[r] = const_cast<DigitRow*>(reinterpret_cast<const DigitRow*>(at));
      top[r] = I32::all(q[r]->start[0]);
      middle[r] = I32::all(q[r]->start[1]);
    }
  }

  // Of the upper two digits.
  void add(I32 codes, int64_t group) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      top[r] = dot_group(top[r], codes, q[r]->upper() + 2 * group);
      middle[r] = dot_group(middle[r], codes, q[r]->upper() + 2 * group + 1);
    }
  }

  // With the lower digits, whose codes are read again.
  void store_scores(const __m512i* codes, int64_t groups, float* scores, int64_t score_stride) {
#pragma GCC unroll 4  // or else the sums are kept in memory
    for (int r = 0; r < R; ++r) {
      I32 low = I32::all(q[r]->start[2]);
      for (int i = 0; i < q[r]->low_count; ++i) {
        const int64_t g = q[r]->low_groups(groups)[i];
        low = dot_group(low, codes[g], q[r]->low(groups) + g);
      }
      const float unit = q[r]->unit;
      F32 score = to_f32(low) * F32::all(unit);
      score = fma(to_f32(middle[r]), F32::all(unit * 256), score);
      store(scores + r * score_stride, fma(to_f32(top[r]), F32::all(unit * 65536), score));
    }
  }
};

// scores[r][j] = queries[r] . keys[j] for `count` keys, rounded up to 16, whose transposed codes go to
// `transposed`, the last 16 at the end: groups of four of all keys, 64 bytes each. As many bytes
// `ahead` are fetched; pointers to 16 more keys exist.
//
// While a quarter of a line is multiplied the next one is loaded: out of order, the processor does not
// look far enough ahead.
template <class KV, int R>
void dot_transposing(const void* queries, int64_t query_bytes, CacheRows keys, Ahead& ahead,
                     int64_t count, int64_t dim, void* transposed, float* scores,
                     int64_t score_stride) {
  constexpr bool IS_INT4 = std::is_same<KV, Int4>::value;
  constexpr int64_t PART = 16;  // bytes: a row is whole parts
  const int64_t groups = dim / 4, bytes = IS_INT4 ? dim / 2 : dim;
  auto* to = static_cast<__m512i*>(transposed);
  Ahead fetched = ahead;
  I32 next[4];  // of keys i, i + 4, i + 8 and i + 12
  const auto load = [&](int i, CacheRows from, int64_t c) __attribute__((always_inline)) {
    next[i] = load_quarters(from.row<char>(i) + c, from.row<char>(i + 4) + c,
                            from.row<char>(i + 8) + c, from.row<char>(i + 12) + c);
  };
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) load(i, keys, 0);
  transpose_quarters(next);
  for (int64_t j = 0; j < count; j += F32::WIDTH) {
    DigitSums<R> sums(queries, query_bytes);
    const CacheRows following = {keys.at + F32::WIDTH, keys.offset};
    for (int64_t c = 0; c < bytes; c += PART) {
      const bool is_last = c + PART == bytes;
      const CacheRows from = is_last ? following : keys;
      I32 rows[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) rows[i] = next[i];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t group = c / 4 + i;
        // Otherwise compilers keep the pointers in vector registers, and pay to get them back.
        asm volatile("" : : : "memory");
        fetched.fetch_line();
        load(i, from, is_last ? 0 : c + PART);
        const auto take = [&](I32 codes, int64_t g) __attribute__((always_inline)) {
          to[g] = codes.v;
          sums.add(codes, g);
        };
        if (IS_INT4) {
          const I32 nibble = I32::all(0x0f0f0f0f);
          take(rows[i] & nibble, group);
          take((rows[i] >> 4) & nibble, groups / 2 + group);
        } else {
          take(rows[i] ^ I32::all(static_cast<int>(0x80808080u)), group);
        }
      }
      transpose_quarters(next);
    }
    sums.store_scores(to, groups, scores + j, score_stride);
    keys = following;
  }
  ahead = fetched;
}

// The same for keys that are transposed already.
template <int R>
void dot_transposed(const void* queries, int64_t query_bytes, int64_t dim, const void* transposed,
                    float* scores, int64_t score_stride) {
  const auto* codes = static_cast<const __m512i*>(transposed);
  const int64_t groups = dim / 4;
  DigitSums<R> sums(queries, query_bytes);
  for (int64_t g = 0; g < groups; ++g) sums.add(codes[g], g);
  sums.store_scores(codes, groups, scores, score_stride);
}

// Weights [begin, end) of a row to 16 bits, in place. Returns what one is worth: NaN where one is not
// finite.
inline float round_weights(float* weights, int begin, int end) {
  constexpr int W = F32::WIDTH;
  F32 largest = F32::zero(), zeros = F32::zero();
  for (int j = begin; j < end; j += W) {
    const F32 x = load(weights + j);
    largest = max(abs(x), largest);
    zeros = fma(x, F32::zero(), zeros);
  }
  constexpr float STEPS = INT16_MAX, LEAST = 1e-33f;  // whose inverse is still finite
  const float bound = reduce_max(largest), zero = reduce_add(zeros);
  const bool is_usual = zero == 0.0f && bound >= LEAST;
  const F32 steps = F32::all(is_usual ? STEPS / bound : 0.0f);
  for (int j = begin; j < end; j += W) {
    const F32 x = load(weights + j);
    store_words(reinterpret_cast<int16_t*>(weights) + j, is_usual ? to_i32(x * steps) : I32::zero());
  }
  return is_usual ? bound / STEPS : zero;
}

// out = out * factor + sums * unit; and the sums become zero.
inline void add_sums(float* out, int32_t* sums, int64_t dim, float factor, float unit) {
  for (int64_t i = 0; i < dim; i += F32::WIDTH) {
    store(out + i, fma(to_f32(load(sums + i)), F32::all(unit), load(out + i) * F32::all(factor)));
    store(sums + i, I32::zero());
  }
}

// Values: two of them interleaved, in 16 bits, with the weights of two keys.
struct Codes {
  using Element = int16_t;
  using Vector = Words;
  using Sum = I32;
  using SumElement = int32_t;
  static constexpr int WIDTH = Words::WIDTH;
  static constexpr int KEYS = 2;
  static constexpr int depth(int r) { return r <= 2 ? 4 : 2; }

  static Vector weight(const int16_t* p) {
    int32_t both;
    std::memcpy(&both, p, 4);
    return {_mm512_set1_epi32(both)};
  }
  template <class T, int D>
  static void read_values(CacheRows rows, int64_t d, int /* tail */, Vector* out) {
    const T *a = rows.row<T>(0) + d, *b = rows.row<T>(1) + d;
    for (int c = 0; c < D; ++c) {
      const Vector x = load_words(a + c * WIDTH), y = load_words(b + c * WIDTH);
      interleave(x, y, out[2 * c], out[2 * c + 1]);
    }
  }
};

}  // namespace tilewise

#endif
