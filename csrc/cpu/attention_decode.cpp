// Attention of few query rows: keys and values stream through once, as they lie.
//
// All queries of a sequence and all heads of a group go along the keys together, so a row is loaded
// and converted once for all of them. The keys of a sequence are cut into splits of fixed size,
// counted from key 0; each split is a task of its own with its own running maximum and sum, and
// whoever finishes a sequence's last split merges them in order. Split sizes depend on nothing, so
// neither do a row's bits: not on threads, nor on the batch, nor on pages.
//
// Requests that share pages have splits in common: one task takes such a split for the rows of all
// of them. That changes what is read how often, and no arithmetic.
//
// Sources: Dao et al., Flash-Decoding, 2023 (splits); Ye et al., FlashInfer, 2025 (arXiv:2501.01005)
// and Juravsky et al., Hydragen, 2024 (arXiv:2402.05099) (shared prefixes).
#include <atomic>
#include <cfloat>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/attention.h"
#include "cpu/decode_plan.h"
#include "cpu/decode_rows.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace tilewise {
namespace {

constexpr int W = F32::WIDTH;
constexpr int64_t BLOCK = 128;  // keys between two updates of the maxima
constexpr int64_t TILE = 16;    // keys whose rows stay in the first-level cache, whatever the strides
constexpr int64_t MIN_TASKS = 32;
constexpr int64_t SCORE_STRIDE = BLOCK + 16;
// Up to here rows are converted again for every ROWS of them; beyond, once to float32 in memory.
constexpr int64_t MAX_DIRECT_ROWS = 2 * ROWS;

static_assert(DECODE_SPLIT % BLOCK == 0 && BLOCK % TILE == 0 && TILE % W == 0, "nested");

// Where the rows of a block of keys are.
struct Block {
  const void* k[BLOCK + TILE];  // of the task's first head; the last one repeats
  const void* v[BLOCK + TILE];
  const float *k_scale[BLOCK], *v_scale[BLOCK];  // the same
  bool is_missing[BLOCK];  // valid if any_missing: keys in pages that do not exist
  bool any_missing;
  int64_t begin, count;  // keys [begin, begin + count) of the sequence
  int64_t first_tile;    // nobody sees a key before
};

// One query of one head in a task.
struct Row {
  const Request* request;
  int64_t query, head;  // within the sequence, within the call
  Span span;
};

float exp2_of(float x) {
  float lanes[W];
  store(lanes, exp2(F32::all(x)));
  return lanes[0];
}

bool is_finite(float x) { return x - x == 0.0f; }

class Decode {
 public:
  Decode(const Attention& a, const Sequence* sequences, int64_t count)
      : a_(a),
        loops_(row_loops_of(a.kv_dtype)),
        float_loops_(row_loops_of(DType::f32)),
        q_loops_(row_loops_of(a.dtype)),
        runs_(a.kv_dtype == DType::i4 ? 2 : 1),
        k_size_(loops_.padded_size(a.dim)),
        v_size_(loops_.padded_size(a.v_dim)),
        k_bytes_(a.dim * loops_.element_size / runs_),
        v_bytes_(a.v_dim * loops_.element_size / runs_),
        k_head_bytes_(a.k.head_stride * loops_.element_size),
        v_head_bytes_(a.v.head_stride * loops_.element_size),
        plan_(a, sequences, count) {
    partial_stride_ = v_size_ + 2;
    int64_t rows = 1;
    for (const Work& work : plan_.works) rows = std::max(rows, work.rows);
    heads_per_task_ = clamp(MAX_WORK_ROWS / rows, 1, a.kv_heads);
    // Rather enough tasks for the threads of a large machine than long streams.
    const int64_t works = plan_.works.size();
    while (heads_per_task_ > 1 && works * (a.kv_heads / heads_per_task_) < MIN_TASKS) {
      heads_per_task_ = (heads_per_task_ + 1) / 2;
    }
    head_parts_ = (a.kv_heads + heads_per_task_ - 1) / heads_per_task_;
    partials_ = make_workspace<float>(plan_.partials * a.kv_heads * partial_stride_);
    pending_.reset(new std::atomic<int32_t>[plan_.requests.size() * a.kv_heads]);
    for (size_t i = 0; i < plan_.requests.size(); ++i) {
      for (int64_t h = 0; h < a.kv_heads; ++h) {
        pending_[i * a.kv_heads + h].store(plan_.requests[i].tasks, std::memory_order_relaxed);
        if (plan_.requests[i].splits == 0) merge(plan_.requests[i], h);
      }
    }
  }

