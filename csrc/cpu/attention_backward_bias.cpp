// The gradient of the bias: that of the scores, summed up to the bias's own shape.
//
// Blocks of scores are computed once more here. A bias is mostly shared by the batch, so adding to
// its gradient in the main pass would make tasks of different sequences wait for each other, or
// need a copy of it for each. Here a task owns a block of the result, and sums in a fixed order
// what all sequences, heads, queries or keys that share it have to say.
#include <memory>
#include <vector>

#include "cpu/attention_backward_block.h"
#include "cpu/parallel.h"

namespace tilewise {
namespace {

// How many of a dimension there are tasks for, and each task's part of it.
struct Split {
  int64_t count;
  bool shared;  // by one task
  int64_t tasks() const { return shared ? 1 : count; }
  Range part(int64_t i) const { return shared ? Range{0, count} : Range{i, i + 1}; }
};

// Adds dS of a block to the gradient, whose strides are 0 where it is shared.
template <class T>
void add_block(const BackwardBlock<T>& block, float* grad, int64_t query_stride,
               int64_t key_stride) {
  for (int64_t r = 0; r < block.queries; ++r) {
    const float* from = block.ds.row(r);
    float* to = grad + r * query_stride;
    if (key_stride == 0) {
      float sum = 0.0f;
      for (int64_t j = 0; j < block.keys; ++j) sum += from[j];
      *to += sum;
    } else {
      for (int64_t j = 0; j < block.keys; ++j) to[j * key_stride] += from[j];
    }
  }
}

template <class T>
void backward(const Attention& a, const AttentionGradients& g, const float* delta) {
  const int64_t* stride = g.grad_bias_stride;
  int64_t query_blocks = 0, key_blocks = 0;
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < a.batch; ++b) {
    sequences.push_back(sequence_of(a, b));
    query_blocks = std::max(query_blocks, query_blocks_of(sequences.back().q_len));
    key_blocks = std::max(key_blocks, key_blocks_of(sequences.back().k_len));
  }
  // Ragged sequences share a bias unless it goes by query.
  const Split by_sequence{a.batch, stride[a.cu_seqlens_q ? 2 : 0] == 0};
  const Split by_head{a.heads, stride[1] == 0};
  const Split by_query{query_blocks, stride[2] == 0}, by_key{key_blocks, stride[3] == 0};
  const int64_t tasks = by_sequence.tasks() * by_head.tasks() * by_query.tasks() * by_key.tasks();
  if (a.batch == 0 || query_blocks == 0 || key_blocks == 0) return;
  parallel(tasks, [&](int64_t task) {
    const Range js = by_key.part(task % by_key.tasks());
    task /= by_key.tasks();
    const Range is = by_query.part(task % by_query.tasks());
    task /= by_query.tasks();
    const Range heads = by_head.part(task % by_head.tasks());
    const Range bs = by_sequence.part(task / by_head.tasks());
    const auto block = std::make_unique<BackwardBlock<T>>(a, g.grad_out, delta);
    for (int64_t b = bs.begin; b < bs.end; ++b) {
      const Sequence& s = sequences[b];
      for (int64_t h = heads.begin; h < heads.end; ++h) {
        for (int64_t j = js.begin; j < std::min(js.end, key_blocks_of(s.k_len)); ++j) {
          bool loaded = false;
          for (int64_t i = is.begin; i < std::min(is.end, query_blocks_of(s.q_len)); ++i) {
            if (!is_visible(visible_key_blocks(a, s, i), j)) continue;
            if (!loaded) block->load_keys(s, h / group_size(a), j);
            loaded = true;
            block->load_queries(s, h, i);
            block->compute(s, h, true);
            float* grad = g.grad_bias + (a.cu_seqlens_q ? 0 : b) * stride[0] + h * stride[1] +
                          (s.q_begin + i * QUERY_BLOCK) * stride[2] + j * KEY_BLOCK * stride[3];
            add_block(*block, grad, stride[2], stride[3]);
          }
        }
      }
    }
  });
}

}  // namespace

void attention_bias_backward(const Attention& a, const AttentionGradients& g, const float* delta) {
  switch (a.dtype) {
    case DType::f32: return backward<float>(a, g, delta);
    case DType::f16: return backward<Half>(a, g, delta);
    default: return backward<BFloat16>(a, g, delta);
  }
}

}  // namespace tilewise
