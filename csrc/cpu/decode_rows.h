// The inner loops of decode attention: a few query rows against key and value rows as they lie. How
// numbers are multiplied is a parameter: in float32 (`Floats`), or two at a time where the processor
// can (decode_pairs.h, decode_integers.h).
//
// A key or value row is loaded and converted once for up to ROWS query rows. Every (query row, key)
// product is summed in one vector over ascending elements, and every (query row, element) of the
// output in one lane over ascending keys: how many rows are taken together never changes a bit.
//
// In memory here, a row is `padded` to whole vectors. An int4 row is two runs, the low nibbles and
// then the high ones, each padded for itself.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/simd_pairs.h"

namespace tilewise {

struct Int4 {};  // of a cache; its rows are read as Nibble<0>, then Nibble<1>

constexpr int ROWS = 4;  // query rows that share a load

// Calls f(tag, begin, n) for each run of a row: n elements of the tag's type, at `begin` in padded
// memory.
template <class KV, class F>
inline void for_runs(int64_t dim, const F& f) {
  if constexpr (std::is_same<KV, Int4>::value) {
    f(Nibble<0>{}, int64_t{0}, dim / 2);
    f(Nibble<1>{}, round_up(dim / 2, F32::WIDTH), dim / 2);
  } else {
    f(KV{}, int64_t{0}, dim);
  }
}

// Rows of a cache, each `offset` bytes behind its pointer.
struct CacheRows {
  const void* const* at;
  int64_t offset;

  template <class T>
  const T* row(int64_t i) const {
    return reinterpret_cast<const T*>(static_cast<const char*>(at[i]) + offset);
  }
};

// out = row in float32, padded. Returns whether all is finite.
template <class KV>
bool expand_row(const void* row, int64_t dim, void* expanded) {
  auto* out = static_cast<float*>(expanded);
  F32 zeros = F32::zero();
  for_runs<KV>(dim, [&](auto tag, int64_t begin, int64_t n) {
    const auto* p = static_cast<const decltype(tag)*>(row);
    int64_t i = 0;
    for (; i + F32::WIDTH <= n; i += F32::WIDTH) {
      const F32 x = load(p + i);
      zeros = fma(x, F32::zero(), zeros);  // infinity times zero is NaN
      store(out + begin + i, x);
    }
    if (i < n) {
      const F32 x = load_partial(p + i, static_cast<int>(n - i));
      zeros = fma(x, F32::zero(), zeros);
      store(out + begin + i, x);
    }
  });
  return reduce_add(zeros) == 0.0f;
}

// Memory that is asked for, for the second-level cache, while something else is read: `span` bytes of
// each row, `offset` behind its pointer, one row after the other as far as `last`.
class Ahead {
 public:
  static constexpr int64_t LINE = 64;  // of caches

  Ahead() = default;  // of who fetches nothing
  // From the byte `begin` of the first row's on.
  Ahead(const void* const* row, const void* const* last, int64_t offset, int64_t span, int64_t begin)
      : at_(static_cast<const char*>(*row) + offset + begin),
        left_(span - begin),
        row_(row),
        last_(last),
        offset_(offset),
        span_(span) {}

  // Inline before all else: GCC takes a function that only prefetches for one without effects, and
  // leaves its calls out.
  __attribute__((always_inline)) inline void fetch_line() {
    _mm_prefetch(at_, _MM_HINT_T1);
    advance(at_ + LINE);
  }

  // For who has no registers for all of this: what to fetch is at `at`, and was, as far as `end`.
  const char* at() const { return at_; }
  void advance(const char* end) {
    left_ -= end - at_;
    at_ = end;
    while (left_ <= 0) {
      row_ += row_ != last_;
      at_ = static_cast<const char*>(*row_) + offset_ - left_;
      left_ += span_;
    }
  }
  // Whether each row is as many bytes: then whoever takes row after row need not count.
  bool is_row_by_row(int64_t bytes) const { return span_ == bytes; }
  const char* row(int64_t i) const { return static_cast<const char*>(row_[i]) + offset_; }
  // Whether as many bytes go beyond a row, behind which something else lies.
  bool exceed_row(int64_t bytes) const {
    return bytes > span_ && row_ != last_ && row(1) - row(0) != span_;
  }
  // Passes over them. Returns where they begin.
  const char* take(int64_t bytes) {
    const char* at = at_;
    advance(at + bytes);
    return at;
  }

