// Bindings of the fused small operations.
//
// Tensors of rows may have any number of dimensions: they are contiguous, or (rows, dim) with a
// stride between the rows. What a norm reads may also be (tokens, heads, dim) with any two strides.
#include <algorithm>
#include <tuple>

#include "cpu/activation.h"
#include "cpu/norm.h"
#include "cpu/rotary.h"
#include "cpu/sampling.h"
#include "ops_cpu.h"
#include "ops_cpu_graph.h"

namespace tilewise {

namespace {

struct Rows {
  const void* data;
  int64_t rows, dim, stride;
};

Rows rows_of(const Tensor& t) {
  const int64_t dims = t.dim(), dim = t.size(dims - 1);
  const int64_t rows = dim ? t.numel() / dim : 0;
  return {t.data_ptr(), rows, dim, dims == 2 ? t.stride(0) : dim};
}

Rows rows_of(const OptionalTensor& t) { return t ? rows_of(*t) : Rows{}; }

// --- norms ---------------------------------------------------------------------------------------

Norm describe(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps,
              const OptionalTensor& residual, const Tensor& out, const OptionalTensor& sum) {
  const Rows rows = rows_of(x), added = rows_of(residual);
  Norm norm{};
  norm.dtype = dtype_of(x);
  norm.tokens = rows.rows;
  norm.heads = 1;
  norm.dim = rows.dim;
  norm.x = rows.data;
  norm.x_stride = rows.stride;
  if (x.dim() == 3) {
    norm.tokens = x.size(0);
    norm.heads = x.size(1);
    norm.x_stride = x.stride(0);
    norm.x_head_stride = x.stride(1);
  }
  norm.residual = added.data;
  norm.residual_stride = added.stride;
  norm.weight = weight.data_ptr();
  norm.bias = pointer(bias);
  norm.out = out.data_ptr();
  norm.sum = const_cast<void*>(pointer(sum));
  norm.eps = static_cast<float>(eps);
  return norm;
}

void rms_norm_op(Tensor x, Tensor weight, double eps, OptionalTensor residual, Tensor out,
                 OptionalTensor sum) {
  const Norm norm = describe(x, weight, {}, eps, residual, out, sum);
  run_kernel<&rms_norm, &Norm::tokens>(norm, {}, x, weight, residual, out, sum);
}

std::tuple<OptionalTensor, OptionalTensor> plain_rms_norm_op(Tensor x, Tensor weight, double eps,
                                                            OptionalTensor residual) {
  const int32_t dtype = dtype_code(x);
  const std::vector<int64_t> size = size_of(x);
  // Heads may be parts of longer rows: queries and keys are, of one projection.
  const bool has_heads = x.dim() == 3 && x.stride(2) == 1;
  if (!is_float_of_kernels(dtype) || size.empty() || !(x.is_contiguous() || has_heads) ||
      dtype_code(weight) != dtype || !has_size(weight, {size.back()}) || !weight.is_contiguous()) {
    return {};
  }
  if (residual && (dtype_code(*residual) != dtype || !has_size(*residual, size) ||
                   !residual->is_contiguous())) {
    return {};
  }
  const Tensor out = empty(size, dtype);
  const OptionalTensor sum = residual ? OptionalTensor(empty(size, dtype)) : std::nullopt;
  rms_norm_op(x, weight, eps, residual, out, sum);
  return {out, sum};
}

void layer_norm_op(Tensor x, Tensor weight, OptionalTensor bias, double eps,
                   OptionalTensor residual, Tensor out, OptionalTensor sum) {
  const Norm norm = describe(x, weight, bias, eps, residual, out, sum);
  run_kernel<&layer_norm, &Norm::tokens>(norm, {}, x, weight, bias, residual, out, sum);
}

NormBackward describe_backward(const Tensor& grad_out, const OptionalTensor& grad_sum,
                               const Tensor& x, const Tensor& weight, double eps,
                               const Tensor& grad_x, const Tensor& grad_weight) {
  const Rows rows = rows_of(x), grad = rows_of(grad_out), direct = rows_of(grad_sum);
  NormBackward norm{};
  norm.dtype = dtype_of(x);
  norm.rows = rows.rows;
  norm.dim = rows.dim;
  norm.grad_out = grad.data;
  norm.grad_out_stride = grad.stride;
  norm.grad_sum = direct.data;
  norm.grad_sum_stride = direct.stride;
  norm.x = rows.data;
  norm.x_stride = rows.stride;
  norm.weight = weight.data_ptr();
  norm.grad_x = grad_x.data_ptr();
  norm.grad_weight = grad_weight.data_ptr();
  norm.eps = static_cast<float>(eps);
  return norm;
}

void rms_norm_backward_op(Tensor grad_out, OptionalTensor grad_sum, Tensor x, Tensor weight,
                          double eps, Tensor grad_x, Tensor grad_weight) {
  rms_norm_backward(describe_backward(grad_out, grad_sum, x, weight, eps, grad_x, grad_weight));
}

void layer_norm_backward_op(Tensor grad_out, OptionalTensor grad_sum, Tensor x, Tensor weight,
                            double eps, Tensor grad_x, Tensor grad_weight, Tensor grad_bias) {
  NormBackward norm =
      describe_backward(grad_out, grad_sum, x, weight, eps, grad_x, grad_weight);
  norm.grad_bias = grad_bias.data_ptr();
  layer_norm_backward(norm);
}

// --- rotary embedding ----------------------------------------------------------------------------

// x and out are (tokens, heads, dim).
void rotary_embedding_op(Tensor x, Tensor cos, Tensor sin, Tensor positions, bool interleaved,
                         bool inverse, Tensor out) {
  Rotary rotary{};
  rotary.dtype = dtype_of(x);
  rotary.tokens = x.size(0);
  rotary.heads = x.size(1);
  rotary.dim = x.size(2);
  rotary.x = x.data_ptr();
  rotary.x_token_stride = x.stride(0);
  rotary.x_head_stride = x.stride(1);
  rotary.out = out.data_ptr();
  rotary.cos = static_cast<const float*>(cos.data_ptr());
  rotary.sin = static_cast<const float*>(sin.data_ptr());
  rotary.positions = static_cast<const int64_t*>(positions.data_ptr());
  rotary.max_positions = cos.size(0);
  rotary.pairs = cos.size(1);
  rotary.interleaved = interleaved;
  rotary.inverse = inverse;
  run_kernel<&rotary_embedding, &Rotary::tokens>(rotary, {}, x, cos, sin, positions, out);
}

OptionalTensor plain_rotary_embedding_op(Tensor x, Tensor cos, Tensor sin, Tensor positions,
                                         bool interleaved) {
  const int32_t dtype = dtype_code(x);
  if (!is_float_of_kernels(dtype) || x.dim() != 3 || x.stride(2) != 1 ||
      !is_plain_rotation(cos, sin, positions, x)) {
    return std::nullopt;
  }
  const Tensor out = empty(size_of(x), dtype);
  rotary_embedding_op(x, cos, sin, positions, interleaved, false, out);
  return out;
}

// --- gated activations ---------------------------------------------------------------------------

Gated describe(const Tensor& gate, const Tensor& up, int64_t activation) {
  STD_TORCH_CHECK(0 <= activation && activation <= 2, "no such activation");
  const Rows gates = rows_of(gate), ups = rows_of(up);
  Gated gated{};
  gated.dtype = dtype_of(gate);
  gated.activation = static_cast<Activation>(activation);
  gated.rows = gates.rows;
  gated.dim = gates.dim;
  gated.gate = gates.data;
  gated.gate_stride = gates.stride;
  gated.up = ups.data;
  gated.up_stride = ups.stride;
  return gated;
}

void gated_activation_op(Tensor gate, Tensor up, int64_t activation, Tensor out) {
  Gated gated = describe(gate, up, activation);
  gated.out = out.data_ptr();
  run_kernel<&gated_activation, &Gated::rows>(gated, {}, gate, up, out);
}

void gated_activation_backward_op(Tensor grad_out, Tensor gate, Tensor up, int64_t activation,
                                  Tensor grad_gate, Tensor grad_up) {
  Gated gated = describe(gate, up, activation);
  const Rows grad = rows_of(grad_out);
  gated.grad_out = grad.data;
  gated.grad_out_stride = grad.stride;
  gated.grad_gate = grad_gate.data_ptr();
  gated.grad_up = grad_up.data_ptr();
  gated_activation(gated);
}

// --- sampling ------------------------------------------------------------------------------------

template <class T>
PerRow<T> per_row(const OptionalTensor& t) {
  return {pointer<T>(t), t ? t->stride(0) : 0};
}

void sample_op(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p,
               Tensor repetition_penalty, OptionalTensor previous_tokens, int64_t seed,
               OptionalTensor sample_ids, OptionalTensor positions, Tensor tokens) {
  Sampling s{};
  s.dtype = dtype_of(logits);
  s.batch = logits.size(0);
  s.vocabulary = logits.size(1);
  s.logits = logits.data_ptr();
  s.stride = logits.stride(0);
  s.temperature = per_row<float>(temperature);
  s.top_k = per_row<int64_t>(top_k);
  s.top_p = per_row<float>(top_p);
  s.min_p = per_row<float>(min_p);
  s.repetition_penalty = per_row<float>(repetition_penalty);
  s.previous_tokens = pointer<int64_t>(previous_tokens);
  s.previous = previous_tokens ? previous_tokens->size(1) : 0;
  s.previous_stride = previous_tokens ? previous_tokens->stride(0) : 0;
  s.seed = seed;
  s.sample_ids = per_row<int64_t>(sample_ids);
  s.positions = per_row<int64_t>(positions);
  s.tokens = static_cast<int64_t*>(tokens.data_ptr());
  sample(s);
}

}  // namespace
}  // namespace tilewise

