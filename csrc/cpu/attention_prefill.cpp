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
#include "cpu/attention_prefill_softmax.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

#if defined(__AMX_BF16__)
#include "cpu/attention_engine_amx.h"
#elif defined(__AVX512F__)
#include "cpu/attention_engine_pairs.h"
#endif

namespace tilewise {
namespace {

// Packed keys and values live in at most this many bytes. It holds 32k keys of 128 + 128 floats.
constexpr int64_t WORKSPACE_BYTES = 48 << 20;

template <class Engine>
class Prefill {
 public:
  Prefill(const Attention& a, const Sequence* sequences, int64_t count)
      : a_(a),
        options_(a),
        group_(group_size(a)),
        key_size_(Engine::key_size(a.dim)) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t h = 0; h < a.kv_heads; ++h) add_unit(sequences[i], h);
    }
  }

  // Round by round, as many units as the workspace holds.
  void run() {
    const int64_t capacity = WORKSPACE_BYTES / (block_size() * sizeof(Element));
    size_t next = 0;
    while (next < units_.size()) {
      const size_t first = next;
      int64_t blocks = 0;
      for (; next < units_.size(); ++next) {
        Unit& unit = units_[next];
        // Packed blocks are worth keeping if a second tile reads them.
        const bool kept = unit.rows() > Engine::ROW_BLOCK && unit.blocks() <= capacity;
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
  using Weight = typename Engine::Weight;

  // A key head of a sequence: what shares keys. Its query rows are numbered query by query.
  struct Unit {
    Sequence s;
    int64_t kv_head;
    int64_t group;
    int64_t first_block, end_block;  // what its queries see
    int64_t packed_at = -1;          // in the workspace, or -1: each task packs for itself

    int64_t rows() const { return s.q_len * group; }
    int64_t blocks() const { return end_block - first_block; }
  };

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
    Workspace<float> scores, out, bias;
    std::vector<RowState> state;
    std::vector<uint8_t> bad_query;
  };

  int64_t block_size() const { return key_size_ + Engine::value_size(a_.v_dim); }

  void add_unit(const Sequence& s, int64_t kv_head) {
    const int64_t first = visible_keys(a_, s, 0).first;
    const int64_t end = visible_keys(a_, s, s.q_len - 1).end;
    Unit unit{s, kv_head, group_, first / Engine::KEY_BLOCK, 0};
    unit.end_block = end > first ? (end - 1) / Engine::KEY_BLOCK + 1 : unit.first_block;
    units_.push_back(unit);
  }

  // The keys that any query of the rows sees.
  Span visible_to(const Unit& unit, int64_t first_row, int64_t end_row) const {
    const int64_t first = visible_keys(a_, unit.s, first_row / group_).first;
    return {first, std::max(first, visible_keys(a_, unit.s, (end_row - 1) / group_).end)};
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
      const int64_t count = (unit.rows() + Engine::ROW_BLOCK - 1) / Engine::ROW_BLOCK;
      const int64_t rows = round_up((unit.rows() + count - 1) / count, Engine::ROW_STRIP);
      for (int64_t row = 0; row < unit.rows(); row += rows) {
        const int64_t end = std::min(row + rows, unit.rows());
        const Span keys = visible_to(unit, row, end);
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
    Scratch scratch = make_scratch();
    pack_queries(engine, unit, tile, scratch);
    const Span keys = visible_to(unit, tile.first_row, tile.end_row);
    const int64_t first_block = keys.first / Engine::KEY_BLOCK;
    const int64_t end_block = (keys.end + Engine::KEY_BLOCK - 1) / Engine::KEY_BLOCK;
    if (unit.packed_at >= 0) {
      for (int64_t b = first_block; b < end_block; ++b) {
        const int64_t at = unit.packed_at + b - unit.first_block;
        run_block(engine, unit, tile, b, shared, at, scratch);
      }
    } else {
      const BlockPacker<Engine> packer(a_);
      Packed own = make_packed(1);
      for (int64_t b = first_block; b < end_block; ++b) {
        pack_block(packer, engine, unit, b, 0, own);
        run_block(engine, unit, tile, b, own, 0, scratch);
      }
    }
    write_results(unit, tile, scratch);
  }

  void run_block(const Engine& engine, const Unit& unit, const Tile& tile, int64_t block,
                 const Packed& packed, int64_t at, Scratch& scratch) const {
    const int64_t first_key = block * Engine::KEY_BLOCK;
    const Element* keys = packed.blocks.get() + at * block_size();
    const uint8_t* flags =
        packed.flagged[at] ? packed.flags.data() + at * Engine::KEY_BLOCK : nullptr;
    const int64_t out_stride = Engine::out_stride(a_.v_dim);
    const int64_t query_stride = Engine::query_size(a_.dim) / Engine::ROW_BLOCK;
    for (int64_t i = tile.first_row; i < tile.end_row; i += Engine::ROW_STRIP) {
      const int64_t end_row = std::min<int64_t>(i + Engine::ROW_STRIP, tile.end_row);
      const Span seen = visible_to(unit, i, end_row);
      const int64_t begin = std::max<int64_t>(seen.first - first_key, 0);
      const int64_t end = std::min<int64_t>(seen.end - first_key, Engine::KEY_BLOCK);
      if (begin >= end) continue;
      const int64_t at_row = i - tile.first_row;
      float* out = scratch.out.get() + at_row * out_stride;
      RowBlock row{};
      row.first_key = first_key;
      row.begin = static_cast<int>(begin / Engine::KEY_STEP * Engine::KEY_STEP);
      row.end = static_cast<int>(round_up(end, Engine::KEY_STEP));
      row.flags = flags;
      engine.scores(scratch.queries.get() + at_row * query_stride, end_row - i, keys, row.begin,
                    row.end, scratch.scores.get());
      for (int64_t r = i; r < end_row;) {
        float* s = scratch.scores.get() + (r - i) * Engine::SCORE_STRIDE;
        RowState* states = &scratch.state[r - tile.first_row];
        float* sums = out + (r - i) * out_stride;
#if defined(__AVX512F__)
        constexpr int TOGETHER = F32::WIDTH;
        if (r + TOGETHER <= end_row && see_all(unit, r, r + TOGETHER, row) &&
            softmax_rows<Weight>(s, Engine::SCORE_STRIDE, row.begin, row.end, options_.factor(),
                                 states, sums, out_stride, out_stride)) {
          r += TOGETHER;
          continue;
        }
#endif
        run_row(unit, r, row, s, scratch.bias.get(), *states, sums);
        ++r;
      }
      engine.accumulate(reinterpret_cast<const Weight*>(scratch.scores.get()), end_row - i,
                        keys + key_size_, row.begin, row.end, out);
    }
  }

  // Whether all scores of the rows are as they are.
  bool see_all(const Unit& unit, int64_t first_row, int64_t end_row, const RowBlock& row) const {
    return options_.plain() && !row.flags &&
           visible_keys(a_, unit.s, (end_row - 1) / group_).first <= row.first_key + row.begin &&
           visible_keys(a_, unit.s, first_row / group_).end >= row.first_key + row.end;
  }

  void run_row(const Unit& unit, int64_t r, RowBlock row, float* s, float* bias, RowState& state,
               float* out) const {
    row.query = r / group_;
    row.head = unit.kv_head * group_ + r % group_;
    const Span span = visible_keys(a_, unit.s, row.query);
    row.low = static_cast<int>(clamp(span.first - row.first_key, 0, Engine::KEY_BLOCK));
    row.high = static_cast<int>(clamp(span.end - row.first_key, 0, Engine::KEY_BLOCK));
    if (!options_.plain()) options_.apply(s, bias, unit.s, row);
    if (row.flags) apply_flags(options_, s, bias, row, state);
    softmax_row<Weight>(s, row, options_.factor(), state, out, Engine::out_stride(a_.v_dim));
  }

  Scratch make_scratch() const {
    constexpr int64_t ROWS = Engine::ROW_BLOCK;
    const int64_t out_size = ROWS * Engine::out_stride(a_.v_dim);
    Scratch scratch{make_workspace<Element>(Engine::query_size(a_.dim)),
                    make_workspace<float>(Engine::ROW_STRIP * Engine::SCORE_STRIDE),
                    make_workspace<float>(out_size),
                    make_workspace<float>(Engine::KEY_BLOCK),
                    std::vector<RowState>(ROWS),
                    std::vector<uint8_t>(ROWS)};
    std::fill_n(scratch.out.get(), out_size, 0.0f);
    std::fill_n(scratch.bias.get(), Engine::KEY_BLOCK, 0.0f);
    return scratch;
  }

  void pack_queries(const Engine& engine, const Unit& unit, const Tile& tile,
                    Scratch& scratch) const {
    const int64_t count = tile.end_row - tile.first_row;
    const int64_t stride = round_up(a_.dim, ALIGNMENT);
    const auto rows = make_workspace<const Element*>(count);
    const auto zeros = make_workspace<Element>(stride);
    const auto converted =
        make_workspace<Element>(a_.dtype == DTYPE_OF<Element> ? 0 : count * stride);
    std::memset(static_cast<void*>(zeros.get()), 0, stride * sizeof(Element));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t query = (tile.first_row + i) / group_;
      const int64_t head = unit.kv_head * group_ + (tile.first_row + i) % group_;
      const void* row = static_cast<const char*>(a_.q.data) +
                        offset(a_, a_.q, unit.s, query, head) * element_size(a_.dtype);
      rows[i] = row_as(a_.dtype, row, 1.0f, a_.dim, converted.get() + i * stride);
    }
    replace_bad_rows(rows.get(), count, a_.dim, zeros.get(), 1, scratch.bad_query.data());
    engine.pack_queries(rows.get(), count, scratch.queries.get());
  }

  void write_results(const Unit& unit, const Tile& tile, Scratch& scratch) const {
    const int64_t stride = Engine::out_stride(a_.v_dim);
    for (int64_t i = 0; i < tile.end_row - tile.first_row; ++i) {
      const int64_t query = (tile.first_row + i) / group_;
      const int64_t head = unit.kv_head * group_ + (tile.first_row + i) % group_;
      const RowState& state = scratch.state[i];
      // A sink is one more key, without a value.
      const float sink = a_.sinks ? a_.sinks[head] * LOG2E : -INFINITY;
      const float max = std::max(state.max, sink);
      float lse = -INFINITY, factor = 0.0f;
      if (max != -INFINITY) {
        const float rescale = exp2(state.max - max);
        const float sum = state.sum * rescale + exp2(sink - max);
        lse = (max + std::log2(sum)) * LN2;
        factor = rescale / sum;
      }
      const bool sees = state.max != -INFINITY;
      if (state.saw_bad_key || (scratch.bad_query[i] && sees)) lse = factor = NAN;
      if (state.saw_bad_value) factor = NAN;
      a_.lse[lse_offset(a_, unit.s, query, head)] = lse;
      char* to = static_cast<char*>(a_.out.data) +
                 offset(a_, a_.out, unit.s, query, head) * element_size(a_.dtype);
      const float* from = scratch.out.get() + i * stride;
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
    for (; n + W <= a_.v_dim; n += W) store(to + n, load(from + n) * f);
    if (n < a_.v_dim) store_partial(to + n, load(from + n) * f, static_cast<int>(a_.v_dim - n));
  }

  const Attention& a_;
  ScoreOptions options_;
  int64_t group_;
  int64_t key_size_;
  std::vector<Unit> units_;
};

}  // namespace

void attention_prefill(const Attention& a, const Sequence* sequences, int64_t count) {
  if (a.heads == 0) return;
#if defined(__AMX_BF16__)
  if (AmxEngine::takes(a)) return Prefill<AmxEngine>(a, sequences, count).run();
#elif defined(__AVX512F__)
  if (PairsEngine::takes(a)) return Prefill<PairsEngine>(a, sequences, count).run();
#endif
  Prefill<FloatEngine>(a, sequences, count).run();
}

}  // namespace tilewise
