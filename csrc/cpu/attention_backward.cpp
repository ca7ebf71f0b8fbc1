// Gradients of attention for q, k, v and the sinks.
//
// A task is one block of keys of one key head: it goes over all queries that see it, keeps dK and
// dV to itself, and adds its share to dQ. Shares are added in the order of the key blocks, a later
// one waiting for its turn, so that dQ has the same bits for any number of threads, from five
// products a block. (Tasks over query blocks for dQ need seven, and partial sums need memory.)
// Tasks start in order, so what is waited for is being worked on. Threads go side by side through
// the key blocks of one head, whose queries stay in the cache, from its last queries on: those are
// what all key blocks of a causal call have in common, so nobody waits for longer than an addition.
//
// Source: Dao, FlashAttention-2, 2023 (arXiv:2307.08691), algorithm 2 and its deterministic mode.
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "cpu/attention.h"
#include "cpu/attention_backward_block.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

#if defined(__AMX_BF16__)
#include "cpu/attention_backward_tiles.h"
#elif defined(__AVX512F__)
#include "cpu/attention_backward_pairs.h"
#endif

namespace tilewise {
namespace {

// --- what each query row contributes -------------------------------------------------------------

// The sum over dO * out. Where out is exactly 0, as in rows that see nothing, dO may be anything.
template <class T, class Out>
float weighted_sum(const T* grad_out, const Out* out, int64_t n) {
  RowSum sum;
  for_vectors(n, [&](int64_t i, auto part, int way) {
    const F32 x = part.load(out + i), zero = F32::zero();
    sum.ways[way] = sum.ways[way] + select_equal(x, zero, zero, x * part.load(grad_out + i));
  });
  return sum.total();
}

// delta of every query row, laid out like the lse. Returns, where there are sinks, their gradient
// through the rows of each task, to be summed up in order.
template <class T>
std::vector<double> prepare(const Attention& a, const AttentionGradients& g,
                            const std::vector<Sequence>& sequences, float* delta) {
  constexpr int64_t ROWS = 64;
  struct Chunk {
    const Sequence* s;
    int64_t first;
  };
  std::vector<Chunk> chunks;
  for (const Sequence& s : sequences) {
    for (int64_t i = 0; i < s.q_len; i += ROWS) chunks.push_back({&s, i});
  }
  std::vector<double> of_sinks(a.sinks ? chunks.size() * a.heads : 0);
  parallel(static_cast<int64_t>(chunks.size()), [&](int64_t task) {
    const Sequence& s = *chunks[task].s;
    const int64_t end = std::min(chunks[task].first + ROWS, s.q_len);
    for (int64_t i = chunks[task].first; i < end; ++i) {
      for (int64_t h = 0; h < a.heads; ++h) {
        const int64_t row = lse_offset(a, s, i, h);
        const T* grad = static_cast<const T*>(g.grad_out.data) + offset(a, g.grad_out, s, i, h);
        const int64_t at = offset(a, a.out, s, i, h);
        delta[row] = g.out_dtype == DType::f32
                         ? weighted_sum(grad, static_cast<const float*>(a.out.data) + at, a.v_dim)
                         : weighted_sum(grad, static_cast<const T*>(a.out.data) + at, a.v_dim);
        if (g.grad_lse) delta[row] -= g.grad_lse[row];
        if (a.sinks && a.lse[row] != -INFINITY) {
          of_sinks[task * a.heads + h] -= std::exp(a.sinks[h] - a.lse[row]) * delta[row];
        }
      }
    }
  });
  return of_sinks;
}

// --- the tasks -----------------------------------------------------------------------------------

// Buffers, handed from task to task: as many as there are threads.
template <class Scratch>
class Pool {
 public:
  template <class Make>
  std::unique_ptr<Scratch> take(const Make& make) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        std::unique_ptr<Scratch> scratch = std::move(free_.back());
        free_.pop_back();
        return scratch;
      }
    }
    return make();
  }

  void give_back(std::unique_ptr<Scratch> scratch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(scratch));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Scratch>> free_;
};

template <class Block>
struct Scratch {
  Block block;
  Workspace<float> memory;
  Matrix grad_q, grad_k, grad_v;

