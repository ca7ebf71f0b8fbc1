// Work sharing without PyTorch's headers: tasks are numbered and begun in that order, and any thread
// may take any of them, so a task must not depend on which thread runs it nor on how many there are.
// It may wait for an earlier one: that one has been begun.
#pragma once

#include <cstdint>

#include "params.h"

namespace tilewise {

template <class F, class Run>
inline void parallel_by(Run run, int64_t tasks, const F& body) {
  if (tasks == 1) {
    body(0);
  } else if (tasks > 1) {
    run(
        tasks, [](int64_t i, void* f) { (*static_cast<const F*>(f))(i); },
        const_cast<void*>(static_cast<const void*>(&body)));
  }
}

template <class F>
inline void parallel(int64_t tasks, const F& body) {
  parallel_by(run_tasks, tasks, body);
}

// For tasks of which no one waits for another: a thread's tasks are neighbours then.
template <class F>
inline void parallel_shares(int64_t tasks, const F& body) {
  parallel_by(run_shares, tasks, body);
}

// How many rows a task should have so that it is worth handing to another thread: tasks of about
// 16k elements (a few microseconds), whatever the thread count, so that results never depend on it.
inline int64_t rows_per_task(int64_t row_elements) {
  constexpr int64_t ELEMENTS = 16384;
  return row_elements >= ELEMENTS ? 1 : ELEMENTS / (row_elements > 0 ? row_elements : 1);
}

// body(row) for every row.
template <class F>
inline void parallel_rows(int64_t rows, int64_t row_elements, const F& body) {
  const int64_t each = rows_per_task(row_elements);
  parallel((rows + each - 1) / each, [&](int64_t task) {
    for (int64_t i = task * each; i < rows && i < (task + 1) * each; ++i) body(i);
  });
}

}  // namespace tilewise
