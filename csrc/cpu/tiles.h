// AMX: eight tile registers of up to 16 rows x 64 bytes, and products of them.
//
//   C (M x N, 32-bit) += A (M x K) B (K x N)
//
// with A as it lies in memory, a row of tile A being 64 bytes of a row of A (K = 32 bfloat16 or 64
// int8), and B in groups of four bytes: row r of tile B has, for each of the 16 columns n, rows
// 2r and 2r + 1 (bfloat16) or 4r ... 4r + 3 (int8) of column n next to each other.
//
// A product takes 16 cycles and its result can be added to again after 52, so four accumulators
// have to be in flight; a load from the first-level cache takes 8 cycles of the load ports, and two
// loads a product are hidden behind it. (So says the manual. On an Emerald Rapids a chain of loads and
// products into one accumulator took 16.6 cycles a product, with 8 rows of A as with 16.)
//
// Whoever uses tiles opens a `Tiles` for as short as it lasts: a thread with live tiles has 8 KB more
// to be saved at every context switch.
//
// Inline assembly instead of the compilers' intrinsics: those of GCC 12 do not say that a load
// reads memory, so stores to an operand can sink below it; and they take tile numbers only as
// literals, while here these are template parameters.
//
// Source: Intel 64 and IA-32 Architectures Optimization Reference Manual, chapter "AMX".
#pragma once

#include <cstdint>

#include "cpu/simd.h"

#if defined(TILEWISE_EMULATED)
#include "emulated/tiles.h"
#elif !defined(__AMX_TILE__) || !defined(__AMX_BF16__) || !defined(__AMX_INT8__)
#error "tiles are for AMX builds"
#endif

namespace tilewise {

constexpr int TILE_HEIGHT = 16;  // rows
constexpr int TILE_BYTES = 64;   // of a row
constexpr int TILE_WIDTH = 16;   // columns of B and C
constexpr int TILE_SIZE = TILE_HEIGHT * TILE_BYTES;
constexpr int TILE_SUMS = TILE_HEIGHT * TILE_WIDTH;  // numbers of C

// What LDTILECFG reads. Unless told otherwise every tile has its full size; a product of an A and a
// C of fewer rows takes proportionally fewer cycles, by the manual.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};  // 8 used
  uint8_t rows[16] = {};

  TileShapes() {
    for (int i = 0; i < 8; ++i) row_bytes[i] = TILE_BYTES, rows[i] = TILE_HEIGHT;
  }
};
static_assert(sizeof(TileShapes) == 64, "the layout is the processor's");

#if !defined(TILEWISE_EMULATED)

inline void configure_tiles(const TileShapes& shapes) {
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}

inline void release_tiles() { asm volatile("tilerelease"); }

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

// Rows are `stride` bytes apart.
template <int T>
inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
               :
               : "r"(p), "r"(stride), "i"(T), "m"(*static_cast<const char(*)[]>(p)));
}

template <int T>
inline void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c3, (%1,%2,1)"
               : "=m"(*static_cast<char(*)[]>(p))
               : "r"(p), "r"(stride), "i"(T));
}

// C += A B for bfloat16.
template <int C, int A, int B>
inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// C += A B for bytes: signed by signed, and signed by unsigned.
template <int C, int A, int B>
inline void tile_dot_i8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

template <int C, int A, int B>
inline void tile_dot_i8_u8() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

// Tiles are there to be used while one of these lives.
class Tiles {
 public:
  explicit Tiles(const TileShapes& shapes = TileShapes()) { configure_tiles(shapes); }
  ~Tiles() { release_tiles(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace tilewise
