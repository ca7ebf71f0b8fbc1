// The threads that kernels run on, and recordings of calls.
//
// A call by itself borrows PyTorch's threads, which costs some microseconds each time. A replay
// borrows them once, for all of its calls: between two pieces of work they wait in a loop, which they
// leave within a hundred nanoseconds. Meanwhile they fetch what they will need: one row's product
// with a weight takes as long as it takes to read the weight, a replay knows which one comes next, and
// in a third of the time memory would else have nothing to do, since small kernels run on one thread.
#include "ops_cpu_graph.h"

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "ops_cpu_memory.h"

namespace tilewise {
namespace {

// Tasks [first, last) of a thread: it takes them from the front, and others who have none left from
// the back. Both in one word, so that nobody sees one of them alone.
class alignas(64) Share {
 public:
  void set(int64_t first, int64_t last) { range_ = first | last << 32; }

  bool take(bool is_first, int64_t* task) {
    for (int64_t range = range_;;) {
      int64_t first = range & 0xffffffff, last = range >> 32;
      if (first >= last) return false;
      *task = is_first ? first++ : --last;
      if (range_.compare_exchange_weak(range, first | last << 32)) return true;
    }
  }

 private:
  std::atomic<int64_t> range_{0};
};

// Tasks that threads do together: in shares of neighbouring tasks, or in order.
class Work {
 public:
  explicit Work(int64_t threads) : shares_(threads) {}

  void set(int64_t tasks, void (*body)(int64_t, void*), void* context, bool in_order) {
    body_ = body;
    context_ = context;
    tasks_ = tasks;
    in_order_ = in_order;
    next_ = 0;
    const int64_t threads = static_cast<int64_t>(shares_.size());
    for (int64_t t = 0; t < threads && !in_order; ++t) {
      shares_[t].set(tasks * t / threads, tasks * (t + 1) / threads);
    }
  }

  void run(int64_t thread) {
    if (in_order_) {
      for (int64_t i = next_++; i < tasks_; i = next_++) body_(i, context_);
      return;
    }
    const int64_t threads = static_cast<int64_t>(shares_.size());
    int64_t task;
    for (int64_t t = 0; t < threads; ++t) {
      Share& share = shares_[(thread + t) % threads];
      while (share.take(t == 0, &task)) body_(task, context_);
    }
  }

 private:
  void (*body_)(int64_t, void*) = nullptr;
  void* context_ = nullptr;
  int64_t tasks_ = 0;
  bool in_order_ = false;
  alignas(64) std::atomic<int64_t> next_{0};
  std::vector<Share> shares_;
};

// What a thread's share of a weight will be, fetched a little at a time into the second-level cache.
class Fetch {
 public:
  void fetch(const Upcoming* what, int64_t thread, int64_t threads) {
    if (what != what_) what_ = what, done_ = 0;
    if (!what || done_ >= MOST / what->parts) return;
    const int64_t part = what->bytes / what->parts;
    const int64_t first = part * thread / threads, last = part * (thread + 1) / threads;
    const int64_t end = std::min(first + done_ + EACH, last);
    for (int64_t p = 0; p < what->parts; ++p) {
      for (int64_t at = first + done_; at < end; at += 64) {
        _mm_prefetch(what->data + p * part + at, _MM_HINT_T1);
      }
    }
    done_ += EACH;
  }

 private:
  static constexpr int64_t EACH = 1024;
  static constexpr int64_t MOST = 512 << 10;  // half of a cache of 1 MB

  const Upcoming* what_ = nullptr;
  int64_t done_ = 0;
};

// Threads that work on one set of tasks after another. One of them leads: it hands out the tasks, and
// does its share. Others come when they can, and none is waited for that has not begun.
class Team {
 public:
  explicit Team(int64_t threads) : threads_(threads), work_(threads) {}

  void run(int64_t tasks, void (*body)(int64_t, void*), void* context, bool in_order) {
    work_.set(tasks, body, context, in_order);
    is_open_ = true;
    work_.run(0);
    is_open_ = false;
    // Who came in before the door closed may be working still.
    while (inside_ != 0) _mm_pause();
  }

