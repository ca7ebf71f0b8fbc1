// One block of the backward pass on AMX tiles. What it is part of: attention_backward_rows.h.
//
// A product of tiles sums over pairs of what lies side by side in a row of A and zipped in B. P and dS
// are made in rows of queries, so zipping two rows of them costs nothing, and turning them would: hence
// dV and dK are computed turned, dV^T = dO^T P and dK^T = Q^T dS, where what has to be turned is the
// smaller dO and Q, once a block. They stay turned until their keys are done.
//
// Of a block only what 32 queries see of the keys is multiplied, in whole steps of 32.
#pragma once

#include <utility>
#include <vector>

#include "cpu/attention_backward_rows.h"
#include "cpu/attention_prefill_pack.h"
#include "cpu/bf16_rows.h"
#include "cpu/tile_packing.h"
#include "cpu/tile_products.h"

namespace tilewise {

class BackwardTiles : public BackwardRows {
 public:
  using Element = BFloat16;
  using Scope = Tiles;

  static bool takes(const Attention& a) { return a.dtype == DType::bf16; }

  BackwardTiles(const Attention& a, const Heads& grad_out, const float* delta)
      : BackwardRows(a, grad_out, delta),
        zeros_(std::max(a.dim, a.v_dim), Element{}),
        rows_(2 * KEY_BLOCK),
        depth_(tile_depth_of(a.dim)),
        v_depth_(tile_depth_of(a.v_dim)),
        columns_(tile_columns_of(a.dim)),
        v_columns_(tile_columns_of(a.v_dim)) {
    const int64_t key_stride = odd_stride(KEY_BLOCK);
    elements_ = make_workspace<Element>(
        TILE_ELEMENTS * (KEY_COLUMNS * (depth_ + v_depth_) + columns_ * KEY_DEPTH +
                         QUERY_BLOCK / TILE_HEIGHT * (depth_ + v_depth_) +
                         (columns_ + v_columns_) * QUERY_DEPTH + 3 * KEY_COLUMNS * QUERY_DEPTH));
    Element* next = elements_.get();
    const auto take = [&](int64_t tiles) {
      return std::exchange(next, next + tiles * TILE_ELEMENTS);
    };
    k_turned_ = take(KEY_COLUMNS * depth_);
    v_turned_ = take(KEY_COLUMNS * v_depth_);
    k_pairs_ = take(columns_ * KEY_DEPTH);
    q_ = take(QUERY_BLOCK / TILE_HEIGHT * depth_);
    grad_ = take(QUERY_BLOCK / TILE_HEIGHT * v_depth_);
    q_turned_ = take(columns_ * QUERY_DEPTH);
    grad_turned_ = take(v_columns_ * QUERY_DEPTH);
    p_pairs_ = take(KEY_COLUMNS * QUERY_DEPTH);
    ds_pairs_ = take(KEY_COLUMNS * QUERY_DEPTH);
    ds_ = take(QUERY_BLOCK / TILE_HEIGHT * KEY_DEPTH);
    memory_ = make_workspace<float>(
        key_stride * (2 * TILE_DEPTH + (columns_ + v_columns_) * TILE_HEIGHT));
    Carver carver(memory_.get());
    s_ = carver.take(TILE_DEPTH, key_stride);
    dp_ = carver.take(TILE_DEPTH, key_stride);
    grad_k_ = carver.take(columns_ * TILE_HEIGHT, key_stride);
    grad_v_ = carver.take(v_columns_ * TILE_HEIGHT, key_stride);
  }

  void load_keys(const Sequence& s, int64_t kv_head, int64_t j) {
    begin_keys(s, j);
    const Element **k = rows_.data(), **v = k + KEY_BLOCK;
    for_keys<Element>(s, kv_head, [&](int64_t r, const Element* k_row, const Element* v_row) {
      k[r] = finite_or_zeros(k_row, a_.dim);
      v[r] = finite_or_zeros(v_row, a_.v_dim);
    });
    const int64_t whole = round_up(keys, TILE_DEPTH);
    fill_up(keys, whole, k, v);
    pack_tile_columns(k, whole, a_.dim, k_turned_);
    pack_tile_columns(v, whole, a_.v_dim, v_turned_);
    pack_tile_pairs(k, whole, a_.dim, KEY_BLOCK, k_pairs_);
    std::memset(grad_k_.data, 0, columns_ * TILE_HEIGHT * grad_k_.stride * sizeof(float));
    std::memset(grad_v_.data, 0, v_columns_ * TILE_HEIGHT * grad_v_.stride * sizeof(float));
  }

