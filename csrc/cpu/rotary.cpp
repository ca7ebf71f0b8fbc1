// Rotary position embedding. Bound by memory: every element is read and written once, and a token's
// row of the tables serves all of its heads.
//
// Interleaved pairs need no separation of even and odd elements: with the cosines doubled, and the
// sines doubled with alternating signs, out = x * cos + (x with neighbours swapped) * sin.
#include "cpu/rotary.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace tilewise {
namespace {

template <class T>
void turn_halves(const T* x, T* out, const float* cos, const float* sin, int64_t pairs) {
  for_vectors(pairs, [&](int64_t i, auto part, int) {
    const F32 a = part.load(x + i), b = part.load(x + pairs + i);
    const F32 c = part.load(cos + i), s = part.load(sin + i);
    part.store(out + i, a * c - b * s);
    part.store(out + pairs + i, fma(b, c, a * s));
  });
}

template <class T>
void turn_neighbours(const T* x, T* out, const float* cos, const float* sin, int64_t pairs) {
  for_vectors(2 * pairs, [&](int64_t i, auto part, int) {
    const F32 value = part.load(x + i);
    part.store(out + i,
               fma(swap_neighbours(value), part.load(sin + i), value * part.load(cos + i)));
  });
}

// The token's row of the tables, in the form that the loops above want; NaN outside the tables.
void write_turns(const Rotary& rotary, int64_t position, float* cos, float* sin) {
  const int64_t pairs = rotary.pairs;
  const bool is_inside = position >= 0 && position < rotary.max_positions;
  const int copies = rotary.interleaved ? 2 : 1;
  if (!is_inside) {
    std::fill(cos, cos + copies * pairs, __builtin_nanf(""));
    std::fill(sin, sin + copies * pairs, __builtin_nanf(""));
    return;
  }
  const float* cos_row = rotary.cos + position * pairs;
  const float* sin_row = rotary.sin + position * pairs;
  const float sign = rotary.inverse ? -1.0f : 1.0f;
  for (int64_t i = 0; i < pairs; ++i) {
    if (rotary.interleaved) {
      cos[2 * i] = cos[2 * i + 1] = cos_row[i];
      sin[2 * i] = -sign * sin_row[i];
      sin[2 * i + 1] = sign * sin_row[i];
    } else {
      cos[i] = cos_row[i];
      sin[i] = sign * sin_row[i];
    }
  }
}

template <class T>
void turn_token(const Rotary& rotary, int64_t token, float* cos, float* sin) {
  write_turns(rotary, rotary.positions[token], cos, sin);
  const int64_t dim = rotary.dim, turned = 2 * rotary.pairs;
  for (int64_t head = 0; head < rotary.heads; ++head) {
    const T* x = static_cast<const T*>(rotary.x) + token * rotary.x_token_stride +
                 head * rotary.x_head_stride;
    T* out = static_cast<T*>(rotary.out) + (token * rotary.heads + head) * dim;
    if (rotary.interleaved) {
      turn_neighbours(x, out, cos, sin, rotary.pairs);
    } else {
      turn_halves(x, out, cos, sin, rotary.pairs);
    }
    if (turned < dim) std::memcpy(out + turned, x + turned, (dim - turned) * sizeof(T));
  }
}

template <class T>
void turn_tokens(const Rotary& rotary) {
  const int64_t tokens = rows_per_task(rotary.heads * rotary.dim);
  parallel((rotary.tokens + tokens - 1) / tokens, [&](int64_t task) {
    const std::unique_ptr<float[]> turns(new float[4 * rotary.pairs]);
    const int64_t end = std::min(rotary.tokens, (task + 1) * tokens);
    for (int64_t token = task * tokens; token < end; ++token) {
      turn_token<T>(rotary, token, turns.get(), turns.get() + 2 * rotary.pairs);
    }
  });
}

}  // namespace

void rotary_embedding(const Rotary& rotary) {
  switch (rotary.dtype) {
    case DType::f32: return turn_tokens<float>(rotary);
    case DType::f16: return turn_tokens<Half>(rotary);
    default: return turn_tokens<BFloat16>(rotary);
  }
}

}  // namespace tilewise
