// Bindings of the mixture of experts and its router, and of the products that gradients are made of.
#include "cpu/moe.h"
#include "ops_cpu_graph.h"
#include "ops_cpu_quant.h"

namespace tilewise {
namespace {

// Plain weights, (..., rows, depth) contiguous.
QuantizedWeight describe_plain(const Tensor& data) {
  QuantizedWeight w{};
  switch (dtype_of(data)) {
    case DType::f32: w.format = Format::plain_f32; break;
    case DType::f16: w.format = Format::plain_f16; break;
    default: w.format = Format::plain_bf16; break;
  }
  w.rows = data.size(data.dim() - 2);
  w.depth = data.size(data.dim() - 1);
  w.data = static_cast<const uint8_t*>(data.data_ptr());
  w.panel_bytes = PANEL_ROWS * w.depth * element_size(dtype_of(data));
  return w;
}

// A format of -1 stands for plain weights.
void moe_op(Tensor x, Tensor logits, int64_t hidden, int64_t gate_up_format,
            int64_t gate_up_group_size, Tensor gate_up_data, OptionalTensor gate_up_scales,
            OptionalTensor gate_up_zeros, int64_t down_format, int64_t down_group_size,
            Tensor down_data, OptionalTensor down_scales, OptionalTensor down_zeros, int64_t top_k,
            bool normalize, Tensor out) {
  Moe call{};
  call.dtype = dtype_of(x);
  call.tokens = x.size(0);
  call.experts = logits.size(1);
  call.top_k = top_k;
  call.normalize = normalize;
  call.x = x.data_ptr();
  call.x_stride = x.stride(0);
  call.logits_dtype = dtype_of(logits);
  call.logits = logits.data_ptr();
  const int64_t dim = x.size(1);
  call.gate_up = gate_up_format < 0 ? describe_plain(gate_up_data)
                                    : describe(gate_up_format, 2 * hidden, dim, gate_up_group_size,
                                               gate_up_data, gate_up_scales, gate_up_zeros);
  call.down = down_format < 0 ? describe_plain(down_data)
                              : describe(down_format, dim, hidden, down_group_size, down_data,
                                         down_scales, down_zeros);
  call.out = out.data_ptr();
  run_kernel<&moe, &Moe::tokens>(call, {}, x, logits, gate_up_data, gate_up_scales, gate_up_zeros,
                                 down_data, down_scales, down_zeros, out);
}

// out = x weight^T; the weight and out are contiguous.
QuantizedMatmul plain_product(const Tensor& x, const Tensor& weight, const Tensor& out) {
  QuantizedMatmul call{};
  call.dtype = dtype_of(out);
  call.x_dtype = dtype_of(x);
  call.rows = x.size(0);
  call.x = x.data_ptr();
  call.x_stride = x.stride(0);
  call.weight = describe_plain(weight);
  call.out = out.data_ptr();
  return call;
}

Upcoming reads_of(const Tensor& weight) {
  return {static_cast<const char*>(weight.data_ptr()),
          weight.numel() * element_size(dtype_of(weight))};
}

// out = x weight^T + bias
void linear_op(Tensor x, Tensor weight, OptionalTensor bias, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1),
                  "x and weight must be (rows, depth)");
  QuantizedMatmul call = plain_product(x, weight, out);
  call.bias = pointer(bias);
  run_kernel<&quantized_matmul, &QuantizedMatmul::rows>(call, reads_of(weight), x, weight, bias, out);
}

void router_logits_op(Tensor x, Tensor weight, Tensor out) {
  const QuantizedMatmul call = plain_product(x, weight, out);
  run_kernel<&router_logits, &QuantizedMatmul::rows>(call, reads_of(weight), x, weight, out);
}

}  // namespace
}  // namespace tilewise

STABLE_TORCH_LIBRARY_FRAGMENT(TILEWISE_NAMESPACE, m) {
  m.def(
      "moe(Tensor x, Tensor logits, int hidden, int gate_up_format, int gate_up_group_size, "
      "Tensor gate_up_data, Tensor? gate_up_scales, Tensor? gate_up_zeros, int down_format, "
      "int down_group_size, Tensor down_data, Tensor? down_scales, Tensor? down_zeros, int top_k, "
      "bool normalize, Tensor(a!) out) -> ()");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
  m.def("router_logits(Tensor x, Tensor weight, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(TILEWISE_NAMESPACE, CPU, m) {
  m.impl("moe", TORCH_BOX(&tilewise::moe_op));
  m.impl("linear", TORCH_BOX(&tilewise::linear_op));
  m.impl("router_logits", TORCH_BOX(&tilewise::router_logits_op));
}
