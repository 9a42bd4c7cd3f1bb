// The cross-attention block where products are of float: projections of sources, and targets.
//
// Plan: a block has a tile of tokens of a pair, its features, first and second layers in shared memory, channels as
// rows; warps take tiles of 48 channels x 16 tokens of a product. Weights and states are read where they are, through
// the caches: all blocks at work want the same few.
#include "block.h"
#include "maths.h"
#include "tile.h"

namespace xattn::cuda {
namespace {

constexpr int kThreads = 256;

// Of a kernel that is a template of the kind of products.
struct Geometry {
  int padded, tokens, parts, denominators, shared;  // of a tile; offsets; size
};

struct Slots {
  int features, pairs;  // in the table
  PackedBlock packed;
  int64_t batch, channels, count, steps, works;
  Dtype dtype;
};

template <class Problem>
struct Arguments {
  Table table;
  Slots slots;
  Problem problem;
  Geometry geometry;
};

template <class P>
class Tiles {
 public:
  using E = typename P::Element;

  XATTN_DEVICE Tiles(const Table& table, const Slots& slots, const Geometry& geometry, int64_t work)
      : slots_(slots), geometry_(geometry) {
    pair = work % slots.count;
    work /= slots.count;
    token = work % slots.steps * geometry.tokens;
    batch = work / slots.steps;
    x_ = table.view(slots.features, table[slots.pairs + 2 * pair]);
    const int64_t set = table[slots.pairs + 2 * pair + 1] * kProjections, padded = geometry.padded;
    matrices_ = reinterpret_cast<const E*>(slots.packed.matrices) + set * padded * padded;
    biases_ = slots.packed.biases + set * padded;
    const int64_t left = x_.tokens - token;
    tokens = left < geometry.tokens ? static_cast<int>(left) : geometry.tokens;
  }

  // Tile 0: features, 1: first layer, 2: second layer, and results.
  XATTN_DEVICE Tile<E> tile(int number, bool token_minor) const {
    const int size = tile_elements<P>(geometry_.padded, geometry_.tokens);
    return make_tile<P>(reinterpret_cast<E*>(shared_memory()) + number * size, token_minor, geometry_.padded,
                        geometry_.tokens);
  }
  XATTN_DEVICE Tile<E> load() const {
    const Access how = access<E>(x_, slots_.dtype);
    const Tile<E> to = tile(0, how.token_minor);
    load_tile(x_, how, {batch, 0, token, static_cast<int>(slots_.channels), tokens}, to, geometry_.padded,
              geometry_.tokens);
    commit_copies();
    wait_copies<0>();
    sync_threads();
    return to;
  }
  // to = map(W x + b), zero in channels there are none of.
  template <class Map>
  XATTN_DEVICE void project(int projection, const Tile<E>& x, const Tile<E>& to, const Map& map) const {
    const int padded = geometry_.padded, channels = static_cast<int>(slots_.channels);
    const Operand<E> w{matrices_ + projection * padded * padded, padded, true};
    const float* bias = biases_ + projection * padded;
    multiply_tiles<P, 3, 2>(w, x.over_channels(), padded, geometry_.tokens, padded,
                            [&](int row, int column, Accumulator<3, 2>& sum, int rows, int columns) {
                              sum.for_pairs(rows, columns, [&](int r, int c, float v, float w) {
                                const bool valid = row + r < channels;
                                const float b = bias[row + r];
                                put_pair(to, row + r, column + c, valid ? map(v + b) : 0.0f, valid ? map(w + b) : 0.0f);
                              });
                            });
    sync_threads();
  }
  static XATTN_DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }

  int64_t pair, token, batch;
  int tokens;

