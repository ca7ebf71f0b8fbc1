// One block of the backward pass in products of bfloat16 pairs (AVX-512). What it is part of:
// attention_backward_rows.h.
//
// vdpbf16ps adds two products an instruction, so all five products take half of what they take in
// float32. Each sums over pairs of something: of dimensions (S, dP), of queries (dV, dK) or of keys
// (dQ). So Q, K and dO are there as rows, zipped by two rows, or turned, and P and dS are rounded to
// bfloat16 and zipped by two queries as they are made.
#pragma once

#include "cpu/attention_backward_rows.h"
#include "cpu/attention_prefill_pack.h"
#include "cpu/bf16_rows.h"

namespace tilewise {

class BackwardPairs : public BackwardRows {
 public:
  using Element = BFloat16;

  static bool takes(const Attention& a) {
    return a.dtype == DType::bf16 && a.dim % 2 == 0 && a.v_dim % 2 == 0;
  }

  BackwardPairs(const Attention& a, const Heads& grad_out, const float* delta)
      : BackwardRows(a, grad_out, delta) {
    const int64_t q_stride = odd_stride(a.dim), v_stride = odd_stride(a.v_dim);
    const int64_t q_pairs = odd_stride(a.dim / 2), v_pairs = odd_stride(a.v_dim / 2);
    const int64_t key_stride = odd_stride(KEY_BLOCK), key_pairs = odd_stride(KEY_BLOCK / 2);
    const int64_t deep_q = round_up(a.dim / 2, PANEL), deep_v = round_up(a.v_dim / 2, PANEL);
    memory_ = make_workspace<float>(
        KEY_BLOCK * (q_pairs + v_pairs) + (deep_q + deep_v) * key_stride +
        KEY_BLOCK / 2 * q_stride + QUERY_BLOCK * (q_pairs + key_pairs + 2 * key_stride) +
        QUERY_BLOCK / 2 * (q_stride + v_stride + 2 * key_stride));
    Carver carver(memory_.get());
    k_ = carver.take<Pair>(KEY_BLOCK, q_pairs);
    grad_ = carver.take<Pair>(KEY_BLOCK, v_pairs);  // V is in it for a while
    k_turned_ = carver.take<Pair>(deep_q, key_stride);
    v_turned_ = carver.take<Pair>(deep_v, key_stride);
    k_zipped_ = carver.take<Pair>(KEY_BLOCK / 2, q_stride);
    q_ = carver.take<Pair>(QUERY_BLOCK, q_pairs);
    ds_ = carver.take<Pair>(QUERY_BLOCK, key_pairs);
    s_ = carver.take(QUERY_BLOCK, key_stride);
    dp_ = carver.take(QUERY_BLOCK, key_stride);
    q_zipped_ = carver.take<Pair>(QUERY_BLOCK / 2, q_stride);
    grad_zipped_ = carver.take<Pair>(QUERY_BLOCK / 2, v_stride);
    p_zipped_ = carver.take<Pair>(QUERY_BLOCK / 2, key_stride);
    ds_zipped_ = carver.take<Pair>(QUERY_BLOCK / 2, key_stride);
  }

  void load_keys(const Sequence& s, int64_t kv_head, int64_t j) {
    begin_keys(s, j);
    for_keys<Element>(s, kv_head, [&](int64_t r, const Element* k_row, const Element* v_row) {
      read_row(k_row, a_.dim, k_, r);
      read_row(v_row, a_.v_dim, grad_, r);
    });
    for (int64_t r = keys; r < round_up(keys, W); ++r) {
      clear_row(k_, r);
      clear_row(grad_, r);
    }
    transpose_rows(k_, keys, a_.dim / 2, k_turned_);
    transpose_rows(grad_, keys, a_.v_dim / 2, v_turned_);
    zip(k_, keys, a_.dim, k_zipped_);
  }

  // After load_keys, from any number of heads of its group.
  void load_queries(const Sequence& s, int64_t head, int64_t i) {
    for_queries<Element>(s, head, i,
                         [&](int64_t r, const Element* q_row, const Element* grad_row) {
                           const bool q_finite = read_row(q_row, a_.dim, q_, r);
                           return read_row(grad_row, a_.v_dim, grad_, r) && q_finite;
                         });
    if (queries % 2) {
      clear_row(q_, queries);
      clear_row(grad_, queries);
    }
    zip(q_, queries, a_.dim, q_zipped_);
    zip(grad_, queries, a_.v_dim, grad_zipped_);
    to_pairs(keys_of_tile, pairs_of_keys_);
    to_pairs(queries_of_tile, pairs_of_queries_);
  }

