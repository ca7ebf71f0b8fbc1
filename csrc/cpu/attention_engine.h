// The matrix engine of prefill attention: what multiplies, and how its operands are laid out.
//
// attention_prefill.cpp shares the work out and walks over the blocks of keys. It is a template over an
// engine, which knows how queries, keys and values are packed and multiplied, and over the strips
// that take rows through one block with it: scores, softmax, sums. Here is the float32 engine, for
// every instruction set; attention_engine_pairs.h has one for bfloat16. Their strips are rows of
// scores (attention_prefill_rows.h). On AMX they are turned (attention_prefill_lanes.h).
//
// What an engine has:
//
//   using Element      what queries, keys and values are packed from and to, float or BFloat16.
//                      Rows of another type are converted to it first.
//   ROW_BLOCK          most query rows of a task (a row is one query of one head of a group)
//   LEAST_ROWS         of a task, where smaller ones are wanted for more threads to share
//   ROW_STRIP          divides both: rows that go through scores, softmax and accumulate
//                      together, so that their scores stay in the first-level cache
//   KEY_BLOCK          keys of a block; block b holds keys [b * KEY_BLOCK, (b + 1) * KEY_BLOCK) of
//                      a sequence, so a row's bits do not depend on which queries come with it
//   KEY_STEP           divides KEY_BLOCK: ranges of keys below start and end at multiples of it
//
//   query_size(dim), key_size(dim), value_size(v_dim)
//                      Elements of ROW_BLOCK packed queries and of KEY_BLOCK packed keys or values,
//                      multiples of 64 bytes; buffers are 64-byte aligned. Row i of the queries, a
//                      multiple of ROW_STRIP, starts at query_size / ROW_BLOCK * i.
//   out_stride(v_dim)  floats that the output sums of a row take. Those of row i, a multiple of
//                      ROW_STRIP, start at out_stride * i, as any row does where scores are rows; the
//                      buffer has ROW_BLOCK rows and is 64-byte aligned
//
//   Engine(dim, v_dim) made once per task and thread (an AMX engine sets its tiles up here and
//                      gives them back in its destructor)
//   pack_queries(rows, count, out)    rows[i] points to `dim` elements, i < count <= ROW_BLOCK, and
//                                     to zeros for the others of a strip
//   pack_keys(rows, count, out)       rows[i] points to `dim` elements. count <= KEY_BLOCK is a
//   pack_values(rows, count, out)     multiple of KEY_STEP (rows past the sequence's end point to
//                                     zeros); v_dim elements a row. All finite.
//
// and for rows of scores
//
//   using Weight       what the softmax writes for `accumulate`: float or BFloat16. It replaces the
//                      scores in place: both have SCORE_STRIDE * 4 bytes a row.
//   SCORE_STRIDE       floats from one row of scores to the next, >= KEY_BLOCK
//
//   scores(queries, count, keys, begin, end, s)
//                      s[i * SCORE_STRIDE + j] = queries[i] . keys[j] for i < count <= ROW_STRIP,
//                      begin <= j < end, which are multiples of KEY_STEP. Rows up to ROW_STRIP may
//                      be written.
//   accumulate(weights, count, values, begin, end, out)
//                      out[i * out_stride + n] += sum over begin <= j < end of
//                      weights[i * SCORE_STRIDE * 4 / sizeof(Weight) + j] * values[j][n].
//                      Rows from `count` to ROW_STRIP may hold anything and may be written.
//
// `scores` and `accumulate` must give a row the same bits wherever in the block of rows it is, and
// weights of zero, or leaving them out, must not change any bit of `out`.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/gemm.h"

namespace tilewise {

class FloatEngine {
 public:
  using Element = float;
  using Weight = float;
  static constexpr int ROW_BLOCK = 96;
  static constexpr int LEAST_ROWS = ROW_BLOCK;
  static constexpr int ROW_STRIP = 24;
  static constexpr int KEY_BLOCK = 256;
  static constexpr int KEY_STEP = PANEL;
  // Rows a power of two apart would share the sets of the first-level cache.
  static constexpr int SCORE_STRIDE = KEY_BLOCK + 16;

  static int64_t query_size(int64_t dim) { return ROW_BLOCK * query_stride(dim); }
  static int64_t key_size(int64_t dim) { return packed_size(dim, KEY_BLOCK); }
  static int64_t value_size(int64_t v_dim) { return packed_size(KEY_BLOCK, v_dim); }
  static int64_t out_stride(int64_t v_dim) { return round_up(v_dim, PANEL); }

  FloatEngine(int64_t dim, int64_t v_dim) : dim_(dim), v_dim_(v_dim) {}

  void pack_queries(const float* const* rows, int64_t count, float* out) const {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(out + i * query_stride(dim_), rows[i], dim_ * sizeof(float));
    }
  }

  void pack_keys(const float* const* rows, int64_t count, float* out) const {
    tilewise::pack_columns(rows, dim_, count, out);
  }

  void pack_values(const float* const* rows, int64_t count, float* out) const {
    tilewise::pack_rows(rows, count, v_dim_, out, KEY_BLOCK * PANEL);
  }

  void scores(const float* queries, int64_t count, const float* keys, int64_t begin, int64_t end,
              float* s) const {
    const int64_t length = chain_length<float>(dim_);
    for (int64_t k = 0; k < dim_; k += length) {
      multiply(queries + k, query_stride(dim_), keys + begin * dim_ + k * PANEL, dim_ * PANEL, count,
               end - begin, std::min(length, dim_ - k), s + begin, SCORE_STRIDE, k > 0);
    }
  }

  void accumulate(const float* weights, int64_t count, const float* values, int64_t begin,
                  int64_t end, float* out) const {
    const int64_t stride = out_stride(v_dim_);
    multiply(weights + begin, SCORE_STRIDE, values + begin * PANEL, KEY_BLOCK * PANEL, count,
             stride, end - begin, out, stride, true);
  }

 private:
  static int64_t query_stride(int64_t dim) { return round_up(dim, 16) + 16; }

  int64_t dim_, v_dim_;
};

}  // namespace tilewise
