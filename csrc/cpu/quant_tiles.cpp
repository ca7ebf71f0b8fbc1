// Products of quantized weights on AMX tiles: blocks of the weight are decoded to tiles once, and all
// rows of x run over them.
//
// A number is a sum of up to three bfloat16 pieces, the next one what the last one left over: of
// bfloat16 activations one, and the weight is rounded to one as well, which adds to a result about as
// much error as its own rounding, unless its zero points are far off; of float16 two, of float32 three.
// The products of pieces that are left out are below the precision of the result. (Henry, Tang and
// Heinecke, Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations,
// 2019.)
//
// fp8 activations are one piece, for weights in fp8 with one scale a row: codes of both are exact in
// bfloat16, and the sums are scaled.
//
// The block sizes are calculated, not measured.
#include "cpu/quant_activations.h"
#include "cpu/quant_kernels.h"
#include "cpu/quant_strips.h"

#if defined(__AMX_BF16__)

#include <algorithm>
#include <atomic>

#include "cpu/tile_product.h"

namespace tilewise {
namespace {

constexpr int W = F32::WIDTH;
static_assert(W == PANEL_ROWS, "a row of a tile has the rows of a panel");

constexpr int64_t SHARED_PANELS = 8;  // in a pass over x
constexpr int64_t FLOAT_STRIPS = 4;  // with SHARED_PANELS 32 KB of tiles a piece, in the first level

// x as tiles: strip by strip, 64 bytes of each row. Tiles may begin at any row.
template <int PIECES>
class FloatTiles {
 public:
  FloatTiles(const QuantizedMatmul& call, const float* x, int64_t x_stride)
      : strips_(strips_of(call.weight.depth)), rows_(call.rows + TILE_HEIGHT - 1) {
    const int64_t depth = call.weight.depth;
    data_ = make_workspace<BFloat16>(PIECES * strips_ * rows_ * STRIP);
    std::atomic<bool> possible{true};
    parallel_rows(rows_, strips_ * STRIP, [&](int64_t m) {
      const auto row = make_workspace<float>(strips_ * STRIP);
      const int64_t count = m < call.rows ? depth : 0;
      std::copy_n(x + (m < call.rows ? m : 0) * x_stride, count, row.get());
      std::fill_n(row.get() + count, strips_ * STRIP - count, 0.0f);
      // Pieces of what is not finite are NaN, and those of tiny numbers would be lost.
      const float most = largest(row.get(), strips_ * STRIP);
      if (!(most == 0 || (most >= 0x1p-90f && most <= 0x1p100f))) possible = false;
      for (int64_t s = 0; s < strips_; ++s) {
        for (int i = 0; i < STRIP; i += W) {
          F32 rest = load(row.get() + s * STRIP + i);
          for (int p = 0; p < PIECES; ++p) {
            BFloat16* to = data_.get() + ((p * strips_ + s) * rows_ + m) * STRIP + i;
            store(to, rest);
            rest = rest - load(to);
          }
        }
      }
    });
    is_possible = possible;
  }

  const char* tile(int piece, int64_t strip, int64_t row) const {
    return reinterpret_cast<const char*>(data_.get() +
                                         ((piece * strips_ + strip) * rows_ + row) * STRIP);
  }
  int64_t strip_bytes() const { return rows_ * TILE_BYTES; }

  bool is_possible;

