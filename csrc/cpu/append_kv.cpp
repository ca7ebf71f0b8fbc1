// Rotary embedding, quantization and the scatter into pages, in one pass over the new tokens.
//
// The bytes are those of the definition (tilewise/paged/kv_formats.py), which takes care to consist
// of IEEE operations only: so products are rounded before they are added, and codes are quotients.
#include "cpu/append_kv.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace tilewise {
namespace {

constexpr int W = F32::WIDTH;

// --- float32 and back -----------------------------------------------------------------------------

template <class T>
void read_row(const T* x, int64_t n, float* row) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(row + i, load(x + i));
  if (i < n) store_partial(row + i, load_partial(x + i, static_cast<int>(n - i)), n - i);
}

template <class T>
void write_row(const float* row, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load(row + i));
  if (i < n) store_partial(out + i, load_partial(row + i, static_cast<int>(n - i)), n - i);
}

// --- rotation -------------------------------------------------------------------------------------

// (a, b) -> (a cos - b sin, b cos + a sin) for each pair, rounded to T as the rotation's result is.
template <class T>
void rotate(const AppendKV& a, int64_t position, float* row) {
  const bool is_inside = position >= 0 && position < a.table_rows;
  const int64_t at = is_inside ? position : 0;  // no pointer far from the tables is made
  const float* cos = a.cos + at * a.cos_stride;
  const float* sin = a.sin + at * a.sin_stride;
  if (is_inside && !a.interleaved) {
    const T* stored = nullptr;
    for_vectors(a.pairs, [&](int64_t i, auto part, int) {
      const F32 x = part.load(row + i), y = part.load(row + a.pairs + i);
      const F32 c = part.load(cos + i), s = part.load(sin + i);
      part.store(row + i, rounded(x * c - y * s, stored));
      part.store(row + a.pairs + i, rounded(y * c + x * s, stored));
    });
    return;
  }
  const int64_t step = a.interleaved ? 2 : 1, other = a.interleaved ? 1 : a.pairs;
  for (int64_t i = 0; i < a.pairs; ++i) {
    float& x = row[i * step];
    float& y = row[i * step + other];
    const float c = is_inside ? cos[i] : NAN, s = is_inside ? sin[i] : NAN;
    T turned_x, turned_y;
    from_float(x * c - y * s, &turned_x);
    from_float(y * c + x * s, &turned_y);
    x = to_float(turned_x);
    y = to_float(turned_y);
  }
}

// --- codes ----------------------------------------------------------------------------------------

// For |x| <= 448, to nearest even.
uint8_t to_float8(float x) {
  uint32_t bits, small_bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 24 & 0x80u;
  bits &= 0x7fffffffu;
  const float magnitude = std::fabs(x);
  // Subnormals are multiples of 2^-9, the spacing of float32 behind 2^14: its own addition rounds.
  const float small = magnitude + 0x1p14f;
  std::memcpy(&small_bits, &small, 4);
  const uint32_t normal = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
  return static_cast<uint8_t>(sign | (magnitude < 0x1p-6f ? small_bits - 0x46800000u : normal));
}

// Replaces a row by its codes (not yet rounded) and returns its scale.
float scale_row(float* row, int64_t n, float largest_code) {
  F32 largest = F32::zero(), zeros = F32::zero();
  for (int64_t i = 0; i < n; i += W) {
    const F32 x = load_partial(row + i, static_cast<int>(std::min<int64_t>(W, n - i)));
    largest = max(abs(x), largest);
    zeros = fma(x, F32::zero(), zeros);
  }
  if (reduce_add(zeros) != 0.0f) {
    const bool any_nan = std::any_of(row, row + n, [](float x) { return x != x; });
    std::fill(row, row + n, 0.0f);
    return any_nan ? NAN : INFINITY;
  }
  const float scale = reduce_max(largest) / largest_code;
  const F32 divisor = F32::all(scale > 0 ? scale : 1.0f);
  // The bounds are for scales so small that they have few bits left.
  const F32 high = F32::all(largest_code), low = F32::all(-largest_code);
  for (int64_t i = 0; i < n; i += W) {
    const int count = static_cast<int>(std::min<int64_t>(W, n - i));
    store_partial(row + i, max(min(load_partial(row + i, count) / divisor, high), low), count);
  }
  return scale;
}

void write_codes(DType format, const float* row, int64_t n, uint8_t* out) {
  if (format == DType::f8e4m3) {
    for (int64_t i = 0; i < n; ++i) out[i] = to_float8(row[i]);
  } else if (format == DType::i8) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(row[i])));
    }
  } else {
    for (int64_t i = 0; i < n / 2; ++i) {
      const int low = static_cast<int>(std::nearbyint(row[i])) + 8;
      const int high = static_cast<int>(std::nearbyint(row[i + n / 2])) + 8;
      out[i] = static_cast<uint8_t>(low | high << 4);
    }
  }
}

// --- tokens ---------------------------------------------------------------------------------------

void write_to_cache(const AppendKV& a, const AppendSide& side, int64_t slot, int64_t head,
                    float* row) {
  const int64_t page = slot / a.page_size, offset = slot % a.page_size;
  const int64_t at = page * side.page_stride + offset * side.slot_stride + head * side.head_stride;
  switch (a.cache_dtype) {
    case DType::f32: return write_row(row, side.dim, static_cast<float*>(side.cache) + at);
    case DType::f16: return write_row(row, side.dim, static_cast<Half*>(side.cache) + at);
    case DType::bf16: return write_row(row, side.dim, static_cast<BFloat16*>(side.cache) + at);
    default: break;
  }
  const float largest = a.cache_dtype == DType::i8 ? 127.0f
                        : a.cache_dtype == DType::f8e4m3 ? 448.0f
                                                         : 7.0f;
  side.scale[page * side.scale_page_stride + offset * side.scale_slot_stride +
             head * side.scale_head_stride] = scale_row(row, side.dim, largest);
  write_codes(a.cache_dtype, row, side.dim, static_cast<uint8_t*>(side.cache) + at);
}

template <class T>
void append_tokens(const AppendKV& a) {
  const int64_t tokens = rows_per_task(a.kv_heads * (a.k.dim + a.v.dim));
  parallel((a.tokens + tokens - 1) / tokens, [&](int64_t task) {
    const std::unique_ptr<float[]> row(new float[std::max(a.k.dim, a.v.dim)]);
    const int64_t end = std::min(a.tokens, (task + 1) * tokens);
    for (int64_t token = task * tokens; token < end; ++token) {
      const int64_t slot = a.slots[token * a.slots_stride];
      if (slot < 0 || slot >= a.num_pages * a.page_size) continue;
      for (int64_t head = 0; head < a.kv_heads; ++head) {
        for (const AppendSide* side : {&a.k, &a.v}) {
          read_row(static_cast<const T*>(side->x) + token * side->token_stride +
                       head * side->x_head_stride,
                   side->dim, row.get());
          if (side == &a.k && a.cos) {
            rotate<T>(a, a.positions[token * a.positions_stride], row.get());
          }
          write_to_cache(a, *side, slot, head, row.get());
        }
      }
    }
  });
}

}  // namespace

void append_kv(const AppendKV& a) {
  switch (a.dtype) {
    case DType::f32: return append_tokens<float>(a);
    case DType::f16: return append_tokens<Half>(a);
    default: return append_tokens<BFloat16>(a);
  }
}

}  // namespace tilewise
