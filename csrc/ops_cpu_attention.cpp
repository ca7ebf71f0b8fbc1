// Bindings of attention, dense, ragged and paged.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "cpu/attention.h"
#include "ops_cpu_cache.h"
#include "ops_cpu_graph.h"

namespace tilewise {
namespace {

// Strides of a (batch, seq, heads, dim) or (tokens, heads, dim) tensor.
Heads heads_of(const Tensor& t) {
  const bool dense = t.dim() == 4;
  return {t.data_ptr(), dense ? t.stride(0) : 0, t.stride(dense), t.stride(dense + 1)};
}

KeyValues keys_of(const Tensor& t, const OptionalTensor& scale) {
  const Heads h = heads_of(t);
  KeyValues kv{h.data, h.batch_stride, h.seq_stride, h.head_stride, nullptr, 0, 0, 0};
  if (scale) {
    kv.scale = pointer<float>(scale);
    kv.scale_page_stride = scale->stride(0);
    kv.scale_slot_stride = scale->stride(1);
    kv.scale_head_stride = scale->stride(2);
  }
  return kv;
}

// Strides of a tensor that broadcasts to the scores, which have four dimensions.
void set_bias_stride(const Tensor& bias, int64_t* stride) {
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t d = i - (4 - bias.dim());
    stride[i] = d >= 0 && bias.size(d) > 1 ? bias.stride(d) : 0;
  }
}

// The options, which the forward and the backward operators share. Sinks and slopes are float32;
// the bias is bool or float32 and has as many dimensions as the scores.
void set_options(Attention& a, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                 const OptionalTensor& bias, bool causal, double scale, int64_t window_left,
                 int64_t window_right, double softcap) {
  a.causal = causal;
  a.scale = static_cast<float>(scale);
  a.softcap = static_cast<float>(softcap);
  constexpr int64_t FAR = int64_t{1} << 40;  // beyond any sequence, and safe to add to
  a.window_left = std::min(window_left, FAR);
  a.window_right = std::min(window_right, FAR);
  a.alibi_slopes = pointer<float>(alibi_slopes);
  a.alibi_batch_stride = alibi_slopes && alibi_slopes->dim() == 2 ? alibi_slopes->stride(0) : 0;
  a.sinks = pointer<float>(sinks);
  a.bias = pointer(bias);
  if (bias) {
    a.bias_is_mask = bias->scalar_type() == torch::headeronly::ScalarType::Bool;
    set_bias_stride(*bias, a.bias_stride);
    const int64_t dims = bias->dim();
    a.bias_keys = dims > 0 && bias->size(dims - 1) > 1 ? bias->size(dims - 1) : INT64_MAX;
  }
}

Attention describe(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& k_scale,
                   const OptionalTensor& v_scale, const OptionalTensor& cu_seqlens_q,
                   const OptionalTensor& cu_seqlens_k, const OptionalTensor& block_table,
                   const OptionalTensor& cache_seqlens, const Tensor& out, const Tensor& lse) {
  Attention a{};
  a.dtype = dtype_of(q);
  a.kv_dtype = dtype_of(k);
  const bool dense = q.dim() == 4;
  a.heads = q.size(q.dim() - 2);
  a.dim = q.size(q.dim() - 1);
  a.v_dim = out.size(out.dim() - 1);
  a.kv_heads = k.size(k.dim() - 2);
  a.q = heads_of(q);
  a.out = heads_of(out);
  a.k = keys_of(k, k_scale);
  a.v = keys_of(v, v_scale);
  a.lse = static_cast<float*>(lse.data_ptr());
  a.cu_seqlens_q = pointer<int32_t>(cu_seqlens_q);
  a.cu_seqlens_k = pointer<int32_t>(cu_seqlens_k);
  a.block_table = pointer<int32_t>(block_table);
  a.cache_seqlens = pointer<int32_t>(cache_seqlens);
  if (dense) {
    a.batch = q.size(0);
    a.q_len = q.size(1);
    a.k_len = k.size(1);
  } else {
    a.q_tokens = q.size(0);
    a.batch = cu_seqlens_q ? cu_seqlens_q->size(0) - 1 : a.q_tokens;
  }
  if (cu_seqlens_k) a.k_tokens = k.size(0);
  if (block_table) {
    a.block_table_stride = block_table->stride(0);
    a.max_pages = block_table->size(1);
    a.num_pages = k.size(0);
    a.page_size = k.size(1);
  }
  return a;
}

void attention_op(Tensor q, Tensor k, Tensor v, OptionalTensor k_scale, OptionalTensor v_scale,
                  OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                  OptionalTensor block_table, OptionalTensor cache_seqlens,
                  OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor bias,
                  bool causal, double scale, int64_t window_left, int64_t window_right,
                  double softcap, Tensor out, Tensor lse) {
  Attention a = describe(q, k, v, k_scale, v_scale, cu_seqlens_q, cu_seqlens_k, block_table,
                         cache_seqlens, out, lse);
  set_options(a, alibi_slopes, sinks, bias, causal, scale, window_left, window_right, softcap);
  run_kernel<&attention_forward, &Attention::q_tokens>(
      a, {}, q, k, v, k_scale, v_scale, cu_seqlens_q, cu_seqlens_k, block_table, cache_seqlens,
      alibi_slopes, sinks, bias, out, lse);
}

// --- the whole call, where it is plain -----------------------------------------------------------

// `packed` is how many elements of a key or value are stored as one.
bool heads_fit(const Tensor& q, const Tensor& k, const Tensor& v, int64_t packed) {
  const int64_t last = q.dim() - 1;
  const int64_t heads = q.size(last - 1), kv_heads = k.size(2);
  const int64_t dim = q.size(last), v_dim = v.size(3) * packed;
  return kv_heads >= 1 && heads >= 1 && heads % kv_heads == 0 && 1 <= dim && dim <= MAX_HEAD_DIM &&
         k.size(3) * packed == dim && 1 <= v_dim && v_dim <= MAX_HEAD_DIM && q.stride(last) == 1 &&
         k.stride(3) == 1 && v.stride(3) == 1 && k.size(0) == v.size(0) &&
         k.size(1) == v.size(1) && v.size(2) == kv_heads;
}

bool is_plain_list(const Tensor& t, int64_t dims, int64_t batch) {
  return has_dtype(t, aoti_torch_dtype_int32()) && t.dim() == dims && t.size(0) == batch &&
         t.is_contiguous();
}

bool is_plain(const Tensor& q, const Tensor& k, const Tensor& v) {
  const int32_t dtype = dtype_code(q);
  return is_float_of_kernels(dtype) && has_dtype(k, dtype) && has_dtype(v, dtype) &&
         q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && heads_fit(q, k, v, 1) &&
         k.size(0) == q.size(0);
}

bool is_plain_paged(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& k_scale,
                    const OptionalTensor& v_scale, const OptionalTensor& cu_seqlens_q,
                    const Tensor& block_table, const Tensor& cache_seqlens) {
  const int32_t dtype = dtype_code(q), stored = dtype_code(k);
  if (!is_float_of_kernels(dtype) || q.dim() != 3 || k.dim() != 4 || v.dim() != 4 ||
      !has_dtype(v, stored) || !(stored == dtype || is_quantized_cache(stored)) ||
      !heads_fit(q, k, v, packed_in(stored)) || k.size(0) < 1 || k.size(1) < 1 ||
      !scale_fits(k_scale, k) || !scale_fits(v_scale, k) || cache_seqlens.dim() != 1) {
    return false;
  }
  for (const OptionalTensor& scale : {k_scale, v_scale}) {
    if (scale && !scale->is_contiguous()) return false;
  }
  const int64_t batch = cache_seqlens.size(0);
  const bool fits = cu_seqlens_q ? is_plain_list(*cu_seqlens_q, 1, batch + 1) : q.size(0) == batch;
  return fits && is_plain_list(block_table, 2, batch) && is_plain_list(cache_seqlens, 1, batch);
}

std::tuple<OptionalTensor, OptionalTensor> plain_attention_op(
    Tensor q, Tensor k, Tensor v, OptionalTensor k_scale, OptionalTensor v_scale,
    OptionalTensor cu_seqlens_q, OptionalTensor block_table, OptionalTensor cache_seqlens,
    bool causal, std::optional<double> scale, int64_t window_left, int64_t window_right,
    double softcap, bool return_lse) {
  const bool is_paged = block_table && cache_seqlens;
  if (is_paged ? !is_plain_paged(q, k, v, k_scale, v_scale, cu_seqlens_q, *block_table,
                                 *cache_seqlens)
               : !is_plain(q, k, v)) {
    return {};
  }
  std::vector<int64_t> size = size_of(q);
  size.back() = v.size(3) * packed_in(dtype_code(v));
  const Tensor out = empty(size, dtype_code(q));
  size.pop_back();
  const Tensor lse = empty(size, aoti_torch_dtype_float32());
  if (!scale) scale = 1 / std::sqrt(static_cast<double>(q.size(q.dim() - 1)));
  attention_op(q, k, v, k_scale, v_scale, cu_seqlens_q, {}, block_table, cache_seqlens, {}, {}, {},
               causal, *scale, window_left, window_right, softcap, out, lse);
  return {out, return_lse ? OptionalTensor(lse) : std::nullopt};
}

// --- the gradient --------------------------------------------------------------------------------

void attention_backward_op(Tensor grad_out, OptionalTensor grad_lse, Tensor out, Tensor lse,
                           Tensor q, Tensor k, Tensor v, OptionalTensor cu_seqlens_q,
                           OptionalTensor cu_seqlens_k, OptionalTensor alibi_slopes,
                           OptionalTensor sinks, OptionalTensor bias, bool causal, double scale,
                           int64_t window_left, int64_t window_right, double softcap,
                           Tensor grad_q, Tensor grad_k, Tensor grad_v, OptionalTensor grad_sinks,
                           OptionalTensor grad_bias) {
  Attention a = describe(q, k, v, std::nullopt, std::nullopt, cu_seqlens_q, cu_seqlens_k,
                         std::nullopt, std::nullopt, out, lse);
  set_options(a, alibi_slopes, sinks, bias, causal, scale, window_left, window_right, softcap);
  AttentionGradients g{};
  g.out_dtype = dtype_of(out);
  g.grad_out = heads_of(grad_out);
  g.grad_lse = pointer<float>(grad_lse);
  g.grad_q = heads_of(grad_q);
  g.grad_k = heads_of(grad_k);
  g.grad_v = heads_of(grad_v);
  if (grad_sinks) g.grad_sinks = static_cast<float*>(grad_sinks->data_ptr());
  if (grad_bias) {
    g.grad_bias = static_cast<float*>(grad_bias->data_ptr());
    set_bias_stride(*grad_bias, g.grad_bias_stride);
  }
  attention_backward(a, g);
}

}  // namespace
}  // namespace tilewise

