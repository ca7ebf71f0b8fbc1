// AVX-512 and AMX in terms of AVX2, so that their libraries can be built and tested on a machine that
// has neither. For tests: the results are those of the instructions, the speed is not.
//
// A build that has this folder in front of its include path (-Iemulated -mavx2 -mfma -mf16c) finds
// this file instead of the compiler's <immintrin.h>. It declares, within namespace tilewise, the
// vector types and the intrinsics that the kernels use; there they hide the compiler's, so the
// kernels are compiled as they stand. What is missing fails to compile: add it here. Inline assembly
// on vectors cannot be emulated; it is left out where TILEWISE_EMULATED is defined.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
#pragma once

#include_next <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || !defined(__AVX2__)
#error "an emulated build is compiled with the flags of AVX2"
#endif

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define __AVX512VBMI__ 1
#define __AVX512VNNI__ 1
#define __AVX512BF16__ 1
#define TILEWISE_EMULATED 1
#if defined(TILEWISE_EMULATES_AMX)
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#define __AMX_INT8__ 1
#endif

namespace tilewise {

struct __m512 {
  __m256 low, high;
};
struct __m512i {
  __m256i low, high;
};

// --- between lanes and halves ---------------------------------------------------------------------

namespace emulated {

template <class T>
struct Lanes {  // a vector as an array
  static constexpr int COUNT = 64 / sizeof(T);
  T at[COUNT];
};

template <class T, class Vector>
inline Lanes<T> lanes(Vector x) {
  Lanes<T> y;
  static_assert(sizeof(x) == sizeof(y), "a vector of 64 bytes");
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

template <class Vector, class T>
inline Vector vector(const Lanes<T>& x) {
  Vector y;
  static_assert(sizeof(x) == sizeof(y), "a vector of 64 bytes");
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

// All-ones lanes where the mask has a bit.
inline __m256i spread8(uint32_t mask) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit), bit);
}
inline __m512i spread16(uint32_t mask) { return {spread8(mask), spread8(mask >> 8)}; }

inline __mmask16 gather16(__m256 low, __m256 high) {
  return static_cast<__mmask16>(_mm256_movemask_ps(low) | _mm256_movemask_ps(high) << 8);
}
inline __mmask16 gather16(__m256i low, __m256i high) {
  return gather16(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high));
}

}  // namespace emulated

// --- float32 --------------------------------------------------------------------------------------

inline __m512 _mm512_setzero_ps() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline __m512 _mm512_set1_ps(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }

#undef _mm512_set_ps
#undef _mm512_setr_ps
inline __m512 _mm512_setr_ps(float a, float b, float c, float d, float e, float f, float g, float h,
                             float i, float j, float k, float l, float m, float n, float o,
                             float p) {
  return {_mm256_setr_ps(a, b, c, d, e, f, g, h), _mm256_setr_ps(i, j, k, l, m, n, o, p)};
}

#define TILEWISE_PS_UNARY(name)                                    \
  inline __m512 _mm512_##name(__m512 a) {                          \
    return {_mm256_##name(a.low), _mm256_##name(a.high)};          \
  }
#define TILEWISE_PS_BINARY(name)                                   \
  inline __m512 _mm512_##name(__m512 a, __m512 b) {                \
    return {_mm256_##name(a.low, b.low), _mm256_##name(a.high, b.high)}; \
  }
#define TILEWISE_PS_TERNARY(name)                                  \
  inline __m512 _mm512_##name(__m512 a, __m512 b, __m512 c) {      \
    return {_mm256_##name(a.low, b.low, c.low), _mm256_##name(a.high, b.high, c.high)}; \
  }
