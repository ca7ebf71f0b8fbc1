// Rows of bfloat16 in the order in which products of pairs want them (AVX-512).
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"
#include "cpu/simd_int.h"

namespace tilewise {

// 32 elements, zeros from `count` on.
inline __m512i load_row(const BFloat16* p, int64_t count) {
  if (count >= 32) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi16((1u << count) - 1, p);
}

// The largest magnitude of some numbers.
class LargestBfloat16 {
 public:
  void add(__m512i x) {  // 32 of them
    const I32 magnitude = I32::all(0x7fff0000);
    odd_ = max_bits(odd_, bits_as_f32(I32(x) & magnitude));
    even_ = max_bits(even_, bits_as_f32((I32(x) << 16) & magnitude));
  }

  // NaN if one of them is.
  float get() const {
    float lanes[F32::WIDTH];
    store(lanes, max_bits(odd_, even_));
    return *std::max_element(lanes, lanes + F32::WIDTH,
                             [](float a, float b) { return a < b || b != b; });
  }

 private:
  F32 odd_ = F32::zero(), even_ = F32::zero();
};

// The first 32 elements of two rows, of which `count` are there, as 32 pairs.
inline void zip_rows(const BFloat16* first, const BFloat16* second, int64_t count, BFloat16* left,
                     BFloat16* right) {
  // The unpack instructions zip 64 bits of each 128: here they are put in order again.
  const __m512i of_left = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i of_right = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const __m512i even = load_row(first, count), odd = load_row(second, count);
  const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
  _mm512_store_si512(left, _mm512_permutex2var_epi64(low, of_left, high));
  _mm512_store_si512(right, _mm512_permutex2var_epi64(low, of_right, high));
}

// Lanes of x and y in turns, as bfloat16; returns all of x's before all of y's.
inline __m512i store_zipped(F32 x, F32 y, void* out) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(y.v, x.v);
  _mm512_store_si512(out, in_turns(both).v);
  return both;
}

// The same with halves rounded up, in fewer cycles, of numbers that are not NaN.
inline void store_zipped_half_up(F32 x, F32 y, void* out) {
  const __m512i half = _mm512_set1_epi32(0x8000), top = _mm512_set1_epi32(-65536);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(x.v), half), 16);
  const __m512i high = _mm512_add_epi32(_mm512_castps_si512(y.v), half);
  _mm512_store_si512(out, _mm512_ternarylogic_epi32(top, high, low, 0xca));  // top ? high : low
}

inline void store_half(BFloat16* out, __m256i x) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(out), x);
}

}  // namespace tilewise
