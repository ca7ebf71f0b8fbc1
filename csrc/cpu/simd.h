// The vector layer: one float32 vector type, `F32`, and loads and stores that convert from and to
// it. Every kernel is written once against it and compiled once per instruction set.
//
// All arithmetic is in float32. 16-bit and 8-bit types exist only in memory. Partial loads and
// stores never touch a byte past `n` elements, and partial loads fill up with zeros.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "params.h"

#if defined(__AVX512F__)
#include "cpu/simd_avx512.h"
#else
#include "cpu/simd_avx2.h"
#endif

namespace tilewise {

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// --- storage types --------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Float8 {  // e4m3fn: no infinities, NaN is 0x7f and 0xff
  uint8_t bits;
};

template <int HIGH>
struct Nibble {  // one of a byte's two four-bit codes, stored as code + 8
  uint8_t bits;
};

// Two consecutive elements, which one instruction multiplies and adds (AVX-512 only).
struct BFloat16Pair {
  BFloat16 low, high;
};

inline float to_float(float x) { return x; }
inline float to_float(Half x) { return _cvtsh_ss(x.bits); }
inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float to_float(int8_t x) { return static_cast<float>(x); }
inline float to_float(Float8 x) {
  // Exponent bias 7 against 127: shifted into place, the value is too small by 2^120.
  const uint32_t magnitude = x.bits & 0x7fu;
  uint32_t bits = magnitude << 20;
  float f;
  std::memcpy(&f, &bits, 4);
  f = magnitude == 0x7f ? __builtin_nanf("") : f * 0x1p120f;
  return (x.bits & 0x80u) ? -f : f;
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, Half* out) {
  out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void from_float(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) {
    out->bits = 0x7fc0;
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
  }
}

// --- loads and stores with conversion -------------------------------------------------------------

inline F32 load(const float* p) { return load_f32(p); }
inline F32 load(const Half* p) { return load_f16(&p->bits); }
inline F32 load(const BFloat16* p) { return load_bf16(&p->bits); }
inline F32 load(const int8_t* p) { return load_i8(p); }
inline F32 load(const Float8* p) { return load_f8e4m3(&p->bits); }

template <int HIGH>
inline F32 load(const Nibble<HIGH>* p) {
  return load_nibbles<HIGH>(&p->bits);
}

// One element in all lanes.
inline F32 broadcast(const float* p) { return F32::all(*p); }

// A vector of what products are made of.
template <class T>
struct LanesOf {
  using type = F32;
};
#if defined(__AVX512F__)
template <>
struct LanesOf<BFloat16Pair> {
  using type = Pairs;
};
inline Pairs load(const BFloat16Pair* p) { return {_mm512_loadu_si512(p)}; }
inline Pairs broadcast(const BFloat16Pair* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return Pairs{_mm512_set1_epi32(bits)};
}
#endif
template <class T>
using Lanes = typename LanesOf<T>::type;

inline void store(float* p, F32 x) { store_f32(p, x); }
inline void store(Half* p, F32 x) { store_f16(&p->bits, x); }
inline void store(BFloat16* p, F32 x) { store_bf16(&p->bits, x); }

// In bfloat16 a subnormal may become zero.
inline void store_flushed(BFloat16* p, F32 x) { store_bf16_flushed(&p->bits, x); }

// Two vectors behind each other. In bfloat16 a subnormal may become zero.
inline void store_pair(float* p, F32 a, F32 b) {
  store(p, a);
  store(p + F32::WIDTH, b);
}
inline void store_pair(BFloat16* p, F32 a, F32 b) { store_bf16_pair(&p->bits, a, b); }

inline F32 load_partial(const float* p, int n) { return load_partial_f32(p, n); }
inline void store_partial(float* p, F32 x, int n) { store_partial_f32(p, x, n); }

template <class T>
inline F32 load_partial(const T* p, int n) {
  T buffer[F32::WIDTH] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

template <class T>
inline void store_partial(T* p, F32 x, int n) {
  T buffer[F32::WIDTH];
  store(buffer, x);
  std::memcpy(p, buffer, n * sizeof(T));
}

// --- functions ------------------------------------------------------------------------------------

constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.693147180559945309417f;

// 2^x with a relative error below 1.5e-7 for x in [-126, 127]: a near-minimax polynomial of degree 6
// for the fraction x - floor(x), which is 1 at 0 (its own error is 1.4e-8; what remains is
// rounding). Below -126 it is 0, so that exp2(-inf) is 0; above, inf; NaN stays NaN.
inline F32 exp2(F32 x) {
  const F32 r = fraction(x);
  F32 p = F32::all(2.161291486e-4f);
  p = fma(p, r, F32::all(1.246784697e-3f));
  p = fma(p, r, F32::all(9.675451554e-3f));
  p = fma(p, r, F32::all(5.548528209e-2f));
  p = fma(p, r, F32::all(2.402293086e-1f));
  p = fma(p, r, F32::all(6.931470633e-1f));
  p = fma(p, r, F32::all(1.0f));
  return scale_by_floor(p, x);
}

// 2^x for x <= 128, with a relative error below 1.8e-7, at two thirds of the cost: no clamp above, one
// degree less, and the power of two comes from the bits of the rounding itself. 0 below -150, where
// not already below -126.5; inf from 127.5 on at the latest; NaN stays NaN.
inline F32 exp2_unclamped(F32 x) {
  F32 r;
  const F32 n = split_exponent(x, r);
  F32 p = F32::all(1.326472721e-3f);
  p = fma(p, r, F32::all(9.671512812e-3f));
  p = fma(p, r, F32::all(5.550733745e-2f));
  p = fma(p, r, F32::all(2.402224208e-1f));
  p = fma(p, r, F32::all(6.931469776e-1f));
  p = fma(p, r, F32::all(1.0f));
  return scale_by_split(p, n);
}

inline F32 exp(F32 x) { return exp2(x * F32::all(LOG2E)); }

// Relative error below 3e-7. Near 0, where the quotient would cancel, an odd polynomial (the one of
// Cephes' tanhf) takes its place.
inline F32 tanh(F32 x) {
  const F32 magnitude = abs(x), one = F32::all(1.0f), z = x * x;
  const F32 far = one - F32::all(2.0f) / (exp(magnitude + magnitude) + one);
  F32 p = F32::all(-5.70498872745e-3f);
  p = fma(p, z, F32::all(2.06390887954e-2f));
  p = fma(p, z, F32::all(-5.37397155531e-2f));
  p = fma(p, z, F32::all(1.33314422036e-1f));
  p = fma(p, z, F32::all(-3.33332819422e-1f));
  const F32 near = fma(p * z, magnitude, magnitude);
  return copy_sign(select_less(magnitude, F32::all(0.625f), near, far), x);
}

}  // namespace tilewise
