// Attention of few query rows: keys and values stream through once, as they lie.
//
// All queries of a sequence and all heads of a group go along the keys together, so a row is loaded
// and converted once for all of them. The keys of a sequence are cut into splits of fixed size,
// counted from key 0; each has a running maximum and sum of its own, and whoever finishes a sequence's
// last split merges them in order. Split sizes depend on nothing, so neither do a row's bits: not on
// threads, nor on the batch, nor on pages.
//
// Requests that share pages have splits in common: one task takes such a split for the rows of all
// of them. That changes what is read how often, and no arithmetic.
//
// Sources: Dao et al., Flash-Decoding, 2023 (splits); Ye et al., FlashInfer, 2025 (arXiv:2501.01005)
// and Juravsky et al., Hydragen, 2024 (arXiv:2402.05099) (shared prefixes).
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/attention.h"
#include "cpu/decode_block.h"
#include "cpu/decode_loops.h"
#include "cpu/decode_plan.h"
#include "cpu/decode_weights.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace tilewise {
namespace {

constexpr int W = F32::WIDTH;
constexpr int64_t TASKS_PER_THREAD = 4;
constexpr int64_t SCORE_STRIDE = BLOCK + STEP;
// A tile of keys, and the next one that is being fetched, are in the second-level cache, with room to
// spare for what else is there.
constexpr int64_t TILE_BYTES = 64 * 1024;
// Up to here rows are converted again for every ROWS of them; beyond, once and kept in memory.
constexpr int64_t MAX_DIRECT_ROWS = 2 * ROWS;

static_assert(DECODE_SPLIT % BLOCK == 0 && BLOCK % STEP == 0 && STEP % W == 0, "nested");

bool is_finite(float x) { return x - x == 0.0f; }

class Decode {
 public:
  Decode(const Attention& a, const Sequence* sequences, int64_t count)
      : a_(a),
        loops_(loops_of(a)),
        expanded_loops_(expanded_loops(a)),
        weights_(a),
        arithmetic_(arithmetic_of(a)),
        runs_(a.kv_dtype == DType::i4 ? 2 : 1),
        k_size_(runs_ * round_up(a.dim / runs_, W)),
        v_size_(runs_ * round_up(a.v_dim / runs_, W)),
        k_bytes_(a.dim * loops_.element_size / runs_),
        v_bytes_(a.v_dim * loops_.element_size / runs_),
        k_head_bytes_(a.k.head_stride * loops_.element_size),
        v_head_bytes_(a.v.head_stride * loops_.element_size),
        plan_(a, sequences, count) {
    partial_stride_ = v_size_ + 2;
    int64_t rows = 1;
    for (const Work& work : plan_.works) rows = std::max(rows, work.rows);
    heads_per_task_ = clamp(MAX_WORK_ROWS / rows, 1, a.kv_heads);
    // Rather enough tasks than long streams; a row's bits do not depend on it.
    const int64_t works = plan_.works.size(), tasks = TASKS_PER_THREAD * thread_count();
    while (heads_per_task_ > 1 && works * (a.kv_heads / heads_per_task_) < tasks) {
      heads_per_task_ = (heads_per_task_ + 1) / 2;
    }
    tile_ = BLOCK;
    const int64_t key_bytes = heads_per_task_ * std::max(k_bytes_, v_bytes_);
    while (tile_ > STEP && tile_ * key_bytes > TILE_BYTES) tile_ /= 2;
    head_parts_ = (a.kv_heads + heads_per_task_ - 1) / heads_per_task_;
    works_per_task_ = std::max<int64_t>(1, works * head_parts_ / tasks);
    partials_ = make_workspace<float>(plan_.partials * a.kv_heads * partial_stride_);
    pending_.reset(new std::atomic<int32_t>[plan_.requests.size() * a.kv_heads]);
    for (size_t i = 0; i < plan_.requests.size(); ++i) {
      for (int64_t h = 0; h < a.kv_heads; ++h) {
        pending_[i * a.kv_heads + h].store(plan_.requests[i].tasks, std::memory_order_relaxed);
        if (plan_.requests[i].splits == 0) merge(plan_.requests[i], h);
      }
    }
  }