TILEWISE_PS_UNARY(sqrt_ps)
TILEWISE_PS_UNARY(moveldup_ps)
TILEWISE_PS_UNARY(movehdup_ps)
TILEWISE_PS_BINARY(add_ps)
TILEWISE_PS_BINARY(sub_ps)
TILEWISE_PS_BINARY(mul_ps)
TILEWISE_PS_BINARY(div_ps)
TILEWISE_PS_BINARY(max_ps)
TILEWISE_PS_BINARY(min_ps)
TILEWISE_PS_BINARY(unpacklo_ps)
TILEWISE_PS_BINARY(unpackhi_ps)
TILEWISE_PS_BINARY(and_ps)
TILEWISE_PS_BINARY(andnot_ps)
TILEWISE_PS_BINARY(or_ps)
TILEWISE_PS_BINARY(xor_ps)
TILEWISE_PS_TERNARY(fmadd_ps)
TILEWISE_PS_TERNARY(fnmadd_ps)
TILEWISE_PS_TERNARY(fmsub_ps)

inline __m512 _mm512_rcp14_ps(__m512 a) { return _mm512_div_ps(_mm512_set1_ps(1.0f), a); }
inline __m512 _mm512_abs_ps(__m512 a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }

// The kernels round to integers only: no fraction bits, whose number would be in imm's upper half.
template <int imm>
inline __m512 roundscale_ps(__m512 a) {
  static_assert(imm >> 4 == 0, "rounds to integers only");
  return {_mm256_round_ps(a.low, imm), _mm256_round_ps(a.high, imm)};
}
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps(a, imm) ::tilewise::roundscale_ps<imm>(a)

// What rounding to an integer leaves; 0 of an infinity.
template <int imm>
inline __m512 reduce_ps(__m512 a) {
  const auto half = [](__m256 x) {
    const __m256 rest = _mm256_sub_ps(x, _mm256_round_ps(x, imm));
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
    return _mm256_andnot_ps(
        _mm256_cmp_ps(magnitude, _mm256_set1_ps(__builtin_inff()), _CMP_EQ_OQ), rest);
  };
  static_assert(imm >> 4 == 0, "rounds to integers only");
  return {half(a.low), half(a.high)};
}
#undef _mm512_reduce_ps
#define _mm512_reduce_ps(a, imm) ::tilewise::reduce_ps<imm>(a)

// a * 2^floor(b), rounded once for |b| <= 250, beyond which nothing finite is left anyway.
inline __m256 emulated_scalef(__m256 a, __m256 b) {
  const auto power = [](__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  };
  const __m256 bounded = _mm256_max_ps(_mm256_min_ps(b, _mm256_set1_ps(250.0f)),
                                       _mm256_set1_ps(-250.0f));
  const __m256i n = _mm256_cvtps_epi32(_mm256_floor_ps(bounded));
  const __m256i half = _mm256_srai_epi32(n, 1);
  const __m256 scaled =
      _mm256_mul_ps(_mm256_mul_ps(a, power(half)), power(_mm256_sub_epi32(n, half)));
  return _mm256_blendv_ps(scaled, b, _mm256_cmp_ps(b, b, _CMP_UNORD_Q));
}
inline __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
  return {emulated_scalef(a.low, b.low), emulated_scalef(a.high, b.high)};
}

// As the compilers sum: halves, quarters, pairs.
inline float _mm512_cvtss_f32(__m512 a) { return _mm256_cvtss_f32(a.low); }
inline float _mm512_reduce_add_ps(__m512 a) {
  const __m256 b = _mm256_add_ps(a.high, a.low);
  const __m128 c = _mm_add_ps(_mm256_extractf128_ps(b, 1), _mm256_castps256_ps128(b));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
inline float _mm512_reduce_max_ps(__m512 a) {
  const __m256 b = _mm256_max_ps(a.high, a.low);
  const __m128 c = _mm_max_ps(_mm256_extractf128_ps(b, 1), _mm256_castps256_ps128(b));
  const __m128 d = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}

// --- masks ----------------------------------------------------------------------------------------

inline __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
  const __m512i m = emulated::spread16(mask);
  return {_mm256_blendv_ps(a.low, b.low, _mm256_castsi256_ps(m.low)),
          _mm256_blendv_ps(a.high, b.high, _mm256_castsi256_ps(m.high))};
}
inline __m512 _mm512_mask_mov_ps(__m512 a, __mmask16 mask, __m512 b) {
  return _mm512_mask_blend_ps(mask, a, b);
}
inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 a) {
  return _mm512_mask_blend_ps(mask, _mm512_setzero_ps(), a);
}
inline __m512 _mm512_maskz_scalef_ps(__mmask16 mask, __m512 a, __m512 b) {
  return _mm512_maskz_mov_ps(mask, _mm512_scalef_ps(a, b));
}

