// Pairs of bfloat16: products of two at a time, added to a float32 sum (AVX512_BF16).
//
// Every 8-bit and 4-bit storage type is exact in bfloat16, so a product of such a pair with bfloat16
// queries is exact too, before it is added; and it needs half the instructions of float32. What is
// subnormal in bfloat16 counts as zero.
#pragma once

#include "cpu/simd.h"

#if defined(__AVX512BF16__)

namespace tilewise {

// The elements of a and b with the same index, paired: some in `low` and some in `high`.
inline void interleave(Pairs a, Pairs b, Pairs& low, Pairs& high) {
  low.v = _mm512_unpacklo_epi16(a.v, b.v);
  high.v = _mm512_unpackhi_epi16(a.v, b.v);
}

// Sums of what `interleave` has made, in the order of the elements: 32 of them.
inline void store_interleaved(float* p, F32 low, F32 high) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  store(p, _mm512_permutex2var_ps(low.v, first, high.v));
  store(p + 16, _mm512_permutex2var_ps(low.v, second, high.v));
}

inline Pairs held(Pairs x) {
#if !defined(TILEWISE_EMULATED)
  asm("" : "+v"(x.v));
#endif
  return x;
}

inline void store(BFloat16* p, Pairs x) { _mm512_storeu_si512(p, x.v); }

inline Pairs load_pairs(const BFloat16* p) { return {_mm512_loadu_si512(p)}; }

inline Pairs load_pairs(const int8_t* p) {
  return {(__m512i)_mm512_cvtne2ps_pbh(load(p + 16).v, load(p).v)};
}

inline __m512i load_words(const uint8_t* p) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// The magnitudes of Float8, by their seven bits.
struct Float8Table {
  alignas(64) uint16_t bits[128];
};

constexpr Float8Table float8_table() {
  Float8Table table{};
  for (int code = 1; code < 127; ++code) {
    int bits = (code << 4) + (120 << 7);  // exponent bias 7 against 127
    for (int top = 0; code >> 3 == 0 && top < 3; ++top) {  // of a subnormal, its highest bit
      if (code >> top == 1) bits = (118 + top) << 7 | (code << (7 - top) & 0x7f);
    }
    table.bits[code] = static_cast<uint16_t>(bits);
  }
  table.bits[127] = 0x7fc0;
  return table;
}

inline Pairs load_pairs(const Float8* p) {
  static constexpr Float8Table TABLE = float8_table();
  const __m512i words = load_words(&p->bits);
  const auto table = [](int i) { return _mm512_load_si512(TABLE.bits + 32 * i); };
  const __m512i small = _mm512_permutex2var_epi16(table(0), words, table(1));
  const __m512i large = _mm512_permutex2var_epi16(table(2), words, table(3));
  const __mmask32 is_large = _mm512_test_epi16_mask(words, _mm512_set1_epi16(0x40));
  const __m512i magnitude = _mm512_mask_blend_epi16(is_large, small, large);
  const __m512i sign = _mm512_set1_epi16(INT16_MIN);
  return {_mm512_ternarylogic_epi32(sign, _mm512_slli_epi16(words, 8), magnitude, 0xea)};
}

template <int HIGH>
inline Pairs load_pairs(const Nibble<HIGH>* p) {
  // -8 to 7. An index has five bits, of which the fifth is another code's: hence twice.
  alignas(64) static constexpr uint16_t TABLE[32] = {
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
      0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
  const __m512i words = load_words(&p->bits);
  const __m512i codes = HIGH ? _mm512_srli_epi16(words, 4) : words;
  return {_mm512_permutexvar_epi16(codes, _mm512_load_si512(TABLE))};
}

}  // namespace tilewise

#endif