  // After load_keys, from any number of heads of its group.
  void load_queries(const Sequence& s, int64_t head, int64_t i) {
    const Element **q = rows_.data(), **grad = q + KEY_BLOCK;
    for_queries<Element>(s, head, i,
                         [&](int64_t r, const Element* q_row, const Element* grad_row) {
                           q[r] = finite_or_zeros(q_row, a_.dim);
                           grad[r] = finite_or_zeros(grad_row, a_.v_dim);
                           return q[r] == q_row && grad[r] == grad_row;
                         });
    const int64_t whole = round_up(queries, TILE_DEPTH);
    fill_up(queries, whole, q, grad);
    pack_tile_rows(q, whole, a_.dim, q_);
    pack_tile_rows(grad, whole, a_.v_dim, grad_);
    pack_tile_turned(q, whole, a_.dim, QUERY_BLOCK, q_turned_);
    pack_tile_turned(grad, whole, a_.v_dim, QUERY_BLOCK, grad_turned_);
    seen_ = {KEY_BLOCK, 0};
    for (int64_t r = 0, t = 0; r < queries; r += TILE_DEPTH, ++t) {
      const int64_t last = std::min(r + TILE_DEPTH, queries) - 1;
      Range seen{keys_of_query_[r].begin / TILE_DEPTH * TILE_DEPTH,
                 round_up(keys_of_query_[last].end, TILE_DEPTH)};
      if (keys_of_query_[last].end <= keys_of_query_[r].begin) seen.end = seen.begin;
      seen_by_[t] = seen;
      if (seen.end == seen.begin) continue;
      seen_ = {std::min(seen_.begin, seen.begin), std::max(seen_.end, seen.end)};
    }
    seen_.end = std::max(seen_.end, seen_.begin);
  }

  // P and dS.
  void compute(const Sequence& s, int64_t head) {
    for (int64_t first = 0, t = 0; first < queries; first += TILE_DEPTH, ++t) {
      const Range seen = seen_by_[t];
      if (seen.end > seen.begin) {
        scores(q_, depth_, first, k_turned_, seen, s_);
        scores(grad_, v_depth_, first, v_turned_, seen, dp_);
      }
      for (int64_t r = first; r < first + TILE_DEPTH; r += 2) {
        if (is_plain()) {
          weigh_rows<false>(r, nullptr, nullptr);
        } else {
          alignas(ALIGNMENT) float added[2][KEY_BLOCK];
          if (r < queries) add_to_scores(s, head, r, added[0]);
          if (r + 1 < queries) add_to_scores(s, head, r + 1, added[1]);
          weigh_rows<true>(r, added[0], added[1]);
        }
      }
    }
  }

  // The block's share of each gradient: dV = P^T dO, dK = dS^T Q, dQ = dS K. The first two are summed up
  // until `finish`. (Why some are not inlined: see multiply_tiles.)
  void grad_v(Matrix, bool) { add_turned(grad_turned_, v_columns_, p_pairs_, grad_v_); }
  void grad_k(Matrix, bool) { add_turned(q_turned_, columns_, ds_pairs_, grad_k_); }
  __attribute__((noinline)) void grad_q(Matrix out) const {
    for (int64_t r = 0, t = 0; r < queries; r += TILE_DEPTH, ++t) {
      const auto [begin, end] = seen_by_[t];
      multiply_tiles<Bfloat16Products>(
          TILE_DEPTH / TILE_HEIGHT, columns_, (end - begin) / TILE_DEPTH, false,
          {ds_ + (r / TILE_HEIGHT * KEY_DEPTH + begin / TILE_DEPTH) * TILE_ELEMENTS,
           KEY_DEPTH * TILE_SIZE, TILE_SIZE},
          {k_pairs_ + begin * TILE_WIDTH, TILE_SIZE, KEY_DEPTH * TILE_SIZE},
          tiles_of_rows(out.row(r), out.stride));
    }
  }

  void finish(Matrix k, Matrix v) const {
    transpose_rows(grad_k_, a_.dim, keys, k);
    transpose_rows(grad_v_, a_.v_dim, keys, v);
  }

