// Uninitialised memory for one call or task, aligned to cache lines (and to AMX tile rows).
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace tilewise {

constexpr std::size_t ALIGNMENT = 64;

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{ALIGNMENT}); }
};

template <class T>
using Workspace = std::unique_ptr<T[], AlignedDelete>;

template <class T>
inline Workspace<T> make_workspace(int64_t count) {
  const std::size_t bytes = static_cast<std::size_t>(count > 0 ? count : 1) * sizeof(T);
  return Workspace<T>(static_cast<T*>(::operator new(bytes, std::align_val_t{ALIGNMENT})));
}

}  // namespace tilewise
