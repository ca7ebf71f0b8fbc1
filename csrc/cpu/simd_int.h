// Integer vectors beside F32: `I32`, as many 32-bit lanes, each also seen as four bytes; and the sums
// of products of bytes that quantized weights are multiplied with.
#pragma once

#include "cpu/simd.h"

namespace tilewise {

#if defined(__AVX512F__)

struct I32 {
  __m512i v;
  I32() = default;
  I32(__m512i x) : v(x) {}
  static I32 all(int32_t x) { return _mm512_set1_epi32(x); }
  static I32 zero() { return _mm512_setzero_si512(); }
};

inline I32 load_int(const void* p) { return _mm512_loadu_si512(p); }
inline void store_int(void* p, I32 x) { _mm512_storeu_si512(p, x.v); }
inline I32 operator&(I32 a, I32 b) { return _mm512_and_si512(a.v, b.v); }
inline I32 operator|(I32 a, I32 b) { return _mm512_or_si512(a.v, b.v); }
inline I32 operator^(I32 a, I32 b) { return _mm512_xor_si512(a.v, b.v); }
inline I32 operator+(I32 a, I32 b) { return _mm512_add_epi32(a.v, b.v); }
inline I32 operator-(I32 a, I32 b) { return _mm512_sub_epi32(a.v, b.v); }
inline I32 operator*(I32 a, I32 b) { return _mm512_mullo_epi32(a.v, b.v); }
inline I32 operator>>(I32 a, unsigned n) { return _mm512_srli_epi32(a.v, n); }
inline I32 operator<<(I32 a, unsigned n) { return _mm512_slli_epi32(a.v, n); }
inline I32 shift_signed(I32 a, unsigned n) { return _mm512_srai_epi32(a.v, n); }
inline F32 to_f32(I32 a) { return _mm512_cvtepi32_ps(a.v); }
inline F32 bits_as_f32(I32 a) { return _mm512_castsi512_ps(a.v); }
inline I32 bits_of(F32 a) { return _mm512_castps_si512(a.v); }
inline I32 widen_u8(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline I32 widen_i8(const uint8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// The nearest integers, ties to even, as bytes. They must be in range.
inline void store_rounded_i8(int8_t* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
// table[x] for every byte x < 16.
inline I32 look_up_bytes(const uint8_t* table, I32 x) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), x.v);
}
// table[x] for every lane x < 16.
inline F32 look_up(const float* table, I32 x) {
  return _mm512_permutexvar_ps(x.v, _mm512_loadu_ps(table));
}

inline I32 to_i32(F32 x) { return _mm512_cvtps_epi32(x.v); }  // to nearest
inline I32 sub_bytes(I32 a, I32 b) { return _mm512_sub_epi8(a.v, b.v); }
// Adds four products of bytes in each lane, unsigned ones of a and signed ones of b.
inline I32 dot_bytes(I32 sum, I32 a, I32 b) { return _mm512_dpbusd_epi32(sum.v, a.v, b.v); }

// The nearest integers, ties to even, as signed bytes, one vector after the other.
inline I32 to_bytes(const F32 (&x)[4]) {
  const __m512i low = _mm512_packs_epi32(to_i32(x[0]).v, to_i32(x[1]).v);
  const __m512i high = _mm512_packs_epi32(to_i32(x[2]).v, to_i32(x[3]).v);
  // 128 bits hold four bytes of each.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
}
// The larger of two numbers that are not negative; a NaN is larger than all.
inline F32 max_bits(F32 a, F32 b) {
  return _mm512_castsi512_ps(
      _mm512_max_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)));
}

// a[i] holds 8 lanes of strip 2 i and 8 of strip 2 i + 1. Adds up the first four lanes of each strip,
// in sums[0], and the last four, in sums[1]; lane by lane as the strips are numbered.
inline void reduce_halves(const I32 (&a)[8], I32 (&sums)[2]) {
  __m512i fours[2];  // 128 bits for each half of a strip, and 32 of them for each of 4 vectors
  for (int i = 0; i < 2; ++i) {
    const I32* b = a + 4 * i;
    const I32 x = I32(_mm512_unpacklo_epi32(b[0].v, b[1].v)) + _mm512_unpackhi_epi32(b[0].v, b[1].v);
    const I32 y = I32(_mm512_unpacklo_epi32(b[2].v, b[3].v)) + _mm512_unpackhi_epi32(b[2].v, b[3].v);
    fours[i] = (I32(_mm512_unpacklo_epi64(x.v, y.v)) + _mm512_unpackhi_epi64(x.v, y.v)).v;
  }
  const __m512i low = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 16, 24, 17, 25, 18, 26, 19, 27);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
  sums[0] = _mm512_permutex2var_epi32(fours[0], low, fours[1]);
  sums[1] = _mm512_permutex2var_epi32(fours[0], high, fours[1]);
}