 private:
  const char* at_;
  int64_t left_;  // of the row
  const void* const *row_, *const *last_;
  int64_t offset_, span_;
};

// Whether a line begins at element `i` of a step's STEP, where `before` were taken before.
template <class T, int STEP = 0>
inline constexpr bool begins_line(int64_t i, int64_t before = 0) {
  if (std::is_same<T, Nibble<1>>::value) return false;  // of the same bytes as Nibble<0>
  constexpr bool has_whole_lines = STEP * sizeof(T) % Ahead::LINE == 0;
  return (has_whole_lines ? i : before + i) * sizeof(T) % Ahead::LINE == 0;
}

// With every load, two places are asked for: of a row a little further on, into the first-level cache
// (here), and of the next tile. From memory straight to the first level would be too much: it holds
// too few lines, and too few of its misses can be under way. Asked for in bursts they would fill the
// buffers for misses and hold up the loads behind.
template <class T>
__attribute__((always_inline)) inline void fetch_near(const T* row, int64_t d) {
  if (sizeof(T) > 1 || begins_line<T>(d)) _mm_prefetch(row + d, _MM_HINT_T0);
}

constexpr int NEAR_VALUES = 4;  // rows

// What the loops are made of: elements in float32, one at a time.
struct Floats {
  using Element = float;  // of queries and weights
  using Vector = F32;
  using Sum = F32;
  using SumElement = float;
  static constexpr int WIDTH = F32::WIDTH;
  static constexpr int KEYS = 1;  // that a product with values takes
  // Vectors of values at a time, for r query rows: as many sums as hide the latency of an addition
  // and still leave registers for the values.
  static constexpr int depth(int r) { return r == 1 ? 8 : r == 2 || WIDTH == 16 ? 4 : 2; }

