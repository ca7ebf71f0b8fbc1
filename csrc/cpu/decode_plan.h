// What decode attention has to do: which splits of which requests, and which of them are the same.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/attention.h"

namespace tilewise {

constexpr int64_t DECODE_SPLIT = 512;  // keys
constexpr int64_t MAX_WORK_ROWS = 64;  // their queries, sums and scores stay in the second-level cache

struct Request {
  Sequence sequence;
  int64_t rows;  // of each key head: queries times heads of a group
  int64_t first_split, splits;
  int64_t partials;  // number of partial results, per key head, of the requests before
  int32_t tasks;     // per key head
};

// One query of one head in a task.
struct DecodeRow {
  const Request* request;
  int64_t query, head;  // within the sequence, within the call
  Span span;
};

// One split for some rows of one or more requests, whose keys in it are the same.
struct Work {
  int64_t split;
  int64_t first_request, requests;  // members[first_request ...]
  int64_t first_row, rows;          // of all the members' rows, one request after the other
};

struct DecodePlan {
  DecodePlan(const Attention& a, const Sequence* sequences, int64_t count);

  bool have_same_rows(const Work& a, const Work& b) const {
    const auto first = members.begin() + a.first_request;
    return a.first_row == b.first_row && a.rows == b.rows && a.requests == b.requests &&
           std::equal(first, first + a.requests, members.begin() + b.first_request);
  }

  std::vector<Request> requests;
  std::vector<int32_t> members;  // indices of requests
  std::vector<Work> works;
  int64_t partials;  // of all requests, per key head

 private:
  void add_split(const Attention& a, int64_t split, std::vector<int32_t>& candidates);
  void add_work(int64_t split, int64_t first_request);
};

}  // namespace tilewise
