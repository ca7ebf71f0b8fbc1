// Products with quantized weights: which kernel runs, and what it needs of x in float32.
#include "cpu/quant.h"

#include "cpu/gemm.h"
#include "cpu/quant_activations.h"
#include "cpu/quant_kernels.h"

namespace tilewise {
namespace {

// x in float32: itself, or a copy whose rows are filled up to whole strips with zeros.
struct Floats {
  const float* data;
  int64_t stride;
  Workspace<float> copy;

  Floats(const QuantizedMatmul& call, Rounding rounding, bool filled_up) {
    const int64_t depth = call.weight.depth;
    if (call.x_dtype == DType::f32 && rounding == Rounding::none && !filled_up) {
      data = static_cast<const float*>(call.x);
      stride = call.x_stride;
      return;
    }
    stride = strips_of(depth) * STRIP;
    copy = make_workspace<float>(call.rows * stride);
    data = copy.get();
    parallel_rows(call.rows, stride, [&](int64_t m) {
      float* row = copy.get() + m * stride;
      load_row(call, m, row);
      if (rounding != Rounding::none) round_row(rounding, row, depth, activation_strips(call));
    });
  }
};

// x A, (rows, rank).
Workspace<float> low_rank(const QuantizedMatmul& call) {
  const int64_t depth = call.weight.depth, rank = call.rank;
  const Floats x(call, Rounding::none, false);
  auto out = make_workspace<float>(call.rows * rank);
  const auto row = make_workspace<float>(rank);
  const auto packed = make_workspace<float>(packed_size(depth, rank));
  for (int64_t k = 0; k < depth; ++k) {
    load_floats(call.dtype, call.adapter_a, k * rank, rank, row.get());
    const float* from = row.get();
    pack_rows(&from, 1, rank, packed.get() + k * PANEL, depth * PANEL);
  }
  parallel_rows(call.rows, depth * rank, [&](int64_t m) {
    multiply(x.data + m * x.stride, x.stride, packed.get(), depth * PANEL, 1, rank, depth,
             out.get() + m * rank, rank, false);
  });
  return out;
}

// With the weight widened to floating-point numbers.
void multiply_wide(const QuantizedMatmul& call, const Finisher& finish, bool few) {
  if (!few && multiply_float_tiles(call, finish)) return;
  const Floats x(call, call.rounding, false);
  multiply_floats(call, finish, x.data, x.stride);
}

// Whether there are so many rows of bfloat16 that widening the weight to it pays: below, two digits
// are as fast (measured).
bool wants_pairs(const QuantizedMatmul& call) {
  const int64_t enough = is_integer(call.weight.format) ? 48 : FEW_ROWS;
  const bool is_bfloat16 = call.x_dtype == DType::bf16 && call.rounding == Rounding::none;
  return is_bfloat16 && call.rows > enough * call.segment_count;
}

// Whether tiles of bfloat16 multiply int8 activations faster than tiles of bytes, out of which sums have to
// come at the end of every group: that takes longer than twice the products, of bfloat16, without it.
// Decoding is cheaper to bytes, so with one tile of rows they are ahead, unless half filled.
bool prefers_floats(const QuantizedMatmul& call) {
  const int64_t group = activation_strips(call);
  if (call.x_dtype != DType::bf16 || group == strips_of(call.weight.depth)) return false;
  return group == 1 || call.rows > 16 * call.segment_count;
}

bool multiply_digits(const QuantizedMatmul& call, const Finisher& finish) {
  switch (digits_of(call)) {
    case 1: return multiply_bytes<1>(call, finish);
    case 2: return multiply_bytes<2>(call, finish);
    default: return multiply_bytes<3>(call, finish);
  }
}

}  // namespace

void quantized_matmul(const QuantizedMatmul& call) {
  if (!call.segments) {
    const Segment all{0, 0, call.rows};
    QuantizedMatmul single = call;
    single.segments = &all;
    single.segment_count = 1;
    return quantized_matmul(single);
  }
  Workspace<float> low;
  if (call.adapter_a) low = low_rank(call);
  const Finisher finish(call, low.get());
  if (call.rows == 0 || finish.outputs() == 0) return;
  if (is_plain(call.weight.format)) {
    if (multiply_plain_pairs(call, finish)) return;
    const Floats x(call, Rounding::none, true);
    return multiply_plain(call, finish, x.data, x.stride);
  }
  const bool few = has_few_rows(call);
  const bool is_bytes = is_integer(call.weight.format);
  if (is_bytes && has_few_rows(call, STREAMED_ROWS) && multiply_digits(call, finish)) return;
  const bool is_int8 = call.rounding == Rounding::int8;
  if (!few && is_int8 && prefers_floats(call) && multiply_float_tiles(call, finish)) return;
  if (!few && is_int8 && multiply_byte_tiles(call, finish)) return;
  if (!few && multiply_fp8_tiles(call, finish)) return;
  if ((few || !HAS_TILES) && multiply_fp8_pairs(call, finish)) return;
  if (HAS_TILES && !is_int8) return multiply_wide(call, finish, few);
  if (wants_pairs(call) && multiply_pairs(call, finish)) return;
  if (is_bytes && multiply_byte_blocks(call, finish)) return;
  // Without vpdpbusd, byte products of several digits are slower than float32 ones.
  if (is_bytes && is_int8 && multiply_digits(call, finish)) return;
  multiply_wide(call, finish, few);
}

}  // namespace tilewise
