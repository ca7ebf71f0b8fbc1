// Products of quantized weights with int8 activations on AMX tiles of bytes; otherwise as in
// quant_tiles.cpp.
//
// Sums over a group of elements that share their scales are exact integers; they leave the tiles at
// each group's end, and scaling them takes longer than the products do. So the zero point, where it
// can be, is subtracted from the codes already.
//
// How many groups are scaled at a time is measured, the other block sizes are calculated.
#include "cpu/quant_kernels.h"
#include "cpu/quant_scales.h"
#include "cpu/quant_strips.h"

#if defined(__AMX_BF16__)

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/quant_tile_calls.h"
#include "cpu/tile_products.h"

namespace tilewise {
namespace {

constexpr int64_t SHARED_PANELS = 8;  // in a pass over x
constexpr int64_t BYTE_STRIPS = 8;    // decoded at a time, with SHARED_PANELS 32 KB
constexpr int64_t LONGEST = 256, PAIR = 2;  // decoded at a time of long groups: 256 KB
constexpr int64_t STRIP_BYTES = STRIP * PANEL_ROWS;
constexpr int64_t PANEL_BYTES = BYTE_STRIPS * STRIP_BYTES;
constexpr int GROUPS_TOGETHER = 4;    // whose sums wait in the first-level cache: 16 KB

// x as bytes: two strips by two, 64 bytes of each row; and of each group of strips what its scales
// need. Tiles may begin at any row.
class ByteTiles {
 public:
  explicit ByteTiles(const QuantizedMatmul& call) : rows_(tile_rows(call.rows)) {
    const int64_t depth = call.weight.depth, strips = strips_of(depth);
    const int64_t group = activation_strips(call), pairs = (strips + 1) / 2;
    const int64_t groups = (strips + group - 1) / group;
    codes_ = make_workspace<int8_t>(pairs * rows_ * TILE_BYTES);
    scales = make_workspace<float>(groups * rows_);
    totals = make_workspace<float>(groups * rows_);
    sums = make_workspace<int32_t>(groups * rows_);
    parallel_rows(call.rows, strips * STRIP, [&](int64_t m) {
      constexpr int64_t TOGETHER = SCALES_TOGETHER;
      const int64_t filled = round_up(strips, TOGETHER);
      const SmallWorkspace<float, 4096> row(filled * STRIP);
      const SmallWorkspace<float, 256> scale(filled);
      load_row(call, m, row.get());
      std::fill_n(row.get() + strips * STRIP, strips % 2 * STRIP, 0.0f);
      const bool is_normal = find_scales(row.get(), strips, group, scale.get());
      int32_t sum = 0;  // of a group
      for (int64_t first = 0; first < strips; first += TOGETHER) {
        const int64_t count = std::min(strips - first, TOGETHER);
        I32 fours[TOGETHER / 2];  // sums of four codes each, two strips in a vector
        std::fill_n(fours, TOGETHER / 2, I32::zero());
        for (int64_t i = 0; i < count; i += 2) {
          F32 code[4];
          for (int v = 0; v < 4; ++v) {
            const int64_t s = first + i + v / 2;
            const float inverse = scale[s] == 0 ? 0 : 1 / scale[s];
            const F32 x = load(row.get() + (first + i) * STRIP + v * F32::WIDTH);
            code[v] = int8_code(x, scale[s], inverse, is_normal);
          }
          const I32 codes = to_bytes(code);
          store_int(codes_.get() + ((first + i) / 2 * rows_ + m) * TILE_BYTES, codes);
          fours[i / 2] = dot_bytes(I32::zero(), I32::all(0x01010101), codes);
        }
        I32 halves[2];
        reduce_halves(fours, halves);
        int32_t of_strip[TOGETHER];
        store_int(of_strip, halves[0] + halves[1]);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t s = first + i, at = s / group * rows_ + m;
          sum += of_strip[i];
          if ((s + 1) % group != 0 && s + 1 != strips) continue;
          scales[at] = scale[s];
          sums[at] = sum;
          totals[at] = static_cast<float>(sum) * scale[s];
          sum = 0;
        }
      }
    });
  }

  const int8_t* tile(int64_t strip, int64_t row) const {
    return codes_.get() + (strip / 2 * rows_ + row) * TILE_BYTES + strip % 2 * STRIP;
  }
  int64_t rows() const { return rows_; }

