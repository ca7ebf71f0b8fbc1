// The second half of emulated/immintrin.h: what moves and converts lanes, and products of small
// types. Plain loops where AVX2 has nothing near.
#pragma once

#include "emulated/immintrin.h"

namespace tilewise {

// --- memory ---------------------------------------------------------------------------------------

inline __m512 _mm512_loadu_ps(const void* p) {
  const float* f = static_cast<const float*>(p);
  return {_mm256_loadu_ps(f), _mm256_loadu_ps(f + 8)};
}
inline __m512 _mm512_load_ps(const void* p) {
  const float* f = static_cast<const float*>(p);
  return {_mm256_load_ps(f), _mm256_load_ps(f + 8)};
}
inline void _mm512_storeu_ps(void* p, __m512 a) {
  float* f = static_cast<float*>(p);
  _mm256_storeu_ps(f, a.low);
  _mm256_storeu_ps(f + 8, a.high);
}
inline __m512i _mm512_loadu_si512(const void* p) {
  return _mm512_castps_si512(_mm512_loadu_ps(p));
}
inline __m512i _mm512_load_si512(const void* p) { return _mm512_castps_si512(_mm512_load_ps(p)); }
inline void _mm512_storeu_si512(void* p, __m512i a) {
  _mm512_storeu_ps(p, _mm512_castsi512_ps(a));
}
inline void _mm512_store_si512(void* p, __m512i a) { _mm512_storeu_si512(p, a); }

inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  const float* f = static_cast<const float*>(p);
  const __m512i m = emulated::spread16(mask);
  return {_mm256_maskload_ps(f, m.low), _mm256_maskload_ps(f + 8, m.high)};
}
inline __m512 _mm512_mask_loadu_ps(__m512 a, __mmask16 mask, const void* p) {
  return _mm512_mask_blend_ps(mask, a, _mm512_maskz_loadu_ps(mask, p));
}
inline void _mm512_mask_storeu_ps(void* p, __mmask16 mask, __m512 a) {
  float* f = static_cast<float*>(p);
  const __m512i m = emulated::spread16(mask);
  _mm256_maskstore_ps(f, m.low, a.low);
  _mm256_maskstore_ps(f + 8, m.high, a.high);
}
inline __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void* p) {
  return _mm512_castps_si512(_mm512_maskz_loadu_ps(mask, p));
}
inline void _mm512_mask_storeu_epi32(void* p, __mmask16 mask, __m512i a) {
  _mm512_mask_storeu_ps(p, mask, _mm512_castsi512_ps(a));
}

// Masked bytes and words: only those whose bit is set are touched.
template <class Vector, class T, class Mask>
inline Vector emulated_masked_load(Mask mask, const void* p) {
  T at[sizeof(Vector) / sizeof(T)] = {};
  for (unsigned i = 0; i < sizeof(at) / sizeof(T); ++i) {
    if (mask >> i & 1) std::memcpy(at + i, static_cast<const T*>(p) + i, sizeof(T));
  }
  Vector x;
  std::memcpy(&x, at, sizeof(x));
  return x;
}
template <class T, class Vector, class Mask>
inline void emulated_masked_store(void* p, Mask mask, Vector x) {
  T at[sizeof(Vector) / sizeof(T)];
  std::memcpy(at, &x, sizeof(x));
  for (unsigned i = 0; i < sizeof(at) / sizeof(T); ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<T*>(p) + i, at + i, sizeof(T));
  }
}
inline __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void* p) {
  return emulated_masked_load<__m512i, uint8_t>(mask, p);
}
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* p) {
  return emulated_masked_load<__m512i, uint16_t>(mask, p);
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  return emulated_masked_load<__m256i, uint16_t>(mask, p);
}
inline __m256i _mm256_maskz_loadu_epi8(__mmask32 mask, const void* p) {
  return emulated_masked_load<__m256i, uint8_t>(mask, p);
}
inline __m128i _mm_maskz_loadu_epi8(__mmask16 mask, const void* p) {
  return emulated_masked_load<__m128i, uint8_t>(mask, p);
}
inline void _mm512_mask_storeu_epi16(void* p, __mmask32 mask, __m512i x) {
  emulated_masked_store<uint16_t>(p, mask, x);
}
inline void _mm256_mask_storeu_epi16(void* p, __mmask16 mask, __m256i x) {
  emulated_masked_store<uint16_t>(p, mask, x);
}

// --- moves across lanes ---------------------------------------------------------------------------