STABLE_TORCH_LIBRARY_FRAGMENT(TILEWISE_NAMESPACE, m) {
  m.def(
      "rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual, Tensor(a!) out, "
      "Tensor(b!)? sum) -> ()");
  m.def(
      "plain_rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual) "
      "-> (Tensor? out, Tensor? sum)");
  m.def(
      "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor? residual, "
      "Tensor(a!) out, Tensor(b!)? sum) -> ()");
  m.def(
      "rms_norm_backward(Tensor grad_out, Tensor? grad_sum, Tensor x, Tensor weight, float eps, "
      "Tensor(a!) grad_x, Tensor(b!) grad_weight) -> ()");
  m.def(
      "layer_norm_backward(Tensor grad_out, Tensor? grad_sum, Tensor x, Tensor weight, float eps, "
      "Tensor(a!) grad_x, Tensor(b!) grad_weight, Tensor(c!) grad_bias) -> ()");
  m.def(
      "rotary_embedding(Tensor x, Tensor cos, Tensor sin, Tensor positions, bool interleaved, "
      "bool inverse, Tensor(a!) out) -> ()");
  m.def(
      "plain_rotary_embedding(Tensor x, Tensor cos, Tensor sin, Tensor positions, "
      "bool interleaved) -> Tensor?");
  m.def("gated_activation(Tensor gate, Tensor up, int activation, Tensor(a!) out) -> ()");
  m.def(
      "gated_activation_backward(Tensor grad_out, Tensor gate, Tensor up, int activation, "
      "Tensor(a!) grad_gate, Tensor(b!) grad_up) -> ()");
  m.def(
      "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
      "Tensor repetition_penalty, Tensor? previous_tokens, int seed, Tensor? sample_ids, "
      "Tensor? positions, Tensor(a!) tokens) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(TILEWISE_NAMESPACE, CPU, m) {
  using namespace tilewise;
  m.impl("rms_norm", TORCH_BOX(&rms_norm_op));
  m.impl("plain_rms_norm", TORCH_BOX(&plain_rms_norm_op));
  m.impl("layer_norm", TORCH_BOX(&layer_norm_op));
  m.impl("rms_norm_backward", TORCH_BOX(&Recorded<&rms_norm_backward_op>::call));
  m.impl("layer_norm_backward", TORCH_BOX(&Recorded<&layer_norm_backward_op>::call));
  m.impl("rotary_embedding", TORCH_BOX(&rotary_embedding_op));
  m.impl("plain_rotary_embedding", TORCH_BOX(&plain_rotary_embedding_op));
  m.impl("gated_activation", TORCH_BOX(&gated_activation_op));
  m.impl("gated_activation_backward", TORCH_BOX(&Recorded<&gated_activation_backward_op>::call));
  m.impl("sample", TORCH_BOX(&Recorded<&sample_op>::call));
}

STABLE_TORCH_LIBRARY_IMPL(TILEWISE_NAMESPACE, Python, m) {
  using namespace tilewise;
  m.impl("plain_rms_norm", TORCH_BOX(&plain_rms_norm_op));
  m.impl("plain_rotary_embedding", TORCH_BOX(&plain_rotary_embedding_op));
}
