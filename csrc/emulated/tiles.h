// The instructions of cpu/tiles.h in plain C++, with the rounding and the order of sums of the
// processor's, and its refusals: a tile that is not configured, or operands whose shapes do not
// fit, stop the program where the processor would raise an exception.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS,
// TDPBSSD, TDPBSUD, TILELOADD.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cpu/simd.h"

namespace tilewise {

struct TileShapes;

namespace emulated {

struct Tile {
  int rows, row_bytes;  // 0 until configured
  alignas(64) uint8_t data[16][64];
};

inline thread_local Tile tiles[8];

inline Tile& tile(int number) {
  if (tiles[number].rows == 0) std::abort();
  return tiles[number];
}

// Denormals are zeros within a product of bfloat16, whatever the program has chosen.
class FlushDenormals {
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr((before_ & ~0x6000u) | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  uint32_t before_;
};

// Columns past a tile's width are zeros, so the whole 64 bytes can always be computed.
template <class B>
inline void dot_bytes(Tile& c, const Tile& a, const Tile& b) {
  for (int m = 0; m < c.rows; ++m) {
    int32_t sum[16];
    std::memcpy(sum, c.data[m], sizeof(sum));
    for (int k = 0; k < a.row_bytes; ++k) {
      const int x = static_cast<int8_t>(a.data[m][k]);
      for (int n = 0; n < 16; ++n) {
        sum[n] += x * static_cast<B>(b.data[k / 4][4 * n + k % 4]);
      }
    }
    std::memcpy(c.data[m], sum, sizeof(sum));
  }
}

inline void dot_bf16(Tile& c, const Tile& a, const Tile& b) {
  const FlushDenormals flush;
  const __m512i top = _mm512_set1_epi32(-65536);
  for (int m = 0; m < c.rows; ++m) {
    // Even and odd k are two sums.
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int k = 0; k < a.row_bytes / 4; ++k) {
      int32_t pair;
      std::memcpy(&pair, a.data[m] + 4 * k, 4);
      const __m512i x = _mm512_set1_epi32(pair), y = _mm512_loadu_si512(b.data[k]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, top)),
                            _mm512_castsi512_ps(_mm512_and_si512(y, top)), odd);
    }
    const __m512 sum = _mm512_add_ps(even, odd);
    _mm512_storeu_ps(c.data[m], _mm512_add_ps(_mm512_loadu_ps(c.data[m]), sum));
  }
}

template <int C, int A, int B>
inline void check_product() {
  static_assert(C != A && C != B && A != B, "the operands of a product are three tiles");
  const Tile &c = tile(C), &a = tile(A), &b = tile(B);
  if (c.rows != a.rows || c.row_bytes != b.row_bytes || 4 * b.rows != a.row_bytes) std::abort();
}

}  // namespace emulated

inline void configure_tiles(const TileShapes& shapes) {
  uint8_t bytes[64];
  std::memcpy(bytes, static_cast<const void*>(&shapes), sizeof(bytes));
  if (bytes[0] != 1) std::abort();
  for (int i = 0; i < 8; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
    const int rows = bytes[48 + i];
    if (row_bytes > 64 || rows > 16) std::abort();
    emulated::tiles[i] = {rows, row_bytes, {}};
  }
}

inline void release_tiles() {
  for (emulated::Tile& t : emulated::tiles) t = {};
}

template <int T>
inline void tile_zero() {
  emulated::Tile& t = emulated::tile(T);
  std::memset(t.data, 0, sizeof(t.data));
}

template <int T>
inline void tile_load(const void* p, int64_t stride) {
  tile_zero<T>();
  emulated::Tile& t = emulated::tile(T);
  for (int i = 0; i < t.rows; ++i) {
    std::memcpy(t.data[i], static_cast<const char*>(p) + i * stride, t.row_bytes);
  }
}

template <int T>
inline void tile_store(void* p, int64_t stride) {
  const emulated::Tile& t = emulated::tile(T);
  for (int i = 0; i < t.rows; ++i) {
    std::memcpy(static_cast<char*>(p) + i * stride, t.data[i], t.row_bytes);
  }
}

template <int C, int A, int B>
inline void tile_dot_bf16() {
  emulated::check_product<C, A, B>();
  emulated::dot_bf16(emulated::tiles[C], emulated::tiles[A], emulated::tiles[B]);
}

template <int C, int A, int B>
inline void tile_dot_i8() {
  emulated::check_product<C, A, B>();
  emulated::dot_bytes<int8_t>(emulated::tiles[C], emulated::tiles[A], emulated::tiles[B]);
}

template <int C, int A, int B>
inline void tile_dot_i8_u8() {
  emulated::check_product<C, A, B>();
  emulated::dot_bytes<uint8_t>(emulated::tiles[C], emulated::tiles[A], emulated::tiles[B]);
}

}  // namespace tilewise
