// Recording: while a thread records, every operator that it calls is written down, with its arguments,
// and not run. Arguments hold on to their tensors, so a recording that is replayed reads and writes the
// same memory each time: who wants other results writes other inputs there first.
#pragma once

#include <cstdint>
#include <functional>
#include <tuple>
#include <type_traits>

#include "ops_cpu.h"

namespace tilewise {

// What a call will read from end to end and once: `parts` equally long pieces, of which each thread
// takes the same share, in order.
struct Upcoming {
  const char* data = nullptr;
  int64_t bytes = 0, parts = 1;
};

// How many rows a replay is about, of those that were recorded. A call that is not told computes the
// others, too: that takes longer, but a row of results depends on the same row of x alone, and whoever
// reads others as well (attention) knows by other numbers which there are.
struct RowCount {
  int64_t recorded = 0, wanted = 0;

  // Of a call on `rows` rows: it is about all of them, or about others.
  int64_t of(int64_t rows) const { return rows == recorded ? wanted : rows; }
};

// Adds a call to the recording of this thread; is_recording() first.
bool is_recording();
void record(std::function<void(const RowCount&)> call, const Upcoming& reads = {});

// What a recording has to hold for a tensor that a call uses: the tensor, or nothing if it lies in
// memory of the recording's own.
OptionalTensor kept(const OptionalTensor& tensor);

template <auto OPERATOR>
struct Recorded;

// The operator itself, to be registered in its place.
template <class... Arguments, void (*OPERATOR)(Arguments...)>
struct Recorded<OPERATOR> {
  static void call(Arguments... arguments) {
    if (is_recording()) return record([=](const RowCount&) { OPERATOR(arguments...); });
    OPERATOR(arguments...);
  }
};

// Runs a kernel on what describes its call, or records that. A recording keeps the tensors that the
// description points to, and a replay asks them for nothing. ROWS is the description's member that
// says how many rows there are to compute, where there is one.
template <auto KERNEL, auto ROWS = nullptr, class Call, class... Tensors>
void run_kernel(const Call& call, const Upcoming& reads, const Tensors&... tensors) {
  if (is_recording()) {
    const auto run = [call, all = std::make_tuple(kept(tensors)...)](const RowCount& rows) {
      static_cast<void>(all);
      if constexpr (std::is_member_pointer_v<decltype(ROWS)>) {
        Call shorter = call;
        shorter.*ROWS = rows.of(call.*ROWS);
        KERNEL(shorter);
      } else {
        KERNEL(call);
      }
    };
    return record(run, reads);
  }
  KERNEL(call);
}

}  // namespace tilewise
