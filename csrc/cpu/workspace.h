// Uninitialised memory for one call or task, aligned to cache lines (and to AMX tile rows).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace tilewise {

constexpr std::size_t ALIGNMENT = 64;

struct AlignedDelete {
  void operator()(void* p) const { std::free(static_cast<void**>(p)[-1]); }
};

template <class T>
using Workspace = std::unique_ptr<T[], AlignedDelete>;

// Aligned by hand: the allocator's own way to aligned memory is several times as slow as malloc.
template <class T>
inline Workspace<T> make_workspace(int64_t count) {
  const std::size_t bytes = static_cast<std::size_t>(count > 0 ? count : 1) * sizeof(T);
  char* const all = static_cast<char*>(std::malloc(bytes + ALIGNMENT + sizeof(void*)));
  if (!all) throw std::bad_alloc();
  const auto begin = reinterpret_cast<std::uintptr_t>(all) + sizeof(void*);
  void* const p = all + sizeof(void*) + (ALIGNMENT - begin % ALIGNMENT) % ALIGNMENT;
  static_cast<void**>(p)[-1] = all;
  return Workspace<T>(static_cast<T*>(p));
}

// The same on the stack, where there is ROOM for it: for tasks of a few microseconds, which would spend
// a tenth of them allocating.
template <class T, int64_t ROOM>
class SmallWorkspace {
 public:
  explicit SmallWorkspace(int64_t count) : data_(here_) {
    if (count > ROOM) {
      there_ = make_workspace<T>(count);
      data_ = there_.get();
    }
  }
  SmallWorkspace(const SmallWorkspace&) = delete;
  SmallWorkspace& operator=(const SmallWorkspace&) = delete;

  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  alignas(ALIGNMENT) T here_[ROOM];
  Workspace<T> there_;
  T* data_;
};

}  // namespace tilewise
