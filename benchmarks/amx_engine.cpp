// Times the parts of attention on AMX tiles, on one core, for several block sizes: what to change
// in csrc/cpu/attention_engine_amx.h is read off here in a minute.
//
//   F="-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni"
//   F="$F -mavx512bf16"
//   g++ -std=c++17 -O3 -ffp-contract=off -Icsrc $F benchmarks/amx_engine.cpp -o /tmp/amx_engine
//   taskset -c 0 /tmp/amx_engine
//
// with -mamx-tile -mamx-bf16 -mamx-int8 in F as well. Figures are medians of 15 runs. The first
// lines are products from the first-level cache: the ceiling of `tiles`, which is the work of the
// line without its softmax.
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/attention_engine.h"
#include "cpu/attention_engine_amx.h"
#include "cpu/attention_prefill_softmax.h"
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
      TileProduct<2, false>::run(
          {reinterpret_cast<const char*>(a.get()), TILE_SIZE, depth * TILE_SIZE, TILE_BYTES,
           reinterpret_cast<const char*>(b.get()), depth * TILE_SIZE, c.get(), (COLUMNS + 1) * 16},
          depth, COLUMNS);
    }
  });
  const double flops = 2.0 * 32 * COLUMNS * 16 * depth * 32 * REPEATS;
  std::printf("product, depth %3d  %6.2f TFLOP/s\n", static_cast<int>(depth * 32),
              flops / seconds * 1e-12);
}

// One tile of query rows over 4096 keys that are packed already, as attention_prefill.cpp does it.
template <class Engine>
void time_engine(int64_t dim) {
  constexpr int64_t BLOCKS = 4096 / Engine::KEY_BLOCK;
  constexpr int64_t STRIPS = Engine::ROW_BLOCK / Engine::ROW_STRIP;
  const int64_t out_stride = Engine::out_stride(dim), key_size = Engine::key_size(dim);
  const int64_t strip_queries = Engine::query_size(dim) / STRIPS;
  const auto queries = random_elements(Engine::query_size(dim));
  const auto blocks = random_elements(BLOCKS * (key_size + Engine::value_size(dim)));
  const auto s = make_workspace<float>(Engine::ROW_STRIP * Engine::SCORE_STRIDE);
  const auto out = make_workspace<float>(Engine::ROW_BLOCK * out_stride);
  std::vector<RowState> state(Engine::ROW_BLOCK);
  const float factor = LOG2E / std::sqrt(static_cast<float>(dim));
  const Engine engine(dim, dim);
  const auto run = [&](bool tiles, bool softmax) {
    std::fill(state.begin(), state.end(), RowState());
    std::fill_n(out.get(), Engine::ROW_BLOCK * out_stride, 0.0f);
    for (int64_t b = 0; b < BLOCKS; ++b) {
      const BFloat16* keys = blocks.get() + b * (key_size + Engine::value_size(dim));
      for (int64_t strip = 0; strip < STRIPS; ++strip) {
        const int64_t first = strip * Engine::ROW_STRIP;
        float* o = out.get() + first * out_stride;
        if (tiles) {
          engine.scores(queries.get() + strip * strip_queries, Engine::ROW_STRIP, keys, 0,
                        Engine::KEY_BLOCK, s.get());
        }
        for (int64_t i = 0; softmax && i < Engine::ROW_STRIP; i += F32::WIDTH) {
          softmax_rows<BFloat16>(s.get() + i * Engine::SCORE_STRIDE, Engine::SCORE_STRIDE, 0,
                                 Engine::KEY_BLOCK, factor, &state[first + i], o + i * out_stride,
                                 out_stride, out_stride);
        }
        if (tiles) {
          engine.accumulate(reinterpret_cast<const BFloat16*>(s.get()), Engine::ROW_STRIP,
                            keys + key_size, 0, Engine::KEY_BLOCK, o);
        }
      }
    }
  };
  const double both = median_seconds([&] { run(true, true); });
  const double tiles = median_seconds([&] { run(true, false); });
  const double flops = 4.0 * Engine::ROW_BLOCK * 4096 * dim;
  std::printf("dim %3d, strips of %3d x %3d  %6.2f TFLOP/s, tiles %6.2f, softmax %5.1f ns a row\n",
              static_cast<int>(dim), Engine::ROW_STRIP, Engine::KEY_BLOCK, flops / both * 1e-12,
              flops / tiles * 1e-12, (both - tiles) / (Engine::ROW_BLOCK * BLOCKS) * 1e9);
}

template <int STRIP, int KEYS>
void time_engines() {
  for (const int64_t dim : {64, 128}) time_engine<AmxEngineOf<STRIP, KEYS>>(dim);
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
  tilewise::time_engines<32, 128>();
  tilewise::time_engines<32, 256>();
  tilewise::time_engines<32, 512>();
  tilewise::time_engines<64, 128>();
  tilewise::time_engines<64, 256>();
  tilewise::time_engines<128, 128>();
}
