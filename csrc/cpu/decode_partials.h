// What the splits of decode attention leave for each row, and how they become its result.
#pragma once

#include <cmath>
#include <memory>

#include "cpu/decode_buffers.h"
#include "cpu/decode_plan.h"

namespace tilewise {

class DecodePartials {
 public:
  DecodePartials(const Attention& a, const DecodeSizes& sizes, float* memory)
      : a_(a), runs_(sizes.runs), size_(sizes.v_size), memory_(memory) {}

  static int64_t size(const Attention& a, const DecodePlan& plan, const DecodeSizes& sizes) {
    return plan.partials * a.kv_heads * (sizes.v_size + 2);
  }

  // v_size output sums, then the maximum and the sum of the weights.
  float* at(const Request& r, int64_t kv_head, int64_t split, int64_t row) const {
    const int64_t place = (kv_head * r.splits + split - r.first_split) * r.rows + row;
    return memory_ + (r.partials * a_.kv_heads + place) * (size_ + 2);
  }

  // The splits of one head's rows, in order, and the sink; then out and lse.
  void merge(const Request& request, int64_t kv_head) const {
    const auto buffer = std::make_unique<float[]>(size_);
    for (int64_t row = 0; row < request.rows; ++row) {
      const int64_t query = row / group_size(a_);
      const int64_t head = kv_head * group_size(a_) + row % group_size(a_);
      const int64_t splits_end = request.first_split + request.splits;
      const float sink = a_.sinks ? a_.sinks[head] : -INFINITY;
      float maximum = sink;
      for (int64_t i = request.first_split; i < splits_end; ++i) {
        maximum = std::max(maximum, at(request, kv_head, i, row)[size_]);
      }
      const float shift = maximum == -INFINITY ? 0.0f : maximum;
      float sum = std::exp(sink - shift);
      bool sees_nothing = true;
      std::fill(buffer.get(), buffer.get() + size_, 0.0f);
      for (int64_t i = request.first_split; i < splits_end; ++i) {
        const float* p = at(request, kv_head, i, row);
        if (p[size_] == -INFINITY && p[size_ + 1] == 0.0f) continue;
        sees_nothing = false;
        const float weight = std::exp(p[size_] - shift);
        sum += weight * p[size_ + 1];
        for (int64_t d = 0; d < size_; d += F32::WIDTH) {
          store(&buffer[d], fma(F32::all(weight), load(p + d), load(&buffer[d])));
        }
      }
      const F32 factor = F32::all(sees_nothing ? 0.0f : 1.0f / sum);
      for (int64_t d = 0; d < size_; d += F32::WIDTH) store(&buffer[d], load(&buffer[d]) * factor);
      write(request.sequence, query, head, buffer.get());
      a_.lse[lse_offset(a_, request.sequence, query, head)] = shift + std::log(sum);
    }
  }

 private:
  void write(const Sequence& s, int64_t query, int64_t head, const float* row) const {
    const int64_t at = offset(a_, a_.out, s, query, head);
    switch (a_.dtype) {
      case DType::f32: return write_runs(static_cast<float*>(a_.out.data) + at, row);
      case DType::f16: return write_runs(static_cast<Half*>(a_.out.data) + at, row);
      default: return write_runs(static_cast<BFloat16*>(a_.out.data) + at, row);
    }
  }

  template <class T>
  void write_runs(T* out, const float* row) const {
    constexpr int W = F32::WIDTH;
    const int64_t n = a_.v_dim / runs_;
    for (int64_t run = 0; run < runs_; ++run, out += n, row += size_ / runs_) {
      int64_t i = 0;
      for (; i + W <= n; i += W) store(out + i, load(row + i));
      if (i < n) store_partial(out + i, load(row + i), static_cast<int>(n - i));
    }
  }

  const Attention& a_;
  const int64_t runs_, size_;
  float* const memory_;  // of (request, kv head, split, row)
};

}  // namespace tilewise
