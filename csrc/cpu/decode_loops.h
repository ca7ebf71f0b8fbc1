// Which inner loops of decode attention a call takes.
#pragma once

#include "cpu/attention.h"
#include "cpu/decode_integers.h"
#include "cpu/decode_pairs.h"
#include "cpu/decode_rows.h"

namespace tilewise {

// What products are made of: weights, and whatever is expanded, are of the same kind.
enum class Arithmetic { floats, pairs, integers };

// The loops for one type of cache; [r - 1] is for r query rows.
struct RowLoops {
  decltype(&dot_rows<float, 1, true>) dot[ROWS];
  decltype(&accumulate_products<Floats, float, 1>) accumulate[ROWS];
  decltype(&expand_row<float>) expand;  // to what `expanded_loops` take
  // For integers alone, in place of `dot`: the first rows transpose STEP keys for the others. Weights
  // are rounded to what `accumulate` takes, and its sums added to float32.
  void (*dot_transposing[ROWS])(const void* queries, int64_t query_bytes, CacheRows keys,
                                CacheRows ahead, int64_t dim, void* transposed, float* scores,
                                int64_t score_stride);
  void (*dot_transposed[ROWS])(const void* queries, int64_t query_bytes, int64_t dim,
                               const void* transposed, float* scores, int64_t score_stride);
  float (*round_weights)(float* weights, int begin, int end);
  void (*add_sums)(float* out, int32_t* sums, int64_t dim, float factor, float unit);
  decltype(&collect_rows) collect;  // the sums of `accumulate`, in the order of the elements
  int64_t element_size;
  bool is_expanded;  // rows are already what `expand` would make of them
};

inline Arithmetic arithmetic_of(const Attention& a) {
#if defined(__AVX512BF16__)
  const int64_t whole = Pairs::WIDTH * (a.kv_dtype == DType::i4 ? 2 : 1);
  if (a.dtype == DType::f32 || a.dim % whole || a.v_dim % whole) return Arithmetic::floats;
  if (a.kv_dtype == DType::i8 || a.kv_dtype == DType::i4) return Arithmetic::integers;
  if (a.dtype == DType::bf16 && a.kv_dtype == DType::bf16) return Arithmetic::pairs;
  if (a.dtype == DType::bf16 && a.kv_dtype == DType::f8e4m3) return Arithmetic::pairs;
#else
  static_cast<void>(a);
#endif
  return Arithmetic::floats;
}

template <class P, class KV>
constexpr RowLoops row_loops(decltype(RowLoops::expand) expand, decltype(RowLoops::collect) collect) {
  return {{dot_products<P, KV, 1>, dot_products<P, KV, 2>, dot_products<P, KV, 3>,
           dot_products<P, KV, 4>},
          {accumulate_products<P, KV, 1>, accumulate_products<P, KV, 2>,
           accumulate_products<P, KV, 3>, accumulate_products<P, KV, 4>},
          expand,
          {},
          {},
          nullptr,
          nullptr,
          collect,
          sizeof(KV),
          std::is_same<KV, typename P::Element>::value};
}

template <class KV>
constexpr RowLoops float_loops() {
  return row_loops<Floats, KV>(expand_row<KV>, collect_rows);
}

inline RowLoops float_loops(DType dtype) {
  switch (dtype) {
    case DType::f32: return float_loops<float>();
    case DType::f16: return float_loops<Half>();
    case DType::bf16: return float_loops<BFloat16>();
    case DType::i8: return float_loops<int8_t>();
    case DType::f8e4m3: return float_loops<Float8>();
    default: return float_loops<Int4>();
  }
}

#if defined(__AVX512BF16__)

template <class KV>
constexpr RowLoops pair_loops() {
  return row_loops<BFloat16Pairs, KV>(expand_row_pairs<KV>, collect_pairs);
}

template <class KV>
constexpr RowLoops integer_loops() {
  return {{},
          {accumulate_products<Codes, KV, 1>, accumulate_products<Codes, KV, 2>,
           accumulate_products<Codes, KV, 3>, accumulate_products<Codes, KV, 4>},
          nullptr,
          {dot_transposing<KV, 1>, dot_transposing<KV, 2>, dot_transposing<KV, 3>,
           dot_transposing<KV, 4>},
          {dot_transposed<1>, dot_transposed<2>, dot_transposed<3>, dot_transposed<4>},
          round_weights,
          add_sums,
          collect_pairs,
          sizeof(KV),
          true};
}

inline RowLoops loops_of(const Attention& a) {
  switch (arithmetic_of(a)) {
    case Arithmetic::floats: return float_loops(a.kv_dtype);
    case Arithmetic::integers:
      return a.kv_dtype == DType::i8 ? integer_loops<int8_t>() : integer_loops<Int4>();
    default:
      return a.kv_dtype == DType::bf16 ? pair_loops<BFloat16>() : pair_loops<Float8>();
  }
}

inline RowLoops expanded_loops(const Attention& a) {
  return arithmetic_of(a) == Arithmetic::pairs ? pair_loops<BFloat16>() : float_loops<float>();
}

// Of one query row.
inline decltype(&expand_row<float>) expand_query(const Attention& a) {
  const bool is_int8 = a.kv_dtype == DType::i8, is_half = a.dtype == DType::f16;
  switch (arithmetic_of(a)) {
    case Arithmetic::floats: return float_loops(a.dtype).expand;
    case Arithmetic::pairs: return expand_row_pairs<BFloat16>;
    default:
      if (is_half) return is_int8 ? expand_digits<Half, int8_t> : expand_digits<Half, Int4>;
      return is_int8 ? expand_digits<BFloat16, int8_t> : expand_digits<BFloat16, Int4>;
  }
}

#else

inline RowLoops loops_of(const Attention& a) { return float_loops(a.kv_dtype); }
inline RowLoops expanded_loops(const Attention&) { return float_loops<float>(); }
inline decltype(&expand_row<float>) expand_query(const Attention& a) {
  return float_loops(a.dtype).expand;
}

#endif

}  // namespace tilewise
