// A few integers for each sequence: Python could write them, but would have to be called for it.
#include "cpu/next_step.h"

#include <algorithm>

namespace tilewise {

void next_step(const NextStep& next) {
  if (*next.steps >= 0 && *next.steps < next.history_steps) {
    std::copy_n(next.chosen, next.size, next.history + *next.steps * next.size);
  }
  ++*next.steps;
  for (int64_t i = 0; i < next.size; ++i) {
    next.token_ids[i] = next.chosen[i];
    const int64_t position = ++next.positions[i], page = position / next.page_size;
    ++next.cache_seqlens[i];
    const int64_t in_cache = page >= 0 && page < next.max_pages
                                 ? next.block_table[i * next.max_pages + page]
                                 : -1;
    next.slot_mapping[i] =
        in_cache < 0 ? -1 : in_cache * next.page_size + position % next.page_size;
    const int64_t length = next.text_lengths[i]++;
    if (next.previous_tokens && length >= 0 && length < next.longest) {
      next.previous_tokens[i * next.longest + length] = next.chosen[i];
    }
  }
}

}  // namespace tilewise