  // Neighbouring heads lie side by side in memory, and splits behind each other: taken together, they
  // make one stream of it.
  void run() const {
    const int64_t works = plan_.works.size();
    const int64_t groups = (works + works_per_task_ - 1) / works_per_task_;
    parallel(groups * head_parts_, [&](int64_t i) {
      const int64_t begin = i / head_parts_ * works_per_task_;
      const int64_t end = std::min(begin + works_per_task_, works);
      const int64_t first = i % head_parts_ * heads_per_task_;
      const int64_t heads = std::min(heads_per_task_, a_.kv_heads - first);
      for (int64_t w = begin; w < end; ++w) {
        const Work& work = plan_.works[w];
        run_split(work, first, heads, w + 1 < end ? &plan_.works[w + 1] : nullptr);
        for (int64_t h = first; h < first + heads; ++h) {
          for (int64_t m = 0; m < work.requests; ++m) {
            const int32_t r = plan_.members[work.first_request + m];
            if (pending_[r * a_.kv_heads + h].fetch_sub(1, std::memory_order_acq_rel) == 1) {
              merge(plan_.requests[r], h);
            }
          }
        }
      }
    });
  }

 private:
  // The buffers of one task.
  struct Buffers {
    Buffers(int64_t rows, int64_t k_size, int64_t v_size) {
      const int64_t wider = std::max(k_size, v_size);
      const int64_t row_size = k_size + 2 * v_size + SCORE_STRIDE + 4;
      memory = make_workspace<float>(rows * row_size + STEP * wider + W);
      queries = memory.get();
      out = queries + rows * k_size;
      integers = out + rows * v_size;
      scores = integers + rows * v_size;
      tile = scores + rows * SCORE_STRIDE;
      maxima = tile + STEP * wider;
      sums = maxima + rows;
      factors = sums + rows;
      units = factors + rows;
      for (int64_t j = 0; j < 2 * STEP; ++j) {
        k_tile[j] = tile + j % STEP * k_size;
        v_tile[j] = tile + j % STEP * v_size;
      }
    }
    Workspace<float> memory;
    float *queries, *out, *scores, *tile, *maxima, *sums;
    float *integers, *factors, *units;  // for products of integers
    const void *k_tile[2 * STEP], *v_tile[2 * STEP];  // as a block's, each row twice
  };

  float* partial(const Request& r, int64_t kv_head, int64_t split, int64_t row) const {
    const int64_t place = (kv_head * r.splits + split - r.first_split) * r.rows + row;
    return partials_.get() + (r.partials * a_.kv_heads + place) * partial_stride_;
  }

  void run_split(const Work& work, int64_t kv_head, int64_t heads, const Work* upcoming) const {
    DecodeRow rows[MAX_WORK_ROWS];
    float* partials[MAX_WORK_ROWS];
    const int64_t group = group_size(a_);
    int64_t n = 0;
    for (int64_t h = kv_head; h < kv_head + heads; ++h) {
      const int64_t rows_end = n + work.rows;
      int64_t i = work.first_row;
      for (int64_t m = 0; n < rows_end; ++m, i = 0) {
        const Request& r = plan_.requests[plan_.members[work.first_request + m]];
        for (; i < r.rows && n < rows_end; ++i, ++n) {
          const int64_t query = i / group;
          rows[n] = {&r, query, h * group + i % group, visible_keys(a_, r.sequence, query)};
          partials[n] = partial(r, h, work.split, i);
        }
      }
    }
    Buffers b(n, k_size_, v_size_);
    const auto expand = expand_query(a_);
    for (int64_t r = 0; r < n; ++r) {
      const char* q = static_cast<const char*>(a_.q.data) +
                      offset(a_, a_.q, rows[r].request->sequence, rows[r].query, rows[r].head) *
                          element_size(a_.dtype);
      const int64_t runs = arithmetic_ == Arithmetic::floats ? runs_ : 1, run = a_.dim / runs;
      for (int64_t half = 0; half < runs; ++half) {
        expand(q + half * run * element_size(a_.dtype), run,
               row_of(b.queries, r, k_size_) + half * (k_size_ / runs) * 4);
      }
    }
    // A value that nobody sees may be NaN, and zero times it would spread. That is rare: whoever
    // meets something that is not finite starts again, looking at each row.
    if (!attend(work.split, kv_head, heads, rows, work.rows, b, false, upcoming)) {
      attend(work.split, kv_head, heads, rows, work.rows, b, true, upcoming);
    }
    for (int64_t r = 0; r < n; ++r) {
      loops_.collect(b.out + r * v_size_, v_size_, partials[r]);
      partials[r][v_size_] = b.maxima[r];
      partials[r][v_size_ + 1] = b.sums[r];
    }
  }