STABLE_TORCH_LIBRARY_FRAGMENT(TILEWISE_NAMESPACE, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? block_table, Tensor? cache_seqlens, "
      "Tensor? alibi_slopes, Tensor? sinks, Tensor? bias, bool causal, float scale, "
      "int window_left, int window_right, float softcap, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "plain_attention(Tensor q, Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale, "
      "Tensor? cu_seqlens_q, Tensor? block_table, Tensor? cache_seqlens, bool causal, "
      "float? scale, int window_left, int window_right, float softcap, bool return_lse) "
      "-> (Tensor? out, Tensor? lse)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor q, "
      "Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, "
      "Tensor? sinks, Tensor? bias, bool causal, float scale, int window_left, int window_right, "
      "float softcap, Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v, "
      "Tensor(d!)? grad_sinks, Tensor(e!)? grad_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(TILEWISE_NAMESPACE, CPU, m) {
  using namespace tilewise;
  m.impl("attention", TORCH_BOX(&attention_op));
  m.impl("plain_attention", TORCH_BOX(&plain_attention_op));
  m.impl("attention_backward", TORCH_BOX(&Recorded<&attention_backward_op>::call));
}

STABLE_TORCH_LIBRARY_IMPL(TILEWISE_NAMESPACE, Python, m) {
  m.impl("plain_attention", TORCH_BOX(&tilewise::plain_attention_op));
}
