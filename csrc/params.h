// What passes between the bindings (which know PyTorch) and the kernels (which do not): raw
// pointers, sizes and strides. Strides count elements, and the last dimension has stride one.
#pragma once

#include <cstdint>

namespace tilewise {

enum class DType : int32_t { f32, f16, bf16, i8, f8e4m3, i4 };

inline int64_t element_size(DType dtype) {
  return dtype == DType::f32 ? 4 : dtype == DType::f16 || dtype == DType::bf16 ? 2 : 1;
}

// Calls body(i, context) once for every i in [0, tasks), on PyTorch's threads; a task is begun only
// when all before it have been. The bindings define it; kernels call `parallel` in cpu/parallel.h.
void run_tasks(int64_t tasks, void (*body)(int64_t, void*), void* context);

// The same for tasks that do not depend on each other, in any order: each thread takes neighbouring
// ones, and others' when it has done its own.
void run_shares(int64_t tasks, void (*body)(int64_t, void*), void* context);

// How many threads that may be. Results must not depend on it.
int64_t thread_count();

// A (batch, seq, heads, dim) tensor, or (tokens, heads, dim) with batch stride 0.
struct Heads {
  void* data;
  int64_t batch_stride, seq_stride, head_stride;
};

// Keys or values, of which row j of a sequence is either j rows behind its first one or, where
// there is a block table, in slot j % page_size of page block_table[j / page_size].
struct KeyValues {
  const void* data;
  int64_t batch_stride;  // of the pages, where there are pages
  int64_t seq_stride, head_stride;
  const float* scale;  // (pages, page_size, kv_heads) of a quantized cache, or null
  int64_t scale_page_stride, scale_slot_stride, scale_head_stride;
};

// Dense: neither cu_seqlens nor a block table; q_len and k_len for every batch row.
// Ragged: cu_seqlens_q and cu_seqlens_k.
// Paged: cache_seqlens and block_table (null if it has no pages), and cu_seqlens_q unless there is one query a request.
struct Attention {
  DType dtype;     // of q and out
  DType kv_dtype;  // of k and v
  int64_t batch, heads, kv_heads, dim, v_dim;
  int64_t q_len, k_len;        // of each sequence where all are equally long
  int64_t q_tokens, k_tokens;  // of the whole ragged tensors

  Heads q, out;
  KeyValues k, v;
  float* lse;  // (batch, q_len, heads) or (tokens, heads), contiguous

  const int32_t* cu_seqlens_q;   // (batch + 1,) or null
  const int32_t* cu_seqlens_k;   // (batch + 1,) or null
  const int32_t* block_table;    // (batch, max_pages) or null
  const int32_t* cache_seqlens;  // (batch,) or null
  int64_t block_table_stride, max_pages, num_pages, page_size;

  bool causal;
  float scale, softcap;
  int64_t window_left, window_right;  // -1 is no limit
  const float* alibi_slopes;          // (heads,) or (batch, heads) or null
  int64_t alibi_batch_stride;
  const float* sinks;     // (heads,) or null
  const void* bias;       // broadcast with strides of 0, or null
  bool bias_is_mask;      // bytes, nonzero means visible; otherwise float32
  int64_t bias_stride[4]; // batch (0 unless dense), head, query (token if ragged), key
  int64_t bias_keys;       // for how many keys there is a bias
};

}  // namespace tilewise
