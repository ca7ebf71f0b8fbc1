// Decoding: 32 consecutive weights of 16 rows, of any format, to bytes with a scale.
//
// A weight is (code - zero) * scale + shift, where a format has them. Codes are unsigned, so that
// vpdpbusd and vpmaddubsw can take them; on AVX2 8-bit codes are signed (`BYTE_OFFSET`). nf4 and fp8
// have no integers for codes: theirs are the bytes as stored, which only `Decoder::values` can read.
//
// Every product and every sum is the one of `QuantizedTensor.dequantize`, in its order: expanded
// weights are equal bit for bit.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/quant.h"
#include "cpu/simd_int.h"

namespace tilewise {

constexpr int QUADS = STRIP / 4;

// Vectors rather than arrays: compilers keep a strip that is used at once in registers.
struct alignas(64) Strip {
  static constexpr int VECTORS = PANEL_ROWS / F32::WIDTH;
  I32 codes[QUADS][VECTORS];  // byte [k / 4][row][k % 4]
  // For k < 16 and for k >= 16, which are equal unless the format has GROUPS = 2.
  F32 scale[2][VECTORS], zero[2][VECTORS], shift[2][VECTORS];
};

// What kernels must know of a format to multiply its codes.
template <int BITS_, int GROUPS_, bool HAS_ZERO_, bool HAS_SHIFT_>
struct Traits {
  static constexpr int BITS = BITS_, GROUPS = GROUPS_;
  static constexpr bool HAS_ZERO = HAS_ZERO_, HAS_SHIFT = HAS_SHIFT_;
  static constexpr bool IS_INTEGER = true;
  using Kind = Traits;  // of formats that are multiplied alike
};

namespace strips {

constexpr int W = F32::WIDTH;
constexpr int WORD = PANEL_ROWS * 4, HALF = PANEL_ROWS * 2;  // bytes of one word or half of each row

inline I32 word(const uint8_t* p, int64_t i, int lane) { return load_int(p + i * WORD + lane * 4); }
inline F32 half(const uint8_t* p, int lane) {
  return load(reinterpret_cast<const Half*>(p) + lane);
}
inline void put(Strip& s, int quad, int lane, I32 codes) {
  s.codes[quad][lane / W] = codes;
}
inline I32 byte_of(I32 words, int i) { return (words >> (8 * i)) & I32::all(255); }

constexpr int NIBBLES = 0x0f0f0f0f;

// Four words of nibbles: weights 0 to 15 in the low ones, 16 to 31 in the high ones.
inline void put_nibbles(Strip& s, const uint8_t* words, int lane) {
  for (int i = 0; i < 4; ++i) {
    const I32 packed = word(words, i, lane);
    put(s, i, lane, packed & I32::all(NIBBLES));
    put(s, i + 4, lane, (packed >> 4) & I32::all(NIBBLES));
  }
}

// Eight words of signed bytes.
inline void put_bytes(Strip& s, const uint8_t* words, int lane) {
  const I32 offset = I32::all(BYTE_OFFSET ? static_cast<int>(0x80808080u) : 0);
  for (int i = 0; i < QUADS; ++i) put(s, i, lane, word(words, i, lane) ^ offset);
}

template <int GROUPS>
inline void put_zero(Strip& s, int lane, int zero) {
  for (int g = 0; g < GROUPS; ++g) s.zero[g][lane / W] = F32::all(static_cast<float>(zero));
}

// --- our own formats ------------------------------------------------------------------------------

inline F32 own_scale(const QuantizedWeight& w, int64_t group, int lane) {
  const int64_t at = group * PANEL_ROWS + lane;
  if (w.scale_type == ScaleType::f16) return load(static_cast<const Half*>(w.scales) + at);
  return load(static_cast<const float*>(w.scales) + at);
}

inline int64_t group_of(const QuantizedWeight& w, int64_t panel, int64_t strip) {
  // In 32 bits a division takes half as long.
  return panel * w.groups + static_cast<uint32_t>(strip) / static_cast<uint32_t>(w.group_strips);
}

struct Int8 : Traits<8, 1, true, false> {
  static void decode(const QuantizedWeight& w, int64_t panel, int64_t strip, int lane, Strip& s) {
    const int64_t group = group_of(w, panel, strip);
    put_bytes(s, w.data + panel * w.panel_bytes + strip * QUADS * WORD, lane);
    s.scale[0][lane / W] = own_scale(w, group, lane);
    F32 zero = F32::all(BYTE_OFFSET);
    if (w.zeros) zero = zero + to_f32(widen_i8(w.zeros + group * PANEL_ROWS + lane));
    s.zero[0][lane / W] = zero;
  }
};

struct Int4 : Traits<4, 1, true, false> {
  static void decode(const QuantizedWeight& w, int64_t panel, int64_t strip, int lane, Strip& s) {
    const int64_t group = group_of(w, panel, strip);
    put_nibbles(s, w.data + panel * w.panel_bytes + strip * 4 * WORD, lane);
    s.scale[0][lane / W] = own_scale(w, group, lane);
    const F32 zero = w.zeros ? to_f32(widen_u8(w.zeros + group * PANEL_ROWS + lane)) : F32::all(8);
    s.zero[0][lane / W] = zero;
  }
};

// Codes are twice the value, plus 12: 0 to 24.
struct MxFp4 : Traits<5, 1, true, false> {
  static void decode(const QuantizedWeight& w, int64_t panel, int64_t strip, int lane, Strip& s) {
    static constexpr uint8_t TWICE[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                          12, 11, 10, 9,  8,  6,  4,  0};
    put_nibbles(s, w.data + panel * w.panel_bytes + strip * 4 * WORD, lane);
    for (int i = 0; i < QUADS; ++i) {
      put(s, i, lane, look_up_bytes(TWICE, s.codes[i][lane / W]));
    }
    // 2^(code - 127) is a float's exponent as it stands, but for 0, which is subnormal, and 255, NaN.
    const uint8_t* codes = static_cast<const uint8_t*>(w.scales);
    const I32 code = widen_u8(codes + group_of(w, panel, strip) * PANEL_ROWS + lane);
    const F32 exponent = to_f32(code), power = bits_as_f32(code << 23);
    F32 scale = select_equal(exponent, F32::zero(), F32::all(0x1p-127f), power);
    scale = select_equal(exponent, F32::all(255), F32::all(__builtin_nanf("")), scale);
    s.scale[0][lane / W] = scale * F32::all(0.5f);
    put_zero<1>(s, lane, 12);
  }
};

// Not integers: the codes are looked up or converted.
struct Nf4 : Traits<8, 1, false, false> {
  static constexpr bool IS_INTEGER = false;
  static void decode(const QuantizedWeight& w, int64_t panel, int64_t strip, int lane, Strip& s) {
    put_nibbles(s, w.data + panel * w.panel_bytes + strip * 4 * WORD, lane);
    s.scale[0][lane / W] = own_scale(w, group_of(w, panel, strip), lane);
  }
  static F32 value(I32 code) {
    static constexpr float LEVELS[16] = {
        -1.0f,                 -0.6961928009986877f,  -0.5250730514526367f,  -0.39491748809814453f,
        -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
        0.07958029955625534f,  0.16093020141124725f,  0.24611230194568634f,  0.33791524171829224f,
        0.44070982933044434f,  0.5626170039176941f,   0.7229568362236023f,   1.0f};
    return look_up(LEVELS, code);
  }
};

struct Fp8 : Traits<8, 1, false, false> {
  static constexpr bool IS_INTEGER = false;
  static void decode(const QuantizedWeight& w, int64_t panel, int64_t strip, int lane, Strip& s) {
    const uint8_t* words = w.data + panel * w.panel_bytes + strip * QUADS * WORD;
    for (int i = 0; i < QUADS; ++i) put(s, i, lane, word(words, i, lane));
    s.scale[0][lane / W] = own_scale(w, group_of(w, panel, strip), lane);
  }
  static F32 value(I32 code) {  // as load_f8e4m3
    const I32 magnitude = code & I32::all(0x7f), sign = (code & I32::all(0x80)) << 24;
    const F32 x = bits_as_f32(magnitude << 20) * F32::all(0x1p120f);
    const F32 finite = select_equal(to_f32(magnitude), F32::all(127),
                                    F32::all(__builtin_nanf("")), x);
    return copy_sign(finite, bits_as_f32(sign));
  }
};

// The codes alone, for who applies the scales to the sums.
struct Fp8Codes : Fp8 {
  static void decode(const QuantizedWeight& w, int64_t panel, int64_t strip, int lane, Strip& s) {
    Fp8::decode(w, panel, strip, lane, s);
    s.scale[0][lane / W] = F32::all(1);
  }
};

// --- GGUF: blocks of 32 ---------------------------------------------------------------------------

template <int BLOCK_BYTES>
inline const uint8_t* block(const QuantizedWeight& w, int64_t panel, int64_t i) {
  return w.data + panel * w.panel_bytes + i * (BLOCK_BYTES * PANEL_ROWS);
}

struct Q4_0 : Traits<4, 1, true, false> {
  static void decode(const QuantizedWeight& w, int64_t panel, int64_t strip, int lane, Strip& s) {
    const uint8_t* p = block<18>(w, panel, strip);
    s.scale[0][lane / W] = half(p, lane);
    put_zero<1>(s, lane, 8);
    put_nibbles(s, p + HALF, lane);
  }
};

struct Q4_1 : Traits<4, 1, false, true> {
  static void decode(const QuantizedWeight& w, int64_t panel, int64_t strip, int lane, Strip& s) {
    const uint8_t* p = block<20>(w, panel, strip);
    s.scale[0][lane / W] = half(p, lane);
    s.shift[0][lane / W] = half(p + HALF, lane);
    put_nibbles(s, p + 2 * HALF, lane);
  }
};

// Adds the fifth bits, which are the 32 bits of one word: four of them, 0b3210, times 2^0 + 2^7 +
// 2^14 + 2^21 have one in the lowest bit of each byte, and nothing carries.
inline void put_fifth_bits(Strip& s, const uint8_t* bits, int lane) {
  const I32 all = word(bits, 0, lane);
  for (int i = 0; i < QUADS; ++i) {
    const I32 four = (all >> (4 * i)) & I32::all(15);
    const I32 spread = (four * I32::all(0x00204081 << 4)) & I32::all(0x10101010);
    put(s, i, lane, s.codes[i][lane / W] | spread);
  }
}

struct Q5_0 : Traits<5, 1, true, false> {
  static void decode(const QuantizedWeight& w, int64_t panel, int64_t strip, int lane, Strip& s) {
    const uint8_t* p = block<22>(w, panel, strip);
    s.scale[0][lane / W] = half(p, lane);
    put_zero<1>(s, lane, 16);
    put_nibbles(s, p + HALF + WORD, lane);
    put_fifth_bits(s, p + HALF, lane);
  }
};

struct Q5_1 : Traits<5, 1, false, true> {
  static void decode(const QuantizedWeight& w, int64_t panel, int64_t strip, int lane, Strip& s) {
    const uint8_t* p = block<24>(w, panel, strip);
    s.scale[0][lane / W] = half(p, lane);
    s.shift[0][lane / W] = half(p + HALF, lane);
    put_nibbles(s, p + 2 * HALF + WORD, lane);
    put_fifth_bits(s, p + 2 * HALF, lane);
  }
};

struct Q8_0 : Traits<8, 1, BYTE_OFFSET != 0, false> {
  static void decode(const QuantizedWeight& w, int64_t panel, int64_t strip, int lane, Strip& s) {
    const uint8_t* p = block<34>(w, panel, strip);
    s.scale[0][lane / W] = half(p, lane);
    put_zero<1>(s, lane, BYTE_OFFSET);
    put_bytes(s, p + HALF, lane);
  }
};

// --- GGUF: blocks of 256, eight strips ------------------------------------------------------------

// The 6-bit scales and minimums of Q4_K and Q5_K, see `blocks._six_bit_scales`.
inline void put_six_bit_scales(Strip& s, const uint8_t* p, int strip, int lane) {
  const uint8_t* words = p + 2 * HALF;
  const int i = strip % 4;
  I32 scale = byte_of(word(words, 0, lane), i), minimum = byte_of(word(words, 1, lane), i);
  if (strip < 4) {
    scale = scale & I32::all(63);
    minimum = minimum & I32::all(63);
  } else {
    const I32 low = byte_of(word(words, 2, lane), i);
    scale = (low & I32::all(15)) | ((scale >> 2) & I32::all(48));
    minimum = (low >> 4) | ((minimum >> 2) & I32::all(48));
  }
  s.scale[0][lane / W] = half(p, lane) * to_f32(scale);
  s.shift[0][lane / W] = F32::zero() - half(p + HALF, lane) * to_f32(minimum);
}

// Eight words of codes of BITS bits, which begin at bit `from` of every byte.
template <int BITS>
inline I32 field(const uint8_t* words, int quad, int from, int lane) {
  constexpr int MASK = ((1 << BITS) - 1) * 0x01010101;
  return (word(words, quad, lane) >> from) & I32::all(MASK);
}

struct Q4_K : Traits<4, 1, false, true> {
  static void decode(const QuantizedWeight& w, int64_t panel, int64_t strip, int lane, Strip& s) {
    const uint8_t* p = block<144>(w, panel, strip / 8);
    const int i = static_cast<int>(strip % 8);
    put_six_bit_scales(s, p, i, lane);
    const uint8_t* nibbles = p + 2 * HALF + (3 + i / 2 * QUADS) * WORD;
    for (int q = 0; q < QUADS; ++q) put(s, q, lane, field<4>(nibbles, q, i % 2 * 4, lane));
  }
};

struct Q5_K : Traits<5, 1, false, true> {
  static void decode(const QuantizedWeight& w, int64_t panel, int64_t strip, int lane, Strip& s) {
    const uint8_t* p = block<176>(w, panel, strip / 8);
    const int i = static_cast<int>(strip % 8);
    put_six_bit_scales(s, p, i, lane);
    const uint8_t* fifth = p + 2 * HALF + 3 * WORD;
    const uint8_t* nibbles = fifth + (QUADS + i / 2 * QUADS) * WORD;
    for (int q = 0; q < QUADS; ++q) {
      put(s, q, lane, field<4>(nibbles, q, i % 2 * 4, lane) | field<1>(fifth, q, i, lane) << 4);
    }
  }
};

struct Q2_K : Traits<4, 2, false, true> {
  static void decode(const QuantizedWeight& w, int64_t panel, int64_t strip, int lane, Strip& s) {
    const uint8_t* p = block<84>(w, panel, strip / 8);
    const uint8_t *codes = p + 4 * WORD, *d = codes + 16 * WORD;
    const int i = static_cast<int>(strip % 8);
    for (int g = 0; g < 2; ++g) {
      const int at = 2 * i + g;
      const I32 both = byte_of(word(p, at / 4, lane), at % 4);
      s.scale[g][lane / W] = half(d, lane) * to_f32(both & I32::all(15));
      s.shift[g][lane / W] = F32::zero() - half(d + HALF, lane) * to_f32(both >> 4);
    }
    for (int q = 0; q < QUADS; ++q) {
      put(s, q, lane, field<2>(codes + i / 4 * QUADS * WORD, q, i % 4 * 2, lane));
    }
  }
};

struct Q3_K : Traits<4, 2, true, false> {
  static void decode(const QuantizedWeight& w, int64_t panel, int64_t strip, int lane, Strip& s) {
    const uint8_t* high = block<110>(w, panel, strip / 8);
    const uint8_t *codes = high + QUADS * WORD, *scales = codes + 16 * WORD, *d = scales + 3 * WORD;
    const int i = static_cast<int>(strip % 8);
    for (int g = 0; g < 2; ++g) {
      const int at = 2 * i + g;
      const I32 low = byte_of(word(scales, at % 8 / 4, lane), at % 4) >> (at / 8 * 4);
      const I32 top = byte_of(word(scales, 2, lane), at % 4) >> (at / 4 * 2);
      const I32 scale = (low & I32::all(15)) | (top & I32::all(3)) << 4;
      s.scale[g][lane / W] = half(d, lane) * to_f32(scale - I32::all(32));
    }
    put_zero<2>(s, lane, 4);
    for (int q = 0; q < QUADS; ++q) {
      const I32 low = field<2>(codes + i / 4 * QUADS * WORD, q, i % 4 * 2, lane);
      put(s, q, lane, low | field<1>(high, q, i, lane) << 2);
    }
  }
};

struct Q6_K : Traits<6, 2, true, false> {
  static void decode(const QuantizedWeight& w, int64_t panel, int64_t strip, int lane, Strip& s) {
    const uint8_t* low = block<210>(w, panel, strip / 8);
    const uint8_t *high = low + 32 * WORD, *scales = high + 16 * WORD, *d = scales + 4 * WORD;
    const int i = static_cast<int>(strip % 8), part = i % 4;
    for (int g = 0; g < 2; ++g) {
      const int at = 2 * i + g;
      const I32 scale = shift_signed(word(scales, at / 4, lane) << (24 - at % 4 * 8), 24);
      s.scale[g][lane / W] = half(d, lane) * to_f32(scale);
    }
    put_zero<2>(s, lane, 32);
    low += (i / 4 * 16 + part % 2 * QUADS) * WORD;
    high += i / 4 * QUADS * WORD;
    for (int q = 0; q < QUADS; ++q) {
      put(s, q, lane, field<4>(low, q, part / 2 * 4, lane) | field<2>(high, q, part * 2, lane) << 4);
    }
  }
};

}  // namespace strips

// Strip `strip` of panel `panel`.
template <class F>
inline void decode_strip(const QuantizedWeight& w, int64_t panel, int64_t strip, Strip& s) {
  for (int lane = 0; lane < PANEL_ROWS; lane += F32::WIDTH) F::decode(w, panel, strip, lane, s);
}

// Whether codes are bytes with a sign.
template <class F>
constexpr bool IS_SIGNED = F::IS_INTEGER && F::BITS == 8 && BYTE_OFFSET == 0;

// The weights that have these codes, one in each lane.
template <class F>
inline F32 weights_of(I32 codes, F32 zero, F32 scale, F32 shift) {
  F32 w;
  if constexpr (!F::IS_INTEGER) {
    w = F::value(codes);
  } else if constexpr (F32::WIDTH == 16) {
    // One instruction puts a byte into the last bits of 2^23: a float, of which one exact difference
    // leaves what is wanted.
    F32 none = F32::all(0x1p23f);
    if constexpr (F::HAS_ZERO) none = none + zero;
    w = bits_as_f32(codes | I32::all(0x4b000000)) - none;
  } else {
    w = to_f32(codes);
    if constexpr (F::HAS_ZERO) w = w - zero;
  }
  w = w * scale;
  if constexpr (F::HAS_SHIFT) w = w + shift;
  return w;
}

// The weights k = 4 * quad + i of the rows from `lane`.
template <class F>
inline F32 strip_values(const Strip& s, int quad, int i, int lane) {
  const int g = F::GROUPS == 2 ? quad / 4 : 0, v = lane / F32::WIDTH;
  const I32 words = s.codes[quad][v];
  const I32 codes = IS_SIGNED<F> ? shift_signed(words << (24 - 8 * i), 24) : strips::byte_of(words, i);
  return weights_of<F>(codes, s.zero[g][v], s.scale[g][v], s.shift[g][v]);
}

// The weights of one row alone, of a panel's strip. Of other rows only codes are decoded.
template <class F>
inline void strip_row(const QuantizedWeight& w, int64_t panel, int64_t strip, int row, float* out) {
  constexpr int W = F32::WIDTH;
  Strip s;
  F::decode(w, panel, strip, row / W * W, s);
  const int v = row / W;
  const auto of_row = [&](const auto& lanes, auto* to) {
    std::memcpy(to, reinterpret_cast<const char*>(&lanes) + row % W * 4, 4);
  };
  const auto everywhere = [&](F32 lanes) {
    float x;
    of_row(lanes, &x);
    return F32::all(x);
  };
  alignas(64) uint8_t codes[STRIP];
  for (int q = 0; q < QUADS; ++q) of_row(s.codes[q][v], codes + 4 * q);
  for (int k = 0; k < STRIP; k += W) {
    const int g = F::GROUPS == 2 ? k / (STRIP / 2) : 0;
    const I32 wide = IS_SIGNED<F> ? widen_i8(codes + k) : widen_u8(codes + k);
    F32 zero, shift;
    if constexpr (F::HAS_ZERO) zero = everywhere(s.zero[g][v]);
    if constexpr (F::HAS_SHIFT) shift = everywhere(s.shift[g][v]);
    store(out + k, weights_of<F>(wide, zero, everywhere(s.scale[g][v]), shift));
  }
}

// A strip of 16 rows to `out`, row by row.
template <class F>
inline void strip_rows(const Strip& s, float* out, int64_t stride) {
  constexpr int W = F32::WIDTH;
  for (int lane = 0; lane < PANEL_ROWS; lane += W) {
    for (int k = 0; k < STRIP; k += W) {
      F32 block[W];
      for (int i = 0; i < W; ++i) block[i] = strip_values<F>(s, (k + i) / 4, (k + i) % 4, lane);
      transpose(block);
      for (int i = 0; i < W; ++i) store(out + (lane + i) * stride + k, block[i]);
    }
  }
}

// Calls body(F{}) with the format's class.
template <class Body>
inline void with_format(Format format, const Body& body) {
  using namespace strips;
  switch (format) {
    case Format::int8: return body(Int8{});
    case Format::int4: return body(Int4{});
    case Format::nf4: return body(Nf4{});
    case Format::fp8: return body(Fp8{});
    case Format::mxfp4: return body(MxFp4{});
    case Format::q4_0: return body(Q4_0{});
    case Format::q4_1: return body(Q4_1{});
    case Format::q5_0: return body(Q5_0{});
    case Format::q5_1: return body(Q5_1{});
    case Format::q8_0: return body(Q8_0{});
    case Format::q2_k: return body(Q2_K{});
    case Format::q3_k: return body(Q3_K{});
    case Format::q4_k: return body(Q4_K{});
    case Format::q5_k: return body(Q5_K{});
    case Format::q6_k: return body(Q6_K{});
    default: return;  // plain numbers have no strips
  }
}

}  // namespace tilewise