template <int predicate>
inline __mmask16 cmp_ps_mask(__m512 a, __m512 b) {
  return emulated::gather16(_mm256_cmp_ps(a.low, b.low, predicate),
                            _mm256_cmp_ps(a.high, b.high, predicate));
}
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, predicate) ::tilewise::cmp_ps_mask<predicate>(a, b)

// Of the classes of numbers quiet and signaling NaNs and subnormals.
template <int CLASSES>
inline __mmask16 fpclass_ps_mask(__m512 a) {
  static_assert((CLASSES & ~(0x01 | 0x80 | 0x20)) == 0, "a class that is not emulated");
  const auto x = emulated::lanes<uint32_t>(a);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) {
    const uint32_t magnitude = x.at[i] & 0x7fffffffu;
    const int nan = magnitude >= 0x7fc00000u ? 0x01 : magnitude > 0x7f800000u ? 0x80 : 0;
    const int subnormal = magnitude != 0 && magnitude < 0x00800000u ? 0x20 : 0;
    if (CLASSES & (nan | subnormal)) mask |= 1u << i;
  }
  return static_cast<__mmask16>(mask);
}
#undef _mm512_fpclass_ps_mask
#define _mm512_fpclass_ps_mask(a, classes) ::tilewise::fpclass_ps_mask<classes>(a)

// --- integers -------------------------------------------------------------------------------------

inline __m512i _mm512_setzero_si512() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
#undef _mm512_setr_epi32
#undef _mm512_setr_epi64
inline __m512i _mm512_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h, int i,
                                 int j, int k, int l, int m, int n, int o, int p) {
  return {_mm256_setr_epi32(a, b, c, d, e, f, g, h), _mm256_setr_epi32(i, j, k, l, m, n, o, p)};
}
inline __m512i _mm512_setr_epi64(long long a, long long b, long long c, long long d, long long e,
                                 long long f, long long g, long long h) {
  return {_mm256_setr_epi64x(a, b, c, d), _mm256_setr_epi64x(e, f, g, h)};
}
inline __m512i _mm512_set1_epi8(char x) { return {_mm256_set1_epi8(x), _mm256_set1_epi8(x)}; }
inline __m512i _mm512_set1_epi16(short x) { return {_mm256_set1_epi16(x), _mm256_set1_epi16(x)}; }
inline __m512i _mm512_set1_epi32(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }

#define TILEWISE_SI_BINARY(name, half)                             \
  inline __m512i _mm512_##name(__m512i a, __m512i b) {             \
    return {_mm256_##half(a.low, b.low), _mm256_##half(a.high, b.high)}; \
  }
TILEWISE_SI_BINARY(and_si512, and_si256)
TILEWISE_SI_BINARY(andnot_si512, andnot_si256)
TILEWISE_SI_BINARY(or_si512, or_si256)
TILEWISE_SI_BINARY(xor_si512, xor_si256)
TILEWISE_SI_BINARY(and_epi32, and_si256)
TILEWISE_SI_BINARY(or_epi32, or_si256)
TILEWISE_SI_BINARY(add_epi8, add_epi8)
TILEWISE_SI_BINARY(sub_epi8, sub_epi8)
TILEWISE_SI_BINARY(sub_epi16, sub_epi16)
TILEWISE_SI_BINARY(add_epi32, add_epi32)
TILEWISE_SI_BINARY(sub_epi32, sub_epi32)
TILEWISE_SI_BINARY(mullo_epi32, mullo_epi32)
TILEWISE_SI_BINARY(max_epi32, max_epi32)
TILEWISE_SI_BINARY(min_epi32, min_epi32)
TILEWISE_SI_BINARY(packs_epi16, packs_epi16)
TILEWISE_SI_BINARY(packs_epi32, packs_epi32)
TILEWISE_SI_BINARY(unpacklo_epi8, unpacklo_epi8)
TILEWISE_SI_BINARY(unpackhi_epi8, unpackhi_epi8)
TILEWISE_SI_BINARY(unpacklo_epi16, unpacklo_epi16)
TILEWISE_SI_BINARY(unpackhi_epi16, unpackhi_epi16)
TILEWISE_SI_BINARY(unpacklo_epi32, unpacklo_epi32)
TILEWISE_SI_BINARY(unpackhi_epi32, unpackhi_epi32)
TILEWISE_SI_BINARY(unpacklo_epi64, unpacklo_epi64)
TILEWISE_SI_BINARY(unpackhi_epi64, unpackhi_epi64)
TILEWISE_SI_BINARY(shuffle_epi8, shuffle_epi8)