 private:
  static constexpr int64_t KEY_COLUMNS = KEY_BLOCK / TILE_WIDTH, KEY_DEPTH = KEY_BLOCK / TILE_DEPTH;
  static constexpr int64_t QUERY_DEPTH = QUERY_BLOCK / TILE_DEPTH;
  static_assert(KEY_BLOCK % TILE_DEPTH == 0 && QUERY_BLOCK % TILE_DEPTH == 0, "blocks are whole tiles");

  const Element* finite_or_zeros(const Element* row, int64_t n) const {
    return is_finite(&row, 1, n) ? row : zeros_.data();
  }

  void fill_up(int64_t begin, int64_t end, const Element** a, const Element** b) const {
    std::fill(a + begin, a + end, zeros_.data());
    std::fill(b + begin, b + end, zeros_.data());
  }

  // 32 rows of scores, of the keys that any of them sees.
  __attribute__((noinline)) static void scores(const Element* rows, int64_t depth, int64_t first,
                                               const Element* turned, Range seen, Matrix out) {
    multiply_tiles<Bfloat16Products>(
        TILE_DEPTH / TILE_HEIGHT, (seen.end - seen.begin) / TILE_WIDTH, depth, false,
        {rows + first * depth * TILE_DEPTH, depth * TILE_SIZE, TILE_SIZE},
        {turned + seen.begin * depth * TILE_DEPTH, TILE_SIZE, depth * TILE_SIZE},
        tiles_of_rows(out.data + seen.begin, out.stride));
  }

  // out += turned rows of queries times pairs of queries.
  __attribute__((noinline)) void add_turned(const Element* turned, int64_t columns,
                                            const Element* pairs, Matrix out) const {
    multiply_tiles<Bfloat16Products>(
        columns, (seen_.end - seen_.begin) / TILE_WIDTH, tile_depth_of(queries), true,
        {turned, QUERY_DEPTH * TILE_SIZE, TILE_SIZE},
        {pairs + seen_.begin * QUERY_BLOCK, TILE_SIZE, QUERY_DEPTH * TILE_SIZE},
        tiles_of_rows(out.data + seen_.begin, out.stride));
  }

  // Rows r and r + 1 of P and dS, for the keys that any query of the block sees.
  template <bool GENERAL>
  void weigh_rows(int64_t r, const float* added, const float* added_next) {
    const int64_t in_strip = r % TILE_DEPTH;
    const float *s_row = s_.row(in_strip), *dp_row = dp_.row(in_strip);
    const float *s_next = s_.row(in_strip + 1), *dp_next = dp_.row(in_strip + 1);
    const int64_t pair = r / TILE_DEPTH * TILE_ELEMENTS + in_strip / 2 * TILE_DEPTH;
    Element* ds_row =
        ds_ + r / TILE_HEIGHT * KEY_DEPTH * TILE_ELEMENTS + r % TILE_HEIGHT * TILE_DEPTH;
    for (int64_t j = seen_.begin; j < seen_.end; j += W) {
      Weighed x{F32::zero(), F32::zero()}, y = x;
      if (r < queries) x = weigh<GENERAL>(r, j, s_row, dp_row, added, false);
      if (r + 1 < queries) y = weigh<GENERAL>(r + 1, j, s_next, dp_next, added_next, false);
      const int64_t at = j * QUERY_BLOCK + pair;
      store_zipped(x.weight, y.weight, p_pairs_ + at);
      const __m512i both = store_zipped(x.gradient, y.gradient, ds_pairs_ + at);
      Element* to = ds_row + j / TILE_DEPTH * TILE_ELEMENTS + j % TILE_DEPTH;
      store_half(to, _mm512_castsi512_si256(both));
      store_half(to + TILE_DEPTH, _mm512_extracti64x4_epi64(both, 1));
    }
  }

  std::vector<Element> zeros_;
  std::vector<const Element*> rows_;  // of what is being packed
  int64_t depth_, v_depth_, columns_, v_columns_;  // tiles of dim and of v_dim
  Range seen_by_[QUERY_DEPTH], seen_;  // keys, in steps of 32, that any of 32 queries or any query sees
  Workspace<Element> elements_;
  Workspace<float> memory_;
  // Tiles, see tile_packing.h: as A rows of queries and turned ones, as B turned keys and pairs of rows.
  Element *q_, *grad_, *ds_, *q_turned_, *grad_turned_;
  Element *k_turned_, *v_turned_, *k_pairs_, *p_pairs_, *ds_pairs_;
  Matrix s_, dp_;           // (32 queries, keys)
  Matrix grad_k_, grad_v_;  // (dim, keys) and (v_dim, keys)
};

}  // namespace tilewise
