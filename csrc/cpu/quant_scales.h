// Activations to codes with AVX-512: the largest elements of 16 strips are found at once, and a row is
// divided by its scales without a division. One by one, finding scales takes as long as all else.
#pragma once

#include <cfloat>

#include "cpu/quant_activations.h"

#if defined(__AVX512F__)

namespace tilewise {

constexpr int64_t SCALES_TOGETHER = 16;
static_assert(F32::WIDTH == SCALES_TOGETHER && STRIP == 2 * F32::WIDTH,
              "a lane for every strip, and half a strip a vector");

// The scale of the int8 code, or of the first digit, of every strip, of which `shared` have one in common,
// and zeros behind them up to SCALES_TOGETHER; NaN where an element is not finite. False if any is not
// normal, so that digits or inverses would not be.
inline bool find_scales(const float* x, int64_t strips, int64_t shared, float* scales) {
  constexpr float SMALLEST = 0x1p-100f;
  constexpr int W = F32::WIDTH;
  for (int64_t s = 0; s < strips; s += SCALES_TOGETHER) {
    F32 most[SCALES_TOGETHER];
    for (int i = 0; i < SCALES_TOGETHER; ++i) {
      const float* strip = x + (s + i) * STRIP;
      most[i] = s + i < strips ? max_bits(abs(load(strip)), abs(load(strip + W))) : F32::zero();
    }
    store(scales + s, reduce_each(most, max_bits));
  }
  for (int64_t first = 0; shared > 1 && first < strips; first += shared) {
    const int64_t last = std::min(strips, first + shared);
    float most = scales[first];
    for (int64_t s = first + 1; s < last; ++s) {
      if (!(scales[s] <= most)) most = scales[s] > most || scales[s] != scales[s] ? scales[s] : most;
    }
    std::fill(scales + first, scales + last, most);
  }
  bool is_normal = true;
  for (int64_t s = 0; s < round_up(strips, SCALES_TOGETHER); ++s) {
    const float most = scales[s];
    is_normal &= (most == 0) | ((most >= 127 * SMALLEST) & (most <= FLT_MAX));
    scales[s] = most / 127 + (most - most);
  }
  return is_normal;
}

// x / scale, by one of Newton's steps from the rounded inverse, with a remainder that is exact
// (Markstein, Computation of elementary functions on the IBM RISC System/6000 processor, 1990): a
// third of the time of a division. Zero if the scale is zero or NaN.
inline F32 quotient(F32 x, float scale, float inverse, bool is_normal) {
  if (is_normal) {
    const F32 near = x * F32::all(inverse);
    return fma(fma(near, F32::all(-scale), x), F32::all(inverse), near);
  }
  return scale > 0 ? x / F32::all(scale) : F32::zero();
}

}  // namespace tilewise

#endif
