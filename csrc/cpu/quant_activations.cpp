#include "cpu/quant_activations.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/rows.h"

namespace tilewise {
namespace {

constexpr int W = F32::WIDTH;

template <int DIGITS>
void split_strip(const float* x, float scale, bool halves, SplitStrip<DIGITS>& out) {
  const F32 top = F32::all(127), bottom = F32::all(-127);
  const F32 divisor = F32::all(scale > 0 ? scale : 1.0f);
  float totals[2];
  for (int h = 0; h < 2; ++h) {
    F32 sums[DIGITS];
    for (int d = 0; d < DIGITS; ++d) sums[d] = F32::zero();
    for (int i = h * STRIP / 2; i < (h + 1) * STRIP / 2; i += W) {
      F32 rest = load(x + i) / divisor;
      for (int d = 0; d < DIGITS; ++d) {
        const F32 digit = min(max(round(rest), bottom), top);
        store_rounded_i8(out.codes[d] + i, digit);
        sums[d] = sums[d] + digit;
        rest = (rest - digit) * F32::all(DIGIT_BASE);
      }
    }
    float total = 0;
    for (int d = DIGITS; d-- > 0;) {
      out.sums[h][d] = reduce_add(sums[d]);
      total = total / DIGIT_BASE + out.sums[h][d];
    }
    totals[h] = total;
  }
  if (!halves) {
    for (int d = 0; d < DIGITS; ++d) out.sums[0][d] += out.sums[1][d];
    totals[0] += totals[1];
  }
  out.totals[0] = totals[0] * scale;
  out.totals[1] = totals[1] * scale;
  out.scale = scale;
}

template <class T>
void widen(const void* data, int64_t at, int64_t n, float* out) {
  const T* from = static_cast<const T*>(data) + at;
  for_vectors(n, [&](int64_t i, auto part, int) { part.store(out + i, part.load(from + i)); });
}

}  // namespace

float largest(const float* x, int64_t n) {
  F32 most = F32::zero(), bad = F32::zero();
  for (int64_t i = 0; i < n; i += W) {
    const F32 v = load(x + i);
    most = max(most, abs(v));
    bad = fma(v, F32::zero(), bad);  // what is finite adds zero
  }
  const float nan = reduce_add(bad);
  return nan == 0 ? reduce_max(most) : std::numeric_limits<float>::quiet_NaN();
}

template <int DIGITS>
bool split_row(const float* x, int64_t depth, int64_t group_strips, bool halves,
               SplitStrip<DIGITS>* out) {
  const int64_t strips = strips_of(depth);
  for (int64_t first = 0; first < strips; first += group_strips) {
    const int64_t last = std::min(strips, first + group_strips);
    float most = largest(x + first * STRIP, (last - first) * STRIP);
    if (DIGITS > 1 && !(most == 0 || most >= 0x1p-100f)) return false;
    const float scale = most / 127;
    for (int64_t s = first; s < last; ++s) {
      if (scale == scale) {
        split_strip(x + s * STRIP, scale, halves, out[s]);
      } else {
        std::memset(&out[s], 0, sizeof(out[s]));
        out[s].scale = out[s].totals[0] = out[s].totals[1] = scale;
      }
    }
  }
  return true;
}

template bool split_row<1>(const float*, int64_t, int64_t, bool, SplitStrip<1>*);
template bool split_row<2>(const float*, int64_t, int64_t, bool, SplitStrip<2>*);
template bool split_row<3>(const float*, int64_t, int64_t, bool, SplitStrip<3>*);

namespace {

// |x| <= 448 to the nearest number of float8 E4M3, ties to even. Added to 2^20 times the power of two
// in it, float32 itself rounds to the three bits behind the first; below 2^-6 all powers are one.
F32 to_float8(F32 x) {
  const F32 power = bits_as_f32(bits_of(x) & I32::all(0x7f800000));
  const F32 large = max(power, F32::all(0x1p-6f)) * F32::all(0x1p20f);
  return copy_sign((abs(x) + large) - large, x);
}

}  // namespace

void encode_float8(float* x, int64_t depth, int64_t group_strips, float* scales) {
  const F32 top = F32::all(448), bottom = F32::all(-448);
  const int64_t elements = strips_of(depth) * STRIP, group = group_strips * STRIP;
  for (int64_t first = 0; first < elements; first += group) {
    const int64_t last = std::min(elements, first + group);
    const float scale = largest(x + first, last - first) / 448;
    const F32 divisor = F32::all(scale == 0 ? 1.0f : scale);
    for (int64_t i = first; i < last; i += W) {
      store(x + i, to_float8(min(max(load(x + i) / divisor, bottom), top)));
    }
    *scales++ = scale;
  }
}

void round_row(Rounding rounding, float* x, int64_t depth, int64_t group_strips) {
  const int64_t strips = strips_of(depth);
  if (rounding == Rounding::fp8) {
    const auto scales = make_workspace<float>((strips + group_strips - 1) / group_strips);
    encode_float8(x, depth, group_strips, scales.get());
    for (int64_t s = 0; s < strips; ++s) {
      const F32 scale = F32::all(scales[s / group_strips]);
      for (int i = 0; i < STRIP; i += W) store(x + s * STRIP + i, load(x + s * STRIP + i) * scale);
    }
    return;
  }
  const auto split = make_workspace<SplitStrip<1>>(strips);
  split_row<1>(x, depth, group_strips, false, split.get());
  for (int64_t s = 0; s < strips; ++s) {
    const F32 scale = F32::all(split[s].scale);
    for (int i = 0; i < STRIP; i += W) store(x + s * STRIP + i, load(split[s].codes[0] + i) * scale);
  }
}

void load_floats(DType dtype, const void* data, int64_t at, int64_t n, float* out) {
  switch (dtype) {
    case DType::f32: return widen<float>(data, at, n, out);
    case DType::f16: return widen<Half>(data, at, n, out);
    default: return widen<BFloat16>(data, at, n, out);
  }
}

void load_row(const QuantizedMatmul& call, int64_t row, float* out) {
  const int64_t depth = call.weight.depth;
  load_floats(call.x_dtype, call.x, row * call.x_stride, depth, out);
  std::fill(out + depth, out + strips_of(depth) * STRIP, 0.0f);
}

}  // namespace tilewise
