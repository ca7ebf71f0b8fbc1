// What the blocks of the backward pass share, whatever they multiply with: which queries see which
// keys, and the step from products to weights and their gradients.
//
//   S = Q K^T   P = exp(S - lse)   dP = dO V^T   dS = P (dP - delta)
//
// where delta is the row sum of dO * out, less the gradient of the lse. From P and dS follow the
// gradients of everything (attention_backward.cpp) and of the bias (attention_backward_bias.cpp).
//
// Rows of Q, K, V and dO that are not finite are multiplied as zeros: 0 * NaN would carry them to
// rows that do not see them. Those that do become NaN by P and dS: a query's own row is NaN here,
// and a key or a value has made the lse or the delta of its queries NaN.
//
// Source: Dao, FlashAttention-2, 2023 (arXiv:2307.08691), algorithm 2.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/attention.h"
#include "cpu/gemm_strided.h"
#include "cpu/simd.h"
#include "cpu/workspace.h"

namespace tilewise {

// Multiples of the rows of a tile and of the columns of a panel on every instruction set. Queries
// come and go with every block, keys stay: the more keys, the less copying, until P, dS and the
// operands outgrow the second-level cache by too much.
constexpr int64_t QUERY_BLOCK = 96, KEY_BLOCK = 192;
static_assert(QUERY_BLOCK % TILE_ROWS == 0 && KEY_BLOCK % TILE_ROWS == 0, "blocks are whole tiles");
static_assert(KEY_BLOCK % PANEL == 0, "blocks are whole panels");

constexpr int64_t query_blocks_of(int64_t n) { return (n + QUERY_BLOCK - 1) / QUERY_BLOCK; }
constexpr int64_t key_blocks_of(int64_t n) { return (n + KEY_BLOCK - 1) / KEY_BLOCK; }

// The key blocks that some query of block i sees.
inline Range visible_key_blocks(const Attention& a, const Sequence& s, int64_t i) {
  const int64_t last = std::min((i + 1) * QUERY_BLOCK, s.q_len) - 1;
  const int64_t first = visible_keys(a, s, i * QUERY_BLOCK).first;
  const int64_t end = visible_keys(a, s, last).end;
  if (end <= first) return {0, 0};
  return {first / KEY_BLOCK, key_blocks_of(end)};
}

inline bool is_visible(Range key_blocks, int64_t j) {
  return j >= key_blocks.begin && j < key_blocks.end;
}

// Heads lie side by side, and no hardware prefetcher follows from one short row to the next.
constexpr int64_t AHEAD = 8;  // rows

template <class T>
inline void prefetch_row(const T* row, int64_t n) {
  const char* p = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(T)); i += 64) {
    _mm_prefetch(p + i, _MM_HINT_T0);
  }
}

// Blocks of 32-bit elements turned: to.row(j)[i] = from.row(i)[j]. Rows and columns are filled up to
// whole vectors.
template <class T>
inline void transpose_rows(MatrixOf<T> from, int64_t rows, int64_t columns, MatrixOf<T> to) {
  static_assert(sizeof(T) == 4, "an element is a lane");
  constexpr int W = F32::WIDTH;
  for (int64_t i = 0; i < rows; i += W) {
    for (int64_t j = 0; j < columns; j += W) {
      F32 block[W];
      for (int r = 0; r < W; ++r) {
        block[r] = load_f32(reinterpret_cast<const float*>(from.row(i + r) + j));
      }
      transpose(block);
      for (int r = 0; r < W; ++r) {
        store_f32(reinterpret_cast<float*>(to.row(j + r) + i), block[r]);
      }
    }
  }
}

// Matrices one behind the other in one piece of memory.
class Carver {
 public:
  explicit Carver(float* memory) : next_(memory) {}

  template <class T = float>
  MatrixOf<T> take(int64_t rows, int64_t stride) {
    static_assert(sizeof(T) == sizeof(float), "elements of 4 bytes");
    MatrixOf<T> m{reinterpret_cast<T*>(next_), stride};
    next_ += rows * stride;
    return m;
  }