  // One split for some heads, n rows each; at its end, the upcoming one is fetched. Returns whether
  // the results are finite.
  bool attend(int64_t split, int64_t kv_head, int64_t heads, const DecodeRow* rows, int64_t n,
              Buffers& b, bool careful, const Work* upcoming) const {
    const int64_t all = heads * n;
    int64_t first = INT64_MAX, end = 0;
    for (int64_t r = 0; r < all; ++r) {
      b.maxima[r] = -INFINITY;
      b.sums[r] = 0.0f;
      if (rows[r].span.first == rows[r].span.end) continue;
      first = std::min(first, rows[r].span.first);
      end = std::max(end, rows[r].span.end);
    }
    std::fill(b.out, b.out + 2 * all * v_size_, 0.0f);  // and b.integers
    first = std::max(first, split * DECODE_SPLIT);
    end = std::min(end, (split + 1) * DECODE_SPLIT);
    if (first >= end) return true;
    Block blocks[2];
    const Sequence& s = rows[0].request->sequence;
    locate(a_, s, kv_head, first, end, blocks[0]);
    bool is_last = false;
    for (int64_t i = 0; !is_last; ++i) {
      const Block& block = blocks[i % 2];
      Block& next = blocks[(i + 1) % 2];
      next.count = 0;
      const int64_t block_end = block.begin + BLOCK;
      is_last = block_end >= end;
      if (!is_last) {
        locate(a_, s, kv_head, block_end, end, next);
      } else if (upcoming) {
        locate_first(*upcoming, kv_head, next);
      }
      score_block(block, heads, n, b, careful);
      weigh_block(block, rows, heads, n, b);
      accumulate_block(block, next, rows, heads, n, b, careful);
    }
    if (arithmetic_ == Arithmetic::integers) return true;  // nothing spreads
    F32 zeros = F32::zero();
    for (int64_t i = 0; i < all * v_size_; i += W) zeros = fma(load(b.out + i), F32::zero(), zeros);
    float sum = reduce_add(zeros);
    for (int64_t r = 0; r < all; ++r) sum += b.sums[r] * 0.0f;
    return sum == 0.0f;
  }

  // About where a split begins.
  void locate_first(const Work& work, int64_t kv_head, Block& block) const {
    const Sequence& s = plan_.requests[plan_.members[work.first_request]].sequence;
    const int64_t begin = work.split * DECODE_SPLIT;
    const int64_t first = std::max(begin, visible_keys(a_, s, 0).first);
    const int64_t end = std::min(begin + DECODE_SPLIT, s.k_len);
    if (first < end) locate(a_, s, kv_head, first, end, block);
  }

  // Row r of float32 or narrower elements.
  static char* row_of(float* rows, int64_t r, int64_t size) {
    return reinterpret_cast<char*>(rows + r * size);
  }

  bool expands(int64_t n, bool careful) const {
    return careful || (n > MAX_DIRECT_ROWS && !loops_.is_expanded);
  }

  // b.scores = queries . keys. What is fetched ahead is the next tile, and at last the values.
  void score_block(const Block& block, int64_t heads, int64_t n, Buffers& b, bool careful) const {
    const bool expand = expands(n, careful);
    const int64_t tile = expand ? STEP : tile_;
    for (int64_t j = block.first; j < block.count; j += tile) {
      const int64_t end = std::min(j + tile, block.count);
      for (int64_t h = 0; h < heads; ++h) {
        CacheRows keys{block.k + j, h * k_head_bytes_};
        CacheRows ahead = end < block.count ? CacheRows{block.k + end, keys.offset}
                                            : CacheRows{block.v + block.first, h * v_head_bytes_};
        if (arithmetic_ == Arithmetic::integers) {
          for (int64_t i = j; i < end; i += STEP, keys.at += STEP, ahead.at += STEP) {
            dot_integers(keys, ahead, h * n, n, i, b);
          }
          continue;
        }
        if (expand) {
          for (int64_t i = 0; i < STEP; ++i) {
            loops_.expand(keys.row<char>(i), a_.dim, row_of(b.tile, i, k_size_));
          }
          keys = {b.k_tile, 0};
        }
        dot(expand ? expanded_loops_ : loops_, keys, ahead, end - j, expand ? k_size_ : a_.dim,
            h * n, n, j, b);
      }
    }
  }

