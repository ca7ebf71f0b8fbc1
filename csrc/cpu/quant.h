// Products with quantized weights: what passes between the bindings and the kernels, and the layout.
// A mixture of experts is a product with a stack of weights, each with its own rows of x; its weights
// may also be plain numbers.
//
// A weight lies in *panels* of 16 rows. Within a panel the 4-byte words of the rows alternate: word 0
// of rows 0 to 15, word 1 of rows 0 to 15, ... so that a vector holds as many rows, and the bytes of a
// lane are consecutive weights of one row: the order in which dot products of bytes (vpdpbusd, AMX's
// tiles) want them, and one from which sums of rows never have to be added up across lanes. The
// 2-byte numbers of GGUF's blocks alternate by themselves, before or after the words as in the
// block; so do the scales and zeros of our own formats, (panels, groups, 16). Rows are filled up to
// whole panels with zeros, the codes of our own formats to whole strips of 32. Nothing else changes:
// panels hold the bytes of the original, in an order that can be undone.
#pragma once

#include "params.h"

namespace tilewise {

enum class Format : int32_t {
  int8, int4, nf4, fp8, mxfp4,
  q4_0, q4_1, q5_0, q5_1, q8_0,
  q2_k, q3_k, q4_k, q5_k, q6_k,
  plain_f32, plain_f16, plain_bf16,  // of experts and routers alone: rows of numbers, no panels
};

constexpr int PANEL_ROWS = 16;
constexpr int STRIP = 32;  // consecutive weights of a row that are decoded together

enum class ScaleType : int32_t { f16, f32, e8m0 };

struct QuantizedWeight {
  Format format;
  int64_t rows, depth;  // N and K
  const uint8_t* data;  // of a stack, one weight behind the other
  int64_t panel_bytes;
  int64_t group_strips;  // strips that share a scale, of our own formats
  int64_t groups;        // scales of a row
  ScaleType scale_type;
  const void* scales;    // (panels, groups, 16)
  const uint8_t* zeros;  // the same, or null
};

// What x is rounded to before it meets the weight: nothing, or codes times one scale per group.
enum class Rounding : int32_t { none, int8, fp8 };

enum class Finish : int32_t { none, gelu, gelu_tanh, silu, swiglu };

// Rows [begin, end) of x, which meet one weight of a stack.
struct Segment {
  int64_t weight, begin, end;
};

// out = finish(x W^T + x A B + bias) + residual
struct QuantizedMatmul {
  DType dtype;  // of bias, residual, the adapter and out
  DType x_dtype;
  int64_t rows;
  const void* x;  // (rows, depth)
  int64_t x_stride;
  QuantizedWeight weight;
  const Segment* segments;  // (segment_count,), which share out all rows; null for a single weight
  int64_t segment_count;
  Rounding rounding;         // fp8 with weights in fp8 alone
  int64_t activation_group;  // elements of x that share a scale then; 0 for a whole row

  const void* bias;      // (N,) or null
  const void* residual;  // (rows, outputs) contiguous, or null
  const void* adapter_a;  // (K, rank) contiguous, or null
  const void* adapter_b;  // (rank, N) contiguous
  int64_t rank;
  Finish finish;
  void* out;  // (rows, outputs) contiguous
};

void quantized_matmul(const QuantizedMatmul& call);

// grad_x (rows, depth) = grad (rows, N) W, all contiguous. N must not be 0.
void quantized_matmul_backward(const QuantizedWeight& weight, const float* grad, int64_t rows,
                               float* grad_x);

// Rows of the weight by number, to out (count, depth). The numbers are in range.
void embed(const QuantizedWeight& weight, const int64_t* ids, int64_t count, DType dtype, void* out);

// Rows [begin, end) of the weight in float32, to out (end - begin, depth).
void dequantize_rows(const QuantizedWeight& weight, int64_t begin, int64_t end, float* out);

}  // namespace tilewise
