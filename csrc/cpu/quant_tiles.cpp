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
// The unit multiplies a tile in 16 cycles, loads one from the first-level cache in 10, from the second
// in 21, from the third in 96, and stores one to the second in 61 (measured, Emerald Rapids). So sums
// stay in tiles over DEPTH strips, x is cut into blocks of rows that stay in the second level while all
// panels pass, and rows are finished while their sums are in the first.
#include "cpu/quant_kernels.h"
#include "cpu/quant_scales.h"
#include "cpu/quant_strips.h"

#if defined(__AMX_BF16__)

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "cpu/bf16_rows.h"
#include "cpu/quant_tile_calls.h"
#include "cpu/tile_products.h"

namespace tilewise {
namespace {

constexpr int W = F32::WIDTH;
static_assert(W == PANEL_ROWS, "a row of a tile has the rows of a panel");

constexpr int64_t PAIR = 2;     // panels
constexpr int64_t DEPTH = 128;  // strips that are decoded at once; sums stay in tiles over as many
constexpr int64_t DECODED = 512 << 10;  // bytes of a task's panels in tiles

// x as tiles: strip by strip, 64 bytes of each row. Tiles may begin at any row.
template <int PIECES>
class FloatTiles {
 public:
  // read(m, row) writes row m, filled up to whole strips with zeros.
  template <class Read>
  FloatTiles(const QuantizedMatmul& call, const Read& read)
      : strips_(strips_of(call.weight.depth)), rows_(tile_rows(call.rows)) {
    data_ = make_workspace<BFloat16>(PIECES * strips_ * rows_ * STRIP);
    std::atomic<bool> possible{true};
    parallel_rows(call.rows, strips_ * STRIP, [&](int64_t m) {
      const bool is_copy = call.x_dtype == DType::bf16 && call.rounding == Rounding::none;
      const float most = is_copy ? copy(call, m) : split(m, read);
      if (!fits_bfloat16(most)) possible = false;
    });
    is_possible = possible;
  }

  const BFloat16* tile(int piece, int64_t strip, int64_t row) const {
    return at(piece, strip, row);
  }
  int64_t strip_bytes() const { return rows_ * TILE_BYTES; }

  bool is_possible;

 private:
  BFloat16* at(int piece, int64_t strip, int64_t row) const {
    return data_.get() + ((piece * strips_ + strip) * rows_ + row) * STRIP;
  }

  // Row m of x as it is; returns its largest magnitude.
  float copy(const QuantizedMatmul& call, int64_t m) {
    const BFloat16* row = static_cast<const BFloat16*>(call.x) + m * call.x_stride;
    LargestBfloat16 largest;
    for (int64_t s = 0; s < strips_; ++s) {
      const I32 strip = load_row(row + s * STRIP, call.weight.depth - s * STRIP);
      store_int(at(0, s, m), strip);
      for (int p = 1; p < PIECES; ++p) store_int(at(p, s, m), I32::zero());
      largest.add(strip.v);
    }
    return largest.get();
  }

  template <class Read>
  float split(int64_t m, const Read& read) {
    const SmallWorkspace<float, SMALL_DEPTH> row(strips_ * STRIP);
    read(m, row.get());
    for (int64_t s = 0; s < strips_; ++s) {
      for (int i = 0; i < STRIP; i += W) {
        F32 rest = load(row.get() + s * STRIP + i);
        for (int p = 0; p < PIECES; ++p) {
          BFloat16* to = at(p, s, m) + i;
          store(to, rest);
          if (p + 1 < PIECES) rest = rest - load(to);
        }
      }
    }
    return largest(row.get(), strips_ * STRIP);
  }

