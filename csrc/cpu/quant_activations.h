// Activations rounded to codes; and as bytes, so that their products with codes are exact integers.
//
// One digit per element is the int8 quantization of `naive.quantize_groups`. Three digits, in base 255
// and each within +-127, hold an element to 2^-24 of the largest of its strip, which is the precision
// of float32 itself; two digits hold it to 2^-16, enough for 16-bit activations, whose results are
// rounded to 2^-9 or 2^-12. A product with few rows then costs a few byte dot products a weight where
// float32 would have to widen every weight to 32 bits. (Splitting floating-point numbers into parts
// whose products are exact: Ozaki et al., Error-free transformations of matrix multiplication, 2012.)
#pragma once

#include "cpu/quant.h"
#include "cpu/simd_int.h"
#include "cpu/workspace.h"

namespace tilewise {

constexpr float DIGIT_BASE = 255.0f;

template <int DIGITS>
struct SplitStrip {
  int8_t codes[DIGITS][STRIP];  // x = scale * (codes[0] + codes[1] / 255 + codes[2] / 255^2)
  float sums[2][DIGITS];        // of the codes of each half; of all 32 in sums[0] of a whole strip
  float totals[2];              // of the same as numbers, times scale
  float scale;
};

// x, `depth` floats, into strips; false if it holds something that digits cannot: a NaN, an infinity
// or numbers so small that a scale would not be normal. With one digit these are a scale of NaN and
// of zero, as in the definition. `group_strips` share a scale. Sums are of halves where `halves`.
template <int DIGITS>
bool split_row(const float* x, int64_t depth, int64_t group_strips, bool halves,
               SplitStrip<DIGITS>* out);

// The largest magnitude of `n` elements, a multiple of the vector; NaN if any is not finite.
float largest(const float* x, int64_t n);

// Whether a row can be multiplied in bfloat16, whose products take what is subnormal for zero: products of
// tiny numbers would be lost, and pieces of what is not finite are NaN.
inline bool fits_bfloat16(float largest) {
  return largest == 0 || (largest >= 0x1p-90f && largest <= 0x1p100f);
}

// `n` elements from data[at] in float32.
void load_floats(DType dtype, const void* data, int64_t at, int64_t n, float* out);

// Row `row` of x in float32, and zeros up to a whole strip.
void load_row(const QuantizedMatmul& call, int64_t row, float* out);

// Replaces a row, filled up to a whole strip, by its codes in float8 E4M3, of which `group_strips`
// share a scale. What is not finite makes the scale NaN.
void encode_float8(float* x, int64_t depth, int64_t group_strips, float* scales);

// Rounds a row, filled up to a whole strip, to codes and back.
void round_row(Rounding rounding, float* x, int64_t depth, int64_t group_strips);

inline int64_t strips_of(int64_t depth) { return (depth + STRIP - 1) / STRIP; }

// Strips that share a scale of the activations.
inline int64_t activation_strips(const QuantizedMatmul& call) {
  return call.activation_group ? call.activation_group / STRIP : strips_of(call.weight.depth);
}

}  // namespace tilewise
