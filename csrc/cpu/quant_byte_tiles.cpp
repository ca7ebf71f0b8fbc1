// Products of quantized weights with int8 activations on AMX tiles of bytes; otherwise as in
// quant_tiles.cpp.
//
// Sums over a group of elements that share their scales are exact integers; they leave the tiles at
// each group's end, and scaling them takes longer than the products do. So the zero point, where it
// can be, is subtracted from the codes already.
//
// The block sizes are calculated, not measured.
#include "cpu/quant_activations.h"
#include "cpu/quant_kernels.h"
#include "cpu/quant_strips.h"

#if defined(__AMX_BF16__)

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/tiles.h"

namespace tilewise {
namespace {

constexpr int64_t SHARED_PANELS = 8;  // in a pass over x
constexpr int64_t BYTE_STRIPS = 8;    // decoded at a time, with SHARED_PANELS 32 KB
constexpr int GROUPS_TOGETHER = 4;    // whose sums wait in the first-level cache: 16 KB

template <bool SIGNED, int C, int A, int B>
inline void dot() {
  if constexpr (SIGNED) {
    tile_dot_i8<C, A, B>();
  } else {
    tile_dot_i8_u8<C, A, B>();
  }
}

// x as bytes: two strips by two, 64 bytes of each row; and of each group of strips what its scales
// need. Tiles may begin at any row.
class ByteTiles {
 public:
  explicit ByteTiles(const QuantizedMatmul& call) : rows_(call.rows + TILE_HEIGHT - 1) {
    const int64_t depth = call.weight.depth, strips = strips_of(depth);
    const int64_t group = activation_strips(call), pairs = (strips + 1) / 2;
    const int64_t groups = (strips + group - 1) / group;
    codes_ = make_workspace<int8_t>(pairs * rows_ * TILE_BYTES);
    scales = make_workspace<float>(groups * rows_);
    totals = make_workspace<float>(groups * rows_);
    sums = make_workspace<int32_t>(groups * rows_);
    parallel_rows(rows_, strips * STRIP, [&](int64_t m) {
      const auto row = make_workspace<float>(strips * STRIP);
      const auto split = make_workspace<SplitStrip<1>>(strips);
      if (m < call.rows) {
        load_row(call, m, row.get());
      } else {
        std::fill_n(row.get(), strips * STRIP, 0.0f);
      }
      split_row<1>(row.get(), depth, group, false, split.get());
      for (int64_t s = 0; s < 2 * pairs; ++s) {
        int8_t* to = codes_.get() + (s / 2 * rows_ + m) * TILE_BYTES + s % 2 * STRIP;
        if (s < strips) {
          std::memcpy(to, split[s].codes[0], STRIP);
        } else {
          std::memset(to, 0, STRIP);
        }
      }
      for (int64_t g = 0; g < groups; ++g) {
        float total = 0, sum = 0;  // exact: an integer below 2^24
        for (int64_t s = g * group; s < std::min(strips, (g + 1) * group); ++s) {
          total += split[s].totals[0];
          sum += split[s].sums[0][0];
        }
        scales[g * rows_ + m] = split[g * group].scale;
        totals[g * rows_ + m] = total;
        sums[g * rows_ + m] = static_cast<int32_t>(sum);
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

// 16 or 32 rows of x by one or two panels: `steps` tiles deep, added to C where `ADD`. Tile (i, j) of
// C is at c[i * c_row + j * c_column]. Codes are signed bytes where `SIGNED`.
template <int ROW_TILES, int PANELS, bool ADD, bool SIGNED>
void multiply_bytes_in(const int8_t* a, int64_t a_step, const uint8_t* b, int64_t b_panel,
                       int64_t b_step, int64_t steps, int32_t* c, int64_t c_row, int64_t c_column,
                       int64_t c_stride) {
  constexpr int A = 4, B = 6;
  const int64_t bytes = c_stride * 4;
  const auto for_c = [&](auto tile_00, auto tile_01, auto tile_10, auto tile_11) {
    tile_00(c);
    if constexpr (PANELS == 2) tile_01(c + c_column);
    if constexpr (ROW_TILES == 2) tile_10(c + c_row);
    if constexpr (ROW_TILES == 2 && PANELS == 2) tile_11(c + c_row + c_column);
  };
  if constexpr (ADD) {
    for_c([&](int32_t* p) { tile_load<0>(p, bytes); }, [&](int32_t* p) { tile_load<1>(p, bytes); },
          [&](int32_t* p) { tile_load<2>(p, bytes); }, [&](int32_t* p) { tile_load<3>(p, bytes); });
  } else {
    for_c([](int32_t*) { tile_zero<0>(); }, [](int32_t*) { tile_zero<1>(); },
          [](int32_t*) { tile_zero<2>(); }, [](int32_t*) { tile_zero<3>(); });
  }
  for (int64_t k = 0; k < steps; ++k, a += a_step, b += b_step) {
    tile_load<A>(a, TILE_BYTES);
    if constexpr (ROW_TILES == 2) tile_load<A + 1>(a + TILE_SIZE, TILE_BYTES);
    tile_load<B>(b, TILE_BYTES);
    if constexpr (PANELS == 2) tile_load<B + 1>(b + b_panel, TILE_BYTES);
    dot<SIGNED, 0, A, B>();
    if constexpr (PANELS == 2) dot<SIGNED, 1, A, B + 1>();
    if constexpr (ROW_TILES == 2) dot<SIGNED, 2, A + 1, B>();
    if constexpr (ROW_TILES == 2 && PANELS == 2) dot<SIGNED, 3, A + 1, B + 1>();
  }
  for_c([&](int32_t* p) { tile_store<0>(p, bytes); }, [&](int32_t* p) { tile_store<1>(p, bytes); },
        [&](int32_t* p) { tile_store<2>(p, bytes); }, [&](int32_t* p) { tile_store<3>(p, bytes); });
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

template <class F, bool SIGNED>
void multiply_bytes_all(const QuantizedMatmul& call, const Finisher& finish) {
  const QuantizedWeight& w = call.weight;
  const int64_t strips = strips_of(w.depth), group = activation_strips(call);
  const ByteTiles x(call);
  const bool is_whole = group > BYTE_STRIPS;       // rows: one group, of several passes
  const int64_t step = group == 1 ? 1 : 2;         // strips that a tile is deep
  TileShapes shapes;
  if (step == 1) {
    shapes.row_bytes[4] = shapes.row_bytes[5] = STRIP;
    shapes.rows[6] = shapes.rows[7] = QUADS;
  }
  constexpr int64_t STRIP_BYTES = STRIP * PANEL_ROWS, PANEL_BYTES = BYTE_STRIPS * STRIP_BYTES;
  constexpr int64_t TILE_SUMS = TILE_HEIGHT * PANEL_ROWS;
  constexpr int64_t BLOCK_SUMS = 4 * TILE_SUMS + PANEL_ROWS;  // not a multiple of 4 KB: no two groups alias

  for_panels(
      call, finish, SHARED_PANELS,
      [&](const Segment& segment, const int64_t* panels, int count, float* sums) {
        const int64_t rows = segment.end - segment.begin, stride = count * PANEL_ROWS;
        const auto tiles = make_workspace<uint8_t>(count * PANEL_BYTES);
        const auto scales = make_workspace<StripScales>(count * BYTE_STRIPS);
        const auto block = make_workspace<int32_t>(GROUPS_TOGETHER * BLOCK_SUMS);
        const Tiles on(shapes);
        Strip strip;
        for (int64_t first = 0; first < strips; first += BYTE_STRIPS) {
          const int64_t deep = std::min(strips - first, BYTE_STRIPS);
          for (int i = 0; i < count; ++i) {
            for (int64_t s = 0; s < deep; ++s) {
              decode_strip<F>(w, panels[i], first + s, strip);
              put_codes<F, SIGNED>(strip, tiles.get() + i * PANEL_BYTES + s * STRIP_BYTES);
              StripScales& kept = scales[i * BYTE_STRIPS + s];
              kept.scale = strip.scale[0][0];
              if constexpr (F::HAS_ZERO) kept.zero = strip.zero[0][0];
              if constexpr (F::HAS_SHIFT) kept.shift = strip.shift[0][0];
            }
          }
          const auto multiply_block = [&](auto row_tiles, auto two_panels, int64_t m, int i) {
            constexpr int R = decltype(row_tiles)::value, P = decltype(two_panels)::value;
            const uint8_t* b = tiles.get() + i * PANEL_BYTES;
            const int64_t row = segment.begin + m;
            float* out = sums + m * stride + i * PANEL_ROWS;
            const auto run = [&](auto add, int64_t from, int64_t to, int32_t* c, int64_t c_row,
                                 int64_t c_column, int64_t c_stride) {
              multiply_bytes_in<R, P, decltype(add)::value, SIGNED>(
                  x.tile(first + from, row), x.rows() * TILE_BYTES, b + from * STRIP_BYTES,
                  PANEL_BYTES, step * STRIP_BYTES, (to - from + step - 1) / step, c, c_row, c_column,
                  c_stride);
            };
            if (is_whole) {  // integers in the place of the sums, until the end
              int32_t* c = reinterpret_cast<int32_t*>(out);
              const auto run_whole = [&](auto add) {
                run(add, 0, deep, c, TILE_HEIGHT * stride, PANEL_ROWS, stride);
              };
              first == 0 ? run_whole(std::false_type{}) : run_whole(std::true_type{});
              return;
            }
            // Several groups, then what their sums add up to: neither waits for the other.
            const auto run_groups = [&](auto groups, int64_t s) {
              constexpr int GROUPS = decltype(groups)::value;
              for (int g = 0; g < GROUPS; ++g) {
                const int64_t from = s + g * group;
                run(std::false_type{}, from, std::min(deep, from + group),
                    block.get() + g * BLOCK_SUMS, 2 * TILE_SUMS, TILE_SUMS, PANEL_ROWS);
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
        if (!is_whole) return;
        for (int64_t m = 0; m < rows; m += TILE_HEIGHT) {
          const int64_t here = std::min<int64_t>(rows - m, TILE_HEIGHT);
          for (int i = 0; i < count; ++i) {
            float* out = sums + m * stride + i * PANEL_ROWS;
            scale_tile<F, SIGNED, 1>(reinterpret_cast<const int32_t*>(out), stride, 0, here,
                                     scales.get() + i * BYTE_STRIPS, 0, x, 0, segment.begin + m, true,
                                     out, stride);
          }
        }
      });
}

// Whether all codes less their zero points are signed bytes.
bool are_signed(const QuantizedMatmul& call) {
  const QuantizedWeight& w = call.weight;
  if (!w.zeros) return true;
  if (w.format != Format::int4) return false;
  const int64_t count = panels_of(w.rows) * w.groups * PANEL_ROWS;
  for (int64_t i = 0; i < call.segment_count; ++i) {
    const uint8_t* zeros = w.zeros + call.segments[i].weight * count;
    if (*std::max_element(zeros, zeros + count) > 128) return false;
  }
  return true;
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
        multiply_bytes_all<F, true>(call, finish);
      } else if constexpr (MAY_BE_FAR) {
        multiply_bytes_all<F, false>(call, finish);
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
