// F32 on AVX-512 (F, BW, DQ, VL, VBMI, VNNI, BF16): sixteen lanes.
#pragma once

namespace tilewise {

struct F32 {
  static constexpr int WIDTH = 16;
  __m512 v;
  F32() = default;
  F32(__m512 x) : v(x) {}
  static F32 all(float x) { return _mm512_set1_ps(x); }
  static F32 zero() { return _mm512_setzero_ps(); }
};

inline F32 operator+(F32 a, F32 b) { return _mm512_add_ps(a.v, b.v); }
inline F32 operator-(F32 a, F32 b) { return _mm512_sub_ps(a.v, b.v); }
inline F32 operator*(F32 a, F32 b) { return _mm512_mul_ps(a.v, b.v); }
inline F32 operator/(F32 a, F32 b) { return _mm512_div_ps(a.v, b.v); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }

// a / b to 2^-22, for b >= 1 and NaN: a division takes 16 cycles on Intel's cores, as long as all else of
// an activation.
inline F32 divide_near(F32 a, F32 b) {
  const __m512 inverse = _mm512_rcp14_ps(b.v), one = _mm512_set1_ps(1.0f);
  // One step of Newton's; of the inverse of infinity, which is 0, it would be NaN.
  const __m512 rest = _mm512_min_ps(_mm512_fnmadd_ps(b.v, inverse, one), one);
  return _mm512_mul_ps(a.v, _mm512_fmadd_ps(inverse, rest, inverse));
}

// Sixteen pairs of bfloat16.
struct Pairs {
  static constexpr int WIDTH = 32;
  __m512i v;
};

// The first and the last sixteen of 32 elements in turns: a pair has one of each.
inline Pairs in_turns(__m512i halves) {
  const __m512i turns = _mm512_setr_epi32(
      0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008,
      0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
  return {_mm512_permutexvar_epi16(turns, halves)};
}

// Both products of each pair are added to c. Subnormal operands and results count as zeros.
inline F32 fma(Pairs a, Pairs b, F32 c) {
  return _mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v);
}

inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a.v, b.v); }
inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a.v, b.v); }
inline F32 sqrt(F32 a) { return _mm512_sqrt_ps(a.v); }
inline F32 round(F32 a) {
  return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F32 abs(F32 a) { return _mm512_abs_ps(a.v); }

inline __mmask16 mask_of(int n) {
  return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
}

// lane < bound ? a : b, for lanes 0, 1, ...; the bound may be negative or beyond the vector.
inline F32 select_below(int bound, F32 a, F32 b) {
  return _mm512_mask_blend_ps(mask_of(bound), b.v, a.v);
}

// a < b ? x : y, and y where either is NaN.
inline F32 select_less(F32 a, F32 b, F32 x, F32 y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v);
}

// a == b ? x : y.
inline F32 select_equal(F32 a, F32 b, F32 x, F32 y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), y.v, x.v);
}

inline bool any_less(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ) != 0; }
inline bool all_less(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ) == 0xffff; }

// |a| with the sign of b.
inline F32 copy_sign(F32 a, F32 b) {
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
      sign, _mm512_castps_si512(b.v), _mm512_castps_si512(a.v), 0xca));  // sign ? b : a
}

// 0, 1, 2, ...
inline F32 lanes() {
  return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// p * 2^n where x >= -126, else 0; NaN stays NaN.
inline F32 scale_by_power(F32 p, F32 n, F32 x) {
  const __mmask16 kept = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(kept, p.v, n.v);
}

// x - floor(x), and p * 2^floor(x) where x >= -126, else 0; NaN stays NaN.
inline F32 fraction(F32 x) {
  return _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
inline F32 scale_by_floor(F32 p, F32 x) { return scale_by_power(p, x, x); }  // floors by itself

// x = n + r with n an integer and |r| <= 0.5, for x <= 128; scale_by_split is p * 2^n.
inline F32 split_exponent(F32 x, F32& r) {
  r = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // 0 where x is -inf
  return _mm512_sub_ps(x.v, r.v);
}
inline F32 scale_by_split(F32 p, F32 n) { return _mm512_scalef_ps(p.v, n.v); }

// rows[i] lane j becomes rows[j] lane i.
inline void transpose(F32 (&rows)[16]) {
  // Within 128 bits first, then the 4 x 4 blocks of 128 bits.
  __m512 pairs[16], quads[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    quads[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 low02 = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x88);
    const __m512 low13 = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xdd);
    const __m512 high02 = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x88);
    const __m512 high13 = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xdd);
    rows[i] = _mm512_shuffle_f32x4(low02, high02, 0x88);
    rows[i + 4] = _mm512_shuffle_f32x4(low13, high13, 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(low02, high02, 0xdd);
    rows[i + 12] = _mm512_shuffle_f32x4(low13, high13, 0xdd);
  }
}

