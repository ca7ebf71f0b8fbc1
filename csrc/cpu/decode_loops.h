// Which inner loops of decode attention a call in float32 or pairs takes.
#pragma once

#include "cpu/attention.h"
#include "cpu/decode_pairs.h"
#include "cpu/decode_rows.h"

namespace tilewise {

// What products are made of: weights, and whatever is expanded, are of the same kind.
enum class Arithmetic { floats, pairs, integers };

// The loops for one type of cache; [r - 1] is for r query rows.
struct RowLoops {
  decltype(&dot_products<Floats, float, 1>) dot[ROWS];
  decltype(&accumulate_products<Floats, float, 1>) accumulate[ROWS];
  decltype(&expand_row<float>) expand;  // to what `expanded_loops` take
  decltype(&collect_rows) collect;  // the sums of `accumulate`, in the order of the elements
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
  return {{dot_loop<P, KV, 1>, dot_loop<P, KV, 2>, dot_loop<P, KV, 3>, dot_loop<P, KV, 4>},
          {accumulate_products<P, KV, 1>, accumulate_products<P, KV, 2>,
           accumulate_products<P, KV, 3>, accumulate_products<P, KV, 4>},
          expand,
          collect,
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

inline RowLoops loops_of(const Attention& a) {
  if (arithmetic_of(a) == Arithmetic::floats) return float_loops(a.kv_dtype);
  return a.kv_dtype == DType::bf16 ? pair_loops<BFloat16>() : pair_loops<Float8>();
}

inline RowLoops expanded_loops(const Attention& a) {
  return arithmetic_of(a) == Arithmetic::floats ? float_loops<float>() : pair_loops<BFloat16>();
}

// Of one query row.
inline decltype(RowLoops::expand) query_expansion(const Attention& a) {
  if (arithmetic_of(a) == Arithmetic::floats) return float_loops(a.dtype).expand;
  return expand_row_pairs<BFloat16>;
}

#else

inline RowLoops loops_of(const Attention& a) { return float_loops(a.kv_dtype); }
inline RowLoops expanded_loops(const Attention&) { return float_loops<float>(); }
inline decltype(RowLoops::expand) query_expansion(const Attention& a) {
  return float_loops(a.dtype).expand;
}

#endif

}  // namespace tilewise
