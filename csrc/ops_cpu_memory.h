// Memory for the results of recorded calls.
//
// A recording's tensors stay where they are, and side by side they would be the activations of every
// layer. So they lie as they would if the calls were made: once nobody holds a result any longer, a
// later one takes its place.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/workspace.h"
#include "ops_cpu.h"

namespace tilewise {

class RecordingMemory : public std::enable_shared_from_this<RecordingMemory> {
 public:
  // An uninitialised tensor on the CPU. It may outlive the recording.
  Tensor empty(const std::vector<int64_t>& size, const std::vector<int64_t>& stride,
               int32_t dtype_code);

  bool holds(const void* p) const;

 private:
  struct Block {
    Workspace<char> data;
    int64_t bytes;
    bool is_free;
  };

  char* take(int64_t bytes);
  static void give_back(void* data, void* memory);

  mutable std::mutex mutex_;  // the last to hold a tensor may be any thread
  std::vector<Block> blocks_;
};

}  // namespace tilewise