  void help(int64_t thread) {
    Fetch fetch;
    while (!is_over_) {
      if (is_open_) {
        ++inside_;
        if (is_open_) work_.run(thread);
        --inside_;
      }
      fetch.fetch(upcoming_, thread, threads_);
      _mm_pause();
    }
  }

  // The leader's own share, a little of it; helpers fetch theirs whenever they wait.
  void expect(const Upcoming* what, bool is_idle) {
    upcoming_ = what;
    if (is_idle) fetch_.fetch(what, 0, threads_);
  }

  void end() { is_over_ = true; }

 private:
  const int64_t threads_;
  Work work_;
  Fetch fetch_;
  alignas(64) std::atomic<int> inside_{0};
  alignas(64) std::atomic<bool> is_open_{false};
  std::atomic<bool> is_over_{false};
  std::atomic<const Upcoming*> upcoming_{nullptr};
};

thread_local Team* led_team = nullptr;

void run(int64_t tasks, void (*body)(int64_t, void*), void* context, bool in_order) {
  if (led_team) return led_team->run(tasks, body, context, in_order);
  // Each thread takes the next task that nobody has: tasks may be of very different length.
  const int64_t threads = std::min(tasks, thread_count());
  Work work(threads);
  work.set(tasks, body, context, in_order);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) { work.run(begin); });
}

}  // namespace

int64_t thread_count() { return torch::stable::get_num_threads(); }

void run_tasks(int64_t tasks, void (*body)(int64_t, void*), void* context) {
  run(tasks, body, context, true);
}

void run_shares(int64_t tasks, void (*body)(int64_t, void*), void* context) {
  run(tasks, body, context, false);
}

// --- recordings ----------------------------------------------------------------------------------