// Lane by lane a and b in bfloat16, a in the lower half. What is subnormal becomes zero.
inline I32 to_pairs(F32 a, F32 b) {
  return in_turns((__m512i)_mm512_cvtne2ps_pbh(b.v, a.v)).v;
}

// What is added to signed bytes before they are multiplied: vpdpbusd takes one side unsigned.
constexpr int BYTE_OFFSET = 128;

// Sums of four products of bytes in each lane: codes of BITS bits times x.
template <int BITS>
class Products {
 public:
  static constexpr int ROOM = 8;  // calls of add() before widen() or take()

  void add(I32 codes, I32 x) { sum_ = _mm512_dpbusd_epi32(sum_, codes.v, x.v); }
  void widen() {}
  I32 take() const { return sum_; }

 private:
  __m512i sum_ = _mm512_setzero_si512();
};

#else

struct I32 {
  __m256i v;
  I32() = default;
  I32(__m256i x) : v(x) {}
  static I32 all(int32_t x) { return _mm256_set1_epi32(x); }
  static I32 zero() { return _mm256_setzero_si256(); }
};

inline I32 load_int(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline void store_int(void* p, I32 x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x.v); }
inline I32 operator&(I32 a, I32 b) { return _mm256_and_si256(a.v, b.v); }
inline I32 operator|(I32 a, I32 b) { return _mm256_or_si256(a.v, b.v); }
inline I32 operator^(I32 a, I32 b) { return _mm256_xor_si256(a.v, b.v); }
inline I32 operator+(I32 a, I32 b) { return _mm256_add_epi32(a.v, b.v); }
inline I32 operator-(I32 a, I32 b) { return _mm256_sub_epi32(a.v, b.v); }
inline I32 operator*(I32 a, I32 b) { return _mm256_mullo_epi32(a.v, b.v); }
inline I32 operator>>(I32 a, unsigned n) { return _mm256_srli_epi32(a.v, n); }
inline I32 operator<<(I32 a, unsigned n) { return _mm256_slli_epi32(a.v, n); }
inline I32 shift_signed(I32 a, unsigned n) { return _mm256_srai_epi32(a.v, n); }
inline F32 to_f32(I32 a) { return _mm256_cvtepi32_ps(a.v); }
inline F32 bits_as_f32(I32 a) { return _mm256_castsi256_ps(a.v); }
inline I32 bits_of(F32 a) { return _mm256_castps_si256(a.v); }
inline I32 widen_u8(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline I32 widen_i8(const uint8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
// The nearest integers, ties to even, as bytes. They must be in range.
inline void store_rounded_i8(int8_t* p, F32 x) {
  const __m256i wide = _mm256_cvtps_epi32(x.v);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
// table[x] for every byte x < 16.
inline I32 look_up_bytes(const uint8_t* table, I32 x) {
  const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), x.v);
}
// table[x] for every lane x < 16.
inline F32 look_up(const float* table, I32 x) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), x.v);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), x.v);
  const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(x.v, 28));  // bit 3 is the sign
  return _mm256_blendv_ps(low, high, is_high);
}

// What is added to signed bytes before they are multiplied: nothing, see Products.
constexpr int BYTE_OFFSET = 0;

// Sums of four products of bytes in each lane: codes of BITS bits, unsigned below 8 and signed with 8,
// times x, which must not be -128.
//
// vpmaddubsw adds two products in 16 bits and saturates, so sums may stay there for eight vectors
// of 4-bit codes (15 * 127 * 2 * 8 = 30480), four of 5 bits and two of 6. Bytes have room for one:
// |w| times x with the sign of w is at most 128 * 127 * 2 = 32512.
template <int BITS>
class Products {
 public:
  static constexpr int ROOM = BITS <= 4 ? 8 : BITS == 5 ? 4 : BITS == 6 ? 2 : 1;

  void add(I32 codes, I32 x) {
    const __m256i product =
        BITS == 8 ? _mm256_maddubs_epi16(_mm256_abs_epi8(codes.v), _mm256_sign_epi8(x.v, codes.v))
                  : _mm256_maddubs_epi16(codes.v, x.v);
    narrow_ = ROOM == 1 ? product : _mm256_add_epi16(narrow_, product);
  }
  void widen() {
    wide_ = _mm256_add_epi32(wide_, _mm256_madd_epi16(narrow_, _mm256_set1_epi16(1)));
    narrow_ = _mm256_setzero_si256();
  }
  I32 take() {
    widen();
    return wide_;
  }

 private:
  __m256i narrow_ = _mm256_setzero_si256(), wide_ = _mm256_setzero_si256();
};

#endif

}  // namespace tilewise