 private:
  const Slots& slots_;
  const Geometry& geometry_;
  View x_;
  const E* matrices_;
  const float* biases_;
};

template <class P>
XATTN_KERNEL(kThreads, 1)
projection_kernel(XATTN_PARAMETER Arguments<BlockSources> args) {
  using E = typename P::Element;
  XATTN_KEEP_LOOP
  for (int64_t work = block_index(); work < args.slots.works; work += block_count()) {
    const Tiles<P> t(args.table, args.slots, args.geometry, work);
    if (t.tokens <= 0) continue;
    const Tile<E> x = t.load(), hidden = t.tile(1, true), result = t.tile(2, false);
    const Access how{Dtype::kFloat32, false, 16};
    const Place place{t.batch, 0, t.token, args.geometry.padded, t.tokens};
    t.project(kValue, x, result, [](float y) { return Tiles<P>::relu(y); });
    store_tile(args.table.view(args.problem.values, t.pair), how, place, result);
    t.project(kKey1, x, hidden, [](float y) { return Tiles<P>::relu(y); });
    t.project(kKey2, hidden, result, [](float y) { return softplus<true>(y); });
    store_tile(args.table.view(args.problem.keys, t.pair), how, place, result);
  }
}

// 1 / max(Z . q, eps) is not what a quotient rounds to: denominators, which results are divided by.
template <class E>
XATTN_DEVICE void sum_denominators(const Arguments<BlockTargets>& args, const Tile<E>& q, const float* z) {
  const Geometry& geometry = args.geometry;
  float* parts = reinterpret_cast<float*>(shared_memory() + geometry.parts);
  const int count = kThreads / geometry.tokens, n = thread_index() % geometry.tokens;
  float sum = 0.0f;
  for (int channel = thread_index() / geometry.tokens; channel < args.slots.channels; channel += count)
    sum = fused_multiply_add(z[channel], *q.at(channel, n), sum);
  parts[thread_index()] = sum;
  sync_threads();
  if (thread_index() < geometry.tokens) {
    sum = 0.0f;
    for (int i = 0; i < count; ++i) sum += parts[i * geometry.tokens + n];
    reinterpret_cast<float*>(shared_memory() + geometry.denominators)[n] =
        sum < args.problem.eps ? args.problem.eps : sum;
  }
  sync_threads();
}

template <class P>
XATTN_KERNEL(kThreads, 1)
target_kernel(XATTN_PARAMETER Arguments<BlockTargets> args) {
  using E = typename P::Element;
  const BlockTargets& problem = args.problem;
  const int padded = args.geometry.padded;
  XATTN_KEEP_LOOP
  for (int64_t work = block_index(); work < args.slots.works; work += block_count()) {
    const Tiles<P> t(args.table, args.slots, args.geometry, work);
    if (t.tokens <= 0) continue;
    const Tile<E> hidden = t.tile(1, true), q = t.tile(2, true);
    t.project(kQuery1, t.load(), hidden, [](float y) { return Tiles<P>::relu(y); });
    t.project(kQuery2, hidden, q, [](float y) { return softplus<true>(y); });
    const int64_t end = args.table[problem.lists + t.pair + 1];
    XATTN_KEEP_LOOP
    for (int64_t i = args.table[problem.lists + t.pair]; i < end; ++i) {
      const int64_t output = args.table[i], state = output * problem.batch + t.batch;
      const View out = args.table.view(problem.outputs, output);
      const Access how = access<E>(out, problem.dtype);
      const Tile<E> to = t.tile(0, how.token_minor);
      sum_denominators(args, q, problem.states.z + state * padded);
      const float* d = reinterpret_cast<const float*>(shared_memory() + args.geometry.denominators);
      const Operand<E> s{reinterpret_cast<const E*>(problem.states.s) + state * padded * padded, padded, true};
      multiply_tiles<P, 3, 2>(s, q.over_channels(), padded, args.geometry.tokens, padded,
                              [&](int row, int column, Accumulator<3, 2>& sum, int rows, int columns) {
                                sum.for_pairs(rows, columns, [&](int r, int c, float x, float y) {
                                  put_pair(to, row + r, column + c, x / d[column + c], y / d[column + c + 1]);
                                });
                              });
      sync_threads();
      store_tile(out, how, {t.batch, 0, t.token, static_cast<int>(problem.channels), t.tokens}, to);
      sync_threads();
    }
  }
}

template <class P>
Geometry geometry(int64_t channels) {
  Geometry g{static_cast<int>(padded_channels(channels)), 0, 0, 0, 0};
  for (g.tokens = 64; g.tokens >= 16; g.tokens /= 2) {
    g.parts = 3 * tile_elements<P>(g.padded, g.tokens) * static_cast<int>(sizeof(float));
    g.denominators = g.parts + kThreads * static_cast<int>(sizeof(float));
    g.shared = g.denominators + g.tokens * static_cast<int>(sizeof(float));
    if (g.shared <= limits().shared_bytes) break;
  }
  return g;
}

template <class P, class Problem>
void start(void (*kernel)(Arguments<Problem>), const char* name, const Problem& problem, const Table& table,
           Stream stream) {
  Arguments<Problem> args{table,
                          {problem.features, problem.pairs, problem.packed, problem.batch, problem.channels,
                           problem.count, 0, 0, problem.dtype},
                          problem,
                          geometry<P>(problem.channels)};
  args.slots.steps = (problem.longest + args.geometry.tokens - 1) / args.geometry.tokens;
  args.slots.works = args.slots.steps * problem.batch * problem.count;
  launch(kernel, name, args.slots.works, kThreads, static_cast<size_t>(args.geometry.shared), stream, args);
}

}  // namespace

void start_plain_projections(const BlockSources& sources, const Table& table, Stream stream) {
  constexpr const char* kName = "block_projections";
  if (sources.tf32)
    start<Tf32Products>(projection_kernel<Tf32Products>, kName, sources, table, stream);
  else
    start<IeeeProducts>(projection_kernel<IeeeProducts>, kName, sources, table, stream);
}

void start_plain_targets(const BlockTargets& targets, const Table& table, Stream stream) {
  constexpr const char* kName = "block_targets";
  if (targets.tf32)
    start<Tf32Products>(target_kernel<Tf32Products>, kName, targets, table, stream);
  else
    start<IeeeProducts>(target_kernel<IeeeProducts>, kName, targets, table, stream);
}

}  // namespace xattn::cuda