// Bit 4 a + 2 b + c of `table`, for every bit of the three.
template <int table>
inline __m512i ternarylogic(__m512i a, __m512i b, __m512i c) {
  const __m512i ones = _mm512_set1_epi32(-1);
  __m512i result = _mm512_setzero_si512();
  for (int i = 0; i < 8; ++i) {
    if (!(table >> i & 1)) continue;
    const __m512i x = i & 4 ? a : _mm512_xor_si512(a, ones);
    const __m512i y = i & 2 ? b : _mm512_xor_si512(b, ones);
    const __m512i z = i & 1 ? c : _mm512_xor_si512(c, ones);
    result = _mm512_or_si512(result, _mm512_and_si512(_mm512_and_si512(x, y), z));
  }
  return result;
}
#undef _mm512_ternarylogic_epi32
#undef _mm512_ternarylogic_epi64
#define _mm512_ternarylogic_epi32(a, b, c, table) ::tilewise::ternarylogic<table>(a, b, c)
#define _mm512_ternarylogic_epi64(a, b, c, table) ::tilewise::ternarylogic<table>(a, b, c)

inline __m512i _mm512_castsi128_si512(__m128i a) {
  return {_mm256_zextsi128_si256(a), _mm256_setzero_si256()};
}
inline int32_t _mm512_reduce_add_epi32(__m512i a) {
  int32_t sum = 0;
  for (const int32_t x : emulated::lanes<int32_t>(a).at) sum += x;
  return sum;
}
inline __m512i inserti32x4(__m512i a, __m128i b, int place) {
  const __m256i both = _mm256_broadcastsi128_si256(b);
  __m256i& half = place & 2 ? a.high : a.low;
  half = place & 1 ? _mm256_blend_epi32(half, both, 0xf0) : _mm256_blend_epi32(half, both, 0x0f);
  return a;
}
#undef _mm512_inserti32x4
#define _mm512_inserti32x4(a, b, place) ::tilewise::inserti32x4(a, b, place)

inline __m512i _mm512_slli_epi16(__m512i a, unsigned n) {
  return {_mm256_slli_epi16(a.low, n), _mm256_slli_epi16(a.high, n)};
}
inline __m512i _mm512_srli_epi16(__m512i a, unsigned n) {
  return {_mm256_srli_epi16(a.low, n), _mm256_srli_epi16(a.high, n)};
}
inline __m512i _mm512_slli_epi32(__m512i a, unsigned n) {
  return {_mm256_slli_epi32(a.low, n), _mm256_slli_epi32(a.high, n)};
}
inline __m512i _mm512_srli_epi32(__m512i a, unsigned n) {
  return {_mm256_srli_epi32(a.low, n), _mm256_srli_epi32(a.high, n)};
}
inline __m512i _mm512_srai_epi32(__m512i a, unsigned n) {
  return {_mm256_srai_epi32(a.low, n), _mm256_srai_epi32(a.high, n)};
}

