// Times the parts of attention on AMX tiles, on one core, for several block sizes: what to change
// in csrc/cpu/attention_engine_amx.h is read off here in a minute.
//
//   F="-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni"
//   F="$F -mavx512bf16"
//   g++ -std=c++17 -O3 -ffp-contract=off -Icsrc $F benchmarks/amx_engine.cpp -o /tmp/amx_engine
//   taskset -c 0 /tmp/amx_engine
//
// with -mamx-tile -mamx-bf16 -mamx-int8 in F as well. Figures are medians of 15 runs. The first
// lines are products from the first-level cache; what a line has beyond scores and sums is its softmax.
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/attention_engine_amx.h"
#include "cpu/attention_prefill_lanes.h"
#include "cpu/tile_products.h"
#include "cpu/workspace.h"

namespace tilewise {
namespace {

template <class F>
double median_seconds(const F& body) {
  std::vector<double> seconds;
  for (int run = 0; run < 15; ++run) {
    const auto start = std::chrono::steady_clock::now();
    body();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    seconds.push_back(took.count());
  }
  std::nth_element(seconds.begin(), seconds.begin() + 7, seconds.end());
  return seconds[7];
}

Workspace<BFloat16> random_elements(int64_t count) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  auto x = make_workspace<BFloat16>(count);
  for (int64_t i = 0; i < count; ++i) from_float(normal(generator), &x[i]);
  return x;
}

// Two row tiles by eight column tiles, from and to the first-level cache.
void time_product(int64_t depth) {
  constexpr int64_t COLUMNS = 8, REPEATS = 2000;
  const auto a = random_elements(2 * depth * TILE_SIZE / 2);
  const auto b = random_elements(COLUMNS * depth * TILE_SIZE / 2);
  const auto c = make_workspace<float>(2 * TILE_HEIGHT * (COLUMNS + 1) * 16);
  const Tiles tiles;
  const double seconds = median_seconds([&] {
    for (int64_t i = 0; i < REPEATS; ++i) {
      multiply_tiles<Bfloat16Products>(
          2, COLUMNS, depth, false, {a.get(), depth * TILE_SIZE, TILE_SIZE},
          {b.get(), TILE_SIZE, depth * TILE_SIZE},
          tiles_of_rows(c.get(), (COLUMNS + 1) * TILE_WIDTH));
    }
  });
  const double flops = 2.0 * 32 * COLUMNS * 16 * depth * 32 * REPEATS;
  std::printf("product, depth %3d  %6.2f TFLOP/s\n", static_cast<int>(depth * 32),
              flops / seconds * 1e-12);
}

// A task's rows over `keys` keys that are packed already, as attention_prefill.cpp does it.
template <class Engine>
void time_engine(int64_t dim, int64_t keys) {
  const int64_t blocks = keys / Engine::KEY_BLOCK, strips = Engine::ROW_BLOCK / Engine::ROW_STRIP;
  const int64_t key_size = Engine::key_size(dim), out_size = Engine::ROW_BLOCK * Engine::out_stride(dim);
  const auto queries = random_elements(Engine::query_size(dim));
  const auto packed = random_elements(blocks * (key_size + Engine::value_size(dim)));
  const auto out = make_workspace<float>(out_size);
  std::vector<float> max(Engine::ROW_BLOCK), sum(Engine::ROW_BLOCK);
  std::vector<uint8_t> flags(Engine::ROW_BLOCK);
  Attention a{};
  a.dim = a.v_dim = dim;
  a.scale = 1 / std::sqrt(static_cast<float>(dim));
  a.window_left = a.window_right = -1;
  const Unit unit{{0, 0, Engine::ROW_BLOCK, 0, keys}, 0, 1, 0, blocks};
  const ScoreOptions options(a);
  const Engine engine(dim, dim);
  const LaneStrips<Engine> lanes(a, options, engine);
  const auto scores = make_workspace<float>(Engine::ROW_STRIP * Engine::SCORE_STEP);
  const auto weights = random_elements(Engine::ROW_STRIP * Engine::KEY_BLOCK);
  enum Part { SCORES, SUMS, ALL };
  const auto run = [&](Part part) {
    std::fill(max.begin(), max.end(), -INFINITY);
    std::fill(sum.begin(), sum.end(), 0.0f);
    std::fill_n(out.get(), out_size, 0.0f);
    for (int64_t b = 0; b < blocks; ++b) {
      const BFloat16* at = packed.get() + b * (key_size + Engine::value_size(dim));
      for (int64_t i = 0; i < strips; ++i) {
        const int64_t row = i * Engine::ROW_STRIP;
        const BFloat16* q = queries.get() + Engine::query_size(dim) / strips * i;
        float* o = out.get() + out_size / strips * i;
        const RowStates states{&max[row], &sum[row], &flags[row]};
        const Strip<BFloat16> strip{row, row + Engine::ROW_STRIP, q, at, at + key_size, nullptr,
                                    b * Engine::KEY_BLOCK, 0, Engine::KEY_BLOCK, states, o};
        if (part == ALL) lanes.attend(unit, strip);
        for (int j = 0; part == SCORES && j < Engine::KEY_BLOCK; j += Engine::SCORE_STEP) {
          engine.scores(q, Engine::ROW_STRIP, at, j, j + Engine::SCORE_STEP, scores.get());
        }
        if (part == SUMS) {
          engine.accumulate(weights.get(), Engine::ROW_STRIP, at + key_size, 0, Engine::KEY_BLOCK, o);
        }
      }
    }
  };
  const double flops = 4.0 * Engine::ROW_BLOCK * keys * dim;
  const double all = median_seconds([&] { run(ALL); });
  const double of_scores = median_seconds([&] { run(SCORES); });
  const double of_sums = median_seconds([&] { run(SUMS); });
  std::printf("dim %3d, %5d keys, tasks of %3d, strips of %3d x %3d, steps of %3d: %5.2f TFLOP/s; ns for "
              "16 scores: %5.2f, scores %5.2f, sums %5.2f\n",
              static_cast<int>(dim), static_cast<int>(keys), Engine::ROW_BLOCK, Engine::ROW_STRIP,
              Engine::KEY_BLOCK, Engine::SCORE_STEP, flops / all * 1e-12,
              all / Engine::ROW_BLOCK / keys * 16e9, of_scores / Engine::ROW_BLOCK / keys * 16e9,
              of_sums / Engine::ROW_BLOCK / keys * 16e9);
}

template <int ROWS, int STRIP, int KEYS, int STEP>
void time_engines() {
  for (const int64_t dim : {64, 128}) {
    for (const int64_t keys : {1024, 8192}) {
      time_engine<AmxEngineOf<ROWS, STRIP, KEYS, STEP>>(dim, keys);
    }
  }
}

}  // namespace
}  // namespace tilewise

int main() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // see kernels/tilewise/native.py
  if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) != 0) {
    std::puts("the system does not grant AMX tiles");
    return 1;
  }
  for (const int64_t depth : {1, 2, 4, 8}) tilewise::time_product(depth);
  tilewise::time_engines<256, 32, 128, 64>();
  tilewise::time_engines<256, 32, 256, 32>();
  tilewise::time_engines<256, 32, 256, 64>();
  tilewise::time_engines<256, 32, 256, 128>();
  tilewise::time_engines<256, 64, 256, 32>();
  tilewise::time_engines<512, 32, 256, 32>();
}
