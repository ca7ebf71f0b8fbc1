// A mixture of experts: tokens are sorted by expert, two products with the experts' stacked weights
// take all of them at once, and each token adds up what its experts made of it, in ascending order.
#include "cpu/moe.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/quant_activations.h"
#include "cpu/quant_kernels.h"
#include "cpu/rows.h"
#include "cpu/workspace.h"

namespace tilewise {
namespace {

// Of a token: `experts` by ascending number, and how much each counts.
void route(const float* logits, int64_t count, int64_t top_k, bool normalize, int32_t* experts,
           float* weights) {
  const auto order = make_workspace<int32_t>(count);
  for (int64_t e = 0; e < count; ++e) order[e] = static_cast<int32_t>(e);
  // As a stable sort has them: the largest first, of equal ones the lower number, NaN before all.
  const auto comes_first = [&](int32_t a, int32_t b) {
    const bool a_is_nan = std::isnan(logits[a]), b_is_nan = std::isnan(logits[b]);
    if (a_is_nan != b_is_nan) return a_is_nan;
    if (!a_is_nan && logits[a] != logits[b]) return logits[a] > logits[b];
    return a < b;
  };
  std::partial_sort(order.get(), order.get() + top_k, order.get() + count, comes_first);
  const float most = logits[order[0]];
  std::copy_n(order.get(), top_k, experts);
  std::sort(experts, experts + top_k);
  double total = 0;
  for (int64_t i = 0; i < (normalize ? top_k : count); ++i) {
    total += std::exp(logits[normalize ? experts[i] : i] - most);
  }
  for (int64_t i = 0; i < top_k; ++i) {
    weights[i] = static_cast<float>(std::exp(logits[experts[i]] - most) / total);
  }
}

// Which rows of the products belong to which token. Rows are sorted by expert, and of one expert by
// token.
struct Routes {
  Workspace<float> weights;        // (tokens, top_k), by ascending expert
  Workspace<int64_t> row_of;       // the same
  Workspace<int64_t> token_of;     // (rows,)
  std::vector<Segment> segments;   // of the experts that have rows, the longest first

  explicit Routes(const Moe& call)
      : weights(make_workspace<float>(call.tokens * call.top_k)),
        row_of(make_workspace<int64_t>(call.tokens * call.top_k)),
        token_of(make_workspace<int64_t>(call.tokens * call.top_k)) {
    const int64_t top_k = call.top_k, choices = call.tokens * top_k;
    const auto experts = make_workspace<int32_t>(choices);
    parallel_rows(call.tokens, call.experts * 8, [&](int64_t t) {
      const auto logits = make_workspace<float>(call.experts);
      load_floats(call.logits_dtype, call.logits, t * call.experts, call.experts, logits.get());
      route(logits.get(), call.experts, top_k, call.normalize, experts.get() + t * top_k,
            weights.get() + t * top_k);
    });
    std::vector<int64_t> next(call.experts + 1);
    for (int64_t i = 0; i < choices; ++i) ++next[experts[i] + 1];
    for (int64_t e = 0; e < call.experts; ++e) {
      next[e + 1] += next[e];
      if (next[e + 1] > next[e]) segments.push_back({e, next[e], next[e + 1]});
    }
    for (int64_t i = 0; i < choices; ++i) {
      row_of[i] = next[experts[i]]++;
      token_of[row_of[i]] = i / top_k;
    }
    std::stable_sort(segments.begin(), segments.end(), [](const Segment& a, const Segment& b) {
      return a.end - a.begin > b.end - b.begin;
    });
  }
};

template <class T>
void add_up(const Moe& call, const Routes& routes, const float* rows) {
  const int64_t dim = call.down.rows;
  parallel_rows(call.tokens, dim * call.top_k, [&](int64_t t) {
    const int64_t* row = routes.row_of.get() + t * call.top_k;
    const float* weight = routes.weights.get() + t * call.top_k;
    for_vectors(dim, [&](int64_t i, auto part, int) {
      F32 sum = F32::zero();
      for (int64_t j = 0; j < call.top_k; ++j) {
        sum = fma(F32::all(weight[j]), part.load(rows + row[j] * dim + i), sum);
      }
      part.store(static_cast<T*>(call.out) + t * dim + i, sum);
    });
  });
}

}  // namespace

void moe(const Moe& call) {
  if (call.tokens == 0) return;
  const Routes routes(call);
  const int64_t rows = call.tokens * call.top_k, dim = call.gate_up.depth, hidden = call.down.depth;

  const int64_t row_bytes = dim * element_size(call.dtype);
  const auto x = make_workspace<char>(rows * row_bytes);
  parallel_rows(rows, dim, [&](int64_t m) {
    const char* from = static_cast<const char*>(call.x);
    std::memcpy(x.get() + m * row_bytes,
                from + routes.token_of[m] * call.x_stride * element_size(call.dtype), row_bytes);
  });

  QuantizedMatmul product{};
  product.rows = rows;
  product.segments = routes.segments.data();
  product.segment_count = static_cast<int64_t>(routes.segments.size());

  const auto inner = make_workspace<float>(rows * hidden);
  const auto outer = make_workspace<float>(rows * dim);
  product.dtype = DType::f32;
  product.x_dtype = call.dtype;
  product.x = x.get();
  product.x_stride = dim;
  product.weight = call.gate_up;
  product.finish = Finish::swiglu;
  product.out = inner.get();
  quantized_matmul(product);

  product.x_dtype = DType::f32;
  product.x = inner.get();
  product.x_stride = hidden;
  product.weight = call.down;
  product.finish = Finish::none;
  product.out = outer.get();
  quantized_matmul(product);

  switch (call.dtype) {
    case DType::f32: return add_up<float>(call, routes, outer.get());
    case DType::f16: return add_up<Half>(call, routes, outer.get());
    default: return add_up<BFloat16>(call, routes, outer.get());
  }
}

// In segments of few rows: products with many add up in another order, and who else is in a batch
// must not send a token to other experts.
void router_logits(const QuantizedMatmul& call) {
  std::vector<Segment> segments;
  for (int64_t m = 0; m < call.rows; m += FEW_ROWS) {
    segments.push_back({0, m, std::min(m + FEW_ROWS, call.rows)});
  }
  QuantizedMatmul product = call;
  product.segments = segments.data();
  product.segment_count = static_cast<int64_t>(segments.size());
  quantized_matmul(product);
}

}  // namespace tilewise