// 1, 0, 3, 2, ...
inline F32 swap_neighbours(F32 a) { return _mm512_permute_ps(a.v, 0xb1); }

// x, loaded once: otherwise compilers fold a load into each instruction that uses it, and the load
// ports become the bottleneck.
inline F32 held(F32 x) {
#if !defined(TILEWISE_EMULATED)
  asm("" : "+v"(x.v));
#endif
  return x;
}

inline float reduce_add(F32 a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(F32 a) { return _mm512_reduce_max_ps(a.v); }

// The sum of each of the sixteen vectors, in order; or what `op` makes of each.
template <class Op>
inline F32 reduce_each(const F32* a, const Op& op) {
  F32 four[4];
  for (int i = 0; i < 4; ++i, a += 4) {
    const F32 x = op(F32(_mm512_unpacklo_ps(a[0].v, a[1].v)), F32(_mm512_unpackhi_ps(a[0].v, a[1].v)));
    const F32 y = op(F32(_mm512_unpacklo_ps(a[2].v, a[3].v)), F32(_mm512_unpackhi_ps(a[2].v, a[3].v)));
    four[i] = op(F32(_mm512_shuffle_ps(x.v, y.v, 0x44)), F32(_mm512_shuffle_ps(x.v, y.v, 0xee)));
  }
  const auto fold = [&](F32 x, F32 y) {
    return op(F32(_mm512_shuffle_f32x4(x.v, y.v, 0x88)), F32(_mm512_shuffle_f32x4(x.v, y.v, 0xdd)));
  };
  return fold(fold(four[0], four[1]), fold(four[2], four[3]));
}
inline F32 reduce_each(const F32* a) {
  return reduce_each(a, [](F32 x, F32 y) { return x + y; });
}

// The sum of one vector, with the bits that it has among sixteen.
inline float reduce_add_as_each(F32 a) {
  a = a + F32(_mm512_permute_ps(a.v, 0x4e));
  a = a + swap_neighbours(a);
  a = a + F32(_mm512_shuffle_f32x4(a.v, a.v, 0xb1));
  a = a + F32(_mm512_shuffle_f32x4(a.v, a.v, 0x4e));
  return _mm512_cvtss_f32(a.v);
}

inline F32 load_f32(const float* p) { return _mm512_loadu_ps(p); }
inline void store_f32(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
inline F32 load_partial_f32(const float* p, int n) { return _mm512_maskz_loadu_ps(mask_of(n), p); }
inline void store_partial_f32(float* p, F32 x, int n) {
  _mm512_mask_storeu_ps(p, mask_of(n), x.v);
}

// n floats at p, and then in the second half n at q.
inline F32 load_halves(const float* p, const float* q, int n) {
  const __mmask16 first = mask_of(n), second = static_cast<__mmask16>(first << 8);
  return _mm512_mask_loadu_ps(_mm512_maskz_loadu_ps(first, p), second, q - 8);
}

inline F32 load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_f16(uint16_t* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline F32 load_bf16(const uint16_t* p) {
  const __m512i wide =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store_bf16(uint16_t* p, F32 x) {
  // vcvtneps2bf16 flushes subnormals to zero, which AVX2 and PyTorch keep, and keeps a NaN's bits.
  constexpr int NAN_OR_SUBNORMAL = 0x01 | 0x80 | 0x20;
  __m256i top = (__m256i)_mm512_cvtneps_pbh(x.v);
  if (__builtin_expect(_mm512_fpclass_ps_mask(x.v, NAN_OR_SUBNORMAL), 0)) {
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    top = _mm512_cvtepi32_epi16(
        _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), top);
}
inline void store_bf16_flushed(uint16_t* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x.v));
}
inline void store_bf16_pair(uint16_t* p, F32 a, F32 b) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v));  // flushes subnormals
}

inline F32 load_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// The low (HIGH = 0) or high nibbles of the bytes, less 8.
template <int HIGH>
inline F32 load_nibbles(const uint8_t* p) {
  __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  wide = HIGH ? _mm512_srli_epi32(wide, 4) : _mm512_and_si512(wide, _mm512_set1_epi32(15));
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(wide, _mm512_set1_epi32(8)));
}

inline F32 load_f8e4m3(const uint8_t* p) {
  // Shifted into place the exponent is too small by 120, which one exact multiplication mends,
  // subnormals included; the code 0x7f is NaN.
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512i magnitude = _mm512_and_si512(wide, _mm512_set1_epi32(0x7f));
  const __m512i sign = _mm512_slli_epi32(_mm512_andnot_si512(_mm512_set1_epi32(0x7f), wide), 24);
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f));
  const __m512 x = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(magnitude, 20)),
                                 _mm512_set1_ps(0x1p120f));
  const __m512i signed_x = _mm512_or_si512(_mm512_castps_si512(x), sign);
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(signed_x, nan, _mm512_set1_epi32(-1)));
}

}  // namespace tilewise
