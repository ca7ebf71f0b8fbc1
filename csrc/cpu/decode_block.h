// Where the rows of a block of keys are.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <iterator>

#include "cpu/attention.h"

namespace tilewise {

constexpr int64_t BLOCK = 128;  // keys between two updates of the maxima
constexpr int64_t STEP = 16;    // keys that the loops take together, or less

struct Block {
  // Of the task's first head. The last one repeats: what is taken goes a STEP beyond, and what is
  // fetched as far beyond as what is taken meanwhile is long.
  const void* k[2 * BLOCK + STEP];
  const void* v[2 * BLOCK + STEP];
  const float *k_scale[BLOCK], *v_scale[BLOCK];  // the same
  bool is_missing[BLOCK];  // valid if any_missing: keys in pages that do not exist
  bool any_missing;
  int64_t begin, count;  // keys [begin, begin + count) of the sequence
  int64_t first;         // nobody sees a key before, counted from `begin`; a multiple of STEP

  float k_scale_of(const Attention& a, int64_t j, int64_t head) const {
    return a.k.scale ? k_scale[j][head * a.k.scale_head_stride] : 1.0f;
  }
  float v_scale_of(const Attention& a, int64_t j, int64_t head) const {
    return a.v.scale ? v_scale[j][head * a.v.scale_head_stride] : 1.0f;
  }
};

// Fills in the block that key `first` is in, as far as `end`, for heads from `kv_head` on.
inline void locate(const Attention& a, const Sequence& s, int64_t kv_head, int64_t first,
                   int64_t end, Block& block) {
  block.begin = first / BLOCK * BLOCK;
  block.first = (first - block.begin) / STEP * STEP;
  block.count = std::min(end - block.begin, BLOCK);
  block.any_missing = false;
  const int64_t element = element_size(a.kv_dtype);
  const auto *k = static_cast<const char*>(a.k.data), *v = static_cast<const char*>(a.v.data);
  const int64_t k_step = a.k.seq_stride * element, v_step = a.v.seq_stride * element;
  int64_t j = block.first;
  const auto place = [&](int64_t run_end, const char* k_at, const char* v_at) {
    for (; j < run_end; ++j, k_at += k_step, v_at += v_step) {
      block.k[j] = k_at;
      block.v[j] = v_at;
    }
  };
  if (!a.block_table) {
    const int64_t key = block.begin + j;
    place(block.count, k + row_offset(a, a.k, s, key, kv_head) * element,
          v + row_offset(a, a.v, s, key, kv_head) * element);
  } else {
    const int32_t* page = a.block_table + s.index * a.block_table_stride;
    page += (block.begin + j) / a.page_size;
    int64_t slot = (block.begin + j) % a.page_size;
    for (; j < block.count; ++page, slot = 0) {
      const int64_t begin = j, run_end = std::min(block.count, j + a.page_size - slot);
      if (*page < 0 || *page >= a.num_pages) {
        if (!block.any_missing) std::fill_n(block.is_missing, BLOCK, false);
        block.any_missing = true;
        for (; j < run_end; ++j) {
          block.k[j] = k;  // read and masked, as anything that nobody sees
          block.v[j] = v;
          block.k_scale[j] = a.k.scale;
          block.v_scale[j] = a.v.scale;
          block.is_missing[j] = true;
        }
        continue;
      }
      const auto at = [&](const KeyValues& t) {
        return *page * t.batch_stride + slot * t.seq_stride + kv_head * t.head_stride;
      };
      place(run_end, k + at(a.k) * element, v + at(a.v) * element);
      if (!a.k.scale) continue;
      const auto scales = [&](const KeyValues& t) {
        return t.scale + *page * t.scale_page_stride + slot * t.scale_slot_stride +
               kv_head * t.scale_head_stride;
      };
      const float *k_scale = scales(a.k), *v_scale = scales(a.v);
      for (int64_t i = begin; i < run_end; ++i) {
        block.k_scale[i] = k_scale + (i - begin) * a.k.scale_slot_stride;
        block.v_scale[i] = v_scale + (i - begin) * a.v.scale_slot_stride;
        // A block is located before the one in front of it is computed.
        _mm_prefetch(reinterpret_cast<const char*>(block.k_scale[i]), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(block.v_scale[i]), _MM_HINT_T1);
      }
    }
  }
  std::fill(block.k + block.count, std::end(block.k), block.k[block.count - 1]);
  std::fill(block.v + block.count, std::end(block.v), block.v[block.count - 1]);
}

}  // namespace tilewise