template <int imm, class Vector>  // quarters: two of a, then two of b
inline Vector shuffle_quarters(Vector a, Vector b) {
  struct Quarter {
    uint64_t bits[2];
  };
  const auto from_a = emulated::lanes<Quarter>(a), from_b = emulated::lanes<Quarter>(b);
  emulated::Lanes<Quarter> to;
  to.at[0] = from_a.at[imm & 3];
  to.at[1] = from_a.at[imm >> 2 & 3];
  to.at[2] = from_b.at[imm >> 4 & 3];
  to.at[3] = from_b.at[imm >> 6 & 3];
  return emulated::vector<Vector>(to);
}
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_i32x4
#undef _mm512_shuffle_i64x2
#define _mm512_shuffle_f32x4(a, b, imm) ::tilewise::shuffle_quarters<imm>(a, b)
#define _mm512_shuffle_i32x4(a, b, imm) ::tilewise::shuffle_quarters<imm>(a, b)
#define _mm512_shuffle_i64x2(a, b, imm) ::tilewise::shuffle_quarters<imm>(a, b)

template <int imm>
inline __m512 shuffle_ps(__m512 a, __m512 b) {
  return {_mm256_shuffle_ps(a.low, b.low, imm), _mm256_shuffle_ps(a.high, b.high, imm)};
}
#undef _mm512_shuffle_ps
#define _mm512_shuffle_ps(a, b, imm) ::tilewise::shuffle_ps<imm>(a, b)

template <int imm>
inline __m512 permute_ps(__m512 a) {
  return {_mm256_permute_ps(a.low, imm), _mm256_permute_ps(a.high, imm)};
}
#undef _mm512_permute_ps
#define _mm512_permute_ps(a, imm) ::tilewise::permute_ps<imm>(a)

template <int imm>
inline __m512i shuffle_epi32(__m512i a) {
  return {_mm256_shuffle_epi32(a.low, imm), _mm256_shuffle_epi32(a.high, imm)};
}
#undef _mm512_shuffle_epi32
#define _mm512_shuffle_epi32(a, imm) ::tilewise::shuffle_epi32<static_cast<int>(imm)>(a)

template <class T, class Vector>
inline Vector emulated_permute(__m512i index, Vector a) {
  const auto i = emulated::lanes<T>(index), from = emulated::lanes<T>(a);
  emulated::Lanes<T> to;
  for (unsigned n = 0; n < to.COUNT; ++n) to.at[n] = from.at[i.at[n] & (to.COUNT - 1)];
  return emulated::vector<Vector>(to);
}
template <class T, class Vector>
inline Vector emulated_permute2(Vector a, __m512i index, Vector b) {
  const auto i = emulated::lanes<T>(index), from_a = emulated::lanes<T>(a),
             from_b = emulated::lanes<T>(b);
  emulated::Lanes<T> to;
  for (unsigned n = 0; n < to.COUNT; ++n) {
    const auto& from = i.at[n] & to.COUNT ? from_b : from_a;
    to.at[n] = from.at[i.at[n] & (to.COUNT - 1)];
  }
  return emulated::vector<Vector>(to);
}
inline __m512 _mm512_permutexvar_ps(__m512i i, __m512 a) {
  return emulated_permute<uint32_t>(i, a);
}
inline __m512i _mm512_permutexvar_epi8(__m512i i, __m512i a) {
  return emulated_permute<uint8_t>(i, a);
}
inline __m512i _mm512_permutexvar_epi16(__m512i i, __m512i a) {
  return emulated_permute<uint16_t>(i, a);
}
inline __m512i _mm512_permutexvar_epi32(__m512i i, __m512i a) {
  return emulated_permute<uint32_t>(i, a);
}
inline __m512i _mm512_permutexvar_epi64(__m512i i, __m512i a) {
  return emulated_permute<uint64_t>(i, a);
}
inline __m512 _mm512_permutex2var_ps(__m512 a, __m512i i, __m512 b) {
  return emulated_permute2<uint32_t>(a, i, b);
}
inline __m512i _mm512_permutex2var_epi8(__m512i a, __m512i i, __m512i b) {
  return emulated_permute2<uint8_t>(a, i, b);
}
inline __m512i _mm512_permutex2var_epi16(__m512i a, __m512i i, __m512i b) {
  return emulated_permute2<uint16_t>(a, i, b);
}
inline __m512i _mm512_permutex2var_epi64(__m512i a, __m512i i, __m512i b) {
  return emulated_permute2<uint64_t>(a, i, b);
}
inline __m512i _mm512_permutex2var_epi32(__m512i a, __m512i i, __m512i b) {
  return emulated_permute2<uint32_t>(a, i, b);
}

