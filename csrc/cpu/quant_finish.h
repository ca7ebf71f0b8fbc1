// What follows the product with a quantized weight: adapter, bias, activation, residual, one rounding.
#pragma once

#include "cpu/activation_functions.h"
#include "cpu/quant.h"
#include "cpu/rows.h"

namespace tilewise {

// `low` is x A, (rows, rank), or null.
class Finisher {
 public:
  Finisher(const QuantizedMatmul& call, const float* low) : call_(call), low_(low) {
    switch (call.dtype) {
      case DType::f32: finish_ = finish_as<float>(call.finish); break;
      case DType::f16: finish_ = finish_as<Half>(call.finish); break;
      default: finish_ = finish_as<BFloat16>(call.finish); break;
    }
  }

  bool is_gated() const { return call_.finish == tilewise::Finish::swiglu; }
  int64_t outputs() const { return is_gated() ? call_.weight.rows / 2 : call_.weight.rows; }

  // Outputs [first, first + count) of a row from the weight's products y and, of a gated weight, `up`,
  // those of its second half. Both are written to.
  void operator()(int64_t row, int64_t first, int count, float* y, float* up) const {
    (this->*finish_)(row, first, count, y, up);
  }

 private:
  using Finish = tilewise::Finish;
  using Function = void (Finisher::*)(int64_t, int64_t, int, float*, float*) const;

  template <class T>
  static Function finish_as(Finish finish) {
    switch (finish) {
      case Finish::none: return &Finisher::finish<T, Finish::none>;
      case Finish::gelu: return &Finisher::finish<T, Finish::gelu>;
      case Finish::gelu_tanh: return &Finisher::finish<T, Finish::gelu_tanh>;
      case Finish::silu: return &Finisher::finish<T, Finish::silu>;
      default: return &Finisher::finish<T, Finish::swiglu>;
    }
  }

  template <class T, Finish KIND>
  static F32 activated(F32 v) {
    if constexpr (KIND == Finish::none) return v;
    if constexpr (KIND == Finish::gelu) return GeluErf::value<T>(v);
    if constexpr (KIND == Finish::gelu_tanh) return GeluTanh::value<T>(v);
    return Silu::value<T>(v);
  }

  template <class T>
  void complete(int64_t row, int64_t column, int count, float* y) const {
    const int64_t n = call_.weight.rows;
    for_vectors(count, [&](int64_t i, auto part, int) {
      F32 sum = part.load(y + i);
      for (int64_t j = 0; j < (low_ ? call_.rank : 0); ++j) {
        const T* b = static_cast<const T*>(call_.adapter_b) + j * n + column;
        sum = fma(F32::all(low_[row * call_.rank + j]), part.load(b + i), sum);
      }
      if (call_.bias) sum = sum + part.load(static_cast<const T*>(call_.bias) + column + i);
      part.store(y + i, sum);
    });
  }

  template <class T, Finish KIND>
  void finish(int64_t row, int64_t first, int count, float* y, float* up) const {
    if (low_ || call_.bias) {
      complete<T>(row, first, count, y);
      if (is_gated()) complete<T>(row, first + outputs(), count, up);
    }
    const int64_t at = row * outputs() + first;
    const T* residual = static_cast<const T*>(call_.residual);
    T* out = static_cast<T*>(call_.out) + at;
    for_vectors(count, [&](int64_t i, auto part, int) {
      F32 v = activated<T, KIND>(part.load(y + i));
      if constexpr (KIND == Finish::swiglu) v = v * part.load(up + i);
      if (residual) v = v + part.load(residual + at + i);
      part.store(out + i, v);
    });
  }

  const QuantizedMatmul& call_;
  const float* low_;
  Function finish_;
};

}  // namespace tilewise
