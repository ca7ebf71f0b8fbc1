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
#include <mutex>
#include <optional>
#include <vector>

#include "cpu/attention.h"
#include "cpu/decode_block.h"
#include "cpu/decode_integer_products.h"
#include "cpu/decode_partials.h"
#include "cpu/decode_plan.h"
#include "cpu/decode_products.h"
#include "cpu/decode_weights.h"
#include "cpu/parallel.h"

#if defined(__AMX_BF16__)
#include "cpu/decode_tile_products.h"
#endif

namespace tilewise {
namespace {

constexpr int64_t TASKS_PER_THREAD = 4;

static_assert(DECODE_SPLIT % BLOCK == 0, "nested");

// Rather enough tasks than long streams; a row's bits do not depend on it.
int64_t heads_per_task(const Attention& a, const DecodePlan& plan) {
  int64_t rows = 1;
  for (const Work& work : plan.works) rows = std::max(rows, work.rows);
  const int64_t works = plan.works.size(), tasks = TASKS_PER_THREAD * thread_count();
  int64_t heads = clamp(MAX_WORK_ROWS / rows, 1, a.kv_heads);
  while (heads > 1 && works * (a.kv_heads / heads) < tasks) heads = (heads + 1) / 2;
  return heads;
}

template <class Products>
class Decode {
 public:
  Decode(const Attention& a, const Sequence* sequences, int64_t count)
      : a_(a),
        plan_(a, sequences, count),
        sizes_(a, heads_per_task(a, plan_), Products::near_bytes(a)),
        weights_(a),
        products_(a, sizes_, weights_),
        memory_(plan_, sizes_, DecodePartials::size(a, plan_, sizes_), a.kv_heads),
        partials_(a, sizes_, memory_.partials()),
        pending_(new std::atomic<int32_t>[plan_.requests.size() * a.kv_heads]) {
    for (size_t i = 0; i < plan_.requests.size(); ++i) {
      for (int64_t h = 0; h < a.kv_heads; ++h) {
        pending_[i * a.kv_heads + h].store(plan_.requests[i].tasks, std::memory_order_relaxed);
        if (plan_.requests[i].splits == 0) partials_.merge(plan_.requests[i], h);
      }
    }
  }

  // Neighbouring heads lie side by side in memory, and splits behind each other: taken together, they
  // make one stream of it.
  void run() const {
    const int64_t works = plan_.works.size();
    const int64_t head_parts = (a_.kv_heads + sizes_.heads - 1) / sizes_.heads;
    const int64_t works_per_task =
        std::max<int64_t>(1, works * head_parts / (TASKS_PER_THREAD * thread_count()));
    const int64_t groups = (works + works_per_task - 1) / works_per_task;
    parallel(groups * head_parts, [&](int64_t i) {
      const int64_t begin = i / head_parts * works_per_task;
      const int64_t end = std::min(begin + works_per_task, works);
      const int64_t first = i % head_parts * sizes_.heads;
      const int64_t heads = std::min(sizes_.heads, a_.kv_heads - first);
      const typename Memory::Part part(memory_);
      std::optional<Buffers> buffers;
      for (int64_t w = begin; w < end; ++w) {
        const Work& work = plan_.works[w];
        const bool has_queries = w > begin && plan_.have_same_rows(plan_.works[w - 1], work);
        if (!has_queries) buffers.emplace(part.data, heads, work.rows, sizes_);
        run_split(work, first, heads, w + 1 < end ? &plan_.works[w + 1] : nullptr, *buffers,
                  has_queries);
        for (int64_t h = first; h < first + heads; ++h) {
          for (int64_t m = 0; m < work.requests; ++m) {
            const int32_t r = plan_.members[work.first_request + m];
            if (pending_[r * a_.kv_heads + h].fetch_sub(1, std::memory_order_acq_rel) == 1) {
              partials_.merge(plan_.requests[r], h);
            }
          }
        }
      }
    });
  }

 private:
  using Buffers = typename Products::Buffers;

  // All memory of a call at once: what is left of tasks, and buffers for as many as there are threads.
  // Pieces that every task frees and asks for may go back to the system each time, and a page that comes
  // back costs up to a microsecond.
  class Memory {
   public:
    // One task's.
    struct Part {
      explicit Part(const Memory& all) : data(all.take()), all_(all) {}
      ~Part() { all_.give(data); }
      Part(const Part&) = delete;
      Part& operator=(const Part&) = delete;
      float* const data;

     private:
      const Memory& all_;
    };

    Memory(const DecodePlan& plan, const DecodeSizes& sizes, int64_t partials, int64_t kv_heads) {
      for (const Work& work : plan.works) {
        each_ = std::max(each_, Buffers::size(sizes.heads, work.rows, sizes));
      }
      each_ = round_up(each_, PAGE);
      partials = round_up(partials, PAGE);
      const int64_t most = plan.works.size() * kv_heads, parts = std::min(thread_count(), most);
      memory_ = make_workspace<float>(partials + parts * each_);
      for (int64_t i = parts; i-- > 0;) free_.push_back(memory_.get() + partials + i * each_);
    }

