// Attention's forward and backward on a CPU, and what its kernels share: where sequences lie, which
// keys a query sees, and where a key or value row is.
//
// Two kernels compute the forward pass. Many query rows are worth packing the keys for (prefill);
// with few of them the keys are read once, as they lie (decode). Which one takes a sequence depends
// on that sequence's own lengths, so that its result does not depend on its neighbours.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace tilewise {

constexpr int64_t MAX_HEAD_DIM = 576;  // as in kernels/tilewise/attention/checks.py

// One batch row: queries [q_begin, q_begin + q_len) of the row-major rows of q, and k_len keys.
// The last query is level with the last key.
struct Sequence {
  int64_t index;
  int64_t q_begin;  // token number within q's batch row (dense) or within all tokens
  int64_t q_len;
  int64_t k_begin;
  int64_t k_len;

  // Position of query i among the keys.
  int64_t position(int64_t i) const { return k_len - q_len + i; }
};

inline int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return std::min(std::max(x, low), high);
}

// Lengths come from memory that nobody has to have checked: whatever they are, no row out of the
// tensors is touched.
inline Sequence sequence_of(const Attention& a, int64_t b) {
  Sequence s{b, 0, a.q_len, 0, a.k_len};
  if (a.cu_seqlens_q) {
    s.q_begin = clamp(a.cu_seqlens_q[b], 0, a.q_tokens);
    s.q_len = clamp(a.cu_seqlens_q[b + 1], s.q_begin, a.q_tokens) - s.q_begin;
  } else if (a.cache_seqlens) {
    s.q_begin = b;  // one query a request
    s.q_len = 1;
  }
  if (a.cu_seqlens_k) {
    s.k_begin = clamp(a.cu_seqlens_k[b], 0, a.k_tokens);
    s.k_len = clamp(a.cu_seqlens_k[b + 1], s.k_begin, a.k_tokens) - s.k_begin;
    if (a.bias) s.k_len = std::min(s.k_len, a.bias_keys);
  } else if (a.cache_seqlens) {
    s.k_len = clamp(a.cache_seqlens[b], 0, a.max_pages * a.page_size);
  }
  return s;
}

// The keys that query `i` may see by causality and window: [first, end), possibly empty.
struct Span {
  int64_t first, end;
};

inline Span visible_keys(const Attention& a, const Sequence& s, int64_t i) {
  const int64_t position = s.position(i);
  const int64_t right = a.causal ? 0 : a.window_right;
  Span span{0, s.k_len};
  if (a.window_left >= 0) span.first = std::max<int64_t>(0, position - a.window_left);
  if (right >= 0) span.end = std::min(s.k_len, position + right + 1);
  span.end = std::max(span.end, span.first);
  return span;
}

inline int64_t batch_of_pointer(const Attention& a, const Sequence& s) {
  return a.cu_seqlens_q || a.cache_seqlens ? 0 : s.index;
}

// Element offset of (query i, head h) in q or in a tensor laid out like it.
inline int64_t offset(const Attention& a, const Heads& t, const Sequence& s, int64_t i, int64_t h) {
  return batch_of_pointer(a, s) * t.batch_stride + (s.q_begin + i) * t.seq_stride +
         h * t.head_stride;
}

inline int64_t lse_offset(const Attention& a, const Sequence& s, int64_t i, int64_t h) {
  const int64_t row = batch_of_pointer(a, s) * a.q_len + s.q_begin + i;
  return row * a.heads + h;
}

// Element offset of key or value row j of a sequence, or -1 where its page does not exist.
inline int64_t row_offset(const Attention& a, const KeyValues& t, const Sequence& s, int64_t j,
                          int64_t kv_head) {
  if (!a.cache_seqlens) {
    return (a.cu_seqlens_k ? 0 : s.index) * t.batch_stride + (s.k_begin + j) * t.seq_stride +
           kv_head * t.head_stride;
  }
  const int64_t page = a.block_table[s.index * a.block_table_stride + j / a.page_size];
  if (page < 0 || page >= a.num_pages) return -1;
  return page * t.batch_stride + (j % a.page_size) * t.seq_stride + kv_head * t.head_stride;
}

// How much of a call's query rows one key head serves: the rows that share its keys.
inline int64_t group_size(const Attention& a) { return a.heads / a.kv_heads; }

// Sequences with at most this many (query, head of a group) rows take the decode kernel.
constexpr int64_t MAX_DECODE_ROWS = 16;

inline bool is_decode(const Attention& a, const Sequence& s) {
  return s.q_len * group_size(a) <= MAX_DECODE_ROWS || s.q_len == 1;
}

void attention_forward(const Attention& a);  // attention.cpp: shares the sequences out
void attention_prefill(const Attention& a, const Sequence* sequences, int64_t count);
void attention_decode(const Attention& a, const Sequence* sequences, int64_t count);

struct AttentionGradients {
  DType out_dtype;               // q's, or float32 where nothing may be lost by rounding
  Heads grad_out;                // like out, of any strides
  const float* grad_lse;         // like lse, or null
  Heads grad_q, grad_k, grad_v;  // contiguous and zero, of q's dtype
  float* grad_sinks;             // (heads,), or null
  float* grad_bias;              // the bias's own shape, zero, or null
  int64_t grad_bias_stride[4];   // as Attention's bias_stride
};

// attention_backward.cpp; the bias's part of it, attention_backward_bias.cpp, takes the row sums of
// grad_out * out, less grad_lse, laid out like lse.
void attention_backward(const Attention& a, const AttentionGradients& g);
void attention_bias_backward(const Attention& a, const AttentionGradients& g, const float* delta);

struct MergeStates {
  DType dtype;
  int64_t rows, dim;
  const void *out_a, *out_b;  // (rows, dim) contiguous
  const float *lse_a, *lse_b;
  void* out;
  float* lse;
};

void merge_states(const MergeStates& m);

}  // namespace tilewise
