// The weights themselves, rows of an embedding table, and the gradient of x: grad W, for a weight that
// is not trained.
//
// A task of the gradient computes 128 of its columns. It widens the weight's rows 256 at a time, which are
// then the depth of a product as in gemm.h: sums run over the weight's rows in one order.
#include "cpu/gemm.h"
#include "cpu/quant_activations.h"
#include "cpu/quant_kernels.h"
#include "cpu/quant_strips.h"

namespace tilewise {
namespace {

constexpr int64_t TASK_STRIPS = 4, COLUMNS = TASK_STRIPS * STRIP;
constexpr int64_t DEPTH_PANELS = PANEL_DEPTH / PANEL_ROWS;

// Strips [first, first + count) of a panel, 16 rows of COLUMNS.
template <class F>
void widen_rows(const QuantizedWeight& w, int64_t panel, int64_t first, int64_t count, float* out) {
  Strip strip;
  for (int64_t s = 0; s < count; ++s) {
    decode_strip<F>(w, panel, first + s, strip);
    strip_rows<F>(strip, out + s * STRIP, COLUMNS);
  }
}

template <class F>
void dequantize(const QuantizedWeight& w, int64_t begin, int64_t end, float* out) {
  const int64_t strips = strips_of(w.depth), first_panel = begin / PANEL_ROWS;
  parallel(panels_of(end) - first_panel, [&](int64_t task) {
    const int64_t panel = first_panel + task, row = panel * PANEL_ROWS;
    const auto wide = make_workspace<float>(PANEL_ROWS * COLUMNS);
    for (int64_t s = 0; s < strips; s += TASK_STRIPS) {
      widen_rows<F>(w, panel, s, std::min(strips - s, TASK_STRIPS), wide.get());
      const int64_t columns = std::min(w.depth - s * STRIP, COLUMNS);
      for (int64_t r = std::max(begin, row); r < std::min(end, row + PANEL_ROWS); ++r) {
        std::copy_n(wide.get() + (r - row) * COLUMNS, columns,
                    out + (r - begin) * w.depth + s * STRIP);
      }
    }
  });
}

template <class F, class T>
void embed_rows(const QuantizedWeight& w, const int64_t* ids, int64_t count, T* out) {
  parallel_rows(count, w.depth, [&](int64_t i) {
    const int64_t panel = ids[i] / PANEL_ROWS;
    const int row = static_cast<int>(ids[i] % PANEL_ROWS);
    T* to = out + i * w.depth;
    for (int64_t k = 0; k < w.depth; k += STRIP) {
      alignas(64) float strip[STRIP];
      strip_row<F>(w, panel, k / STRIP, row, strip);
      for_vectors(std::min<int64_t>(w.depth - k, STRIP), [&](int64_t j, auto part, int) {
        part.store(to + k + j, part.load(strip + j));
      });
    }
  });
}

template <class F>
void backward(const QuantizedWeight& w, const float* grad, int64_t rows, float* out) {
  const int64_t strips = strips_of(w.depth), panels = panels_of(w.rows);
  parallel((strips + TASK_STRIPS - 1) / TASK_STRIPS, [&](int64_t task) {
    const int64_t first = task * TASK_STRIPS, count = std::min(strips - first, TASK_STRIPS);
    const int64_t columns = std::min(w.depth - first * STRIP, count * STRIP);
    const auto wide = make_workspace<float>(PANEL_ROWS * COLUMNS);
    const auto packed = make_workspace<float>(packed_size(PANEL_DEPTH, COLUMNS));
    for (int64_t p = 0; p < panels; p += DEPTH_PANELS) {
      const int64_t row = p * PANEL_ROWS, depth = std::min(w.rows - row, PANEL_DEPTH);
      for (int64_t i = 0; i < depth; i += PANEL_ROWS) {
        widen_rows<F>(w, (row + i) / PANEL_ROWS, first, count, wide.get());
        const float* each[PANEL_ROWS];
        for (int r = 0; r < PANEL_ROWS; ++r) each[r] = wide.get() + r * COLUMNS;
        pack_rows(each, std::min<int64_t>(depth - i, PANEL_ROWS), columns,
                  packed.get() + i * PANEL, PANEL_DEPTH * PANEL);
      }
      multiply(grad + row, w.rows, packed.get(), PANEL_DEPTH * PANEL, rows, columns, depth,
               out + first * STRIP, w.depth, p > 0);
    }
  });
}

}  // namespace

void dequantize_rows(const QuantizedWeight& weight, int64_t begin, int64_t end, float* out) {
  if (begin >= end) return;
  with_format(weight.format,
              [&](auto format) { dequantize<decltype(format)>(weight, begin, end, out); });
}

void embed(const QuantizedWeight& weight, const int64_t* ids, int64_t count, DType dtype, void* out) {
  with_format(weight.format, [&](auto format) {
    using F = decltype(format);
    switch (dtype) {
      case DType::f32: return embed_rows<F>(weight, ids, count, static_cast<float*>(out));
      case DType::f16: return embed_rows<F>(weight, ids, count, static_cast<Half*>(out));
      default: return embed_rows<F>(weight, ids, count, static_cast<BFloat16*>(out));
    }
  });
}

void quantized_matmul_backward(const QuantizedWeight& weight, const float* grad, int64_t rows,
                               float* grad_x) {
  with_format(weight.format,
              [&](auto format) { backward<decltype(format)>(weight, grad, rows, grad_x); });
}

}  // namespace tilewise
