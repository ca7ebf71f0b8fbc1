// Attention with many queries: FlashAttention on a CPU.
//
// The keys and values of a sequence and key head are packed once, in blocks, and serve all query
// rows: every query of every head of the group. A task takes a tile of such rows over all blocks
// that any of them sees: its sums stay in the second-level cache, the scores of a few rows in the
// first.
//
// Blocks start at multiples of KEY_BLOCK in the sequence, and a row's arithmetic does not depend on
// the rows around it. So its bits depend neither on how the queries are divided (a prompt in chunks
// gives what it gives in one piece) nor on the batch, nor on where in memory the keys are.
//
// Source: Dao, FlashAttention-2, 2023 (arXiv:2307.08691).
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/attention.h"
#include "cpu/attention_engine.h"
#include "cpu/attention_prefill_pack.h"
#include "cpu/attention_prefill_rows.h"
#include "cpu/attention_prefill_softmax.h"
#include "cpu/attention_prefill_strip.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

#if defined(__AMX_BF16__)
#include "cpu/attention_engine_amx.h"
#include "cpu/attention_prefill_lanes.h"
#elif defined(__AVX512F__)
#include "cpu/attention_engine_pairs.h"
#endif

namespace tilewise {
namespace {

// Packed keys and values live in at most this many bytes. It holds 32k keys of 128 + 128 floats.
constexpr int64_t WORKSPACE_BYTES = 48 << 20;

// Enough of them for causal tasks, which differ in length, to be shared out evenly.
constexpr int64_t TASKS_PER_THREAD = 4;

// `Strips` is what knows how scores lie in memory: it takes a strip of rows through one block.
template <class Engine, class Strips>
class Prefill {
 public:
  Prefill(const Attention& a, const Sequence* sequences, int64_t count)
      : a_(a),
        options_(a),
        key_size_(Engine::key_size(a.dim)) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t h = 0; h < a.kv_heads; ++h) add_unit(sequences[i], h);
    }
  }

  // Round by round, as many units as the workspace holds.
  void run() {
    const int64_t capacity = WORKSPACE_BYTES / (block_size() * sizeof(Element));
    int64_t rows = 0;
    for (const Unit& unit : units_) rows += unit.rows();
    most_rows_ = clamp(round_up(rows / (TASKS_PER_THREAD * thread_count()), Engine::ROW_STRIP),
                       Engine::LEAST_ROWS, Engine::ROW_BLOCK);
    size_t next = 0;
    while (next < units_.size()) {
      const size_t first = next;
      int64_t blocks = 0;
      for (; next < units_.size(); ++next) {
        Unit& unit = units_[next];
        // Packed blocks are worth keeping if a second tile reads them.
        const bool kept = unit.rows() > most_rows_ && unit.blocks() <= capacity;
        if (!kept) continue;
        if (blocks + unit.blocks() > capacity) break;
        unit.packed_at = blocks;
        blocks += unit.blocks();
      }
      run_round(first, next, blocks);
    }
  }

 private:
  using Element = typename Engine::Element;

  struct Tile {
    size_t unit;
    int64_t first_row, end_row;
    int64_t cost;
  };

  // Packed blocks, each with its keys first. One allocation: freed and asked for again by the next
  // call, two of a megabyte go back to the kernel each time with glibc, one does not.
  struct Packed {
    Workspace<Element> blocks;
    std::vector<uint8_t> flags;    // of every key
    std::vector<uint8_t> flagged;  // of a block: whether any of its flags is set
  };

  // What a task works in.
  struct Scratch {
    Workspace<Element> queries;
    Workspace<float> out, max, sum;
    std::vector<uint8_t> flags;

    RowStates states() { return {max.get(), sum.get(), flags.data()}; }
  };

  int64_t block_size() const { return key_size_ + Engine::value_size(a_.v_dim); }

  void add_unit(const Sequence& s, int64_t kv_head) {
    const int64_t first = visible_keys(a_, s, 0).first;
    const int64_t end = visible_keys(a_, s, s.q_len - 1).end;
    Unit unit{s, kv_head, group_size(a_), first / Engine::KEY_BLOCK, 0};
    unit.end_block = end > first ? (end - 1) / Engine::KEY_BLOCK + 1 : unit.first_block;
    units_.push_back(unit);
  }

  void run_round(size_t first_unit, size_t end_unit, int64_t blocks) {
    Packed packed = make_packed(blocks);
    std::vector<std::pair<size_t, int64_t>> packing;  // unit, block
    std::vector<Tile> tiles;
    for (size_t u = first_unit; u < end_unit; ++u) {
      const Unit& unit = units_[u];
      if (unit.packed_at >= 0) {
        for (int64_t b = unit.first_block; b < unit.end_block; ++b) packing.emplace_back(u, b);
      }
      const int64_t count = (unit.rows() + most_rows_ - 1) / most_rows_;
      const int64_t rows = round_up((unit.rows() + count - 1) / count, Engine::ROW_STRIP);
      for (int64_t row = 0; row < unit.rows(); row += rows) {
        const int64_t end = std::min(row + rows, unit.rows());
        const Span keys = unit.visible(a_, row, end);
        tiles.push_back({u, row, end, (end - row) * (keys.end - keys.first)});
      }
    }
    parallel(packing.size(), [&](int64_t i) {
      const auto [u, block] = packing[i];
      const Unit& unit = units_[u];
      pack_block(BlockPacker<Engine>(a_), Engine(a_.dim, a_.v_dim), unit, block,
                 unit.packed_at + block - unit.first_block, packed);
    });
    // The longest first, so that no thread is left with one at the end.
    std::stable_sort(tiles.begin(), tiles.end(),
                     [](const Tile& x, const Tile& y) { return x.cost > y.cost; });
    parallel(tiles.size(), [&](int64_t i) { run_tile(tiles[i], packed); });
  }

  Packed make_packed(int64_t blocks) const {
    return {make_workspace<Element>(blocks * block_size()),
            std::vector<uint8_t>(blocks * Engine::KEY_BLOCK), std::vector<uint8_t>(blocks)};
  }

  void pack_block(const BlockPacker<Engine>& packer, const Engine& engine, const Unit& unit,
                  int64_t block, int64_t at, Packed& packed) const {
    Element* keys = packed.blocks.get() + at * block_size();
    packed.flagged[at] = packer.pack(engine, unit.s, unit.kv_head, block, keys, keys + key_size_,
                                     packed.flags.data() + at * Engine::KEY_BLOCK);
  }

  void run_tile(const Tile& tile, const Packed& shared) const {
    const Unit& unit = units_[tile.unit];
    const Engine engine(a_.dim, a_.v_dim);
    const Strips strips(a_, options_, engine);
    Scratch scratch = make_scratch(round_up(tile.end_row - tile.first_row, Engine::ROW_STRIP));
    pack_queries(engine, unit, tile, scratch);
    const Span keys = unit.visible(a_, tile.first_row, tile.end_row);
    const int64_t first_block = keys.first / Engine::KEY_BLOCK;
    const int64_t end_block = (keys.end + Engine::KEY_BLOCK - 1) / Engine::KEY_BLOCK;
    if (unit.packed_at >= 0) {
      for (int64_t b = first_block; b < end_block; ++b) {
        const int64_t at = unit.packed_at + b - unit.first_block;
        run_block(strips, unit, tile, b, shared, at, scratch);
      }
    } else {
      const BlockPacker<Engine> packer(a_);
      Packed own = make_packed(1);
      for (int64_t b = first_block; b < end_block; ++b) {
        pack_block(packer, engine, unit, b, 0, own);
        run_block(strips, unit, tile, b, own, 0, scratch);
      }
    }
    strips.finish(scratch.out.get(), tile.end_row - tile.first_row);
    write_results(unit, tile, scratch);
  }

  void run_block(const Strips& strips, const Unit& unit, const Tile& tile, int64_t block,
                 const Packed& packed, int64_t at, Scratch& scratch) const {
    const int64_t query_stride = Engine::query_size(a_.dim) / Engine::ROW_BLOCK;
    Strip<Element> x{};
    x.keys = packed.blocks.get() + at * block_size();
    x.values = x.keys + key_size_;
    x.flags = packed.flagged[at] ? packed.flags.data() + at * Engine::KEY_BLOCK : nullptr;
    x.first_key = block * Engine::KEY_BLOCK;
    for (int64_t i = tile.first_row; i < tile.end_row; i += Engine::ROW_STRIP) {
      x.first_row = i;
      x.end_row = std::min<int64_t>(i + Engine::ROW_STRIP, tile.end_row);
      const Span seen = unit.visible(a_, i, x.end_row);
      const int64_t begin = std::max<int64_t>(seen.first - x.first_key, 0);
      const int64_t end = std::min<int64_t>(seen.end - x.first_key, Engine::KEY_BLOCK);
      if (begin >= end) continue;
      x.begin = static_cast<int>(begin / Engine::KEY_STEP * Engine::KEY_STEP);
      x.end = static_cast<int>(round_up(end, Engine::KEY_STEP));
      const int64_t at_row = i - tile.first_row;
      x.queries = scratch.queries.get() + at_row * query_stride;
      x.states = scratch.states().from(at_row);
      x.out = scratch.out.get() + at_row * Engine::out_stride(a_.v_dim);
      strips.attend(unit, x);
    }
  }

  Scratch make_scratch(int64_t rows) const {
    const int64_t out_size = rows * Engine::out_stride(a_.v_dim);
    Scratch scratch{make_workspace<Element>(Engine::query_size(a_.dim) / Engine::ROW_BLOCK * rows),
                    make_workspace<float>(out_size), make_workspace<float>(rows),
                    make_workspace<float>(rows), std::vector<uint8_t>(rows)};
    std::fill_n(scratch.out.get(), out_size, 0.0f);
    std::fill_n(scratch.max.get(), rows, -INFINITY);
    std::fill_n(scratch.sum.get(), rows, 0.0f);
    return scratch;
  }

  void pack_queries(const Engine& engine, const Unit& unit, const Tile& tile,
                    Scratch& scratch) const {
    const int64_t count = tile.end_row - tile.first_row;
    const int64_t stride = round_up(a_.dim, ALIGNMENT);
    const int64_t room = round_up(count, Engine::ROW_STRIP);
    const auto rows = make_workspace<const Element*>(room);
    const auto zeros = make_workspace<Element>(stride);
    const auto converted =
        make_workspace<Element>(a_.dtype == DTYPE_OF<Element> ? 0 : count * stride);
    std::memset(static_cast<void*>(zeros.get()), 0, stride * sizeof(Element));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t query = unit.query(tile.first_row + i), head = unit.head(tile.first_row + i);
      const void* row = static_cast<const char*>(a_.q.data) +
                        offset(a_, a_.q, unit.s, query, head) * element_size(a_.dtype);
      rows[i] = row_as(a_.dtype, row, 1.0f, a_.dim, converted.get() + i * stride);
    }
    replace_bad_rows(rows.get(), count, a_.dim, zeros.get(), BAD_QUERY, scratch.flags.data());
    std::fill(rows.get() + count, rows.get() + room, zeros.get());
    engine.pack_queries(rows.get(), count, scratch.queries.get());
  }

  void write_results(const Unit& unit, const Tile& tile, Scratch& scratch) const {
    for (int64_t i = 0; i < tile.end_row - tile.first_row; ++i) {
      const int64_t query = unit.query(tile.first_row + i), head = unit.head(tile.first_row + i);
      const float state_max = scratch.max[i];
      const uint8_t flags = scratch.flags[i];
      float max = state_max, sum = scratch.sum[i], rescale = 1.0f;
      if (a_.sinks) {  // one more key, without a value
        const float sink = a_.sinks[head] * LOG2E;
        max = std::max(max, sink);
        if (max != -INFINITY) {
          rescale = exp2(state_max - max);
          sum = sum * rescale + exp2(sink - max);
        }
      }
      float lse = -INFINITY, factor = 0.0f;
      if (max != -INFINITY) {
        lse = (max + std::log2(sum)) * LN2;
        factor = rescale / sum;
      }
      const bool sees = state_max != -INFINITY;
      if ((flags & BAD_KEY) || ((flags & BAD_QUERY) && sees)) lse = factor = NAN;
      if (flags & BAD_VALUE) factor = NAN;
      a_.lse[lse_offset(a_, unit.s, query, head)] = lse;
      char* to = static_cast<char*>(a_.out.data) +
                 offset(a_, a_.out, unit.s, query, head) * element_size(a_.dtype);
      const float* from = Strips::out_row(scratch.out.get(), i, a_.v_dim);
      switch (a_.dtype) {
        case DType::f32: write_row(from, factor, reinterpret_cast<float*>(to)); break;
        case DType::f16: write_row(from, factor, reinterpret_cast<Half*>(to)); break;
        default: write_row(from, factor, reinterpret_cast<BFloat16*>(to)); break;
      }
    }
  }

  template <class T>
  void write_row(const float* from, float factor, T* to) const {
    constexpr int W = F32::WIDTH;
    const F32 f = F32::all(factor);
    int64_t n = 0;
    const auto sums = [&](int64_t at) {
      return load(from + at / 16 * Strips::OUT_STEP + at % 16) * f;
    };
    for (; n + W <= a_.v_dim; n += W) store(to + n, sums(n));
    if (n < a_.v_dim) store_partial(to + n, sums(n), static_cast<int>(a_.v_dim - n));
  }

  const Attention& a_;
  ScoreOptions options_;
  int64_t key_size_;
  int64_t most_rows_ = 0;  // of a task
  std::vector<Unit> units_;
};

template <class Engine, class Strips = RowStrips<Engine>>
void run(const Attention& a, const Sequence* sequences, int64_t count) {
  Prefill<Engine, Strips>(a, sequences, count).run();
}

}  // namespace

void attention_prefill(const Attention& a, const Sequence* sequences, int64_t count) {
  if (a.heads == 0) return;
#if defined(__AMX_BF16__)
  if (AmxEngine::takes(a)) return run<AmxEngine, LaneStrips<AmxEngine>>(a, sequences, count);
#elif defined(__AVX512F__)
  if (PairsEngine::takes(a)) return run<PairsEngine>(a, sequences, count);
#endif
  run<FloatEngine>(a, sequences, count);
}

}  // namespace tilewise
