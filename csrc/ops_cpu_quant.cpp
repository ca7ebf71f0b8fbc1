// Bindings of products with quantized weights.
#include "ops_cpu_quant.h"

#include "ops_cpu_graph.h"

namespace tilewise {
namespace {

ScaleType scale_type_of(const OptionalTensor& scales) {
  using torch::headeronly::ScalarType;
  if (!scales || scales->scalar_type() == ScalarType::Half) return ScaleType::f16;
  return scales->scalar_type() == ScalarType::Float ? ScaleType::f32 : ScaleType::e8m0;
}

}  // namespace

QuantizedWeight describe(int64_t format, int64_t rows, int64_t depth, int64_t group_size,
                         const Tensor& data, const OptionalTensor& scales,
                         const OptionalTensor& zeros) {
  STD_TORCH_CHECK(0 <= format && format <= static_cast<int64_t>(Format::q6_k), "no such format");
  const int64_t last = data.dim() - 1;
  QuantizedWeight w{};
  w.format = static_cast<Format>(format);
  w.rows = rows;
  w.depth = depth;
  w.data = static_cast<const uint8_t*>(data.data_ptr());
  w.panel_bytes = data.size(last - 1) * data.size(last);
  w.group_strips = group_size > 0 ? group_size / STRIP : (depth + STRIP - 1) / STRIP;
  w.groups = scales ? scales->size(scales->dim() - 2) : 0;
  w.scale_type = scale_type_of(scales);
  w.scales = pointer(scales);
  w.zeros = pointer<uint8_t>(zeros);
  return w;
}

namespace {

// Of `rows` rows of x, which lie `x_stride` elements apart.
QuantizedMatmul product_of(const Tensor& x, int64_t rows, int64_t x_stride,
                           const QuantizedWeight& weight, const OptionalTensor& bias,
                           int64_t finish, const OptionalTensor& residual, int64_t rounding,
                           int64_t activation_group, const Tensor& out) {
  QuantizedMatmul call{};
  call.dtype = dtype_of(out);
  call.x_dtype = dtype_of(x);
  call.rows = rows;
  call.x = x.data_ptr();
  call.x_stride = x_stride;
  call.weight = weight;
  call.rounding = static_cast<Rounding>(rounding);
  call.activation_group = activation_group > 0 ? activation_group : 0;
  call.bias = pointer(bias);
  call.residual = pointer(residual);
  call.finish = static_cast<Finish>(finish);
  call.out = out.data_ptr();
  return call;
}

// The weight, of which a thread works on the same rows of the gate and of what it multiplies.
Upcoming reads_of(const QuantizedMatmul& call) {
  const QuantizedWeight& weight = call.weight;
  return {reinterpret_cast<const char*>(weight.data),
          (weight.rows + PANEL_ROWS - 1) / PANEL_ROWS * weight.panel_bytes,
          call.finish == Finish::swiglu ? 2 : 1};
}

void quantized_matmul_op(Tensor x, int64_t format, int64_t rows, int64_t depth, int64_t group_size,
                         Tensor data, OptionalTensor scales, OptionalTensor zeros,
                         OptionalTensor bias, int64_t finish, OptionalTensor residual,
                         OptionalTensor adapter_a, OptionalTensor adapter_b,
                         int64_t rounding, int64_t activation_group, Tensor out) {
  STD_TORCH_CHECK(0 <= finish && finish <= static_cast<int64_t>(Finish::swiglu),
                  "no such activation");
  STD_TORCH_CHECK(0 <= rounding && rounding <= static_cast<int64_t>(Rounding::fp8),
                  "no such rounding");
  const QuantizedWeight weight = describe(format, rows, depth, group_size, data, scales, zeros);
  QuantizedMatmul call = product_of(x, x.size(0), x.stride(0), weight, bias, finish, residual,
                                    rounding, activation_group, out);
  call.adapter_a = pointer(adapter_a);
  call.adapter_b = pointer(adapter_b);
  call.rank = adapter_a ? adapter_a->size(1) : 0;
  run_kernel<&quantized_matmul, &QuantizedMatmul::rows>(call, reads_of(call), x, data, scales, zeros,
                                                        bias, residual, adapter_a, adapter_b, out);
}

// The weight has been checked when it was made; it is one matrix.
OptionalTensor plain_quantized_matmul_op(Tensor x, int64_t format, int64_t rows, int64_t depth,
                                         int64_t group_size, Tensor data, OptionalTensor scales,
                                         OptionalTensor zeros, OptionalTensor bias, int64_t finish,
                                         OptionalTensor residual, int64_t rounding,
                                         int64_t activation_group, bool to_float32) {
  const int32_t dtype = dtype_code(x);
  const int32_t out_dtype = to_float32 ? aoti_torch_dtype_float32() : dtype;
  std::vector<int64_t> size = size_of(x);
  const bool is_gated = finish == static_cast<int64_t>(Finish::swiglu);
  if (!is_float_of_kernels(dtype) || size.empty() || size.back() != depth || !x.is_contiguous() ||
      depth < 1 || (is_gated && rows % 2) || (out_dtype != dtype && (bias || residual))) {
    return std::nullopt;
  }
  size.back() = is_gated ? rows / 2 : rows;
  if (bias && (dtype_code(*bias) != dtype || !has_size(*bias, {rows}) || !bias->is_contiguous())) {
    return std::nullopt;
  }
  if (residual && (dtype_code(*residual) != dtype || !has_size(*residual, size) ||
                   !residual->is_contiguous())) {
    return std::nullopt;
  }
  const Tensor out = empty(size, out_dtype);
  const QuantizedWeight weight = describe(format, rows, depth, group_size, data, scales, zeros);
  const QuantizedMatmul call = product_of(x, x.numel() / depth, depth, weight, bias, finish,
                                          residual, rounding, activation_group, out);
  run_kernel<&quantized_matmul, &QuantizedMatmul::rows>(call, reads_of(call), x, data, scales, zeros,
                                                        bias, residual, out);
  return out;
}

void quantized_matmul_backward_op(Tensor grad, int64_t format, int64_t rows, int64_t depth,
                                  int64_t group_size, Tensor data, OptionalTensor scales,
                                  OptionalTensor zeros, Tensor grad_x) {
  const QuantizedWeight w = describe(format, rows, depth, group_size, data, scales, zeros);
  quantized_matmul_backward(w, static_cast<const float*>(grad.data_ptr()), grad.size(0),
                            static_cast<float*>(grad_x.data_ptr()));
}

struct Embedding {
  QuantizedWeight weight;
  const int64_t* ids;
  int64_t count;
  DType dtype;
  void* out;
};

void embed_checked(const Embedding& e) {
  const auto is_row = [&e](int64_t id) { return 0 <= id && id < e.weight.rows; };
  STD_TORCH_CHECK(std::all_of(e.ids, e.ids + e.count, is_row), "token_ids: out of range");
  embed(e.weight, e.ids, e.count, e.dtype, e.out);
}

void embedding_op(Tensor ids, int64_t format, int64_t rows, int64_t depth, int64_t group_size,
                  Tensor data, OptionalTensor scales, OptionalTensor zeros, Tensor out) {
  Embedding e{};
  e.weight = describe(format, rows, depth, group_size, data, scales, zeros);
  e.ids = static_cast<const int64_t*>(ids.data_ptr());
  e.count = ids.numel();
  e.dtype = dtype_of(out);
  e.out = out.data_ptr();
  run_kernel<&embed_checked, &Embedding::count>(e, {}, ids, data, scales, zeros, out);
}

void dequantize_op(int64_t format, int64_t rows, int64_t depth, int64_t group_size, Tensor data,
                   OptionalTensor scales, OptionalTensor zeros, int64_t begin, Tensor out) {
  const QuantizedWeight w = describe(format, rows, depth, group_size, data, scales, zeros);
  const int64_t end = begin + out.size(0);
  STD_TORCH_CHECK(0 <= begin && end <= rows, "rows out of range");
  dequantize_rows(w, begin, end, static_cast<float*>(out.data_ptr()));
}

}  // namespace
}  // namespace tilewise

