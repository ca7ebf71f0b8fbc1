// The threads that kernels run on, and recordings of calls.
//
// A call by itself borrows PyTorch's threads, which costs some microseconds each time. A replay
// borrows them once, for all of its calls: between two pieces of work they wait in a loop, which they
// leave within a hundred nanoseconds.
#include "ops_cpu_graph.h"

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "ops_cpu.h"

namespace tilewise {
namespace {

// Threads that work on one set of tasks after another. One of them leads: it hands out the tasks, and
// does its share. Others come when they can, and none is waited for that has not begun.
class Team {
 public:
  void run(int64_t tasks, void (*body)(int64_t, void*), void* context) {
    body_ = body;
    context_ = context;
    tasks_ = tasks;
    next_ = 0;
    is_open_ = true;
    work();
    is_open_ = false;
    // Who came in before the door closed may be working still.
    while (inside_ != 0) _mm_pause();
  }

  void help() {
    while (!is_over_) {
      if (is_open_) {
        ++inside_;
        if (is_open_) work();
        --inside_;
      }
      _mm_pause();
    }
  }

  void end() { is_over_ = true; }

 private:
  void work() {
    for (int64_t i = next_++; i < tasks_; i = next_++) body_(i, context_);
  }

  void (*body_)(int64_t, void*) = nullptr;
  void* context_ = nullptr;
  int64_t tasks_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> inside_{0};
  alignas(64) std::atomic<bool> is_open_{false};
  std::atomic<bool> is_over_{false};
};

thread_local Team* led_team = nullptr;

}  // namespace

int64_t thread_count() { return torch::stable::get_num_threads(); }

void run_tasks(int64_t tasks, void (*body)(int64_t, void*), void* context) {
  if (led_team) return led_team->run(tasks, body, context);
  // Each thread takes the next task that nobody has: tasks may be of very different length.
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min(tasks, thread_count());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) body(i, context);
  });
}

// --- recordings ----------------------------------------------------------------------------------

namespace {

using Recording = std::vector<std::function<void()>>;

thread_local std::unique_ptr<Recording> recording;

// Python holds recordings by number.
std::mutex recordings_mutex;
std::map<int64_t, std::shared_ptr<Recording>> recordings;
int64_t last_recording = 0;

std::shared_ptr<Recording> find_recording(int64_t number) {
  const std::lock_guard<std::mutex> lock(recordings_mutex);
  const auto found = recordings.find(number);
  STD_TORCH_CHECK(found != recordings.end(), "no such recording");
  return found->second;
}

void begin_recording() {
  STD_TORCH_CHECK(!recording, "this thread is recording already");
  recording = std::make_unique<Recording>();
}

// The number of the recording, which is thrown away if it is not wanted.
int64_t end_recording(bool is_wanted) {
  STD_TORCH_CHECK(recording != nullptr, "this thread is not recording");
  std::shared_ptr<Recording> ended = std::move(recording);
  if (!is_wanted) return 0;
  const std::lock_guard<std::mutex> lock(recordings_mutex);
  recordings[++last_recording] = std::move(ended);
  return last_recording;
}

void forget_recording(int64_t number) {
  const auto forgotten = find_recording(number);  // its tensors are freed outside of the lock
  const std::lock_guard<std::mutex> lock(recordings_mutex);
  recordings.erase(number);
}

void replay(int64_t number) {
  STD_TORCH_CHECK(!recording && !led_team, "a replay can be neither recorded nor part of another");
  const auto calls = find_recording(number);
  Team team;
  // An error must not cross the threads: it is thrown again where Python waits for it.
  std::exception_ptr error;
  torch::stable::parallel_for(0, thread_count(), 1, [&](int64_t begin, int64_t) {
    if (begin != 0) return team.help();
    led_team = &team;
    try {
      for (const auto& call : *calls) call();
    } catch (...) {
      error = std::current_exception();
    }
    led_team = nullptr;
    team.end();
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace

bool is_recording() { return recording != nullptr; }

void record(std::function<void()> call) { recording->push_back(std::move(call)); }

}  // namespace tilewise

STABLE_TORCH_LIBRARY_FRAGMENT(TILEWISE_NAMESPACE, m) {
  m.def("begin_recording() -> ()");
  m.def("end_recording(bool is_wanted) -> int");
  m.def("forget_recording(int number) -> ()");
  m.def("replay(int number) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(TILEWISE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("begin_recording", TORCH_BOX(&tilewise::begin_recording));
  m.impl("end_recording", TORCH_BOX(&tilewise::end_recording));
  m.impl("forget_recording", TORCH_BOX(&tilewise::forget_recording));
  m.impl("replay", TORCH_BOX(&tilewise::replay));
}