  // Scores [j, j + count) of n rows from `first` on.
  void dot(const RowLoops& loops, CacheRows keys, CacheRows ahead, int64_t count, int64_t dim,
           int64_t first, int64_t n, int64_t j, Buffers& b) const {
    for (int64_t i = 0; i < n; i += ROWS, ahead = keys) {
      const int64_t r = first + i;
      loops.dot[std::min<int64_t>(n - i, ROWS) - 1](row_of(b.queries, r, k_size_), k_size_ * 4,
                                                    keys, ahead, count, dim,
                                                    b.scores + r * SCORE_STRIDE + j, SCORE_STRIDE);
    }
  }

  // The same for STEP keys, in integers.
  void dot_integers(CacheRows keys, CacheRows ahead, int64_t first, int64_t n, int64_t j,
                    Buffers& b) const {
    for (int64_t i = 0; i < n; i += ROWS) {
      const int64_t r = first + i, count = std::min<int64_t>(n - i, ROWS);
      const char* queries = row_of(b.queries, r, k_size_);
      float* scores = b.scores + r * SCORE_STRIDE + j;
      if (i == 0) {
        loops_.dot_transposing[count - 1](queries, k_size_ * 4, keys, ahead, a_.dim, b.tile, scores,
                                          SCORE_STRIDE);
      } else {
        loops_.dot_transposed[count - 1](queries, k_size_ * 4, a_.dim, b.tile, scores,
                                         SCORE_STRIDE);
      }
    }
  }

  // b.scores = weights of the values, and b.out is scaled to the new maxima: now, or where integers
  // are summed, when their sums are added.
  void weigh_block(const Block& block, const DecodeRow* rows, int64_t heads, int64_t n,
                   Buffers& b) const {
    for (int64_t h = 0; h < heads; ++h) {
      const DecodeWeights::Scales scales = weights_.scales_of(block, h);
      for (int64_t r = h * n; r < (h + 1) * n; ++r) {
        float* scores = b.scores + r * SCORE_STRIDE;
        const float factor =
            weights_.weigh(block, rows[r], scales, scores, b.maxima[r], b.sums[r]);
        if (arithmetic_ == Arithmetic::integers) {
          b.factors[r] = factor;
          b.units[r] = loops_.round_weights(scores, static_cast<int>(block.first),
                                            static_cast<int>(round_up(block.count, STEP)));
          continue;
        }
        if (factor == 1.0f) continue;
        float* out = b.out + r * v_size_;
        for (int64_t i = 0; i < v_size_; i += W) store(out + i, load(out + i) * F32::all(factor));
      }
    }
  }

  // b.out += weights . values
  void accumulate_block(const Block& block, const Block& next, const DecodeRow* rows,
                        int64_t heads, int64_t n, Buffers& b, bool careful) const {
    const bool is_integer = arithmetic_ == Arithmetic::integers;
    const bool expand = !is_integer && expands(n, careful);
    float* sums = is_integer ? b.integers : b.out;  // or int32
    const RowLoops& loops = expand ? expanded_loops_ : loops_;
    const int64_t dim = expand ? v_size_ : a_.v_dim, tile = expand ? STEP : tile_;
    for (int64_t j = block.first; j < block.count; j += tile) {
      const int64_t end = std::min(j + tile, block.count);
      for (int64_t h = 0; h < heads; ++h) {
        CacheRows values{block.v + j, h * v_head_bytes_};
        CacheRows ahead = values;
        if (end < block.count) {
          ahead.at = block.v + end;
        } else if (next.count > 0) {
          ahead = {next.k + next.first, h * k_head_bytes_};
        }
        if (expand) {
          for (int64_t i = 0; i < STEP; ++i) expand_value(block, j, i, h, rows, n, b, careful);
          values = {b.v_tile, 0};
        }
        for (int64_t i = 0; i < n; i += ROWS, ahead = values) {
          const int64_t r = h * n + i;
          loops.accumulate[std::min<int64_t>(n - i, ROWS) - 1](
              weights_.at(b.scores + r * SCORE_STRIDE, j), SCORE_STRIDE * 4, values, ahead, end - j,
              dim, sums + r * v_size_, v_size_);
        }
      }
    }
    for (int64_t r = 0; r < heads * n && is_integer; ++r) {
      loops_.add_sums(b.out + r * v_size_, reinterpret_cast<int32_t*>(b.integers + r * v_size_),
                      v_size_, b.factors[r], b.units[r]);
    }
  }

