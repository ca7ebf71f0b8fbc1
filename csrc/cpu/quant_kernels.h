// The ways to multiply, and what they share.
#pragma once

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/quant_finish.h"
#include "cpu/workspace.h"

namespace tilewise {

// By dot products of bytes: few rows, and int8 activations where nothing faster is. False if the
// activations cannot be split into as many digits; nothing has been written then.
template <int DIGITS>
bool multiply_bytes(const QuantizedMatmul& call, const Finisher& finish);

// The same with many rows, on AVX-512; false elsewhere, too.
bool multiply_byte_blocks(const QuantizedMatmul& call, const Finisher& finish);

// With many rows of bfloat16, the weight rounded to it, too. False, with nothing written, without
// AVX-512 or if x does not fit.
bool multiply_pairs(const QuantizedMatmul& call, const Finisher& finish);

// A weight in fp8 with bfloat16 or fp8 activations. False, with nothing written, without AVX-512, with
// others, or if x does not fit.
bool multiply_fp8_pairs(const QuantizedMatmul& call, const Finisher& finish);

// With a weight of plain bfloat16, of which subnormal numbers count as zero, and a few rows of it. False,
// with nothing written, without AVX-512 or if x does not fit.
bool multiply_plain_pairs(const QuantizedMatmul& call, const Finisher& finish);

// With a weight of plain numbers; x is (rows, depth), filled up to whole strips with zeros.
void multiply_plain(const QuantizedMatmul& call, const Finisher& finish, const float* x,
                    int64_t x_stride);

// On AMX tiles. False, with nothing written, where there are none or they do not fit.
bool multiply_byte_tiles(const QuantizedMatmul& call, const Finisher& finish);
bool multiply_fp8_tiles(const QuantizedMatmul& call, const Finisher& finish);
bool multiply_float_tiles(const QuantizedMatmul& call, const Finisher& finish);

// By widening blocks of the weight to float32; x is (rows, depth).
void multiply_floats(const QuantizedMatmul& call, const Finisher& finish, const float* x,
                     int64_t x_stride);

#if defined(__AMX_BF16__)
constexpr bool HAS_TILES = true;
#else
constexpr bool HAS_TILES = false;
#endif

inline bool is_plain(Format format) { return format >= Format::plain_f32; }
inline bool is_integer(Format format) {
  return format != Format::nf4 && format != Format::fp8 && !is_plain(format);
}

// How many bytes hold an element of x, see quant_activations.h.
inline int digits_of(const QuantizedMatmul& call) {
  if (call.rounding == Rounding::int8) return 1;
  return call.x_dtype == DType::f32 ? 3 : 2;
}

inline int64_t panels_of(int64_t rows) { return (rows + PANEL_ROWS - 1) / PANEL_ROWS; }

// Whether there are so few rows for each weight that reading it is most of the work.
constexpr int64_t FEW_ROWS = 4;
inline bool has_few_rows(const QuantizedMatmul& call, int64_t few = FEW_ROWS) {
  return call.rows <= few * call.segment_count;
}
// The same for products of bytes, which keep sums of so many in 32 registers.
constexpr int64_t STREAMED_ROWS = F32::WIDTH == 16 && !HAS_TILES ? 8 : FEW_ROWS;

// Decoding waits for memory while the products before it do not, and they are too many instructions
// for a core to look past: what comes `ahead` bytes later is asked for now, into cache level LEVEL.
template <int LEVEL>
inline void prefetch(const uint8_t* p, int64_t bytes, int64_t ahead) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + ahead + i, 0, 4 - LEVEL);
}

// Panels of a task that reads about `bytes` of a weight.
inline int64_t panels_in(const QuantizedMatmul& call, int64_t bytes) {
  return std::max<int64_t>(bytes / std::max<int64_t>(call.weight.panel_bytes, 1), 1);
}

// About `wanted` panels of a task, a multiple of `step`, such that the last round of tasks leaves as
// few threads idle as possible.
inline int64_t even_shares(const QuantizedMatmul& call, int64_t wanted, int64_t step) {
  const int64_t panels = panels_of(call.weight.rows), threads = thread_count();
  int64_t best = wanted, least = INT64_MAX;
  for (int64_t each = wanted + wanted / 2; each >= wanted / 2; each -= step) {
    const int64_t tasks = (panels + each - 1) / each * call.segment_count;
    const int64_t longest = (tasks + threads - 1) / threads * each;
    if (longest < least) best = each, least = longest;
  }
  return best;
}

// The work on all segments, in tasks of up to `each` panels: body(segment, panels, count, done) calls
// done(begin, end, sums) with the products of rows [begin, end) of x with the task's panels, (rows,
// count * 16), which are then finished. The panels of a gated weight come in pairs, all first halves
// before all second ones.
template <class Body>
inline void for_panels_by_rows(const QuantizedMatmul& call, const Finisher& finish, int64_t each,
                               const Body& body) {
  const int64_t outputs = finish.outputs();
  const bool is_paired = finish.is_gated() && outputs % PANEL_ROWS == 0;
  // Where a gated weight's halves do not meet between panels, all products are kept for the end.
  const bool is_kept = finish.is_gated() && !is_paired;
  const int64_t all = panels_of(is_paired ? outputs : call.weight.rows);
  const int64_t kept_stride = all * PANEL_ROWS;
  const auto kept = is_kept ? make_workspace<float>(call.rows * kept_stride) : nullptr;
  each = std::max<int64_t>(is_paired ? each / 2 : each, 1);
  const int64_t tasks = (all + each - 1) / each;

  parallel_shares(call.segment_count * tasks, [&](int64_t task) {
    const Segment& segment = call.segments[task / tasks];
    const int64_t begin = task % tasks * each, first = begin * PANEL_ROWS;
    const int64_t before = segment.weight * panels_of(call.weight.rows);
    const int half = static_cast<int>(std::min(all - begin, each));
    const int count = is_paired ? 2 * half : half;
    const SmallWorkspace<int64_t, 32> panels(count);
    for (int i = 0; i < count; ++i) {
      panels[i] = before + (i < half ? begin + i : begin + i - half + all);
    }
    body(segment, panels.get(), count, [&](int64_t row, int64_t end, float* sums) {
      for (float* y = sums; row < end; ++row, y += count * PANEL_ROWS) {
        if (is_kept) {
          std::copy_n(y, half * PANEL_ROWS, kept.get() + row * kept_stride + first);
        } else {
          const int64_t columns = std::min<int64_t>(outputs - first, half * PANEL_ROWS);
          finish(row, first, static_cast<int>(columns), y, y + half * PANEL_ROWS);
        }
      }
    });
  });
  if (is_kept) {
    parallel_rows(call.rows, kept_stride, [&](int64_t m) {
      float* y = kept.get() + m * kept_stride;
      finish(m, 0, static_cast<int>(outputs), y, y + outputs);
    });
  }
}

// The same with all rows at once: body(segment, panels, count, sums) writes the products.
template <class Body>
inline void for_panels(const QuantizedMatmul& call, const Finisher& finish, int64_t each,
                       const Body& body) {
  for_panels_by_rows(
      call, finish, each,
      [&](const Segment& segment, const int64_t* panels, int count, const auto& done) {
        // Whole tiles of rows, for those who write tiles.
        const int64_t rows = round_up(segment.end - segment.begin, 16);
        const SmallWorkspace<float, 4096> sums(rows * count * PANEL_ROWS);
        body(segment, panels, count, sums.get());
        done(segment.begin, segment.end, sums.get());
      });
}

}  // namespace tilewise
