// One block of the backward pass in float32: queries of a head against keys. What it is part of:
// attention_backward_rows.h.
#pragma once

#include <cstring>

#include "cpu/attention_backward_rows.h"

namespace tilewise {

// `row` as float32, zeros behind it up to a whole panel. All zeros, and false, if it is not finite.
template <class T>
inline bool read_row(const T* row, int64_t n, float* out) {
  constexpr int W = F32::WIDTH;
  const int64_t whole = n - n % W, padded = round_up(n, PANEL);
  F32 check = F32::zero();  // x * 0 summed up
  for (int64_t i = 0; i < whole; i += W) {
    const F32 x = load(row + i);
    check = fma(x, F32::zero(), check);
    store(out + i, x);
  }
  if (whole < n) {
    const F32 x = load_partial(row + whole, static_cast<int>(n - whole));
    check = fma(x, F32::zero(), check);
    store(out + whole, x);
  }
  const bool finite = reduce_add(check) == 0.0f;
  const int64_t filled = finite ? round_up(n, W) : 0;
  std::memset(out + filled, 0, (padded - filled) * sizeof(float));
  return finite;
}

// The operands of a block and what is computed from them; T is the dtype of the tensors. One thread
// at a time uses it.
template <class T>
class BackwardBlock : public BackwardRows {
 public:
  using Element = T;

  BackwardBlock(const Attention& a, const Heads& grad_out, const float* delta)
      : BackwardRows(a, grad_out, delta) {
    const int64_t q_stride = odd_stride(a.dim), v_stride = odd_stride(a.v_dim);
    const int64_t score_stride = odd_stride(KEY_BLOCK);
    const int64_t deep_q = round_up(a.dim, PANEL), deep_v = round_up(a.v_dim, PANEL);
    memory_ = make_workspace<float>(
        QUERY_BLOCK * (q_stride + 2 * score_stride) + KEY_BLOCK * (q_stride + v_stride) +
        (deep_q + deep_v) * score_stride);
    Carver carver(memory_.get());
    q_ = carver.take(QUERY_BLOCK, q_stride);
    k_ = carver.take(KEY_BLOCK, q_stride);
    grad_ = carver.take(KEY_BLOCK, v_stride);  // V is in it for a while
    p_ = carver.take(QUERY_BLOCK, score_stride);
    ds = carver.take(QUERY_BLOCK, score_stride);
    k_transposed_ = carver.take(deep_q, score_stride);
    v_transposed_ = carver.take(deep_v, score_stride);
  }

  Matrix ds;  // (queries, keys); of a tile's rows only what is in its range is there

  void load_keys(const Sequence& s, int64_t kv_head, int64_t j) {
    begin_keys(s, j);
    // V's rows pass through the place of dO, which is loaded later.
    for_keys<T>(s, kv_head, [&](int64_t r, const T* k_row, const T* v_row) {
      read_row(k_row, a_.dim, k_.row(r));
      read_row(v_row, a_.v_dim, grad_.row(r));
    });
    for (int64_t r = keys; r < round_up(keys, F32::WIDTH); ++r) {
      std::memset(k_.row(r), 0, k_.stride * sizeof(float));
      std::memset(grad_.row(r), 0, grad_.stride * sizeof(float));
    }
    transpose_rows(k_, keys, a_.dim, k_transposed_);
    transpose_rows(grad_, keys, a_.v_dim, v_transposed_);
  }

  // After load_keys, from any number of heads of its group.
  void load_queries(const Sequence& s, int64_t head, int64_t i) {
    for_queries<T>(s, head, i, [&](int64_t r, const T* q_row, const T* grad_row) {
      const bool q_finite = read_row(q_row, a_.dim, q_.row(r));
      return read_row(grad_row, a_.v_dim, grad_.row(r)) && q_finite;
    });
  }

  // P and dS; with `of_bias` dS is the gradient of the biased score, without the softcap's slope.
  void compute(const Sequence& s, int64_t head, bool of_bias = false) {
    multiply_strided_columns(q_, k_transposed_, queries, keys, a_.dim, keys_of_tile, p_);
    multiply_strided_columns(grad_, v_transposed_, queries, keys, a_.v_dim, keys_of_tile, ds);
    for (int64_t r = 0; r < queries; ++r) {
      if (is_plain()) {
        weigh_row<false>(r, nullptr, of_bias);
      } else {
        alignas(ALIGNMENT) float added[KEY_BLOCK];
        add_to_scores(s, head, r, added);
        weigh_row<true>(r, added, of_bias);
      }
    }
  }

  // The block's share of each gradient: dV = P^T dO, dK = dS^T Q, dQ = dS K.
  void grad_v(Matrix out, bool accumulate) const {
    multiply_strided<Stored::columns>(p_, grad_, keys, a_.v_dim, queries_of_tile, out, accumulate);
  }
  void grad_k(Matrix out, bool accumulate) const {
    multiply_strided<Stored::columns>(ds, q_, keys, a_.dim, queries_of_tile, out, accumulate);
  }
  void grad_q(Matrix out) const {
    multiply_strided<Stored::rows>(ds, k_, queries, a_.dim, keys_of_tile, out, false);
  }

 private:
  // Row r of P and dS, from the two products that lie there.
  template <bool GENERAL>
  void weigh_row(int64_t r, const float* added, bool of_bias) {
    float *p_row = p_.row(r), *ds_row = ds.row(r);
    for (int64_t j = 0; j < keys; j += W) {
      const auto [weight, gradient] = weigh<GENERAL>(r, j, p_row, ds_row, added, of_bias);
      store(p_row + j, weight);
      store(ds_row + j, gradient);
    }
  }

  Workspace<float> memory_;
  Matrix q_, k_, grad_;  // (queries, dim), (keys, dim) and, of the output, (queries, v_dim)
  Matrix p_;             // like ds
  Matrix k_transposed_, v_transposed_;  // (dim, keys) and (v_dim, keys)
};

}  // namespace tilewise