  Workspace<float> scales, totals;  // (groups, rows), the totals times the scales
  Workspace<int32_t> sums;          // of the codes

 private:
  int64_t rows_;
  Workspace<int8_t> codes_;
};

// What a strip's sums need besides its codes.
struct StripScales {
  F32 scale, zero, shift;
};

template <bool SIGNED>
using Products = std::conditional_t<SIGNED, SignedByteProducts, ByteProducts>;

template <class F>
StripScales scales_of(const Strip& strip) {
  StripScales kept;
  kept.scale = strip.scale[0][0];
  if constexpr (F::HAS_ZERO) kept.zero = strip.zero[0][0];
  if constexpr (F::HAS_SHIFT) kept.shift = strip.shift[0][0];
  return kept;
}

// Adds integer sums of up to 16 rows and one panel, of GROUPS groups and once scaled, to `out`, or
// writes them there where `first`. The groups' sums are `sums_group` apart, their scales `w_group`.
template <class F, bool SIGNED, int GROUPS>
void scale_tile(const int32_t* sums, int64_t sums_stride, int64_t sums_group, int64_t rows,
                const StripScales* w, int64_t w_group, const ByteTiles& x, int64_t group, int64_t row,
                bool first, float* out, int64_t out_stride) {
  constexpr bool HAS_ZERO = F::HAS_ZERO && !SIGNED;
  const int64_t at = group * x.rows() + row;
  const float *x_scales = x.scales.get() + at, *x_totals = x.totals.get() + at;
  const int32_t* x_sums = x.sums.get() + at;
  F32 scale[GROUPS], shift[GROUPS];
  I32 zero[GROUPS];
  for (int g = 0; g < GROUPS; ++g) {
    scale[g] = w[g * w_group].scale;
    if constexpr (F::HAS_SHIFT) shift[g] = w[g * w_group].shift;
    if constexpr (HAS_ZERO) zero[g] = I32(_mm512_cvtps_epi32(w[g * w_group].zero.v));
  }
  for (int64_t m = 0; m < rows; ++m) {
    float* to = out + m * out_stride;
    F32 total = first ? F32::zero() : load(to);
    for (int g = 0; g < GROUPS; ++g) {
      const int64_t i = g * x.rows() + m;
      I32 sum = load_int(sums + g * sums_group + m * sums_stride);
      // In integers: the difference may be far smaller than its parts.
      if constexpr (HAS_ZERO) sum = sum - zero[g] * I32::all(x_sums[i]);
      if constexpr (F::HAS_SHIFT) total = fma(shift[g], F32::all(x_totals[i]), total);
      total = fma(to_f32(sum), scale[g] * F32::all(x_scales[i]), total);
    }
    store(to, total);
  }
}

// The codes of a strip, or their differences from the zero point.
template <class F, bool SIGNED>
void put_codes(const Strip& strip, uint8_t* out) {
  I32 zero = I32::zero();
  if constexpr (SIGNED && F::HAS_ZERO) {  // in each byte of a lane; at most 128
    zero = I32(_mm512_cvtps_epi32(strip.zero[0][0].v)) * I32::all(0x01010101);
  }
  for (int q = 0; q < QUADS; ++q) {
    store_int(out + q * TILE_BYTES, sub_bytes(strip.codes[q][0], zero));
  }
}

// The products of all tiles of rows with up to PAIR panels. Not inlined, see multiply_tiles.
template <class Products>
__attribute__((noinline)) void multiply_pair(int64_t rows, int64_t panels, int64_t depth, bool add,
                                             const int8_t* x, int64_t x_step, const uint8_t* w,
                                             int64_t panel_bytes, int32_t* sums) {
  multiply_tiles<Products>(rows, panels, depth, add, {x, TILE_SIZE, x_step},
                           {w, TILE_SIZE, panel_bytes}, {sums, PAIR * TILE_SUMS, TILE_SUMS});
}

// One scale a row: sums stay in tiles over the whole depth.
template <class F, bool SIGNED>
void multiply_rows(const QuantizedMatmul& call, const Finisher& finish) {
  const QuantizedWeight& w = call.weight;
  const int64_t strips = strips_of(w.depth);
  const int64_t panel_bytes = round_up(std::min(strips, LONGEST), 2) * STRIP_BYTES;
  const ByteTiles x(call);
  const CutSegments cut(call, strips * STRIP);
  for_panels(
      cut.call, finish, even_shares(cut.call, SHARED_PANELS, PAIR),
      [&](const Segment& segment, const int64_t* panels, int count, float* sums) {
        const int64_t rows = segment.end - segment.begin, stride = count * PANEL_ROWS;
        const auto tiles = make_workspace<uint8_t>(PAIR * panel_bytes);
        const auto block = make_workspace<int32_t>(round_up(rows, TILE_HEIGHT) * PAIR * PANEL_ROWS);
        const Tiles on;
        Strip strip;
        StripScales scales[PAIR];
        for (int i = 0; i < count; i += PAIR) {
          const int pair = static_cast<int>(std::min<int64_t>(count - i, PAIR));
          for (int64_t first = 0; first < strips; first += LONGEST) {
            const int64_t deep = std::min(strips - first, LONGEST);
            for (int p = 0; p < pair; ++p) {
              for (int64_t s = 0; s < deep; ++s) {
                decode_strip<F>(w, panels[i + p], first + s, strip);
                put_codes<F, SIGNED>(strip, tiles.get() + p * panel_bytes + s * STRIP_BYTES);
              }
              scales[p] = scales_of<F>(strip);
            }
            multiply_pair<Products<SIGNED>>((rows + TILE_HEIGHT - 1) / TILE_HEIGHT, pair,
                                            (deep + 1) / 2, first > 0, x.tile(first, segment.begin),
                                            x.rows() * TILE_BYTES, tiles.get(), panel_bytes,
                                            block.get());
          }
          for (int64_t m = 0; m < rows; m += TILE_HEIGHT) {
            const int64_t here = std::min<int64_t>(rows - m, TILE_HEIGHT);
            for (int p = 0; p < pair; ++p) {
              scale_tile<F, SIGNED, 1>(block.get() + m * PAIR * PANEL_ROWS + p * TILE_SUMS,
                                       PANEL_ROWS, 0, here, scales + p, 0, x, 0, segment.begin + m,
                                       true, sums + m * stride + (i + p) * PANEL_ROWS, stride);
            }
          }
        }
      });
}

// The products of a group, of one or two tiles of rows with as many panels. Not inlined either.
template <class Products, int ROWS, int PANELS>
__attribute__((noinline)) void multiply_group(int64_t depth, const int8_t* x, int64_t x_step,
                                              const uint8_t* w, int64_t w_step, int32_t* sums) {
  multiply_tile_block<Products, false, ROWS, PANELS>(
      depth, {x, TILE_SIZE, x_step}, {w, w_step, PANEL_BYTES}, {sums, 2 * TILE_SUMS, TILE_SUMS});
}

// Groups of up to BYTE_STRIPS strips.
template <class F, bool SIGNED>
void multiply_short_groups(const QuantizedMatmul& call, const Finisher& finish) {
  const QuantizedWeight& w = call.weight;
  const int64_t strips = strips_of(w.depth), group = activation_strips(call);
  const ByteTiles x(call);
  const int64_t step = group == 1 ? 1 : 2;         // strips that a tile is deep
  constexpr int64_t BLOCK_SUMS = 4 * TILE_SUMS + PANEL_ROWS;  // not a multiple of 4 KB: no two groups alias

  for_panels(
      call, finish, SHARED_PANELS,
      [&](const Segment& segment, const int64_t* panels, int count, float* sums) {
        const int64_t rows = segment.end - segment.begin, stride = count * PANEL_ROWS;
        const auto tiles = make_workspace<uint8_t>(count * PANEL_BYTES);
        const auto scales = make_workspace<StripScales>(count * BYTE_STRIPS);
        const auto block = make_workspace<int32_t>(GROUPS_TOGETHER * BLOCK_SUMS);
        const Tiles on(block_shapes(step * STRIP));
        Strip strip;
        for (int64_t first = 0; first < strips; first += BYTE_STRIPS) {
          const int64_t deep = std::min(strips - first, BYTE_STRIPS);
          for (int i = 0; i < count; ++i) {
            for (int64_t s = 0; s < deep; ++s) {
              decode_strip<F>(w, panels[i], first + s, strip);
              put_codes<F, SIGNED>(strip, tiles.get() + i * PANEL_BYTES + s * STRIP_BYTES);
              scales[i * BYTE_STRIPS + s] = scales_of<F>(strip);
            }
          }
          const auto multiply_block = [&](auto row_tiles, auto two_panels, int64_t m, int i) {
            constexpr int R = decltype(row_tiles)::value, P = decltype(two_panels)::value;
            const uint8_t* b = tiles.get() + i * PANEL_BYTES;
            const int64_t row = segment.begin + m;
            float* out = sums + m * stride + i * PANEL_ROWS;
            // Several groups, then what their sums add up to: neither waits for the other.
            const auto run_groups = [&](auto groups, int64_t s) {
              constexpr int GROUPS = decltype(groups)::value;
              for (int g = 0; g < GROUPS; ++g) {
                const int64_t from = s + g * group;
                const int64_t steps = (std::min(deep - from, group) + step - 1) / step;
                multiply_group<Products<SIGNED>, R, P>(
                    steps, x.tile(first + from, row), x.rows() * TILE_BYTES, b + from * STRIP_BYTES,
                    step * STRIP_BYTES, block.get() + g * BLOCK_SUMS);
              }
              for (int r = 0; r < R; ++r) {
                const int64_t here = std::min<int64_t>(rows - m - r * TILE_HEIGHT, TILE_HEIGHT);
                for (int p = 0; p < P; ++p) {
                  scale_tile<F, SIGNED, GROUPS>(
                      block.get() + (2 * r + p) * TILE_SUMS, PANEL_ROWS, BLOCK_SUMS, here,
                      scales.get() + (i + p) * BYTE_STRIPS + s, group, x, (first + s) / group,
                      row + r * TILE_HEIGHT, first + s == 0,
                      out + r * TILE_HEIGHT * stride + p * PANEL_ROWS, stride);
                }
              }
            };
            int64_t s = 0;
            for (; s + GROUPS_TOGETHER * group <= deep; s += GROUPS_TOGETHER * group) {
              run_groups(std::integral_constant<int, GROUPS_TOGETHER>{}, s);
            }
            for (; s < deep; s += group) run_groups(std::integral_constant<int, 1>{}, s);
          };
          using One = std::integral_constant<int, 1>;
          using Two = std::integral_constant<int, 2>;
          for (int64_t m = 0; m < rows; m += 2 * TILE_HEIGHT) {
            const bool two_rows = rows - m > TILE_HEIGHT;
            for (int i = 0; i < count; i += 2) {
              if (two_rows) {
                i + 1 < count ? multiply_block(Two{}, Two{}, m, i) : multiply_block(Two{}, One{}, m, i);
              } else {
                i + 1 < count ? multiply_block(One{}, Two{}, m, i) : multiply_block(One{}, One{}, m, i);
              }
            }
          }
        }
      });
}

template <class F, bool SIGNED>
void multiply_groups(const QuantizedMatmul& call, const Finisher& finish) {
  activation_strips(call) > BYTE_STRIPS ? multiply_rows<F, SIGNED>(call, finish)
                                        : multiply_short_groups<F, SIGNED>(call, finish);
}

// Whether all codes less their zero points are signed bytes.
bool are_signed(const QuantizedMatmul& call) {
  const QuantizedWeight& w = call.weight;
  return !w.zeros || (w.format == Format::int4 && largest_zero(call) <= 128);
}

}  // namespace

bool multiply_byte_tiles(const QuantizedMatmul& call, const Finisher& finish) {
  constexpr int64_t DEEPEST = int64_t{1} << 16;  // 255 * 127 * this is below 2^31
  bool done = false;
  with_format(call.weight.format, [&](auto format) {
    using F = decltype(format);
    // Tiles of 16 elements, for two groups in a strip, would be too shallow to pay.
    if constexpr (F::IS_INTEGER && F::GROUPS == 1) {
      if (call.weight.depth == 0 || call.weight.depth > DEEPEST) return;
      // Only a format's own zero points may be anything.
      constexpr bool MAY_BE_FAR = std::is_same_v<F, strips::Int4> || std::is_same_v<F, strips::Int8>;
      if (!MAY_BE_FAR || are_signed(call)) {
        multiply_groups<F, true>(call, finish);
      } else if constexpr (MAY_BE_FAR) {
        multiply_groups<F, false>(call, finish);
      }
      done = true;
    }
  });
  return done;
}

}  // namespace tilewise

#else

namespace tilewise {

bool multiply_byte_tiles(const QuantizedMatmul&, const Finisher&) { return false; }

}  // namespace tilewise

#endif