  template <class T>
  static Vector read(const T* p, int tail) {
    return tail ? load_partial(p, tail) : load(p);
  }
  static Vector query(const float* p) { return load(p); }
  static Vector weight(const float* p) { return F32::all(*p); }
  // D vectors of the value that `rows` begin with.
  template <class T, int D>
  static void read_values(CacheRows rows, int64_t d, int tail, Vector* out) {
    for (int c = 0; c < D; ++c) out[c] = read(rows.row<T>(0) + d + c * WIDTH, tail);
  }
};

// Keys that R query rows take at a time: one vector of sums for each row and key, and all of them
// reduced at once.
constexpr int keys_together(int r) { return F32::WIDTH / (r == 3 ? 4 : r); }

template <int R>
inline void store_reduced(const F32* sums, float* scores, int64_t score_stride) {
  constexpr int J = keys_together(R);
  float reduced[F32::WIDTH];
  store(reduced, reduce_each(sums));
  for (int r = 0; r < R; ++r) std::memcpy(scores + r * score_stride, reduced + r * J, J * 4);
}

// dot_products, below. A loop for each way to fetch has registers enough.
template <class P, class KV, int R, bool FETCHES, bool ROW_BY_ROW>
void dot_keys(const void* queries, int64_t query_bytes, CacheRows keys, Ahead ahead, int64_t count,
              int64_t dim, float* scores, int64_t score_stride) {
  constexpr int J = keys_together(R), W = F32::WIDTH;
  const int64_t query_stride = query_bytes / sizeof(typename P::Element);
  for (int64_t j = 0; j < count; j += J) {
    F32 sums[W];
    for (int i = 0; i < W; ++i) sums[i] = F32::zero();
    for_runs<KV>(dim, [&](auto tag, int64_t begin, int64_t n) {
      using T = decltype(tag);
      const T *key[J], *near[J];
      for (int c = 0; c < J; ++c) {
        key[c] = keys.row<T>(j + c);
        near[c] = FETCHES ? keys.row<T>(j + J + c) : nullptr;
      }
      const auto* q = static_cast<const typename P::Element*>(queries) + begin;
      int64_t d = 0;
      const auto multiply = [&](const auto& fetch_far) {
        for (; d + P::WIDTH <= n; d += P::WIDTH) {
          typename P::Vector k[J];  // held, or else it is loaded again for every row
          for (int c = 0; c < J; ++c) {
            k[c] = held(P::read(key[c] + d, 0));
            if (FETCHES) fetch_near(near[c], d);
            if (FETCHES) fetch_far(c, d);
          }
          for (int r = 0; r < R; ++r) {
            const auto x = held(P::query(q + r * query_stride + d));
            for (int c = 0; c < J; ++c) sums[r * J + c] = fma(x, k[c], sums[r * J + c]);
          }
        }
      };
      const char* rows[J];
      const auto multiply_with_rows = [&] {
        multiply([&](int c, int64_t i) __attribute__((always_inline)) {
          if (begins_line<T>(i)) _mm_prefetch(rows[c] + i * sizeof(T), _MM_HINT_T1);
        });
      };
      const int64_t bytes = n * sizeof(T);
      if (FETCHES && ROW_BY_ROW) {
        for (int c = 0; c < J; ++c) rows[c] = ahead.row(j + c);
        multiply_with_rows();
      } else if (FETCHES && begins_line<T>(0) && ahead.exceed_row(J * bytes)) {
        for (int c = 0; c < J; ++c) rows[c] = ahead.take(bytes);
        multiply_with_rows();
      } else {
        const char* far = ahead.at();
        multiply([&](int c, int64_t i) __attribute__((always_inline)) {
          if (!begins_line<T, J * P::WIDTH>(c * P::WIDTH, i * J)) return;
          _mm_prefetch(far, _MM_HINT_T1);
          far += Ahead::LINE;
        });
        if (FETCHES) ahead.advance(far);
      }
      if constexpr (P::KEYS == 1) {
        if (d == n) return;
        for (int c = 0; c < J; ++c) {
          const auto k = P::read(key[c] + d, static_cast<int>(n - d));
          for (int r = 0; r < R; ++r) {
            sums[r * J + c] = fma(P::query(q + r * query_stride + d), k, sums[r * J + c]);
          }
        }
      }
    });
    store_reduced<R>(sums, scores + j, score_stride);
  }
}

// scores[r][j] = queries[r] . keys[j]. Reads keys and writes scores up to the next multiple of
// F32::WIDTH behind `count`, and fetches as many bytes `ahead`; pointers to F32::WIDTH more keys exist.
// Query rows are `query_bytes` apart.
template <class P, class KV, int R, bool FETCHES = true>
void dot_products(const void* queries, int64_t query_bytes, CacheRows keys, Ahead ahead,
                  int64_t count, int64_t dim, float* scores, int64_t score_stride) {
  const int64_t row_bytes = std::is_same<KV, Int4>::value ? dim / 2 : dim * sizeof(KV);
  const bool row_by_row = FETCHES && ahead.is_row_by_row(row_bytes);
  const auto dot = row_by_row ? dot_keys<P, KV, R, FETCHES, FETCHES>
                              : dot_keys<P, KV, R, FETCHES, false>;
  dot(queries, query_bytes, keys, ahead, count, dim, scores, score_stride);
}

template <class P, class KV, int R>
constexpr auto dot_loop = &dot_products<P, KV, R>;

// out[r][d .. d + D vectors] += sum over j of weights[r][j] * values[j][...]. Never begins within such
// D vectors, from which compilers see what is to be fetched.
template <class P, class T, int R, int D, bool ROW_BY_ROW>
inline void accumulate_vectors(const typename P::Element* weights, int64_t weight_stride,
                               CacheRows values, Ahead& ahead, int64_t count, int64_t d,
                               int tail, typename P::SumElement* out, int64_t out_stride) {
  constexpr int W = F32::WIDTH, N = D * P::KEYS;
  if (d % (D * P::WIDTH) != 0) __builtin_unreachable();
  Ahead far = ahead;  // in registers
  typename P::Sum sums[R * N];
#pragma GCC unroll 16
  for (int i = 0; i < R * N; ++i) sums[i] = load(out + i / N * out_stride + i % N * W);
  for (int64_t j = 0; j < count; j += P::KEYS) {
    typename P::Vector v[N];
    P::template read_values<T, D>({values.at + j, values.offset}, d, tail, v);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      fetch_near(values.row<T>(j + i / D + NEAR_VALUES), d + i % D * P::WIDTH);
      if (ROW_BY_ROW) {
        const int64_t e = d + i % D * P::WIDTH;
        if (begins_line<T>(e)) _mm_prefetch(far.row(j + i / D) + e * sizeof(T), _MM_HINT_T1);
      } else if (begins_line<T, N * P::WIDTH>(i * P::WIDTH, j * D * P::WIDTH)) {
        far.fetch_line();
      }
    }
    for (int r = 0; r < R; ++r) {
      const auto weight = P::weight(weights + r * weight_stride + j);
      for (int c = 0; c < N; ++c) sums[r * N + c] = fma(weight, v[c], sums[r * N + c]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * N; ++i) store(out + i / N * out_stride + i % N * W, sums[i]);
  ahead = far;
}

// out[r] += sum over j < count of weights[r][j] * values[j]; rows of weights are `weight_bytes` apart,
// and `out` holds P::Sum. Where products take two keys and `count` is odd, one value more is read,
// whose weight is zero. Pointers to NEAR_VALUES + 1 more exist.
template <class P, class KV, int R>
void accumulate_products(const void* weights, int64_t weight_bytes, CacheRows values,
                         Ahead ahead, int64_t count, int64_t dim, void* out,
                         int64_t out_stride) {
  constexpr int D = P::depth(R);
  using Element = typename P::Element;
  const auto* w = static_cast<const Element*>(weights);
  const int64_t weight_stride = weight_bytes / sizeof(Element);
  for_runs<KV>(dim, [&](auto tag, int64_t begin, int64_t n) {
    using T = decltype(tag);
    auto* sums = static_cast<typename P::SumElement*>(out) + begin;
    const auto accumulate = [&](auto is_row_by_row) {
      constexpr bool ROW_BY_ROW = decltype(is_row_by_row)::value;
      int64_t d = 0;
      for (; d + D * P::WIDTH <= n; d += D * P::WIDTH) {
        accumulate_vectors<P, T, R, D, ROW_BY_ROW>(w, weight_stride, values, ahead, count, d, 0,
                                                   sums + d, out_stride);
      }
      for (; d < n; d += P::WIDTH) {
        const int tail = d + P::WIDTH <= n ? 0 : static_cast<int>(n - d);
        accumulate_vectors<P, T, R, 1, ROW_BY_ROW>(w, weight_stride, values, ahead, count, d, tail,
                                                   sums + d, out_stride);
      }
    };
    if (ahead.is_row_by_row(n * sizeof(T))) {
      accumulate(std::true_type{});
    } else {
      accumulate(std::false_type{});
    }
  });
}

inline void collect_rows(const float* sums, int64_t dim, float* out) {
  std::memcpy(out, sums, dim * 4);
}

}  // namespace tilewise
