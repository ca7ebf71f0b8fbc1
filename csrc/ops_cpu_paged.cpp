// Bindings of what goes with attention over a paged cache: writing to it, merging results, and going on.
#include "cpu/append_kv.h"
#include "cpu/attention.h"
#include "cpu/next_step.h"
#include "ops_cpu_cache.h"
#include "ops_cpu_graph.h"

namespace tilewise {
namespace {

AppendSide side_of(const Tensor& x, const Tensor& cache, const OptionalTensor& scale) {
  AppendSide side{};
  side.x = x.data_ptr();
  side.token_stride = x.stride(0);
  side.x_head_stride = x.stride(1);
  side.dim = x.size(2);
  side.cache = cache.data_ptr();
  side.page_stride = cache.stride(0);
  side.slot_stride = cache.stride(1);
  side.head_stride = cache.stride(2);
  if (scale) {
    side.scale = static_cast<float*>(scale->data_ptr());
    side.scale_page_stride = scale->stride(0);
    side.scale_slot_stride = scale->stride(1);
    side.scale_head_stride = scale->stride(2);
  }
  return side;
}

AppendKV describe(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                  const Tensor& slot_mapping, const OptionalTensor& k_scale,
                  const OptionalTensor& v_scale) {
  AppendKV a{};
  a.dtype = dtype_of(k);
  a.cache_dtype = dtype_of(k_cache);
  a.tokens = k.size(0);
  a.kv_heads = k.size(1);
  a.num_pages = k_cache.size(0);
  a.page_size = k_cache.size(1);
  a.k = side_of(k, k_cache, k_scale);
  a.v = side_of(v, v_cache, v_scale);
  a.slots = static_cast<const int64_t*>(slot_mapping.data_ptr());
  a.slots_stride = slot_mapping.stride(0);
  return a;
}

void append_kv_op(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor slot_mapping,
                  OptionalTensor cos, OptionalTensor sin, bool interleaved,
                  OptionalTensor positions, OptionalTensor k_scale, OptionalTensor v_scale) {
  AppendKV a = describe(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale);
  if (cos && sin && positions) {
    a.cos = pointer<float>(cos);
    a.sin = pointer<float>(sin);
    a.cos_stride = cos->stride(0);
    a.sin_stride = sin->stride(0);
    a.table_rows = cos->size(0);
    a.pairs = cos->size(1);
    a.interleaved = interleaved;
    a.positions = pointer<int64_t>(positions);
    a.positions_stride = positions->stride(0);
  }
  run_kernel<&append_kv, &AppendKV::tokens>(a, {}, k, v, k_cache, v_cache, slot_mapping, cos, sin,
                                            positions, k_scale, v_scale);
}

// Whether rows (tokens, kv_heads, dim) go into a cache (pages, page_size, kv_heads, stored dim).
bool is_plain_side(const Tensor& x, const Tensor& cache, const OptionalTensor& scale,
                   int32_t dtype, int32_t cache_dtype) {
  return has_dtype(x, dtype) && x.dim() == 3 && has_dtype(cache, cache_dtype) &&
         cache.dim() == 4 && cache.size(0) >= 1 && cache.size(1) >= 1 && cache.size(2) >= 1 &&
         cache.size(2) == x.size(1) && cache.size(3) * packed_in(cache_dtype) == x.size(2) &&
         x.size(2) >= 1 && x.size(2) <= MAX_HEAD_DIM && x.stride(2) == 1 &&
         cache.stride(3) == 1 && scale_fits(scale, cache);
}

bool plain_append_kv_op(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor slot_mapping,
                        OptionalTensor cos, OptionalTensor sin, bool interleaved,
                        OptionalTensor positions, OptionalTensor k_scale, OptionalTensor v_scale) {
  const int32_t dtype = dtype_code(k), cache_dtype = dtype_code(k_cache);
  if (!is_float_of_kernels(dtype) ||
      !(is_float_of_kernels(cache_dtype) || is_quantized_cache(cache_dtype)) ||
      !is_plain_side(k, k_cache, k_scale, dtype, cache_dtype) ||
      !is_plain_side(v, v_cache, v_scale, dtype, cache_dtype) || v.size(0) != k.size(0) ||
      v.size(1) != k.size(1) || v_cache.size(0) != k_cache.size(0) ||
      v_cache.size(1) != k_cache.size(1) || !has_dtype(slot_mapping, aoti_torch_dtype_int64()) ||
      !has_size(slot_mapping, {k.size(0)})) {
    return false;
  }
  if ((cos || sin || positions) &&
      !(cos && sin && positions && is_plain_rotation(*cos, *sin, *positions, k))) {
    return false;
  }
  append_kv_op(k, v, k_cache, v_cache, slot_mapping, cos, sin, interleaved, positions, k_scale,
               v_scale);
  return true;
}

// out_a and out_b are (rows, dim), lse_a and lse_b (rows,), all contiguous.
void merge_states_op(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, Tensor out,
                     Tensor lse) {
  merge_states({dtype_of(out_a), out_a.size(0), out_a.size(1), out_a.data_ptr(), out_b.data_ptr(),
                static_cast<const float*>(lse_a.data_ptr()),
                static_cast<const float*>(lse_b.data_ptr()), out.data_ptr(),
                static_cast<float*>(lse.data_ptr())});
}

// All contiguous.
void next_step_op(Tensor chosen, Tensor token_ids, Tensor positions, Tensor cache_seqlens,
                  Tensor slot_mapping, Tensor block_table, int64_t page_size, Tensor text_lengths,
                  OptionalTensor previous_tokens, Tensor history, Tensor steps) {
  const auto integers = [](const Tensor& t) { return static_cast<int64_t*>(t.data_ptr()); };
  NextStep next{};
  next.size = chosen.size(0);
  next.chosen = integers(chosen);
  next.token_ids = integers(token_ids);
  next.positions = integers(positions);
  next.cache_seqlens = static_cast<int32_t*>(cache_seqlens.data_ptr());
  next.slot_mapping = integers(slot_mapping);
  next.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  next.max_pages = block_table.size(1);
  next.page_size = page_size;
  next.text_lengths = integers(text_lengths);
  if (previous_tokens) {
    next.previous_tokens = integers(*previous_tokens);
    next.longest = previous_tokens->size(1);
  }
  next.history = integers(history);
  next.history_steps = history.size(0);
  next.steps = integers(steps);
  run_kernel<&next_step>(next, {}, chosen, token_ids, positions, cache_seqlens, slot_mapping,
                         block_table, text_lengths, previous_tokens, history, steps);
}

}  // namespace
}  // namespace tilewise

