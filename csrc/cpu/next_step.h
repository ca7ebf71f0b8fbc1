// What a step of decoding leaves to the one after it: each sequence's next token, fed behind the last.
#pragma once

#include "params.h"

namespace tilewise {

struct NextStep {
  int64_t size;           // sequences
  const int64_t* chosen;  // (size,), this step's tokens

  // What a step reads, each (size,).
  int64_t* token_ids;
  int64_t* positions;
  int32_t* cache_seqlens;
  int64_t* slot_mapping;
  const int32_t* block_table;  // (size, max_pages)
  int64_t max_pages, page_size;

  // What choosing reads.
  int64_t* text_lengths;     // (size,)
  int64_t* previous_tokens;  // (size, longest) or null
  int64_t longest;

  // Where the chosen tokens are kept.
  int64_t* history;  // (history_steps, size)
  int64_t history_steps;
  int64_t* steps;  // (1,), how many there are in the history
};

void next_step(const NextStep& next);

}  // namespace tilewise