inline __mmask16 _mm512_cmpeq_epi32_mask(__m512i a, __m512i b) {
  return emulated::gather16(_mm256_cmpeq_epi32(a.low, b.low), _mm256_cmpeq_epi32(a.high, b.high));
}
inline __mmask16 _mm512_cmpgt_epi32_mask(__m512i a, __m512i b) {
  return emulated::gather16(_mm256_cmpgt_epi32(a.low, b.low), _mm256_cmpgt_epi32(a.high, b.high));
}
inline __mmask16 _mm512_cmplt_epi32_mask(__m512i a, __m512i b) {
  return _mm512_cmpgt_epi32_mask(b, a);
}
inline __mmask16 _mm512_test_epi32_mask(__m512i a, __m512i b) {
  return static_cast<__mmask16>(
      ~_mm512_cmpeq_epi32_mask(_mm512_and_si512(a, b), _mm512_setzero_si512()));
}
inline __m512i _mm512_mask_mov_epi32(__m512i a, __mmask16 mask, __m512i b) {
  const __m512i m = emulated::spread16(mask);
  return {_mm256_blendv_epi8(a.low, b.low, m.low), _mm256_blendv_epi8(a.high, b.high, m.high)};
}
inline __m512i _mm512_mask_blend_epi32(__mmask16 mask, __m512i a, __m512i b) {
  return _mm512_mask_mov_epi32(a, mask, b);
}
inline __m512i _mm512_maskz_mov_epi32(__mmask16 mask, __m512i a) {
  return _mm512_mask_mov_epi32(_mm512_setzero_si512(), mask, a);
}

// --- casts and conversions ------------------------------------------------------------------------

inline __m512 _mm512_castsi512_ps(__m512i a) {
  return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)};
}
inline __m512i _mm512_castps_si512(__m512 a) {
  return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)};
}
inline __m512 _mm512_castps256_ps512(__m256 a) { return {a, _mm256_setzero_ps()}; }
inline __m256 _mm512_castps512_ps256(__m512 a) { return a.low; }
inline __m512i _mm512_castsi256_si512(__m256i a) { return {a, _mm256_setzero_si256()}; }
inline __m256i _mm512_castsi512_si256(__m512i a) { return a.low; }
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)};
}
inline __m512i _mm512_cvtps_epi32(__m512 a) {
  return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)};
}
inline __m512i _mm512_cvttps_epi32(__m512 a) {
  return {_mm256_cvttps_epi32(a.low), _mm256_cvttps_epi32(a.high)};
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
          _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))};
}
inline __m512i _mm512_cvtepi16_epi32(__m256i a) {
  return {_mm256_cvtepi16_epi32(_mm256_castsi256_si128(a)),
          _mm256_cvtepi16_epi32(_mm256_extracti128_si256(a, 1))};
}
inline __m512i _mm512_cvtepi8_epi32(__m128i a) {
  return {_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8))};
}
inline __m512i _mm512_cvtepu8_epi32(__m128i a) {
  return {_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8))};
}
inline __m512i _mm512_cvtepi8_epi16(__m256i a) {
  return {_mm256_cvtepi8_epi16(_mm256_castsi256_si128(a)),
          _mm256_cvtepi8_epi16(_mm256_extracti128_si256(a, 1))};
}
inline __m512i _mm512_cvtepu8_epi16(__m256i a) {
  return {_mm256_cvtepu8_epi16(_mm256_castsi256_si128(a)),
          _mm256_cvtepu8_epi16(_mm256_extracti128_si256(a, 1))};
}
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  const __m256i low16 = _mm256_set1_epi32(0xffff);
  return _mm256_permute4x64_epi64(
      _mm256_packus_epi32(_mm256_and_si256(a.low, low16), _mm256_and_si256(a.high, low16)), 0xd8);
}
inline __m128i _mm512_cvtepi32_epi8(__m512i a) {
  const auto from = emulated::lanes<int32_t>(a);
  uint8_t to[16];
  for (int i = 0; i < 16; ++i) to[i] = static_cast<uint8_t>(from.at[i]);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(to));
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
}
template <int rounding>
inline __m256i cvtps_ph(__m512 a) {
  return _mm256_set_m128i(_mm256_cvtps_ph(a.high, rounding), _mm256_cvtps_ph(a.low, rounding));
}
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, rounding) ::tilewise::cvtps_ph<rounding>(a)

#undef TILEWISE_PS_UNARY
#undef TILEWISE_PS_BINARY
#undef TILEWISE_PS_TERNARY
#undef TILEWISE_SI_BINARY

}  // namespace tilewise

#include "emulated/avx512_moves.h"