STABLE_TORCH_LIBRARY_FRAGMENT(TILEWISE_NAMESPACE, m) {
  m.def(
      "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, "
      "Tensor? cos, Tensor? sin, bool interleaved, Tensor? positions, Tensor(c!)? k_scale, "
      "Tensor(d!)? v_scale) -> ()");
  m.def(
      "plain_append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor slot_mapping, Tensor? cos, Tensor? sin, bool interleaved, Tensor? positions, "
      "Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> bool");
  m.def(
      "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, Tensor(a!) out, "
      "Tensor(b!) lse) -> ()");
  m.def(
      "next_step(Tensor chosen, Tensor(a!) token_ids, Tensor(b!) positions, "
      "Tensor(c!) cache_seqlens, Tensor(d!) slot_mapping, Tensor block_table, int page_size, "
      "Tensor(e!) text_lengths, Tensor(f!)? previous_tokens, Tensor(g!) history, "
      "Tensor(h!) steps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(TILEWISE_NAMESPACE, CPU, m) {
  using namespace tilewise;
  m.impl("append_kv", TORCH_BOX(&append_kv_op));
  m.impl("plain_append_kv", TORCH_BOX(&plain_append_kv_op));
  m.impl("next_step", TORCH_BOX(&next_step_op));
  m.impl("merge_states", TORCH_BOX(&Recorded<&merge_states_op>::call));
}

STABLE_TORCH_LIBRARY_IMPL(TILEWISE_NAMESPACE, Python, m) {
  m.impl("plain_append_kv", TORCH_BOX(&tilewise::plain_append_kv_op));
}