  static constexpr int64_t SMALL_DEPTH = 4096;  // rows up to here are read to the stack
  int64_t strips_, rows_;
  Workspace<BFloat16> data_;
};

// As round_row with int8, a row that is read to whole strips.
void round_to_int8(float* x, int64_t strips, int64_t group_strips) {
  const SmallWorkspace<float, 256> scales(round_up(strips, SCALES_TOGETHER));
  const bool is_normal = find_scales(x, strips, group_strips, scales.get());
  for (int64_t s = 0; s < strips; ++s) {
    const float scale = scales[s], inverse = scale == 0 ? 0 : 1 / scale;
    for (int i = 0; i < STRIP; i += W) {
      float* at = x + s * STRIP + i;
      store(at, int8_code(load(at), scale, inverse, is_normal) * F32::all(scale));
    }
  }
}

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

// Code i of each lane's four as a number.
template <class F>
F32 code_of(I32 words, int i) {
  static constexpr float CODES[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  if constexpr (F::BITS <= 4) return look_up(CODES, words >> (8 * i));  // by the last four bits alone
  return bits_as_f32(strips::byte_of(words, i) | I32::all(0x4b000000)) - F32::all(0x1p23f);
}

// The codes of a row with one scale, less their zero point, which are exact in bfloat16, as codes in fp8
// are: the scale is for the sums.
struct Int8Codes : strips::Int8 {};
template <class F>
constexpr bool ARE_CODES = std::is_same_v<F, Int8Codes> || std::is_same_v<F, strips::Fp8Codes>;

// A strip to a tile of one piece: with half as many instructions, where that is most of the work with few
// rows. A weight is one multiply-add, as its shift or the product of its zero point and scale is the
// same for the strip, and is rounded half away from zero.
template <class F>
void strip_to_tile(const Strip& strip, char* out) {
  const I32 half = I32::all(0x8000), upper = I32::all(static_cast<int>(0xffff0000u));
  for (int q = 0; q < QUADS; ++q) {
    const int g = F::GROUPS == 2 ? q / 4 : 0;
    F32 offset = F32::zero();
    if constexpr (F::HAS_ZERO) offset = F32::zero() - strip.zero[g][0] * strip.scale[g][0];
    if constexpr (F::HAS_SHIFT) offset = strip.shift[g][0];
    const auto bits = [&](int i) {
      if constexpr (std::is_same_v<F, Int8Codes>) {
        const I32 code = strips::byte_of(strip.codes[q][0], i) | I32::all(0x4b000000);
        return bits_of(bits_as_f32(code) - (F32::all(0x1p23f) + strip.zero[g][0]));
      }
      if constexpr (!F::IS_INTEGER) return bits_of(strip_values<F>(strip, q, i, 0)) + half;
      return bits_of(fma(code_of<F>(strip.codes[q][0], i), strip.scale[g][0], offset)) + half;
    };
    for (int i = 0; i < 4; i += 2, out += TILE_BYTES) {
      store_int(out, (bits(i) >> 16) | (bits(i + 1) & upper));
    }
  }
}

// The products of tiles of rows with panels. Not inlined, see multiply_tiles.
__attribute__((noinline)) void multiply_panels(int64_t rows, int64_t panels, int64_t depth,
                                               bool add, const BFloat16* x, int64_t strip_bytes,
                                               const char* w, int64_t panel_bytes, float* sums,
                                               int64_t stride) {
  multiply_tiles<Bfloat16Products>(rows, panels, depth, add, {x, TILE_SIZE, strip_bytes},
                                   {w, TILE_SIZE, panel_bytes}, tiles_of_rows(sums, stride));
}

// `x_scales`, of each row, are for activations that are codes, too.
template <class F, int PIECES, class Read>
bool multiply_floats_in(const QuantizedMatmul& call, const Finisher& finish, const Read& read,
                        const float* x_scales = nullptr) {
  const QuantizedWeight& w = call.weight;
  const FloatTiles<PIECES> x(call, read);
  if (!x.is_possible) return false;
  const int64_t strips = strips_of(w.depth), deepest = std::min(strips, DEPTH);
  const int64_t piece_bytes = deepest * TILE_SIZE, panel_bytes = PIECES * piece_bytes;
  const int64_t room = DECODED / panel_bytes, wanted = room >= 8 ? 8 : room >= 4 ? 4 : PAIR;
  const CutSegments cut(call, PIECES * strips * TILE_BYTES);
  for_panels_by_rows(
      cut.call, finish, wanted > PAIR ? even_shares(cut.call, wanted, PAIR) : PAIR,
      [&](const Segment& segment, const int64_t* panels, int count, const auto& done) {
        const int64_t rows = segment.end - segment.begin, stride = count * PANEL_ROWS;
        const auto tiles = make_workspace<char>(count * panel_bytes);
        // Two tiles of rows are finished while their sums are in the first-level cache, if those are
        // complete. Products of later pieces are small: added to the others at once, each would round
        // their sum.
        const bool is_whole = strips <= DEPTH;
        const int64_t kept = is_whole ? 2 * TILE_HEIGHT : round_up(rows, TILE_HEIGHT);
        const auto sums = make_workspace<float>(kept * stride);
        const auto small = make_workspace<float>(PIECES > 1 ? kept * stride : 0);
        const Tiles on;
        Strip strip;
        for (int64_t first = 0; first < strips; first += DEPTH) {
          const int64_t deep = std::min(strips - first, DEPTH);
          for (int i = 0; i < count; ++i) {
            for (int64_t s = 0; s < deep; ++s) {
              char* to = tiles.get() + i * panel_bytes + s * TILE_SIZE;
              decode_strip<F>(w, panels[i], first + s, strip);
              if constexpr (PIECES == 1) {
                strip_to_tile<F>(strip, to);
              } else {
                strip_to_tiles<F, PIECES>(strip, to, piece_bytes);
              }
            }
          }
          for (int64_t m = 0; m < rows; m += 2 * TILE_HEIGHT) {
            const int64_t together = std::min<int64_t>(rows - m, 2 * TILE_HEIGHT);
            const int64_t row = is_whole ? 0 : m * stride;
            for (int j = 0; j < PIECES; ++j) {
              for (int k = 0; j + k < PIECES; ++k) {
                multiply_panels(together > TILE_HEIGHT ? 2 : 1, count, deep,
                                first > 0 || j > 0 || k > 1, x.tile(j, first, segment.begin + m),
                                x.strip_bytes(), tiles.get() + k * piece_bytes, panel_bytes,
                                (j + k > 0 ? small.get() : sums.get()) + row, stride);
              }
            }
            if (first + DEPTH < strips) continue;
            float* y = sums.get() + row;
            if constexpr (PIECES > 1) {
              for (int64_t n = 0; n < together * stride; n += W) {
                store(y + n, load(y + n) + load(&small[row + n]));
              }
            }
            for (int i = 0; ARE_CODES<F> && i < count; ++i) {
              const F32 of_panel = strips::own_scale(w, panels[i] * w.groups, 0);
              for (int64_t n = 0; n < together; ++n) {
                float* sum = y + n * stride + i * PANEL_ROWS;
                const F32 scaled = load(sum) * of_panel;
                store(sum, x_scales ? scaled * F32::all(x_scales[segment.begin + m + n]) : scaled);
              }
            }
            done(segment.begin + m, segment.begin + m + together, y);
          }
        }
      });
  return true;
}

// Whether a zero point is none of the codes, so that weights may be far from zero, all on one side: they
// can add up to much less than what rounding them changes.
bool has_far_zeros(const QuantizedMatmul& call) {
  return call.weight.format == Format::int4 && largest_zero(call) > 15;
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
  return multiply_floats_in<strips::Fp8Codes, 1>(
      call, finish, [&](int64_t m, float* row) { std::copy_n(codes.get() + m * filled, filled, row); },
      scales.get());
}

bool multiply_float_tiles(const QuantizedMatmul& call, const Finisher& finish) {
  // A row of few results may by chance be much smaller than what it is summed from.
  if (call.weight.depth == 0 || call.weight.rows < PANEL_ROWS) return false;
  const auto read = [&](int64_t m, float* row) {
    load_row(call, m, row);
    const int64_t depth = call.weight.depth, group = activation_strips(call);
    if (call.rounding == Rounding::int8) round_to_int8(row, strips_of(depth), group);
    if (call.rounding == Rounding::fp8) round_row(call.rounding, row, depth, group);
  };
  bool done = false;
  with_format(call.weight.format, [&](auto format) {
    using F = decltype(format);
    switch (call.rounding == Rounding::fp8 ? DType::f32 : call.x_dtype) {
      case DType::bf16:
        if constexpr (std::is_same_v<F, strips::Int8>) {
          if (call.weight.group_strips >= strips_of(call.weight.depth)) {
            done = multiply_floats_in<Int8Codes, 1>(call, finish, read);
            return;
          }
        }
        done = has_far_zeros(call) ? multiply_floats_in<F, 2>(call, finish, read)
                                   : multiply_floats_in<F, 1>(call, finish, read);
        return;
      case DType::f16: done = multiply_floats_in<F, 2>(call, finish, read); return;
      default: done = multiply_floats_in<F, 3>(call, finish, read); return;
    }
  });
  return done;
}

}  // namespace tilewise

#else

namespace tilewise {

bool multiply_fp8_tiles(const QuantizedMatmul&, const Finisher&) { return false; }
bool multiply_float_tiles(const QuantizedMatmul&, const Finisher&) { return false; }

}  // namespace tilewise

#endif
