// From rows in tensors to packed blocks: any stored type becomes the engine's, and rows that must
// not be multiplied (not finite, or not there) become zeros with a flag.
//
// 0 * NaN is NaN, so one bad key that nobody sees would spoil every query of its block. A block in
// which nothing is flagged, the usual one, costs its queries nothing.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/attention.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"

#if defined(__AVX512F__)
#include "cpu/bf16_rows.h"
#endif

namespace tilewise {

enum RowFlag : uint8_t { BAD_KEY = 1, BAD_VALUE = 2, MISSING = 4, BAD_QUERY = 8 };

template <class T>
constexpr DType DTYPE_OF = std::is_same_v<T, float> ? DType::f32 : DType::bf16;

// Whether all of some rows is finite: whether it sums up to 0 once multiplied by 0.
template <class T>
inline bool is_finite(const T* const* rows, int64_t count, int64_t n) {
  constexpr int W = F32::WIDTH;
  F32 sums[4] = {F32::zero(), F32::zero(), F32::zero(), F32::zero()};
  for (int64_t r = 0; r < count; ++r) {
    const T* x = rows[r];
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums[j] = fma(load(x + i + j * W), F32::zero(), sums[j]);
    }
    for (; i + W <= n; i += W) sums[0] = fma(load(x + i), F32::zero(), sums[0]);
    if (i < n) {
      sums[1] = fma(load_partial(x + i, static_cast<int>(n - i)), F32::zero(), sums[1]);
    }
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3])) == 0.0f;
}

#if defined(__AVX512F__)

// One instruction for a vector of pairs.
inline bool is_finite(const BFloat16* const* rows, int64_t count, int64_t n) {
  const Pairs zeros{_mm512_setzero_si512()};
  F32 sums[4] = {F32::zero(), F32::zero(), F32::zero(), F32::zero()};
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = 0; i < n; i += Pairs::WIDTH) {
      F32& sum = sums[i / Pairs::WIDTH % 4];
      sum = fma(Pairs{load_row(rows[r] + i, n - i)}, zeros, sum);
    }
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3])) == 0.0f;
}

#endif

// Sets `flag` for rows that are not finite, and puts `zeros` in their place.
template <class T>
inline void replace_bad_rows(const T** rows, int64_t count, int64_t n, const T* zeros, uint8_t flag,
                             uint8_t* flags) {
  if (is_finite(rows, count, n)) return;
  for (int64_t r = 0; r < count; ++r) {
    if (is_finite(rows + r, 1, n)) continue;
    flags[r] |= flag;
    rows[r] = zeros;
  }
}

template <class T>
inline void decode_row(const T* x, float scale, int64_t n, float* out) {
  constexpr int W = F32::WIDTH;
  const F32 factor = F32::all(scale);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load(x + i) * factor);
  if (const int left = static_cast<int>(n - i)) {
    store_partial(out + i, load_partial(x + i, left) * factor, left);
  }
}

// Two codes a byte, as code + 8: element j is in the low half of byte j, j + n/2 in the high one.
inline void decode_int4_row(const uint8_t* x, float scale, int64_t n, float* out) {
  for (int64_t j = 0; j < n / 2; ++j) {
    out[j] = static_cast<float>((x[j] & 15) - 8) * scale;
    out[n / 2 + j] = static_cast<float>((x[j] >> 4) - 8) * scale;
  }
}

// A row of n elements as T: where it lies, or converted in `scratch`.
template <class T>
inline const T* row_as(DType dtype, const void* row, float scale, int64_t n, T* scratch) {
  if constexpr (std::is_same_v<T, float>) {
    switch (dtype) {
      case DType::f32: return static_cast<const float*>(row);
      case DType::f16: decode_row(static_cast<const Half*>(row), scale, n, scratch); break;
      case DType::bf16: decode_row(static_cast<const BFloat16*>(row), scale, n, scratch); break;
      case DType::i8: decode_row(static_cast<const int8_t*>(row), scale, n, scratch); break;
      case DType::f8e4m3: decode_row(static_cast<const Float8*>(row), scale, n, scratch); break;
      case DType::i4: decode_int4_row(static_cast<const uint8_t*>(row), scale, n, scratch); break;
    }
    return scratch;
  } else {
    return static_cast<const T*>(row);  // such an engine is only given rows of its own type
  }
}

template <class Engine>
class BlockPacker {
 public:
  using Element = typename Engine::Element;

  explicit BlockPacker(const Attention& a)
      : a_(a),
        stride_(round_up(std::max(a.dim, a.v_dim), ALIGNMENT)),
        rows_(make_workspace<const Element*>(Engine::KEY_BLOCK)),
        zeros_(make_workspace<Element>(stride_)),
        converted_(make_workspace<Element>(
            a.kv_dtype == DTYPE_OF<Element> ? 0 : Engine::KEY_BLOCK * stride_)) {
    std::memset(static_cast<void*>(zeros_.get()), 0, stride_ * sizeof(Element));
  }

  // Packs keys [block * KEY_BLOCK, ...) of a sequence, and sets a flag for every key of the block.
  // Returns whether there is any.
  bool pack(const Engine& engine, const Sequence& s, int64_t kv_head, int64_t block, Element* keys,
            Element* values, uint8_t* flags) const {
    const int64_t first = block * Engine::KEY_BLOCK;
    const int64_t count = std::min<int64_t>(s.k_len - first, Engine::KEY_BLOCK);
    const int64_t padded = round_up(count, Engine::KEY_STEP);
    std::memset(flags, 0, Engine::KEY_BLOCK);
    gather(a_.k, s, kv_head, first, count, padded, a_.dim, BAD_KEY, flags);
    engine.pack_keys(rows_.get(), padded, keys);
    gather(a_.v, s, kv_head, first, count, padded, a_.v_dim, BAD_VALUE, flags);
    engine.pack_values(rows_.get(), padded, values);
    return !std::all_of(flags, flags + count, [](uint8_t flag) { return flag == 0; });
  }

 private:
  void gather(const KeyValues& t, const Sequence& s, int64_t kv_head, int64_t first, int64_t count,
              int64_t padded, int64_t n, RowFlag bad, uint8_t* flags) const {
    const int64_t bytes = element_size(a_.kv_dtype);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t offset = row_offset(a_, t, s, first + j, kv_head);
      if (offset < 0) {
        flags[j] |= MISSING;
        rows_[j] = zeros_.get();
        continue;
      }
      const void* row = static_cast<const char*>(t.data) + offset * bytes;
      rows_[j] = row_as(a_.kv_dtype, row, scale_of(t, s, first + j, kv_head), n,
                        converted_.get() + j * stride_);
    }
    replace_bad_rows(rows_.get(), count, n, zeros_.get(), bad, flags);
    std::fill(rows_.get() + count, rows_.get() + padded, zeros_.get());
  }

  float scale_of(const KeyValues& t, const Sequence& s, int64_t j, int64_t kv_head) const {
    if (!t.scale) return 1.0f;
    const int64_t page = a_.block_table[s.index * a_.block_table_stride + j / a_.page_size];
    return t.scale[page * t.scale_page_stride + j % a_.page_size * t.scale_slot_stride +
                   kv_head * t.scale_head_stride];
  }

  const Attention& a_;
  int64_t stride_;
  Workspace<const Element*> rows_;
  Workspace<Element> zeros_, converted_;
};

}  // namespace tilewise
