// F32 on AVX2, FMA and F16C: eight lanes.
#pragma once

namespace tilewise {

struct F32 {
  static constexpr int WIDTH = 8;
  __m256 v;
  F32() = default;
  F32(__m256 x) : v(x) {}
  static F32 all(float x) { return _mm256_set1_ps(x); }
  static F32 zero() { return _mm256_setzero_ps(); }
};

inline F32 operator+(F32 a, F32 b) { return _mm256_add_ps(a.v, b.v); }
inline F32 operator-(F32 a, F32 b) { return _mm256_sub_ps(a.v, b.v); }
inline F32 operator*(F32 a, F32 b) { return _mm256_mul_ps(a.v, b.v); }
inline F32 operator/(F32 a, F32 b) { return _mm256_div_ps(a.v, b.v); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }

// a / b; see simd_avx512.h.
inline F32 divide_near(F32 a, F32 b) { return a / b; }
inline F32 max(F32 a, F32 b) { return _mm256_max_ps(a.v, b.v); }
inline F32 min(F32 a, F32 b) { return _mm256_min_ps(a.v, b.v); }
inline F32 sqrt(F32 a) { return _mm256_sqrt_ps(a.v); }
inline F32 round(F32 a) {
  return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F32 abs(F32 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }

// lane < bound ? a : b, for lanes 0, 1, ...; the bound may be negative or beyond the vector.
inline F32 select_below(int bound, F32 a, F32 b) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(bound), lane);
  return _mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(below));
}

// a < b ? x : y, and y where either is NaN.
inline F32 select_less(F32 a, F32 b, F32 x, F32 y) {
  return _mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ));
}

// a == b ? x : y.
inline F32 select_equal(F32 a, F32 b, F32 x, F32 y) {
  return _mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ));
}

// |a| with the sign of b.
inline F32 copy_sign(F32 a, F32 b) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(sign, a.v), _mm256_and_ps(sign, b.v));
}

// 0, 1, 2, ...
inline F32 lanes() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }

// p * 2^n where x >= -126, else 0; NaN stays NaN.
inline F32 scale_by_power(F32 p, F32 n, F32 x) {
  const __m256i exponent = _mm256_slli_epi32(
      _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  const __m256 scaled = _mm256_mul_ps(p.v, _mm256_castsi256_ps(exponent));
  const __m256 tiny = _mm256_cmp_ps(x.v, _mm256_set1_ps(-126.0f), _CMP_LT_OQ);
  return _mm256_andnot_ps(tiny, scaled);
}

// floor(x) as far as it is an exponent; for NaN -127, as max and min return their second operand.
inline F32 floor_exponent(F32 x) {
  return _mm256_floor_ps(min(max(x, F32::all(-127.0f)), F32::all(128.0f)).v);
}
// x - floor(x), and p * 2^floor(x) where x >= -126, else 0; NaN stays NaN.
inline F32 fraction(F32 x) { return x - floor_exponent(x); }
inline F32 scale_by_floor(F32 p, F32 x) { return scale_by_power(p, floor_exponent(x), x); }

// x = n + r with n an integer and |r| <= 0.5, for x <= 128. n is in a form for scale_by_split only,
// which is p * 2^n.
// Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits, here with the exponent's
// bias: shifted, they are 2^n, or 0 where x was -127 or less.
inline F32 split_exponent(F32 x, F32& r) {
  const __m256 magic = _mm256_set1_ps(0x1.8p23f + 127.0f);
  const __m256 kept = _mm256_max_ps(_mm256_set1_ps(-127.0f), x.v);  // x where it is NaN
  const __m256 n = _mm256_add_ps(kept, magic);
  r = _mm256_sub_ps(kept, _mm256_sub_ps(n, magic));
  return n;
}
inline F32 scale_by_split(F32 p, F32 n) {
  return _mm256_mul_ps(p.v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(n.v), 23)));
}

// rows[i] lane j becomes rows[j] lane i.
inline void transpose(F32 (&rows)[8]) {
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

// 1, 0, 3, 2, ...
inline F32 swap_neighbours(F32 a) { return _mm256_permute_ps(a.v, 0xb1); }

// x, loaded once: otherwise compilers fold a load into each instruction that uses it, and the load
// ports become the bottleneck.
inline F32 held(F32 x) {
  asm("" : "+x"(x.v));
  return x;
}

inline float reduce_add(F32 a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline float reduce_add_as_each(F32 a) { return reduce_add(a); }

inline float reduce_max(F32 a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

// The sum of each of the eight vectors, in order.
inline F32 reduce_each(const F32* a) {
  __m256 four[2];
  for (int i = 0; i < 2; ++i, a += 4) {
    const __m256 x = _mm256_add_ps(_mm256_unpacklo_ps(a[0].v, a[1].v),
                                   _mm256_unpackhi_ps(a[0].v, a[1].v));
    const __m256 y = _mm256_add_ps(_mm256_unpacklo_ps(a[2].v, a[3].v),
                                   _mm256_unpackhi_ps(a[2].v, a[3].v));
    four[i] = _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xee));
  }
  return _mm256_add_ps(_mm256_permute2f128_ps(four[0], four[1], 0x20),
                       _mm256_permute2f128_ps(four[0], four[1], 0x31));
}

inline F32 load_f32(const float* p) { return _mm256_loadu_ps(p); }
inline void store_f32(float* p, F32 x) { _mm256_storeu_ps(p, x.v); }

inline __m256i mask_of(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline F32 load_partial_f32(const float* p, int n) { return _mm256_maskload_ps(p, mask_of(n)); }
inline void store_partial_f32(float* p, F32 x, int n) { _mm256_maskstore_ps(p, mask_of(n), x.v); }

inline F32 load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_f16(uint16_t* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline F32 load_bf16(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline void store_bf16(uint16_t* p, F32 x) {  // round to nearest even; NaN becomes 0x7fc0
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i top = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  top = _mm256_blendv_epi8(top, _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(top, top), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store_bf16_flushed(uint16_t* p, F32 x) { store_bf16(p, x); }
inline void store_bf16_pair(uint16_t* p, F32 a, F32 b) {
  store_bf16(p, a);
  store_bf16(p + 8, b);
}

inline F32 load_i8(const int8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// The low (HIGH = 0) or high nibbles of the bytes, less 8.
template <int HIGH>
inline F32 load_nibbles(const uint8_t* p) {
  __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  wide = HIGH ? _mm256_srli_epi32(wide, 4) : _mm256_and_si256(wide, _mm256_set1_epi32(15));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(wide, _mm256_set1_epi32(8)));
}

inline F32 load_f8e4m3(const uint8_t* p) {
  // Shifted into place the exponent is too small by 120, which one exact multiplication mends,
  // subnormals included; the code 0x7f is NaN.
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m256i magnitude = _mm256_and_si256(wide, _mm256_set1_epi32(0x7f));
  const __m256i sign = _mm256_slli_epi32(_mm256_andnot_si256(_mm256_set1_epi32(0x7f), wide), 24);
  const __m256i nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f));
  const __m256 x = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(magnitude, 20)),
                                 _mm256_set1_ps(0x1p120f));
  return _mm256_or_ps(_mm256_or_ps(x, _mm256_castsi256_ps(sign)), _mm256_castsi256_ps(nan));
}

}  // namespace tilewise