 private:
  int64_t strips_, rows_;
  Workspace<BFloat16> data_;
};

// The upper half of each lane rounded to bfloat16, the lower one zero. All must be finite.
inline I32 rounded(F32 x) {
  const I32 bits = bits_of(x);
  const I32 odd = (bits >> 16) & I32::all(1);
  return (bits + odd + I32::all(0x7fff)) & I32::all(static_cast<int>(0xffff0000u));
}

// A strip to tiles of its pieces, which are `piece_bytes` apart.
template <class F, int PIECES>
void strip_to_tiles(const Strip& strip, char* out, int64_t piece_bytes) {
  for (int q = 0; q < QUADS; ++q) {
    for (int i = 0; i < 4; i += 2, out += TILE_BYTES) {
      F32 even = strip_values<F>(strip, q, i, 0), odd = strip_values<F>(strip, q, i + 1, 0);
      for (int p = 0; p < PIECES; ++p) {
        const I32 first = rounded(even), second = rounded(odd);
        store_int(out + p * piece_bytes, (first >> 16) | second);
        even = even - bits_as_f32(first);
        odd = odd - bits_as_f32(second);
      }
    }
  }
}

// `x_scales`, of each row, are for weights that come without their scales.
template <class F, int PIECES>
bool multiply_floats_in(const QuantizedMatmul& call, const Finisher& finish, const float* from,
                        int64_t from_stride, const float* x_scales = nullptr) {
  const QuantizedWeight& w = call.weight;
  const FloatTiles<PIECES> x(call, from, from_stride);
  if (!x.is_possible) return false;
  const int64_t strips = strips_of(w.depth);
  constexpr int64_t PIECE = FLOAT_STRIPS * TILE_SIZE, PANEL = PIECES * PIECE;
  for_panels(
      call, finish, SHARED_PANELS,
      [&](const Segment& segment, const int64_t* panels, int count, float* sums) {
        const int64_t rows = segment.end - segment.begin, stride = count * PANEL_ROWS;
        const auto tiles = make_workspace<char>(count * PANEL);
        const Tiles on;
        const int64_t size = round_up(rows, TILE_HEIGHT) * stride;
        // Products of later pieces are small: added to the others at once, each would round their sum.
        const auto small = make_workspace<float>(PIECES > 1 ? size : 0);
        std::fill_n(sums, size, 0.0f);
        std::fill_n(small.get(), PIECES > 1 ? size : 0, 0.0f);
        Strip strip;
        for (int64_t first = 0; first < strips; first += FLOAT_STRIPS) {
          const int64_t deep = std::min(strips - first, FLOAT_STRIPS);
          for (int i = 0; i < count; ++i) {
            for (int64_t s = 0; s < deep; ++s) {
              decode_strip<F>(w, panels[i], first + s, strip);
              strip_to_tiles<F, PIECES>(strip, tiles.get() + i * PANEL + s * TILE_SIZE, PIECE);
            }
          }
          // Two tiles of rows at a time with all pieces: their sums stay in the first-level cache.
          for (int64_t m = 0; m < rows; m += 2 * TILE_HEIGHT) {
            const int64_t together = std::min<int64_t>(rows - m, 2 * TILE_HEIGHT);
            for (int i = 0; i < PIECES; ++i) {
              for (int j = 0; i + j < PIECES; ++j) {
                multiply_tiles<true>(
                    together, deep, count,
                    {x.tile(i, first, segment.begin + m), x.strip_bytes(), TILE_SIZE, TILE_BYTES,
                     tiles.get() + j * PIECE, PANEL,
                     (i + j > 0 ? small.get() : sums) + m * stride, stride});
              }
            }
          }
        }
        if constexpr (PIECES > 1) {
          for (int64_t i = 0; i < rows * stride; i += W) store(sums + i, load(sums + i) + load(&small[i]));
        }
        if (!x_scales) return;
        for (int i = 0; i < count; ++i) {
          const F32 of_panel = strips::own_scale(w, panels[i] * w.groups, 0);
          for (int64_t m = 0; m < rows; ++m) {
            float* sum = sums + m * stride + i * PANEL_ROWS;
            store(sum, load(sum) * of_panel * F32::all(x_scales[segment.begin + m]));
          }
        }
      });
  return true;
}

// Whether a zero point is none of the codes, so that weights may be far from zero, all on one side: they
// can add up to much less than what rounding them changes.
bool has_far_zeros(const QuantizedMatmul& call) {
  const QuantizedWeight& w = call.weight;
  if (w.format != Format::int4 || !w.zeros) return false;
  const int64_t count = panels_of(w.rows) * w.groups * PANEL_ROWS;
  for (int64_t i = 0; i < call.segment_count; ++i) {
    const uint8_t* zeros = w.zeros + call.segments[i].weight * count;
    if (*std::max_element(zeros, zeros + count) > 15) return true;
  }
  return false;
}

}  // namespace

bool multiply_fp8_tiles(const QuantizedMatmul& call, const Finisher& finish) {
  const QuantizedWeight& w = call.weight;
  const int64_t strips = strips_of(w.depth), filled = strips * STRIP;
  if (call.rounding != Rounding::fp8 || w.depth == 0 || w.group_strips < strips) return false;
  const auto codes = make_workspace<float>(call.rows * filled);
  const auto scales = make_workspace<float>(call.rows);
  parallel_rows(call.rows, filled, [&](int64_t m) {
    load_row(call, m, codes.get() + m * filled);
    encode_float8(codes.get() + m * filled, w.depth, strips, scales.get() + m);
  });
  return multiply_floats_in<strips::Fp8Codes, 1>(call, finish, codes.get(), filled, scales.get());
}

bool multiply_float_tiles(const QuantizedMatmul& call, const Finisher& finish, const float* x,
                          int64_t x_stride) {
  // A row of few results may by chance be much smaller than what it is summed from.
  if (call.weight.depth == 0 || call.weight.rows < PANEL_ROWS) return false;
  const DType dtype = call.rounding == Rounding::none ? call.x_dtype : DType::f32;
  bool done = false;
  with_format(call.weight.format, [&](auto format) {
    using F = decltype(format);
    switch (dtype) {
      case DType::bf16:
        done = has_far_zeros(call) ? multiply_floats_in<F, 2>(call, finish, x, x_stride)
                                   : multiply_floats_in<F, 1>(call, finish, x, x_stride);
        return;
      case DType::f16: done = multiply_floats_in<F, 2>(call, finish, x, x_stride); return;
      default: done = multiply_floats_in<F, 3>(call, finish, x, x_stride); return;
    }
  });
  return done;
}

}  // namespace tilewise

#else

namespace tilewise {

bool multiply_fp8_tiles(const QuantizedMatmul&, const Finisher&) { return false; }
bool multiply_float_tiles(const QuantizedMatmul&, const Finisher&, const float*, int64_t) {
  return false;
}

}  // namespace tilewise

#endif
