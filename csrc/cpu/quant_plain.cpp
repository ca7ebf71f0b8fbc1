// Products with weights of plain numbers, row by row as PyTorch has them: of experts, routers and linear
// layers that are not quantized.
//
// Rows of the weight are packed for gemm.h, 256 deep, and all rows of x of the segment run over them;
// a few rows of x are multiplied with the weight's rows as they lie, bfloat16 in pairs.
#include "cpu/decode_pairs.h"
#include "cpu/decode_rows.h"
#include "cpu/gemm.h"
#include "cpu/quant_activations.h"
#include "cpu/quant_kernels.h"

#if defined(__AVX512BF16__)
#include "cpu/bf16_rows.h"
#endif

namespace tilewise {
namespace {

constexpr int64_t SHARED_PANELS = 8;       // in a pass over x
constexpr int64_t TASK_BYTES = 128 << 10;  // of the weight where x has few rows

// The rows of some panels. Those past the last row are the last one: nobody reads their products.
template <class T>
Workspace<const void*> rows_of(const QuantizedWeight& w, const Segment& segment,
                               const int64_t* panels, int count) {
  auto rows = make_workspace<const void*>(count * PANEL_ROWS);
  const T* weight = reinterpret_cast<const T*>(w.data) + segment.weight * w.rows * w.depth;
  for (int i = 0; i < count * PANEL_ROWS; ++i) {
    const int64_t panel = panels[i / PANEL_ROWS] - segment.weight * panels_of(w.rows);
    const int64_t row = std::min(panel * PANEL_ROWS + i % PANEL_ROWS, w.rows - 1);
    rows[i] = weight + row * w.depth;
  }
  return rows;
}

template <class P, class T, int R = ROWS>
void multiply_few(const typename P::Element* x, int64_t x_stride, int64_t x_rows,
                  const void* const* rows, int64_t count, int64_t depth, float* sums,
                  int64_t sums_stride) {
  for (; x_rows >= R; x_rows -= R, x += R * x_stride, sums += R * sums_stride) {
    dot_products<P, T, R, false>(x, x_stride * sizeof(*x), {rows, 0}, {}, count, depth, sums,
                                 sums_stride);
  }
  if constexpr (R > 1) {
    multiply_few<P, T, R / 2>(x, x_stride, x_rows, rows, count, depth, sums, sums_stride);
  }
}

template <class T>
void multiply_many(const float* x, int64_t x_stride, int64_t x_rows, const void* const* rows,
                   int64_t count, int64_t depth, float* sums, int64_t sums_stride) {
  const auto columns = make_workspace<const float*>(count);
  const auto floats = make_workspace<float>(std::is_same<T, float>::value ? 0 : count * PANEL_DEPTH);
  const auto packed = make_workspace<float>(packed_size(PANEL_DEPTH, count));
  for (int64_t k = 0; k == 0 || k < depth; k += PANEL_DEPTH) {
    const int64_t deep = std::min(depth - k, PANEL_DEPTH);
    for (int64_t j = 0; j < count; ++j) {
      const T* row = static_cast<const T*>(rows[j]) + k;
      if constexpr (std::is_same<T, float>::value) {
        columns[j] = row;
      } else {
        float* to = floats.get() + j * PANEL_DEPTH;
        for_vectors(deep, [&](int64_t i, auto part, int) { part.store(to + i, part.load(row + i)); });
        columns[j] = to;
      }
    }
    pack_columns(columns.get(), deep, count, packed.get());
    multiply(x + k, x_stride, packed.get(), deep * PANEL, x_rows, count, deep, sums, sums_stride,
             k > 0);
  }
}

// All products, a task's by `product`, which is a multiply_few or multiply_many.
template <class T, class Element, class Product>
void multiply_all(const QuantizedMatmul& call, const Finisher& finish, const Element* x,
                  int64_t x_stride, int64_t panels_of_task, const Product& product) {
  const QuantizedWeight& w = call.weight;
  for_panels(call, finish, panels_of_task,
             [&](const Segment& segment, const int64_t* panels, int count, float* sums) {
               const auto rows = rows_of<T>(w, segment, panels, count);
               const int64_t columns = count * PANEL_ROWS;
               product(x + segment.begin * x_stride, x_stride, segment.end - segment.begin,
                       rows.get(), columns, w.depth, sums, columns);
             });
}

template <class P, class T>
void multiply_all_few(const QuantizedMatmul& call, const Finisher& finish,
                      const typename P::Element* x, int64_t x_stride) {
  multiply_all<T>(call, finish, x, x_stride, panels_in(call, TASK_BYTES), multiply_few<P, T>);
}

template <class T>
void multiply_widened(const QuantizedMatmul& call, const Finisher& finish, const float* x,
                      int64_t x_stride) {
  if (has_few_rows(call)) return multiply_all_few<Floats, T>(call, finish, x, x_stride);
  multiply_all<T>(call, finish, x, x_stride, SHARED_PANELS, multiply_many<T>);
}

}  // namespace

#if defined(__AVX512BF16__)

bool multiply_plain_pairs(const QuantizedMatmul& call, const Finisher& finish) {
  const QuantizedWeight& w = call.weight;
  if (!has_few_rows(call) || call.x_dtype != DType::bf16 || w.format != Format::plain_bf16 ||
      w.depth % Pairs::WIDTH != 0) {
    return false;
  }
  const auto* x = static_cast<const BFloat16*>(call.x);
  for (int64_t m = 0; m < call.rows; ++m) {
    LargestBfloat16 largest;
    for (int64_t k = 0; k < w.depth; k += Pairs::WIDTH) {
      largest.add(load_row(x + m * call.x_stride + k, Pairs::WIDTH));
    }
    if (!fits_bfloat16(largest.get())) return false;
  }
  multiply_all_few<BFloat16Pairs, BFloat16>(call, finish, x, call.x_stride);
  return true;
}

#else

bool multiply_plain_pairs(const QuantizedMatmul&, const Finisher&) { return false; }

#endif

void multiply_plain(const QuantizedMatmul& call, const Finisher& finish, const float* x,
                    int64_t x_stride) {
  switch (call.weight.format) {
    case Format::plain_f32: return multiply_widened<float>(call, finish, x, x_stride);
    case Format::plain_f16: return multiply_widened<Half>(call, finish, x, x_stride);
    default: return multiply_widened<BFloat16>(call, finish, x, x_stride);
  }
}

}  // namespace tilewise
