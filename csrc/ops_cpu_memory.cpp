#include "ops_cpu_memory.h"

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>

namespace tilewise {

using Memory = std::shared_ptr<RecordingMemory>;

Tensor RecordingMemory::empty(const std::vector<int64_t>& size, const std::vector<int64_t>& stride,
                              int32_t dtype_code) {
  int64_t elements = 1;
  for (std::size_t i = 0; i < size.size(); ++i) {
    elements = size[i] ? elements + (size[i] - 1) * stride[i] : elements;
  }
  char* const data = take(elements * aoti_torch_dtype_element_size(dtype_code));
  auto memory = std::make_unique<Memory>(shared_from_this());
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      data, static_cast<int64_t>(size.size()), size.data(), stride.data(), 0, dtype_code,
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0, &give_back,
      memory.get()));
  static_cast<void>(memory.release());  // the tensor's own now, until it gives back the memory
  return Tensor(handle);
}

bool RecordingMemory::holds(const void* p) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::any_of(blocks_.begin(), blocks_.end(), [p](const Block& block) {
    const char* const data = block.data.get();
    return data <= p && p < data + block.bytes;
  });
}

// The smallest free block that is large enough.
char* RecordingMemory::take(int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Block* best = nullptr;
  for (Block& block : blocks_) {
    if (!block.is_free || block.bytes < bytes || (best && best->bytes <= block.bytes)) continue;
    best = &block;
  }
  if (!best) {
    blocks_.push_back({make_workspace<char>(bytes), bytes, true});
    best = &blocks_.back();
  }
  best->is_free = false;
  return best->data.get();
}

// Called with a tensor's memory when nobody holds it any longer.
void RecordingMemory::give_back(void* data, void* memory) {
  const std::unique_ptr<Memory> owned(static_cast<Memory*>(memory));
  const std::lock_guard<std::mutex> lock((*owned)->mutex_);
  for (Block& block : (*owned)->blocks_) block.is_free |= block.data.get() == data;
}

}  // namespace tilewise