 private:
  float* next_;
};

class BackwardRows {
 public:
  struct Scope {};  // lives as long as a thread computes

  BackwardRows(const Attention& a, const Heads& grad_out, const float* delta)
      : a_(a), grad_out_(grad_out), delta_of_rows_(delta) {}

  // Where gradients of keys and values are written that a block has summed up by itself.
  void finish(Matrix, Matrix) const {}

  int64_t queries, keys;
  Range keys_of_tile[QUERY_BLOCK / TILE_ROWS];   // that any of TILE_ROWS queries sees
  Range queries_of_tile[KEY_BLOCK / TILE_ROWS];  // that see any of TILE_ROWS keys

 protected:
  static constexpr int W = F32::WIDTH;

  struct Weighed {
    F32 weight, gradient;
  };

  void begin_keys(const Sequence& s, int64_t j) {
    first_key_ = j * KEY_BLOCK;
    keys = std::min(KEY_BLOCK, s.k_len - first_key_);
  }

  // read(r, q_row, grad_row) for every query of block i, which returns whether both are finite; then
  // the ranges are there.
  template <class T, class Read>
  void for_queries(const Sequence& s, int64_t head, int64_t i, const Read& read) {
    first_query_ = i * QUERY_BLOCK;
    queries = std::min(QUERY_BLOCK, s.q_len - first_query_);
    const T* q_row = static_cast<const T*>(a_.q.data) + offset(a_, a_.q, s, first_query_, head);
    const T* grad_row = static_cast<const T*>(grad_out_.data) +
                        offset(a_, grad_out_, s, first_query_, head);
    for (int64_t r = 0; r < queries; ++r) {
      const int64_t query = first_query_ + r, row = lse_offset(a_, s, query, head);
      if (r + AHEAD < queries) {
        prefetch_row(q_row + AHEAD * a_.q.seq_stride, a_.dim);
        prefetch_row(grad_row + AHEAD * grad_out_.seq_stride, a_.v_dim);
      }
      lse_[r] = read(r, q_row, grad_row) ? a_.lse[row] : NAN;
      delta_[r] = delta_of_rows_[row];
      q_row += a_.q.seq_stride;
      grad_row += grad_out_.seq_stride;
      const Span span = visible_keys(a_, s, query);
      keys_of_query_[r] = {clamp(span.first - first_key_, 0, keys),
                           clamp(span.end - first_key_, 0, keys)};
    }
    // What a query sees moves to the right from one to the next.
    for (int64_t r = 0, t = 0; r < queries; r += TILE_ROWS, ++t) {
      const int64_t last = std::min<int64_t>(r + TILE_ROWS, queries) - 1;
      keys_of_tile[t] = {keys_of_query_[r].begin, keys_of_query_[last].end};
      keys_of_tile[t].end = std::max(keys_of_tile[t].end, keys_of_tile[t].begin);
    }
    Range seen{0, 0};
    for (int64_t key = 0, t = 0; key < keys; key += TILE_ROWS, ++t) {
      while (seen.begin < queries && keys_of_query_[seen.begin].end <= key) ++seen.begin;
      seen.end = std::max(seen.end, seen.begin);
      const int64_t key_end = key + TILE_ROWS;
      while (seen.end < queries && keys_of_query_[seen.end].begin < key_end) ++seen.end;
      queries_of_tile[t] = seen;
    }
  }

  // read(r, k_row, v_row) for every key.
  template <class T, class Read>
  void for_keys(const Sequence& s, int64_t kv_head, const Read& read) const {
    for (int64_t r = 0; r < keys; ++r) {
      if (r + AHEAD < keys) {
        prefetch_row(row_of<T>(a_.k, s, first_key_ + r + AHEAD, kv_head), a_.dim);
        prefetch_row(row_of<T>(a_.v, s, first_key_ + r + AHEAD, kv_head), a_.v_dim);
      }
      read(r, row_of<T>(a_.k, s, first_key_ + r, kv_head),
           row_of<T>(a_.v, s, first_key_ + r, kv_head));
    }
  }