STABLE_TORCH_LIBRARY_FRAGMENT(TILEWISE_NAMESPACE, m) {
  m.def(
      "quantized_matmul(Tensor x, int format, int rows, int depth, int group_size, Tensor data, "
      "Tensor? scales, Tensor? zeros, Tensor? bias, int finish, Tensor? residual, "
      "Tensor? adapter_a, Tensor? adapter_b, int rounding, int activation_group, Tensor(a!) out) -> ()");
  m.def(
      "plain_quantized_matmul(Tensor x, int format, int rows, int depth, int group_size, "
      "Tensor data, Tensor? scales, Tensor? zeros, Tensor? bias, int finish, Tensor? residual, "
      "int rounding, int activation_group, bool to_float32) -> Tensor?");
  m.def(
      "quantized_matmul_backward(Tensor grad, int format, int rows, int depth, int group_size, "
      "Tensor data, Tensor? scales, Tensor? zeros, Tensor(a!) grad_x) -> ()");
  m.def(
      "embedding(Tensor ids, int format, int rows, int depth, int group_size, Tensor data, "
      "Tensor? scales, Tensor? zeros, Tensor(a!) out) -> ()");
  m.def(
      "dequantize(int format, int rows, int depth, int group_size, Tensor data, Tensor? scales, "
      "Tensor? zeros, int begin, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(TILEWISE_NAMESPACE, CPU, m) {
  using namespace tilewise;
  m.impl("quantized_matmul", TORCH_BOX(&quantized_matmul_op));
  m.impl("plain_quantized_matmul", TORCH_BOX(&plain_quantized_matmul_op));
  m.impl("quantized_matmul_backward", TORCH_BOX(&Recorded<&quantized_matmul_backward_op>::call));
  m.impl("embedding", TORCH_BOX(&embedding_op));
  m.impl("dequantize", TORCH_BOX(&Recorded<&dequantize_op>::call));
}

STABLE_TORCH_LIBRARY_IMPL(TILEWISE_NAMESPACE, Python, m) {
  m.impl("plain_quantized_matmul", TORCH_BOX(&tilewise::plain_quantized_matmul_op));
}
