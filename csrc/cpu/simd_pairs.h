// Products of two numbers at a time: of bfloat16, added to a float32 sum (AVX512_BF16), and of 16-bit
// integers, added to a 32-bit one (AVX512_VNNI).
//
// Float8 is exact in bfloat16, so a product of such a pair with bfloat16 queries is exact too, before
// it is added; and it needs half the instructions of float32. What is subnormal in bfloat16 counts as
// zero.
#pragma once

#include "cpu/simd_int.h"

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

// The two bytes of Float8 magnitudes in bfloat16, by their seven bits.
struct Float8Table {
  alignas(64) uint8_t lower[128], upper[128];
};

constexpr Float8Table float8_table() {
  Float8Table table{};
  for (int code = 1; code < 128; ++code) {
    int bits = (code << 4) + (120 << 7);  // exponent bias 7 against 127
    for (int top = 0; code >> 3 == 0 && top < 3; ++top) {  // of a subnormal, its highest bit
      if (code >> top == 1) bits = (118 + top) << 7 | (code << (7 - top) & 0x7f);
    }
    if (code == 127) bits = 0x7fc0;
    table.lower[code] = static_cast<uint8_t>(bits);
    table.upper[code] = static_cast<uint8_t>(bits >> 8);
  }
  return table;
}

// 64 codes of Float8: the first eight of each sixteen in `low`, the others in `high`.
inline void float8_pairs(__m512i codes, Pairs& low, Pairs& high) {
  static constexpr Float8Table TABLE = float8_table();
  const auto look_up = [&](const uint8_t* table) {  // by the lower seven bits
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes,
                                    _mm512_load_si512(table + 64));
  };
  const __m512i lower = look_up(TABLE.lower), sign = _mm512_set1_epi8(INT8_MIN);
  const __m512i upper = _mm512_ternarylogic_epi32(look_up(TABLE.upper), codes, sign, 0xf8);
  low.v = _mm512_unpacklo_epi8(lower, upper);
  high.v = _mm512_unpackhi_epi8(lower, upper);
}

// 32 codes, and nothing of use behind them.
inline __m512i load_codes(const Float8* p) {
  return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Elements of two rows.
inline void load_pairs(const Float8* a, const Float8* b, Pairs& of_a, Pairs& of_b) {
  const __m512i turns = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  float8_pairs(_mm512_permutex2var_epi64(load_codes(a), turns, load_codes(b)), of_a, of_b);
}
inline Pairs load_pairs(const Float8* p) {
  Pairs x, unused;
  load_pairs(p, p, x, unused);
  return x;
}

// What `interleave` makes of the elements of two rows.
inline void load_interleaved(const BFloat16* a, const BFloat16* b, Pairs& low, Pairs& high) {
  interleave(load_pairs(a), load_pairs(b), low, high);
}
inline void load_interleaved(const Float8* a, const Float8* b, Pairs& low, Pairs& high) {
  const __m512i turns = _mm512_setr_epi32(  // of bytes
      0x41014000, 0x43034202, 0x45054404, 0x47074606, 0x49094808, 0x4b0b4a0a, 0x4d0d4c0c,
      0x4f0f4e0e, 0x51115010, 0x53135212, 0x55155414, 0x57175616, 0x59195818, 0x5b1b5a1a,
      0x5d1d5c1c, 0x5f1f5e1e);
  float8_pairs(_mm512_permutex2var_epi8(load_codes(a), turns, load_codes(b)), low, high);
}

inline __m512i widen_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Pairs of 16-bit integers, whose products are added to 32-bit sums.
struct Words {
  static constexpr int WIDTH = 32;
  __m512i v;
};

inline I32 fma(Words a, Words b, I32 c) { return _mm512_dpwssd_epi32(c.v, a.v, b.v); }

inline void interleave(Words a, Words b, Words& low, Words& high) {
  low.v = _mm512_unpacklo_epi16(a.v, b.v);
  high.v = _mm512_unpackhi_epi16(a.v, b.v);
}

inline Words load_words(const int8_t* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

template <int HIGH>
inline Words load_words(const Nibble<HIGH>* p) {
  const __m512i words = widen_bytes(&p->bits);
  const __m512i codes =
      HIGH ? _mm512_srli_epi16(words, 4) : _mm512_and_si512(words, _mm512_set1_epi16(15));
  return {_mm512_sub_epi16(codes, _mm512_set1_epi16(8))};
}

inline I32 load(const int32_t* p) { return load_int(p); }
inline void store(int32_t* p, I32 x) { store_int(p, x); }
inline void store_low_bytes(void* p, I32 x) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
}
// In 16 bits; all must be in range.
inline void store_words(int16_t* p, I32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x.v));
}
inline int32_t reduce_add(I32 x) { return _mm512_reduce_add_epi32(x.v); }

// sum + the products of four unsigned codes in each lane with the four signed digits at p.
inline I32 dot_group(I32 sum, I32 codes, const int32_t* p) {
#if defined(TILEWISE_EMULATED)
  return dot_bytes(sum, codes, I32::all(*p));
#else
  // GCC 12 would load the digits first, and copy the sum.
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum.v) : "v"(codes.v), "m"(*p));
  return sum;
#endif
}

// 16 bytes of each, behind each other.
inline I32 load_quarters(const void* a, const void* b, const void* c, const void* d) {
  const auto quarter = [](const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); };
  __m512i x = _mm512_castsi128_si512(quarter(a));
  x = _mm512_inserti32x4(x, quarter(b), 1);
  x = _mm512_inserti32x4(x, quarter(c), 2);
  return _mm512_inserti32x4(x, quarter(d), 3);
}

// Element i of each quarter of rows[j] becomes element j of that quarter of rows[i].
inline void transpose_quarters(I32 (&rows)[4]) {
  const __m512i a = _mm512_unpacklo_epi32(rows[0].v, rows[1].v);
  const __m512i b = _mm512_unpackhi_epi32(rows[0].v, rows[1].v);
  const __m512i c = _mm512_unpacklo_epi32(rows[2].v, rows[3].v);
  const __m512i d = _mm512_unpackhi_epi32(rows[2].v, rows[3].v);
  rows[0] = _mm512_unpacklo_epi64(a, c);
  rows[1] = _mm512_unpackhi_epi64(a, c);
  rows[2] = _mm512_unpacklo_epi64(b, d);
  rows[3] = _mm512_unpackhi_epi64(b, d);
}

}  // namespace tilewise

#endif
