// Recording: while a thread records, every operator that it calls is written down, with its arguments,
// and not run. Arguments hold on to their tensors, so a recording that is replayed reads and writes the
// same memory each time: who wants other results writes other inputs there first.
#pragma once

#include <cstdint>
#include <functional>
#include <tuple>

namespace tilewise {

// What a call will read from end to end and once: `parts` equally long pieces, of which each thread
// takes the same share, in order.
struct Upcoming {
  const char* data = nullptr;
  int64_t bytes = 0, parts = 1;
};

// Adds a call to the recording of this thread; is_recording() first.
bool is_recording();
void record(std::function<void()> call, const Upcoming& reads = {});

template <auto OPERATOR>
struct Recorded;

// The operator itself, to be registered in its place.
template <class... Arguments, void (*OPERATOR)(Arguments...)>
struct Recorded<OPERATOR> {
  static void call(Arguments... arguments) {
    if (is_recording()) return record([=] { OPERATOR(arguments...); });
    OPERATOR(arguments...);
  }
};

// Runs a kernel on what describes its call, or records that. A recording keeps the tensors that the
// description points to, and a replay asks them for nothing.
template <auto KERNEL, class Call, class... Tensors>
void run_kernel(const Call& call, const Upcoming& reads, const Tensors&... tensors) {
  if (is_recording()) {
    const auto run = [call, kept = std::make_tuple(tensors...)] {
      static_cast<void>(kept);
      KERNEL(call);
    };
    return record(run, reads);
  }
  KERNEL(call);
}

}  // namespace tilewise
