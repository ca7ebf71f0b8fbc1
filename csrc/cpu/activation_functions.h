// The activations of feed-forward networks, their slopes, and the exponential behind them.
//
// Both approximations of the sigmoid's kind are x / (1 + e^-y), to 1e-7 for results in float32; what is
// rounded to 16 bits afterwards is known to 5e-6 in two thirds of the time. The exact gelu is
// relu(x) - |x| Q(|x|) with Q the upper tail of the normal distribution, e^(-x^2/2) times a
// polynomial in 1 / (1 + 0.26 |x|) (the form of Abramowitz and Stegun 7.1.26, fitted anew to a
// relative error of 3e-8): nothing cancels, where 1 + erf(x) has no digits left below x = -5.
#pragma once

#include <limits>
#include <type_traits>

#include "cpu/simd.h"

namespace tilewise {

// e^x to 1e-7 relative for every x: unlike exp2(x * LOG2E), whose error grows with |x|. It is 0
// below 2^-126 and inf above the largest float. Range reduction and polynomial as in Cephes' expf.
inline F32 exp_exact(F32 x) {
  // max and min return their second operand if one is NaN. 89 gives inf, with n = 128.
  x = min(F32::all(89.0f), max(F32::all(-90.0f), x));
  const F32 n = round(x * F32::all(LOG2E));
  F32 r = fma(n, F32::all(-0.693359375f), x);
  r = fma(n, F32::all(2.12194440e-4f), r);
  F32 p = F32::all(1.9875691500e-4f);
  p = fma(p, r, F32::all(1.3981999507e-3f));
  p = fma(p, r, F32::all(8.3334519073e-3f));
  p = fma(p, r, F32::all(4.1665795894e-2f));
  p = fma(p, r, F32::all(1.6666665459e-1f));
  p = fma(p, r, F32::all(5.0000001201e-1f));
  p = fma(p, r * r, r) + F32::all(1.0f);
  // 2^128 is no float, but twice 2^127 times p < 1 is one: n = 128 needs the halved power.
  return scale_by_power(p + p, n - F32::all(1.0f), n);
}

// x / (1 + e^-y) for a result of type T.
template <class T>
inline F32 times_sigmoid(F32 x, F32 y) {
  const F32 one = F32::all(1.0f);
  if constexpr (std::is_same_v<T, float>) return x / (one + exp_exact(F32::zero() - y));
  // min returns its second operand if that is NaN.
  return divide_near(x, one + exp2_unclamped(min(F32::all(128.0f), y * F32::all(-LOG2E))));
}

struct Silu {
  template <class T>
  static F32 value(F32 x) {
    return times_sigmoid<T>(x, x);
  }

  // (x s)' = s (1 + x (1 - s)) with s = sigmoid(x)
  static F32 slope(F32 x, F32* value) {
    const F32 one = F32::all(1.0f);
    const F32 s = one / (one + exp_exact(F32::zero() - x));
    *value = x * s;
    return s * fma(x, one - s, one);
  }
};

struct GeluTanh {
  // (1 + tanh u) / 2 = sigmoid(2 u), with 2 u = x (LINEAR + CUBIC x^2)
  static constexpr float LINEAR = 1.5957691216057308f, CUBIC = 0.0713548162726002527f;

  template <class T>
  static F32 value(F32 x) {
    return times_sigmoid<T>(x, x * fma(x * x, F32::all(CUBIC), F32::all(LINEAR)));
  }

  static F32 slope(F32 x, F32* value) {
    const F32 one = F32::all(1.0f), square = x * x;
    const F32 y = x * fma(square, F32::all(CUBIC), F32::all(LINEAR));
    const F32 s = one / (one + exp_exact(F32::zero() - y));
    const F32 y_slope = fma(square, F32::all(3.0f * CUBIC), F32::all(LINEAR));
    *value = x * s;
    return s * fma(x * (one - s), y_slope, one);
  }
};

struct GeluErf {
  // Q(|x|), and e^(-x^2/2) beside it.
  static F32 tail(F32 x, F32* bell) {
    const F32 one = F32::all(1.0f);
    const F32 t = one / fma(abs(x), F32::all(0.26f), one);
    *bell = exp_exact(x * x * F32::all(-0.5f));
    F32 p = F32::all(3.050479479e-2f);
    p = fma(p, t, F32::all(-1.528284252e-1f));
    p = fma(p, t, F32::all(2.514905334e-1f));
    p = fma(p, t, F32::all(-1.509481966e-1f));
    p = fma(p, t, F32::all(1.609473825e-1f));
    p = fma(p, t, F32::all(5.102786422e-2f));
    p = fma(p, t, F32::all(1.030302122e-1f));
    p = fma(p, t, F32::all(1.030167565e-1f));
    p = fma(p, t, F32::all(1.037590578e-1f));
    return p * t * *bell;
  }

  // inf * 0 is NaN, and gelu(inf) is not.
  static F32 finite(F32 magnitude) {
    return min(F32::all(std::numeric_limits<float>::max()), magnitude);
  }

  static F32 from_tail(F32 x, F32 q) {
    const F32 half = F32::all(0.5f), magnitude = abs(x);
    return fma(half, x, half * magnitude) - finite(magnitude) * q;  // half of both: relu(x)
  }

  template <class T>
  static F32 value(F32 x) {
    F32 bell;
    return from_tail(x, tail(x, &bell));
  }

  // (x P)' = P + x P', with P = 1 - Q(x) for x > 0 and Q(|x|) otherwise
  static F32 slope(F32 x, F32* value) {
    F32 bell;
    const F32 q = tail(x, &bell);
    *value = from_tail(x, q);
    const F32 half = F32::all(0.5f), sign = copy_sign(F32::all(1.0f), x);
    const F32 p = fma(half, sign, half) - sign * q;
    return fma(x, bell * F32::all(0.398942280401432678f), p);
  }
};

}  // namespace tilewise