  // Neighbouring heads lie side by side in memory: taken together, they make one stream of it.
  void run() const {
    parallel(static_cast<int64_t>(plan_.works.size()) * head_parts_, [&](int64_t i) {
      const Work& work = plan_.works[i / head_parts_];
      const int64_t first = i % head_parts_ * heads_per_task_;
      const int64_t end = std::min(first + heads_per_task_, a_.kv_heads);
      run_split(work, first, end - first);
      for (int64_t h = first; h < end; ++h) {
        for (int64_t m = 0; m < work.requests; ++m) {
          const int32_t r = plan_.members[work.first_request + m];
          if (pending_[r * a_.kv_heads + h].fetch_sub(1, std::memory_order_acq_rel) == 1) {
            merge(plan_.requests[r], h);
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
      memory = make_workspace<float>(rows * (k_size + v_size + SCORE_STRIDE + 2) + TILE * wider + W);
      queries = memory.get();
      out = queries + rows * k_size;
      scores = out + rows * v_size;
      tile = scores + rows * SCORE_STRIDE;
      maxima = tile + TILE * wider;
      sums = maxima + rows;
      for (int64_t j = 0; j < TILE; ++j) {
        k_tile[j] = tile + j * k_size;
        v_tile[j] = tile + j * v_size;
      }
    }
    Workspace<float> memory;
    float *queries, *out, *scores, *tile, *maxima, *sums;
    const void *k_tile[TILE], *v_tile[TILE];
  };

  float* partial(const Request& r, int64_t kv_head, int64_t split, int64_t row) const {
    const int64_t place = (kv_head * r.splits + split - r.first_split) * r.rows + row;
    return partials_.get() + (r.partials * a_.kv_heads + place) * partial_stride_;
  }

  int64_t element_size() const { return a_.dtype == DType::f32 ? 4 : 2; }

  void run_split(const Work& work, int64_t kv_head, int64_t heads) const {
    Row rows[MAX_WORK_ROWS];
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
    for (int64_t r = 0; r < n; ++r) {
      const char* q = static_cast<const char*>(a_.q.data) +
                      offset(a_, a_.q, rows[r].request->sequence, rows[r].query, rows[r].head) *
                          element_size();
      const int64_t run = a_.dim / runs_;
      for (int64_t half = 0; half < runs_; ++half) {
        q_loops_.expand(q + half * run * element_size(), run,
                        b.queries + r * k_size_ + half * (k_size_ / runs_));
      }
    }
    // A value that nobody sees may be NaN, and zero times it would spread. That is rare: whoever
    // meets something that is not finite starts again, looking at each row.
    if (!attend(work.split, kv_head, heads, rows, work.rows, b, false)) {
      attend(work.split, kv_head, heads, rows, work.rows, b, true);
    }
    for (int64_t r = 0; r < n; ++r) {
      std::memcpy(partials[r], b.out + r * v_size_, v_size_ * 4);
      partials[r][v_size_] = b.maxima[r];
      partials[r][v_size_ + 1] = b.sums[r];
    }
  }

  // One split for some heads, n rows each. Returns whether the results are finite.
  bool attend(int64_t split, int64_t kv_head, int64_t heads, const Row* rows, int64_t n, Buffers& b,
              bool careful) const {
    const int64_t all = heads * n;
    int64_t first = INT64_MAX, end = 0;
    for (int64_t r = 0; r < all; ++r) {
      b.maxima[r] = -INFINITY;
      b.sums[r] = 0.0f;
      if (rows[r].span.first == rows[r].span.end) continue;
      first = std::min(first, rows[r].span.first);
      end = std::max(end, rows[r].span.end);
    }
    std::fill(b.out, b.out + all * v_size_, 0.0f);
    first = std::max(first, split * DECODE_SPLIT);
    end = std::min(end, (split + 1) * DECODE_SPLIT);
    if (first >= end) return true;
    Block blocks[2];
    const Sequence& s = rows[0].request->sequence;
    locate(s, kv_head, first, end, blocks[0]);
    for (int64_t i = 0;; ++i) {
      const Block& block = blocks[i % 2];
      Block& next = blocks[(i + 1) % 2];
      next.count = 0;
      const int64_t block_end = block.begin + BLOCK;
      if (block_end < end) locate(s, kv_head, block_end, end, next);
      score_block(block, heads, n, b, careful);
      for (int64_t h = 0; h < heads; ++h) weigh_head(block, h, rows, n, b);
      accumulate_block(block, next, rows, heads, n, b, careful);
      if (next.count == 0) break;
    }
    F32 zeros = F32::zero();
    for (int64_t i = 0; i < all * v_size_; i += W) zeros = fma(load(b.out + i), F32::zero(), zeros);
    float sum = reduce_add(zeros);
    for (int64_t r = 0; r < all; ++r) sum += b.sums[r] * 0.0f;
    return sum == 0.0f;
  }

  // The block that key `first` is in, as far as `end`.
  void locate(const Sequence& s, int64_t kv_head, int64_t first, int64_t end, Block& block) const {
    block.begin = first / BLOCK * BLOCK;
    block.first_tile = (first - block.begin) / TILE;
    block.count = std::min(end - block.begin, BLOCK);
    block.any_missing = false;
    const int64_t begin = block.first_tile * TILE;
    const int64_t run_size = a_.block_table ? a_.page_size : BLOCK;
    const char* k = static_cast<const char*>(a_.k.data);
    const char* v = static_cast<const char*>(a_.v.data);
    const int64_t element = loops_.element_size;
    for (int64_t j = begin; j < block.count;) {
      // Rows are evenly spaced within a page, and throughout where there are none.
      const int64_t key = block.begin + j;
      const int64_t slot = a_.block_table ? key % run_size : 0;
      const int64_t run_end = std::min(block.count, j + run_size - slot);
      const int64_t k_row = row_offset(a_, a_.k, s, key, kv_head);
      if (k_row < 0) {
        if (!block.any_missing) std::fill(block.is_missing, block.is_missing + BLOCK, false);
        block.any_missing = true;
        for (; j < run_end; ++j) {
          block.k[j] = k;  // read and masked, as anything that nobody sees
          block.v[j] = v;
          block.k_scale[j] = a_.k.scale;
          block.v_scale[j] = a_.v.scale;
          block.is_missing[j] = true;
        }
        continue;
      }
      const char* k_at = k + k_row * element;
      const char* v_at = v + row_offset(a_, a_.v, s, key, kv_head) * element;
      if (a_.k.scale) {
        const int64_t page = a_.block_table[s.index * a_.block_table_stride + key / run_size];
        const float* k_scale = scales(a_.k, page, slot, kv_head);
        const float* v_scale = scales(a_.v, page, slot, kv_head);
        for (int64_t i = j; i < run_end; ++i) {
          block.k_scale[i] = k_scale + (i - j) * a_.k.scale_slot_stride;
          block.v_scale[i] = v_scale + (i - j) * a_.v.scale_slot_stride;
        }
      }
      for (; j < run_end; ++j) {
        block.k[j] = k_at;
        block.v[j] = v_at;
        k_at += a_.k.seq_stride * element;
        v_at += a_.v.seq_stride * element;
      }
    }
    std::fill_n(block.k + block.count, TILE, block.k[block.count - 1]);
    std::fill_n(block.v + block.count, TILE, block.v[block.count - 1]);
  }

  static const float* scales(const KeyValues& t, int64_t page, int64_t slot, int64_t kv_head) {
    return t.scale + page * t.scale_page_stride + slot * t.scale_slot_stride +
           kv_head * t.scale_head_stride;
  }

  bool expands(int64_t n, bool careful) const {
    return careful || (n > MAX_DIRECT_ROWS && !loops_.is_float);
  }

  // b.scores = queries . keys. What is fetched ahead is the next tile, and at last the values.
  void score_block(const Block& block, int64_t heads, int64_t n, Buffers& b, bool careful) const {
    const bool expand = expands(n, careful);
    const RowLoops& loops = expand ? float_loops_ : loops_;
    const int64_t dim = expand ? k_size_ : a_.dim;
    const int64_t first = block.first_tile * TILE;
    for (int64_t j = first; j < block.count; j += TILE) {
      const bool is_last = j + TILE >= block.count;
      for (int64_t h = 0; h < heads; ++h) {
        const void* const* keys = block.k + j;
        int64_t offset = h * k_head_bytes_;
        Ahead ahead = is_last
                          ? Ahead{block.v + first, TILE, h * v_head_bytes_, v_bytes_}
                          : Ahead{block.k + j + TILE, TILE, offset, k_bytes_};
        if (expand) {
          for (int64_t i = 0; i < TILE; ++i) {
            loops_.expand(row_at<char>(keys[i], offset), a_.dim, b.tile + i * k_size_);
          }
          keys = b.k_tile;
          offset = 0;
        }
        for (int64_t i = 0; i < n; i += ROWS, ahead.count = 0) {
          const int64_t r = h * n + i;
          loops.dot[std::min<int64_t>(n - i, ROWS) - 1](b.queries + r * k_size_, k_size_, keys,
                                                        offset, TILE, dim,
                                                        b.scores + r * SCORE_STRIDE + j,
                                                        SCORE_STRIDE, ahead);
        }
      }
    }
  }

  // b.out += weights . values
  void accumulate_block(const Block& block, const Block& next, const Row* rows, int64_t heads,
                        int64_t n, Buffers& b, bool careful) const {
    const bool expand = expands(n, careful);
    const RowLoops& loops = expand ? float_loops_ : loops_;
    const int64_t dim = expand ? v_size_ : a_.v_dim;
    for (int64_t j = block.first_tile * TILE; j < block.count; j += TILE) {
      const int64_t count = std::min(TILE, block.count - j);
      for (int64_t h = 0; h < heads; ++h) {
        const void* const* values = block.v + j;
        int64_t offset = h * v_head_bytes_;
        Ahead ahead = j + TILE < block.count
                          ? Ahead{block.v + j + TILE, TILE, offset, v_bytes_}
                          : Ahead{next.k, std::min(next.count, TILE), h * k_head_bytes_, k_bytes_};
        if (expand) {
          for (int64_t i = 0; i < count; ++i) {
            float* row = b.tile + i * v_size_;
            const bool finite = loops_.expand(row_at<char>(values[i], offset), a_.v_dim, row);
            if (careful && !(finite && is_finite(v_scale(block, j + i, h)))) {
              std::fill_n(row, v_size_, 0.0f);
              for (int64_t r = h * n; r < (h + 1) * n; ++r) {
                b.scores[r * SCORE_STRIDE + j + i] = sees(rows[r], block, j + i) ? NAN : 0.0f;
              }
            }
          }
          values = b.v_tile;
          offset = 0;
        }
        for (int64_t i = 0; i < n; i += ROWS, ahead.count = 0) {
          const int64_t r = h * n + i;
          loops.accumulate[std::min<int64_t>(n - i, ROWS) - 1](
              b.scores + r * SCORE_STRIDE + j, SCORE_STRIDE, values, offset, count, dim,
              b.out + r * v_size_, v_size_, ahead);
        }
      }
    }
  }

  float v_scale(const Block& block, int64_t j, int64_t h) const {
    return a_.v.scale ? block.v_scale[j][h * a_.v.scale_head_stride] : 1.0f;
  }

  void weigh_head(const Block& block, int64_t h, const Row* rows, int64_t n, Buffers& b) const {
    alignas(64) float k_scale[BLOCK] = {}, v_scale[BLOCK] = {};
    if (a_.k.scale) {
      for (int64_t j = block.first_tile * TILE; j < block.count; ++j) {
        k_scale[j] = block.k_scale[j][h * a_.k.scale_head_stride];
        v_scale[j] = block.v_scale[j][h * a_.v.scale_head_stride];
      }
    }
    for (int64_t r = h * n; r < (h + 1) * n; ++r) weigh(block, rows[r], r, k_scale, v_scale, b);
  }

  // The bias of a row's key 0 on.
  template <class T>
  const T* bias_of(const Row& row) const {
    const Sequence& s = row.request->sequence;
    return static_cast<const T*>(a_.bias) + s.index * a_.bias_stride[0] +
           row.head * a_.bias_stride[1] + (s.q_begin + row.query) * a_.bias_stride[2];
  }

  float bias_at(const Row& row, int64_t key) const {
    const int64_t at = key * a_.bias_stride[3];
    if (a_.bias_is_mask) return bias_of<uint8_t>(row)[at] ? 0.0f : -INFINITY;
    return bias_of<float>(row)[at];
  }

  bool sees(const Row& row, const Block& block, int64_t j) const {
    const int64_t key = block.begin + j;
    return key >= row.span.first && key < row.span.end &&
           !(block.any_missing && block.is_missing[j]) &&
           !(a_.bias && bias_at(row, key) == -INFINITY);
  }

  // From products to weights exp(score - maximum), in place, bringing the row's maximum, its sum
  // and its output up to date.
  void weigh(const Block& block, const Row& row, int64_t r, const float* k_scale,
             const float* v_scale, Buffers& b) const {
    const int begin = static_cast<int>(block.first_tile * TILE);
    const int end = static_cast<int>(round_up(block.count, W));
    const int first = static_cast<int>(clamp(row.span.first - block.begin, begin, end));
    const int last = static_cast<int>(clamp(row.span.end - block.begin, begin, block.count));
    float* scores = b.scores + r * SCORE_STRIDE;
    if (first >= last) {
      std::fill(scores + begin, scores + end, 0.0f);
      return;
    }
    alignas(64) float bias[BLOCK];
    const bool has_bias = a_.bias || block.any_missing;
    if (has_bias) {
      std::fill(bias + begin, bias + end, 0.0f);
      for (int j = first; j < last; ++j) {
        const bool exists = !block.any_missing || !block.is_missing[j];
        bias[j] = !exists ? -INFINITY : a_.bias ? bias_at(row, block.begin + j) : 0.0f;
      }
    }
    const Sequence& s = row.request->sequence;
    const bool has_alibi = a_.alibi_slopes;
    const F32 slope = F32::all(
        has_alibi ? a_.alibi_slopes[s.index * a_.alibi_batch_stride + row.head] : 0.0f);
    const float distance = static_cast<float>(s.position(row.query) - block.begin);
    const F32 softcap = F32::all(a_.softcap);

    F32 maximum = F32::all(-INFINITY);
    for (int j = begin; j < end; j += W) {
      F32 x = load(scores + j) * F32::all(a_.scale);
      if (a_.k.scale) x = x * load(k_scale + j);
      // Infinity here comes from a query or a key that is not finite, which means NaN.
      x = fma(x, F32::zero(), x);
      if (a_.softcap > 0) x = softcap * tanh(x / softcap);
      if (has_alibi) x = x - slope * abs(F32::all(distance - static_cast<float>(j)) - lanes());
      if (has_bias) {
        const F32 y = load(bias + j);
        x = select_less(y, F32::all(-FLT_MAX), F32::all(-INFINITY), x + y);
      }
      if (j < first) x = select_below(first - j, F32::all(-INFINITY), x);
      if (j + W > last) x = select_below(last - j, x, F32::all(-INFINITY));
      store(scores + j, x);
      maximum = max(x, maximum);  // passes over NaN, which the sum will not
    }
    const float old_maximum = b.maxima[r];
    const float new_maximum = std::max(old_maximum, reduce_max(maximum));
    const F32 shift = F32::all(new_maximum == -INFINITY ? 0.0f : new_maximum);
    F32 sum = F32::zero();
    for (int j = begin; j < end; j += W) {
      F32 weight = exp2((load(scores + j) - shift) * F32::all(LOG2E));
      sum = sum + weight;
      if (a_.v.scale) weight = weight * load(v_scale + j);
      store(scores + j, weight);
    }
    if (new_maximum != old_maximum) {
      const float factor = exp2_of((old_maximum - new_maximum) * LOG2E);
      b.maxima[r] = new_maximum;
      b.sums[r] *= factor;
      float* out = b.out + r * v_size_;
      for (int64_t i = 0; i < v_size_; i += W) store(out + i, load(out + i) * F32::all(factor));
    }
    b.sums[r] += reduce_add(sum);
  }

  static F32 lanes() {
    alignas(64) static const float numbers[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                  8, 9, 10, 11, 12, 13, 14, 15};
    return load(numbers);
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
  const RowLoops loops_, float_loops_, q_loops_;
  const int64_t runs_;             // of a row: two in an int4 cache
  const int64_t k_size_, v_size_;  // of a row in float32, padded
  const int64_t k_bytes_, v_bytes_;  // of a row in the cache
  const int64_t k_head_bytes_, v_head_bytes_;  // from one head's to the next
  const DecodePlan plan_;
  int64_t partial_stride_, heads_per_task_, head_parts_;
  Workspace<float> partials_;  // out, maximum and sum of (request, kv head, split, row)
  std::unique_ptr<std::atomic<int32_t>[]> pending_;  // splits of (request, kv head) not yet done
};

}  // namespace

void attention_decode(const Attention& a, const Sequence* sequences, int64_t count) {
  Decode(a, sequences, count).run();
}

}  // namespace tilewise