  // Value j + i of a block to row i of b.tile. With care, a row that is not finite becomes zero, and
  // its weights NaN where they are seen.
  void expand_value(const Block& block, int64_t j, int64_t i, int64_t h, const DecodeRow* rows,
                    int64_t n, Buffers& b, bool careful) const {
    const CacheRows values{block.v + j, h * v_head_bytes_};
    char* row = row_of(b.tile, i, v_size_);
    const bool exists = j + i < block.count;
    const bool finite = loops_.expand(values.row<char>(i), a_.v_dim, row);
    if (!careful || (exists && finite && is_finite(block.v_scale_of(a_, j + i, h)))) return;
    std::memset(row, 0, v_size_ * 4);
    if (!exists) return;
    for (int64_t r = h * n; r < (h + 1) * n; ++r) {
      const bool is_seen = weights_.sees(rows[r], block, j + i);
      weights_.set(b.scores + r * SCORE_STRIDE, j + i, is_seen ? NAN : 0.0f);
    }
  }

  // The splits of one head's rows, in order, and the sink; then out and lse.
  void merge(const Request& request, int64_t kv_head) const {
    const auto buffer = std::make_unique<float[]>(v_size_);
    for (int64_t row = 0; row < request.rows; ++row) {
      const int64_t query = row / group_size(a_);
      const int64_t head = kv_head * group_size(a_) + row % group_size(a_);
      const int64_t splits_end = request.first_split + request.splits;
      const float sink = a_.sinks ? a_.sinks[head] : -INFINITY;
      float maximum = sink;
      for (int64_t i = request.first_split; i < splits_end; ++i) {
        maximum = std::max(maximum, partial(request, kv_head, i, row)[v_size_]);
      }
      const float shift = maximum == -INFINITY ? 0.0f : maximum;
      float sum = std::exp(sink - shift);
      bool sees_nothing = true;
      std::fill(buffer.get(), buffer.get() + v_size_, 0.0f);
      for (int64_t i = request.first_split; i < splits_end; ++i) {
        const float* p = partial(request, kv_head, i, row);
        if (p[v_size_] == -INFINITY && p[v_size_ + 1] == 0.0f) continue;
        sees_nothing = false;
        const float weight = std::exp(p[v_size_] - shift);
        sum += weight * p[v_size_ + 1];
        for (int64_t d = 0; d < v_size_; d += W) {
          store(&buffer[d], fma(F32::all(weight), load(p + d), load(&buffer[d])));
        }
      }
      const F32 factor = F32::all(sees_nothing ? 0.0f : 1.0f / sum);
      for (int64_t d = 0; d < v_size_; d += W) store(&buffer[d], load(&buffer[d]) * factor);
      write(request.sequence, query, head, buffer.get());
      a_.lse[lse_offset(a_, request.sequence, query, head)] = shift + std::log(sum);
    }
  }

  void write(const Sequence& s, int64_t query, int64_t head, const float* row) const {
    const int64_t at = offset(a_, a_.out, s, query, head);
    switch (a_.dtype) {
      case DType::f32: return write_runs(static_cast<float*>(a_.out.data) + at, row);
      case DType::f16: return write_runs(static_cast<Half*>(a_.out.data) + at, row);
      default: return write_runs(static_cast<BFloat16*>(a_.out.data) + at, row);
    }
  }

  template <class T>
  void write_runs(T* out, const float* row) const {
    const int64_t n = a_.v_dim / runs_;
    for (int64_t run = 0; run < runs_; ++run, out += n, row += v_size_ / runs_) {
      int64_t i = 0;
      for (; i + W <= n; i += W) store(out + i, load(row + i));
      if (i < n) store_partial(out + i, load(row + i), static_cast<int>(n - i));
    }
  }

  const Attention& a_;
  const RowLoops loops_, expanded_loops_;
  const DecodeWeights weights_;
  const Arithmetic arithmetic_;
  const int64_t runs_;             // of a row: two in an int4 cache
  const int64_t k_size_, v_size_;  // of a row, padded
  const int64_t k_bytes_, v_bytes_;  // of a row in the cache
  const int64_t k_head_bytes_, v_head_bytes_;  // from one head's to the next
  const DecodePlan plan_;
  int64_t partial_stride_, heads_per_task_, head_parts_, works_per_task_;
  int64_t tile_;  // keys that every head takes before any goes on: BLOCK or a part of it
  Workspace<float> partials_;  // out, maximum and sum of (request, kv head, split, row)
  std::unique_ptr<std::atomic<int32_t>[]> pending_;  // splits of (request, kv head) not yet done
};

}  // namespace

void attention_decode(const Attention& a, const Sequence* sequences, int64_t count) {
  Decode(a, sequences, count).run();
}

}  // namespace tilewise