template <int part>
inline __m256i extract_half(__m512i a) {
  return part ? a.high : a.low;
}
template <int part>
inline __m256 extract_half(__m512 a) {
  return part ? a.high : a.low;
}
template <int part>
inline __m512i insert_half(__m512i a, __m256i b) {
  return part ? __m512i{a.low, b} : __m512i{b, a.high};
}
#undef _mm512_extracti64x4_epi64
#undef _mm512_extracti32x8_epi32
#undef _mm512_extractf32x8_ps
#undef _mm512_inserti64x4
#undef _mm512_inserti32x8
#define _mm512_extracti64x4_epi64(a, part) ::tilewise::extract_half<part>(a)
#define _mm512_extracti32x8_epi32(a, part) ::tilewise::extract_half<part>(a)
#define _mm512_extractf32x8_ps(a, part) ::tilewise::extract_half<part>(a)
#define _mm512_inserti64x4(a, b, part) ::tilewise::insert_half<part>(a, b)
#define _mm512_inserti32x8(a, b, part) ::tilewise::insert_half<part>(a, b)

inline __mmask32 _mm512_test_epi16_mask(__m512i a, __m512i b) {
  const auto x = emulated::lanes<uint16_t>(a), y = emulated::lanes<uint16_t>(b);
  __mmask32 mask = 0;
  for (int i = 0; i < 32; ++i) mask |= static_cast<__mmask32>((x.at[i] & y.at[i]) != 0) << i;
  return mask;
}
inline __m512i _mm512_mask_blend_epi16(__mmask32 mask, __m512i a, __m512i b) {
  auto to = emulated::lanes<uint16_t>(a);
  const auto from = emulated::lanes<uint16_t>(b);
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) to.at[i] = from.at[i];
  }
  return emulated::vector<__m512i>(to);
}

// --- BF16 and VNNI --------------------------------------------------------------------------------

using __m512bh = __m512i;
using __m256bh = __m256i;

// Round to nearest even; subnormals become zeros and a NaN stays one.
inline uint16_t emulated_bf16(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  if (magnitude < 0x00800000u) return static_cast<uint16_t>(bits >> 16 & 0x8000u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline __m256bh _mm512_cvtneps_pbh(__m512 a) {
  const auto from = emulated::lanes<uint32_t>(a);
  uint16_t to[16];
  for (int i = 0; i < 16; ++i) to[i] = emulated_bf16(from.at[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(to));
}
inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  return {_mm512_cvtneps_pbh(low), _mm512_cvtneps_pbh(high)};
}

// Two products added one after the other, the odd one first; subnormals are zeros whatever the program
// has chosen.
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr((before & ~0x6000u) | 0x8040u);
  const __m512i top = _mm512_set1_epi32(-65536);
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, top)),
                        _mm512_castsi512_ps(_mm512_and_si512(b, top)), sum);
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                        _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sum);
  _mm_setcsr(before);
  return sum;
}

// Four products of bytes, and two of words, added to a 32-bit sum.
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  auto to = emulated::lanes<int32_t>(sum);
  const auto x = emulated::lanes<uint8_t>(a);
  const auto y = emulated::lanes<int8_t>(b);
  for (int i = 0; i < 64; ++i) to.at[i / 4] += x.at[i] * y.at[i];
  return emulated::vector<__m512i>(to);
}
inline __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
  auto to = emulated::lanes<int32_t>(sum);
  const auto x = emulated::lanes<int16_t>(a), y = emulated::lanes<int16_t>(b);
  for (int i = 0; i < 32; ++i) to.at[i / 2] += x.at[i] * y.at[i];
  return emulated::vector<__m512i>(to);
}

// --- integers, for quantized weights --------------------------------------------------------------

#define TILEWISE_SHIFT(name)                                                              \
  inline __m512i _mm512_##name##_epi32(__m512i a, __m128i count) {                        \
    return {_mm256_##name##_epi32(a.low, count), _mm256_##name##_epi32(a.high, count)};   \
  }
TILEWISE_SHIFT(srl)
TILEWISE_SHIFT(sll)
TILEWISE_SHIFT(sra)
#undef TILEWISE_SHIFT

inline __m512i _mm512_broadcast_i32x4(__m128i a) {
  return {_mm256_broadcastsi128_si256(a), _mm256_broadcastsi128_si256(a)};
}

}  // namespace tilewise