  Scratch(const Attention& a, const AttentionGradients& g, const float* delta)
      : block(a, g.grad_out, delta) {
    const int64_t stride = odd_stride(a.dim), v_stride = odd_stride(a.v_dim);
    memory = make_workspace<float>((QUERY_BLOCK + KEY_BLOCK) * stride + KEY_BLOCK * v_stride);
    grad_q = {memory.get(), stride};
    grad_k = {grad_q.row(QUERY_BLOCK), stride};
    grad_v = {grad_k.row(KEY_BLOCK), v_stride};
  }
};

// Whose turn it is to add to dQ, for every query block of every head.
class Turns {
 public:
  explicit Turns(int64_t count) : done_(new std::atomic<int64_t>[count]()) {}

  void wait(int64_t i, int64_t turn) const {
    for (int tries = 0; done_[i].load(std::memory_order_acquire) != turn; ++tries) {
      if (tries < 1000) {
        _mm_pause();
      } else {
        std::this_thread::yield();  // there are more threads than cores
      }
    }
  }

  void finish(int64_t i, int64_t turn) { done_[i].store(turn + 1, std::memory_order_release); }

 private:
  std::unique_ptr<std::atomic<int64_t>[]> done_;
};

struct Task {
  const Sequence* s;
  int64_t kv_head, key_block;
  int64_t first_turn;  // of the sequence in Turns: then heads, then query blocks
};

template <class T>
void store_rows(Matrix from, int64_t rows, int64_t n, float scale, T* to, int64_t stride) {
  const F32 factor = F32::all(scale);
  for (int64_t r = 0; r < rows; ++r) {
    for_vectors(n, [&](int64_t i, auto part, int) {
      part.store(to + r * stride + i, load(from.row(r) + i) * factor);
    });
  }
}

void add_rows(Matrix from, int64_t rows, int64_t n, float scale, float* to, int64_t stride) {
  const F32 factor = F32::all(scale);
  for (int64_t r = 0; r < rows; ++r) {
    for_vectors(n, [&](int64_t i, auto part, int) {
      float* sum = to + r * stride + i;
      part.store(sum, fma(load(from.row(r) + i), factor, part.load(sum)));
    });
  }
}

// `grad_q` is dQ in float32, laid out like g.grad_q.
template <class Block>
void run(const Attention& a, const AttentionGradients& g, const Task& task, Scratch<Block>& scratch,
         float* grad_q, Turns& turns) {
  using T = typename Block::Element;
  const Sequence& s = *task.s;
  const int64_t query_blocks = query_blocks_of(s.q_len), group = group_size(a);
  Block& block = scratch.block;
  [[maybe_unused]] const typename Block::Scope scope{};
  bool loaded = false;
  for (int64_t h = task.kv_head * group; h < (task.kv_head + 1) * group; ++h) {
    for (int64_t i = query_blocks - 1; i >= 0; --i) {
      const Range key_blocks = visible_key_blocks(a, s, i);
      if (!is_visible(key_blocks, task.key_block)) continue;
      if (!loaded) block.load_keys(s, task.kv_head, task.key_block);
      block.load_queries(s, h, i);
      block.compute(s, h);
      block.grad_v(scratch.grad_v, loaded);
      block.grad_k(scratch.grad_k, loaded);
      loaded = true;
      block.grad_q(scratch.grad_q);
      const int64_t place = task.first_turn + h * query_blocks + i;
      const int64_t turn = task.key_block - key_blocks.begin;
      turns.wait(place, turn);
      add_rows(scratch.grad_q, block.queries, a.dim, a.scale,
               grad_q + offset(a, g.grad_q, s, i * QUERY_BLOCK, h), g.grad_q.seq_stride);
      turns.finish(place, turn);
    }
  }
  if (!loaded) return;  // zeros are there
  block.finish(scratch.grad_k, scratch.grad_v);
  const int64_t row = (a.cu_seqlens_k ? 0 : s.index) * g.grad_k.batch_stride +
                      (s.k_begin + task.key_block * KEY_BLOCK) * g.grad_k.seq_stride +
                      task.kv_head * g.grad_k.head_stride;
  store_rows(scratch.grad_k, block.keys, a.dim, a.scale, static_cast<T*>(g.grad_k.data) + row,
             g.grad_k.seq_stride);
  const int64_t v_row = (a.cu_seqlens_k ? 0 : s.index) * g.grad_v.batch_stride +
                        (s.k_begin + task.key_block * KEY_BLOCK) * g.grad_v.seq_stride +
                        task.kv_head * g.grad_v.head_stride;
  store_rows(scratch.grad_v, block.keys, a.v_dim, 1.0f, static_cast<T*>(g.grad_v.data) + v_row,
             g.grad_v.seq_stride);
}

