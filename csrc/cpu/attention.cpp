// Shares the sequences of a call out between the two kernels.
#include "cpu/attention.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"

namespace tilewise {
namespace {

// Tokens behind the last sequence are padding: out 0, lse -inf.
void clear_padding(const Attention& a) {
  if (!a.cu_seqlens_q) return;
  const int64_t element = a.dtype == DType::f32 ? 4 : 2;
  const int64_t first = clamp(a.cu_seqlens_q[a.batch], 0, a.q_tokens);
  for (int64_t t = first; t < a.q_tokens; ++t) {
    for (int64_t h = 0; h < a.heads; ++h) {
      char* row = static_cast<char*>(a.out.data) +
                  (t * a.out.seq_stride + h * a.out.head_stride) * element;
      std::memset(row, 0, a.v_dim * element);
      a.lse[t * a.heads + h] = -INFINITY;
    }
  }
}

}  // namespace

void attention_forward(const Attention& a) {
  std::vector<Sequence> decode, prefill;
  for (int64_t b = 0; b < a.batch; ++b) {
    const Sequence s = sequence_of(a, b);
    if (s.q_len > 0) (is_decode(a, s) ? decode : prefill).push_back(s);
  }
  clear_padding(a);
  if (!decode.empty()) attention_decode(a, decode.data(), decode.size());
  if (!prefill.empty()) attention_prefill(a, prefill.data(), prefill.size());
}

}  // namespace tilewise