namespace {

struct Call {
  std::function<void(const RowCount&)> run;
  Upcoming reads;
};

struct Recording {
  int64_t rows;  // of its tensors, of which a replay may want fewer; 0 where it may not
  std::vector<Call> calls;
  const std::shared_ptr<RecordingMemory> memory = std::make_shared<RecordingMemory>();
};

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

void begin_recording(int64_t rows) {
  STD_TORCH_CHECK(!recording, "this thread is recording already");
  recording = std::make_unique<Recording>();
  recording->rows = rows;
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

// All calls once; `again` if they will be run again at once.
void run_calls(const std::vector<Call>& calls, const RowCount& rows, Team& team, bool again) {
  const auto next_weight = [end = calls.end()](std::vector<Call>::const_iterator from) {
    return std::find_if(from, end, [](const Call& call) { return call.reads.bytes != 0; });
  };
  for (auto call = calls.begin(); call != calls.end(); ++call) {
    auto next = next_weight(call + 1);
    if (next == calls.end() && again) next = next_weight(calls.begin());
    team.expect(next == calls.end() ? nullptr : &next->reads, !call->reads.bytes);
    call->run(rows);
  }
}

// `rows` may be less than was recorded if the recording says how many that was.
void replay(int64_t number, int64_t times, int64_t rows) {
  STD_TORCH_CHECK(!recording && !led_team, "a replay can be neither recorded nor part of another");
  const auto replayed = find_recording(number);
  STD_TORCH_CHECK(replayed->rows ? 1 <= rows && rows <= replayed->rows : rows == 0,
                  "rows: from 1 to what was recorded");
  const RowCount count{replayed->rows, rows};
  Team team(thread_count());
  // An error must not cross the threads: it is thrown again where Python waits for it.
  std::exception_ptr error;
  torch::stable::parallel_for(0, thread_count(), 1, [&](int64_t begin, int64_t) {
    if (begin != 0) return team.help(begin);
    led_team = &team;
    try {
      for (int64_t i = 0; i < times; ++i) run_calls(replayed->calls, count, team, i + 1 < times);
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

void record(std::function<void(const RowCount&)> call, const Upcoming& reads) {
  recording->calls.push_back({std::move(call), reads});
}

OptionalTensor kept(const OptionalTensor& tensor) {
  return tensor && recording->memory->holds(tensor->data_ptr()) ? std::nullopt : tensor;
}

Tensor empty(const std::vector<int64_t>& size, int32_t dtype_code) {
  std::vector<int64_t> stride(size.size());
  int64_t elements = 1;
  for (std::size_t i = size.size(); i-- > 0; elements *= std::max<int64_t>(size[i], 1)) {
    stride[i] = elements;
  }
  if (recording) return recording->memory->empty(size, stride, dtype_code);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(),
                                                  stride.data(), dtype_code,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

namespace {

// Like a tensor that Python would have allocated, in the recording's memory.
Tensor recorded_empty_like(Tensor like) {
  STD_TORCH_CHECK(recording != nullptr, "this thread is not recording");
  std::vector<int64_t> stride(like.dim());
  for (std::size_t i = 0; i < stride.size(); ++i) stride[i] = like.stride(i);
  return recording->memory->empty(size_of(like), stride, dtype_code(like));
}

// --- rows by number, which PyTorch computes outside of recordings ---------------------------------

struct TakenRows {
  bool wraps;  // numbers below 0 count from the end
  const char* x;
  int64_t x_rows, x_stride, row_bytes;
  const int64_t* numbers;
  int64_t count;
  char* out;
};

void take_rows(const TakenRows& taken) {
  for (int64_t i = 0; i < taken.count; ++i) {
    const int64_t number = taken.numbers[i];
    const int64_t row = taken.wraps && number < 0 ? number + taken.x_rows : number;
    STD_TORCH_CHECK(0 <= row && row < taken.x_rows, "index: out of range");
    std::memcpy(taken.out + i * taken.row_bytes, taken.x + row * taken.x_stride, taken.row_bytes);
  }
}

// x[numbers]: x is (rows, ...), contiguous but for a stride between its rows; numbers (count,) is
// contiguous.
Tensor take_rows_op(Tensor x, Tensor numbers, bool wraps) {
  std::vector<int64_t> size = size_of(x);
  const int64_t rows = size[0], elements = rows ? x.numel() / rows : 0;
  size[0] = numbers.size(0);
  const Tensor out = empty(size, dtype_code(x));
  TakenRows taken{};
  taken.wraps = wraps;
  taken.x = static_cast<const char*>(x.data_ptr());
  taken.x_rows = rows;
  taken.x_stride = x.stride(0) * x.element_size();
  taken.row_bytes = elements * x.element_size();
  taken.numbers = static_cast<const int64_t*>(numbers.data_ptr());
  taken.count = size[0];
  taken.out = static_cast<char*>(out.data_ptr());
  run_kernel<&take_rows, &TakenRows::count>(taken, {}, x, numbers, out);
  return out;
}

}  // namespace

}  // namespace tilewise

STABLE_TORCH_LIBRARY_FRAGMENT(TILEWISE_NAMESPACE, m) {
  m.def("begin_recording(int rows) -> ()");
  m.def("end_recording(bool is_wanted) -> int");
  m.def("forget_recording(int number) -> ()");
  m.def("replay(int number, int times, int rows) -> ()");
  m.def("recorded_empty_like(Tensor like) -> Tensor");
  m.def("take_rows(Tensor x, Tensor numbers, bool wraps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(TILEWISE_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("begin_recording", TORCH_BOX(&tilewise::begin_recording));
  m.impl("end_recording", TORCH_BOX(&tilewise::end_recording));
  m.impl("forget_recording", TORCH_BOX(&tilewise::forget_recording));
  m.impl("replay", TORCH_BOX(&tilewise::replay));
  m.impl("recorded_empty_like", TORCH_BOX(&tilewise::recorded_empty_like));
  m.impl("take_rows", TORCH_BOX(&tilewise::take_rows_op));
}
