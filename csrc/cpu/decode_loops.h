// Which inner loops of decode attention a call takes.
#pragma once

#include "cpu/attention.h"
#include "cpu/decode_pairs.h"
#include "cpu/decode_rows.h"

namespace tilewise {

// The loops for one type of cache; [r - 1] is for r query rows.
struct RowLoops {
  decltype(&dot_rows<float, 1>) dot[ROWS];
  decltype(&accumulate_rows<float, 1>) accumulate[ROWS];
  decltype(&expand_row<float>) expand;  // to what `expanded_loops` take
  decltype(&collect_rows) collect;      // the sums of `accumulate`, in the order of the elements
  int64_t element_size;
  bool is_expanded;  // rows are already what `expand` would make of them
};

// Whether queries and weights are bfloat16, and whatever is expanded. Otherwise all is float32.
inline bool takes_pairs(const Attention& a) {
#if defined(__AVX512BF16__)
  const int64_t whole = Pairs::WIDTH * (a.kv_dtype == DType::i4 ? 2 : 1);
  return a.dtype == DType::bf16 && a.kv_dtype != DType::f32 && a.kv_dtype != DType::f16 &&
         a.dim % whole == 0 && a.v_dim % whole == 0;
#else
  static_cast<void>(a);
  return false;
#endif
}

template <class KV>
constexpr RowLoops row_loops() {
  return {{dot_rows<KV, 1>, dot_rows<KV, 2>, dot_rows<KV, 3>, dot_rows<KV, 4>},
          {accumulate_rows<KV, 1>, accumulate_rows<KV, 2>, accumulate_rows<KV, 3>,
           accumulate_rows<KV, 4>},
          expand_row<KV>,
          collect_rows,
          sizeof(KV),
          std::is_same<KV, float>::value};
}

inline RowLoops float_loops(DType dtype) {
  switch (dtype) {
    case DType::f32: return row_loops<float>();
    case DType::f16: return row_loops<Half>();
    case DType::bf16: return row_loops<BFloat16>();
    case DType::i8: return row_loops<int8_t>();
    case DType::f8e4m3: return row_loops<Float8>();
    default: return row_loops<Int4>();
  }
}

#if defined(__AVX512BF16__)

template <class KV>
constexpr RowLoops pair_loops() {
  return {{dot_pairs<KV, 1>, dot_pairs<KV, 2>, dot_pairs<KV, 3>, dot_pairs<KV, 4>},
          {accumulate_pairs<KV, 1>, accumulate_pairs<KV, 2>, accumulate_pairs<KV, 3>,
           accumulate_pairs<KV, 4>},
          expand_row_pairs<KV>,
          collect_pairs,
          sizeof(KV),
          std::is_same<KV, BFloat16>::value};
}

inline RowLoops loops_of(const Attention& a) {
  if (!takes_pairs(a)) return float_loops(a.kv_dtype);
  switch (a.kv_dtype) {
    case DType::bf16: return pair_loops<BFloat16>();
    case DType::i8: return pair_loops<int8_t>();
    case DType::f8e4m3: return pair_loops<Float8>();
    default: return pair_loops<Int4>();
  }
}

inline RowLoops expanded_loops(const Attention& a) {
  return takes_pairs(a) ? pair_loops<BFloat16>() : row_loops<float>();
}

// Of one query row.
inline decltype(&expand_row<float>) expand_query(const Attention& a) {
  return takes_pairs(a) ? expand_row_pairs<BFloat16> : float_loops(a.dtype).expand;
}

#else

inline RowLoops loops_of(const Attention& a) { return float_loops(a.kv_dtype); }
inline RowLoops expanded_loops(const Attention&) { return row_loops<float>(); }
inline decltype(&expand_row<float>) expand_query(const Attention& a) {
  return float_loops(a.dtype).expand;
}

#endif

}  // namespace tilewise
