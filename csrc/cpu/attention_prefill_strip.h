// What prefill attention shares out: rows of queries that see the same keys, and strips of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/attention.h"

namespace tilewise {

// A key head of a sequence: what shares keys. Its query rows are numbered query by query.
struct Unit {
  Sequence s;
  int64_t kv_head;
  int64_t group;                   // query heads of the key head
  int64_t first_block, end_block;  // what its queries see
  int64_t packed_at = -1;          // in the workspace, or -1: each task packs for itself

  int64_t rows() const { return s.q_len * group; }
  int64_t blocks() const { return end_block - first_block; }
  int64_t query(int64_t row) const { return row / group; }
  int64_t head(int64_t row) const { return kv_head * group + row % group; }

  Span visible(const Attention& a, int64_t row) const { return visible_keys(a, s, query(row)); }

  // The keys that any query of the rows sees.
  Span visible(const Attention& a, int64_t first_row, int64_t end_row) const {
    const int64_t first = visible(a, first_row).first;
    return {first, std::max(first, visible(a, end_row - 1).end)};
  }

  // The keys that all of them see; its end may be before its beginning.
  Span visible_to_all(const Attention& a, int64_t first_row, int64_t end_row) const {
    return {visible(a, end_row - 1).first, visible(a, first_row).end};
  }
};

// What rows carry from block to block.
struct RowStates {
  float* max;      // of the exponents, or what stands for it; -inf until a key was seen
  float* sum;      // of the weights, relative to 2^max
  uint8_t* flags;  // of the keys seen, and its own: see RowFlag

  RowStates from(int64_t row) const { return {max + row, sum + row, flags + row}; }
};

// Rows of a unit and what they have to do with one packed block of keys.
template <class Element>
struct Strip {
  int64_t first_row, end_row;
  const Element* queries;  // of these rows, packed
  const Element* keys;     // of the block, packed
  const Element* values;
  const uint8_t* flags;    // of its keys, or null if there are none
  int64_t first_key;       // of the block, in the sequence
  int begin, end;          // the block's keys that any of the rows sees, in whole steps
  RowStates states;        // of these rows
  float* out;              // their sums

  int64_t rows() const { return end_row - first_row; }
};

}  // namespace tilewise