    float* partials() const { return memory_.get(); }

   private:
    static constexpr int64_t PAGE = 1024;  // floats: threads don't share pages

    // More than were foreseen are rare, and served.
    float* take() const {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (free_.empty()) {
        more_.push_back(make_workspace<float>(each_));
        return more_.back().get();
      }
      float* part = free_.back();
      free_.pop_back();
      return part;
    }
    void give(float* part) const {
      const std::lock_guard<std::mutex> lock(mutex_);
      free_.push_back(part);
    }

    int64_t each_ = 0;
    Workspace<float> memory_;
    mutable std::mutex mutex_;
    mutable std::vector<float*> free_;
    mutable std::vector<Workspace<float>> more_;
  };

  void run_split(const Work& work, int64_t kv_head, int64_t heads, const Work* upcoming, Buffers& b,
                 bool has_queries) const {
    DecodeRow at[MAX_WORK_ROWS];
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
          at[n] = {&r, query, h * group + i % group, visible_keys(a_, r.sequence, query)};
          partials[n] = partials_.at(r, h, work.split, i);
        }
      }
    }
    const TaskRows rows{at, heads, work.rows};
    for (int64_t r = 0; r < n && !has_queries; ++r) {
      const int64_t q = offset(a_, a_.q, at[r].request->sequence, at[r].query, at[r].head);
      products_.take_query(static_cast<const char*>(a_.q.data) + q * element_size(a_.dtype), r, b);
    }
    if (!attend(work.split, kv_head, rows, b, false, upcoming)) {
      attend(work.split, kv_head, rows, b, true, upcoming);
    }
    for (int64_t r = 0; r < n; ++r) {
      products_.collect(r, b, partials[r]);
      partials[r][sizes_.v_size] = b.maxima[r];
      partials[r][sizes_.v_size + 1] = b.sums[r];
    }
  }

  // One split for some heads' rows; at its end, the upcoming one is fetched. Returns whether the
  // results are finite.
  bool attend(int64_t split, int64_t kv_head, const TaskRows& rows, Buffers& b, bool careful,
              const Work* upcoming) const {
    int64_t first = INT64_MAX, end = 0;
    for (int64_t r = 0; r < rows.all(); ++r) {
      b.maxima[r] = -INFINITY;
      b.sums[r] = 0.0f;
      const Span& span = rows.at[r].span;
      if (span.first == span.end) continue;
      first = std::min(first, span.first);
      end = std::max(end, span.end);
    }
    std::fill_n(b.out, rows.all() * sizes_.v_size, 0.0f);
    first = std::max(first, split * DECODE_SPLIT);
    end = std::min(end, (split + 1) * DECODE_SPLIT);
    if (first >= end) return true;
    Block blocks[2];
    const Sequence& s = rows.at[0].request->sequence;
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
      products_.score(block, rows, b, careful);
      weigh(block, rows, b);
      products_.accumulate(block, next, rows, b, careful);
    }
    return products_.is_finite(rows.all(), b);
  }

  // About where a split begins.
  void locate_first(const Work& work, int64_t kv_head, Block& block) const {
    const Sequence& s = plan_.requests[plan_.members[work.first_request]].sequence;
    const int64_t begin = work.split * DECODE_SPLIT;
    const int64_t first = std::max(begin, visible_keys(a_, s, 0).first);
    const int64_t end = std::min(begin + DECODE_SPLIT, s.k_len);
    if (first < end) locate(a_, s, kv_head, first, end, block);
  }

  // b.scores = weights of the values. The output so far is to be scaled to the new maxima.
  void weigh(const Block& block, const TaskRows& rows, Buffers& b) const {
    auto* all_scales = reinterpret_cast<DecodeWeights::Scales*>(b.scales);
    weights_.take_scales(block, rows.heads, all_scales);
    for (int64_t h = 0; h < rows.heads; ++h) {
      const DecodeWeights::Scales& scales = all_scales[h];
      for (int64_t r = h * rows.count; r < (h + 1) * rows.count; ++r) {
        float* scores = b.scores + r * SCORE_STRIDE;
        const float factor =
            weights_.weigh(block, rows.at[r], scales, scores, b.maxima[r], b.sums[r]);
        products_.take_weights(block, r, factor, b);
      }
    }
  }

  const Attention& a_;
  const DecodePlan plan_;
  const DecodeSizes sizes_;
  const DecodeWeights weights_;
  const Products products_;
  const Memory memory_;
  const DecodePartials partials_;
  const std::unique_ptr<std::atomic<int32_t>[]> pending_;  // splits of (request, kv head) to do
};

}  // namespace

void attention_decode(const Attention& a, const Sequence* sequences, int64_t count) {
#if defined(__AMX_BF16__)
  if (DecodeTileProducts::takes(a)) {
    return Decode<DecodeTileProducts>(a, sequences, count).run();
  }
#endif
#if defined(__AVX512BF16__)
  if (arithmetic_of(a) == Arithmetic::integers) {
    return Decode<DecodeIntegerProducts>(a, sequences, count).run();
  }
#endif
  Decode<DecodeProducts>(a, sequences, count).run();
}

}  // namespace tilewise
