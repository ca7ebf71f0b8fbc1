// The random numbers of tilewise/fused/philox.py, to the last bit: Philox4x32-10 (Salmon et al.,
// Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011), and Gumbel noise made of its words.
//
// No product may be contracted with a sum here: the sources are compiled with -ffp-contract=off.
#pragma once

#include <cstdint>
#include <cstring>

namespace tilewise {

// Whose numbers are drawn: the key, and the counter but for the token.
struct Stream {
  uint32_t key[2];
  uint32_t position, id[2];
};

// How many tokens are drawn at a time. The loop is over independent lanes, which compilers turn
// into vectors.
constexpr int64_t DRAWN = 64;

inline void draw_words(const Stream& stream, int64_t first_token, uint32_t* words) {
  const uint32_t first = static_cast<uint32_t>(first_token / 4);
  uint32_t w0[DRAWN / 4], w1[DRAWN / 4], w2[DRAWN / 4], w3[DRAWN / 4];
  for (uint32_t lane = 0; lane < DRAWN / 4; ++lane) {
    uint32_t c0 = first + lane, c1 = stream.position, c2 = stream.id[0], c3 = stream.id[1];
    uint32_t k0 = stream.key[0], k1 = stream.key[1];
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u;
      const uint64_t b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(b);
      c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(a);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    w0[lane] = c0, w1[lane] = c1, w2[lane] = c2, w3[lane] = c3;
  }
  for (int64_t lane = 0; lane < DRAWN / 4; ++lane) {
    words[4 * lane] = w0[lane];
    words[4 * lane + 1] = w1[lane];
    words[4 * lane + 2] = w2[lane];
    words[4 * lane + 3] = w3[lane];
  }
}

// log((1 + fraction) * 2^exponent) for a fraction in [-1/2, 0].
inline float log_of(float fraction, float exponent) {
  const float s = fraction / (fraction + 2.0f);
  const float square = s * s;
  float series = static_cast<float>(1.0 / 13);
  for (const double divisor : {11.0, 9.0, 7.0, 5.0, 3.0, 1.0}) {
    series = series * square + static_cast<float>(1.0 / divisor);
  }
  return exponent * 0.693147182464599609375f + (s + s) * series;
}

// -log(x) for a normal x > 0.
inline float minus_log(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const int exponent = static_cast<int>(bits >> 23) - 126;
  bits = (bits & 0x7fffffu) | 0x3f000000u;
  float mantissa;  // in [1/2, 1)
  std::memcpy(&mantissa, &bits, 4);
  return -log_of(mantissa - 1.0f, static_cast<float>(exponent));
}

// -log(-log(u)) with u = (word + 1/2) / 2^32; of u in the upper half, 1 - u is kept.
inline float gumbel(uint32_t word) {
  const bool is_upper = word >= 0x80000000u;
  const uint64_t smaller = is_upper ? ~word : word;
  const float tail = static_cast<float>(2 * smaller + 1) * 0x1p-33f;
  return minus_log(is_upper ? -log_of(-tail, 0.0f) : minus_log(tail));
}

}  // namespace tilewise
