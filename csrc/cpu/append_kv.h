#pragma once

#include "params.h"

namespace tilewise {

// Keys or values of new tokens, and the cache that they go to. Strides count elements as stored.
struct AppendSide {
  const void* x;  // (tokens, kv_heads, dim)
  int64_t token_stride, x_head_stride;
  int64_t dim;
  void* cache;  // (pages, page_size, kv_heads, dim, or dim / 2 bytes of int4)
  int64_t page_stride, slot_stride, head_stride;
  float* scale;  // (pages, page_size, kv_heads) of a quantized cache, or null
  int64_t scale_page_stride, scale_slot_stride, scale_head_stride;
};

struct AppendKV {
  DType dtype, cache_dtype;
  int64_t tokens, kv_heads, num_pages, page_size;
  AppendSide k, v;
  const int64_t* slots;  // (tokens,); those outside the cache are skipped
  int64_t slots_stride;
  // Rotation of k, or null: (table_rows, pairs) with row strides.
  const float *cos, *sin;
  int64_t cos_stride, sin_stride, table_rows, pairs;
  bool interleaved;
  const int64_t* positions;
  int64_t positions_stride;
};

void append_kv(const AppendKV& a);

}  // namespace tilewise