  // P and dS.
  void compute(const Sequence& s, int64_t head) {
    multiply_strided_columns(q_, k_turned_, queries, keys, a_.dim / 2, keys_of_tile, s_);
    multiply_strided_columns(grad_, v_turned_, queries, keys, a_.v_dim / 2, keys_of_tile, dp_);
    for (int64_t r = 0; r < queries; r += 2) {
      if (is_plain()) {
        weigh_rows<false>(r, nullptr, nullptr);
      } else {
        alignas(ALIGNMENT) float added[2][KEY_BLOCK];
        add_to_scores(s, head, r, added[0]);
        if (r + 1 < queries) add_to_scores(s, head, r + 1, added[1]);
        weigh_rows<true>(r, added[0], added[1]);
      }
    }
  }

  // The block's share of each gradient: dV = P^T dO, dK = dS^T Q, dQ = dS K.
  void grad_v(Matrix out, bool accumulate) const {
    multiply_strided<Stored::columns>(p_zipped_, grad_zipped_, keys, a_.v_dim, pairs_of_queries_,
                                      out, accumulate);
  }
  void grad_k(Matrix out, bool accumulate) const {
    multiply_strided<Stored::columns>(ds_zipped_, q_zipped_, keys, a_.dim, pairs_of_queries_, out,
                                      accumulate);
  }
  void grad_q(Matrix out) const {
    multiply_strided<Stored::rows>(ds_, k_zipped_, queries, a_.dim, pairs_of_keys_, out, false);
  }

 private:
  using Pair = BFloat16Pair;
  using Pairs = MatrixOf<Pair>;

  static Element* elements(Pairs m, int64_t r) { return reinterpret_cast<Element*>(m.row(r)); }

  static void clear_row(Pairs m, int64_t r) {
    std::memset(static_cast<void*>(m.row(r)), 0, m.stride * sizeof(Pair));
  }

  // Row r of m, zeros behind it. All zeros, and false, if it is not finite.
  static bool read_row(const Element* row, int64_t n, Pairs m, int64_t r) {
    const bool finite = is_finite(&row, 1, n);
    const int64_t filled = finite ? n : 0;
    Element* out = elements(m, r);
    std::memcpy(static_cast<void*>(out), row, filled * sizeof(Element));
    std::memset(static_cast<void*>(out + filled), 0, (2 * m.stride - filled) * sizeof(Element));
    return finite;
  }

  // Rows 2 i and 2 i + 1 of n elements to row i of n pairs.
  static void zip(Pairs from, int64_t rows, int64_t n, Pairs to) {
    for (int64_t r = 0; r < rows; r += 2) {
      for (int64_t i = 0; i < n; i += 32) {
        zip_rows(elements(from, r) + i, elements(from, r + 1) + i, 32,
                 reinterpret_cast<Element*>(to.row(r / 2) + i),
                 reinterpret_cast<Element*>(to.row(r / 2) + i + 16));
      }
    }
  }

  template <int N>
  static void to_pairs(const Range (&from)[N], Range (&to)[N]) {
    for (int i = 0; i < N; ++i) to[i] = {from[i].begin / 2, (from[i].end + 1) / 2};
  }

  // Rows r and r + 1 of P and dS.
  template <bool GENERAL>
  void weigh_rows(int64_t r, const float* added, const float* added_next) {
    const bool has_next = r + 1 < queries;
    const float *s_row = s_.row(r), *dp_row = dp_.row(r);
    const float *s_next = s_.row(r + 1), *dp_next = dp_.row(r + 1);
    for (int64_t j = 0; j < keys; j += W) {
      Weighed x = weigh<GENERAL>(r, j, s_row, dp_row, added, false), y{F32::zero(), F32::zero()};
      if (has_next) y = weigh<GENERAL>(r + 1, j, s_next, dp_next, added_next, false);
      store_zipped(x.weight, y.weight, p_zipped_.row(r / 2) + j);
      const __m512i both = store_zipped(x.gradient, y.gradient, ds_zipped_.row(r / 2) + j);
      store_half(elements(ds_, r) + j, _mm512_castsi512_si256(both));
      store_half(elements(ds_, r + 1) + j, _mm512_extracti64x4_epi64(both, 1));
    }
  }

  Workspace<float> memory_;
  Pairs q_, k_, grad_;          // rows of pairs: (queries, dim), (keys, dim), (queries, v_dim)
  Pairs k_turned_, v_turned_;   // (dim, keys) and (v_dim, keys), pairs of dimensions
  Pairs q_zipped_, grad_zipped_, k_zipped_;  // (queries or keys, dim), pairs of rows
  Matrix s_, dp_;               // (queries, keys); of a tile's rows only what is in its range is there
  Pairs p_zipped_, ds_zipped_;  // (queries, keys), pairs of queries
  Pairs ds_;                    // (queries, keys), pairs of keys
  Range pairs_of_keys_[QUERY_BLOCK / TILE_ROWS], pairs_of_queries_[KEY_BLOCK / TILE_ROWS];
};

}  // namespace tilewise