std::vector<Task> tasks_of(const Attention& a, const std::vector<Sequence>& sequences,
                           int64_t* turns) {
  std::vector<Task> tasks;
  for (const Sequence& s : sequences) {
    for (int64_t h = 0; h < a.kv_heads; ++h) {
      for (int64_t j = 0; j < key_blocks_of(s.k_len); ++j) tasks.push_back({&s, h, j, *turns});
    }
    *turns += a.heads * query_blocks_of(s.q_len);
  }
  return tasks;
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};

// Zeros, from pages that nobody has to touch before they are used.
std::unique_ptr<float[], Free> make_zeros(int64_t count) {
  auto* p = static_cast<float*>(std::calloc(count > 0 ? count : 1, sizeof(float)));
  if (!p) throw std::bad_alloc();
  return std::unique_ptr<float[], Free>(p);
}

template <class Block>
void backward(const Attention& a, const AttentionGradients& g) {
  using T = typename Block::Element;
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < a.batch; ++b) {
    const Sequence s = sequence_of(a, b);
    if (s.q_len > 0) sequences.push_back(s);
  }
  const int64_t rows = a.cu_seqlens_q ? a.q_tokens : a.batch * a.q_len;
  const auto delta = make_workspace<float>(rows * a.heads);
  const std::vector<double> of_sinks = prepare<T>(a, g, sequences, delta.get());
  for (int64_t h = 0; a.sinks && h < a.heads; ++h) {
    double sum = 0;
    for (size_t i = h; i < of_sinks.size(); i += a.heads) sum += of_sinks[i];
    g.grad_sinks[h] = static_cast<float>(sum);
  }

  constexpr bool in_place = std::is_same_v<T, float>;
  const int64_t q_elements = rows * a.heads * a.dim;
  const auto sums = make_zeros(in_place ? 0 : q_elements);
  float* grad_q = in_place ? static_cast<float*>(g.grad_q.data) : sums.get();
  int64_t turn_count = 0;
  const std::vector<Task> tasks = tasks_of(a, sequences, &turn_count);
  Turns turns(turn_count);
  Pool<Scratch<Block>> pool;
  parallel(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    auto scratch = pool.take([&] { return std::make_unique<Scratch<Block>>(a, g, delta.get()); });
    run(a, g, tasks[i], *scratch, grad_q, turns);
    pool.give_back(std::move(scratch));
  });
  if constexpr (!in_place) {
    const int64_t chunk = rows_per_task(1);
    parallel((q_elements + chunk - 1) / chunk, [&](int64_t task) {
      const int64_t first = task * chunk, n = std::min(chunk, q_elements - first);
      T* to = static_cast<T*>(g.grad_q.data) + first;
      for_vectors(n, [&](int64_t i, auto part, int) {
        part.store(to + i, part.load(grad_q + first + i));
      });
    });
  }
  if (g.grad_bias) attention_bias_backward(a, g, delta.get());
}

}  // namespace

void attention_backward(const Attention& a, const AttentionGradients& g) {
#if defined(__AMX_BF16__)
  if (BackwardTiles::takes(a)) return backward<BackwardTiles>(a, g);
#elif defined(__AVX512F__)
  if (BackwardPairs::takes(a)) return backward<BackwardPairs>(a, g);
#endif
  switch (a.dtype) {
    case DType::f32: return backward<BackwardBlock<float>>(a, g);
    case DType::f16: return backward<BackwardBlock<Half>>(a, g);
    default: return backward<BackwardBlock<BFloat16>>(a, g);
  }
}

}  // namespace tilewise
