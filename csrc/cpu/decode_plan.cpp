// Finds the splits that requests have in common: those of equal number whose pages are the same.
#include "cpu/decode_plan.h"

#include <cstring>

namespace tilewise {
namespace {

// The entries of the block table that a split's keys are in.
struct Pages {
  const int32_t* first;
  int64_t count;
};

Pages pages_of(const Attention& a, const Sequence& s, int64_t split) {
  const int64_t first = split * DECODE_SPLIT / a.page_size;
  const int64_t last = ((split + 1) * DECODE_SPLIT - 1) / a.page_size;
  return {a.block_table + s.index * a.block_table_stride + first, last - first + 1};
}

}  // namespace

DecodePlan::DecodePlan(const Attention& a, const Sequence* sequences, int64_t count)
    : partials(0) {
  requests.reserve(count);
  int64_t first_split = INT64_MAX, end_split = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Sequence& s = sequences[i];
    int64_t first = INT64_MAX, end = 0;
    for (int64_t q = 0; q < s.q_len; ++q) {
      const Span span = visible_keys(a, s, q);
      if (span.first == span.end) continue;
      first = std::min(first, span.first);
      end = std::max(end, span.end);
    }
    Request r{s, s.q_len * group_size(a), 0, 0, partials, 0};
    if (first < end) {
      r.first_split = first / DECODE_SPLIT;
      r.splits = (end + DECODE_SPLIT - 1) / DECODE_SPLIT - r.first_split;
      first_split = std::min(first_split, r.first_split);
      end_split = std::max(end_split, r.first_split + r.splits);
    }
    partials += r.splits * r.rows;
    requests.push_back(r);
  }
  std::vector<int32_t> candidates;
  for (int64_t split = first_split; split < end_split; ++split) {
    for (int32_t i = 0; i < count; ++i) {
      const Request& r = requests[i];
      if (split < r.first_split || split >= r.first_split + r.splits) continue;
      if (a.block_table && r.sequence.k_len >= (split + 1) * DECODE_SPLIT) {
        candidates.push_back(i);
      } else {
        members.push_back(i);
        add_work(split, members.size() - 1);
      }
    }
    if (!candidates.empty()) add_split(a, split, candidates);
    candidates.clear();
  }
}

// Groups the candidates, all of whose keys in this split exist, by their pages.
void DecodePlan::add_split(const Attention& a, int64_t split, std::vector<int32_t>& candidates) {
  const auto pages = [&](int32_t i) { return pages_of(a, requests[i].sequence, split); };
  std::stable_sort(candidates.begin(), candidates.end(), [&](int32_t x, int32_t y) {
    const Pages p = pages(x), q = pages(y);
    return std::lexicographical_compare(p.first, p.first + p.count, q.first, q.first + q.count);
  });
  for (size_t i = 0; i < candidates.size();) {
    const Pages leader = pages(candidates[i]);
    const int64_t first_request = members.size();
    do {
      members.push_back(candidates[i++]);
    } while (i < candidates.size() &&
             std::memcmp(leader.first, pages(candidates[i]).first, leader.count * 4) == 0);
    add_work(split, first_request);
  }
}

// The members from `first_request` on, cut into pieces of at most MAX_WORK_ROWS rows.
void DecodePlan::add_work(int64_t split, int64_t first_request) {
  const int64_t end = members.size();
  int64_t rows = 0;
  for (int64_t m = first_request; m < end; ++m) rows += requests[members[m]].rows;
  int64_t first_row = 0, first_member_row = 0, m = first_request;
  while (first_row < rows) {
    // A piece names just the members that it has rows of.
    while (first_member_row + requests[members[m]].rows <= first_row) {
      first_member_row += requests[members[m++]].rows;
    }
    const int64_t last_row = std::min(rows, first_row + MAX_WORK_ROWS);
    int64_t member_end = m, row = first_member_row;
    for (; row < last_row; ++member_end) {
      ++requests[members[member_end]].tasks;
      row += requests[members[member_end]].rows;
    }
    works.push_back({split, m, member_end - m, first_row - first_member_row, last_row - first_row});
    first_row = last_row;
  }
}

}  // namespace tilewise