  // Whether a score is its product times the scale and nothing else.
  bool is_plain() const { return a_.softcap <= 0 && !a_.alibi_slopes && !a_.bias; }

  // What is added to the scores of query r: bias and ALiBi, or -inf where the bias hides a key.
  void add_to_scores(const Sequence& s, int64_t head, int64_t r, float* added) const {
    const auto [begin, end] = keys_of_query_[r];
    const int64_t query = first_query_ + r;
    std::fill(added + begin, added + end, 0.0f);
    if (a_.bias) {
      const int64_t step = a_.bias_stride[3];
      const int64_t batch = a_.cu_seqlens_q ? 0 : s.index;
      const int64_t from = batch * a_.bias_stride[0] + head * a_.bias_stride[1] +
                           (s.q_begin + query) * a_.bias_stride[2] + first_key_ * step;
      if (a_.bias_is_mask) {
        const uint8_t* visible = static_cast<const uint8_t*>(a_.bias) + from;
        for (int64_t j = begin; j < end; ++j) added[j] = visible[j * step] ? 0.0f : -INFINITY;
      } else {
        const float* bias = static_cast<const float*>(a_.bias) + from;
        for (int64_t j = begin; j < end; ++j) added[j] = bias[j * step];
      }
    }
    if (a_.alibi_slopes) {
      const float slope = a_.alibi_slopes[s.index * a_.alibi_batch_stride + head];
      const int64_t distance = s.position(query) - first_key_;
      for (int64_t j = begin; j < end; ++j) {
        added[j] -= slope * static_cast<float>(std::abs(distance - j));
      }
    }
  }

  // Vector j of query r's weights and of their gradient, from the products in its rows of S and dP;
  // zeros for keys that the query does not see. With `of_bias` it is the gradient of the biased score,
  // without the softcap's slope.
  template <bool GENERAL>
  Weighed weigh(int64_t r, int64_t j, const float* s_row, const float* dp_row, const float* added,
                bool of_bias) const {
    const auto [begin, end] = keys_of_query_[r];
    const F32 zero = F32::zero(), one = F32::all(1.0f);
    if (j + W <= begin || j >= end) return {zero, zero};
    const F32 scale = F32::all(a_.scale), lse = F32::all(lse_[r]), delta = F32::all(delta_[r]);
    F32 weight, slope = one, hidden = zero;
    if constexpr (GENERAL) {
      F32 score = load(s_row + j) * scale;
      if (a_.softcap > 0) {
        const F32 cap = F32::all(a_.softcap), t = tanh(score / cap);
        score = cap * t;
        if (!of_bias) slope = one - t * t;
      }
      hidden = load(added + j);
      weight = exp(score + hidden - lse);
    } else {
      weight = exp(fma(load(s_row + j), scale, zero - lse));
    }
    F32 gradient = weight * (load(dp_row + j) - delta);
    if constexpr (GENERAL) {
      const F32 nothing = F32::all(-INFINITY);
      weight = select_equal(hidden, nothing, zero, weight);
      gradient = select_equal(hidden, nothing, zero, gradient * slope);
    }
    if (j < begin || j + W > end) {
      const int before = static_cast<int>(begin - j), upto = static_cast<int>(end - j);
      weight = select_below(before, zero, select_below(upto, weight, zero));
      gradient = select_below(before, zero, select_below(upto, gradient, zero));
    }
    return {weight, gradient};
  }

  const Attention& a_;
  Range keys_of_query_[QUERY_BLOCK];

 private:
  template <class T>
  const T* row_of(const KeyValues& t, const Sequence& s, int64_t j, int64_t kv_head) const {
    return static_cast<const T*>(t.data) + row_offset(a_, t, s, j, kv_head);
  }

  const Heads& grad_out_;
  const float* delta_of_rows_;
  int64_t first_key_ = 0, first_query_ = 0;
  float lse_[QUERY_BLOCK], delta_[QUERY_BLOCK];
};

}  // namespace tilewise
