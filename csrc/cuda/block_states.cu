// States of the cross-attention block: the partial sums of every output's pairs, added in a fixed order, as targets
// want them: matrices laid out like weights, zero where they are padded.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "block.h"
#include "product.h"

namespace xattn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMost = 1 << 20;  // tokens of a work
constexpr int kRun = 8;             // elements that a thread sums, side by side: a row of a core of 8 x 8

struct Arguments {
  Table table;
  BlockStates states;
  const float* partial;
  int64_t batch, channels, padded, segments, works;
  int lists, first;
  bool bfloat16;
};

// The sums of `count` columns from `column` on of a row.
XATTN_DEVICE void sum_run(const Arguments& args, int64_t output, int64_t b, int64_t row, int64_t column, int count,
                          float (&sum)[kRun]) {
  XATTN_UNROLL
  for (int i = 0; i < kRun; ++i) sum[i] = 0.0f;
  if (count <= 0) return;
  const int64_t elements = (args.channels + 1) * args.channels;
  const float* from = args.partial + row * args.channels + column;
  const int64_t end = args.table[args.lists + output + 1];
  for (int64_t m = args.table[args.lists + output]; m < end; ++m) {
    const int64_t pair = args.table[m], last = args.table[args.first + pair + 1];
    for (int64_t chunk = args.table[args.first + pair]; chunk < last; ++chunk) {
      const float* part = from + (chunk * args.batch + b) * elements;
      XATTN_UNROLL
      for (int i = 0; i < kRun; ++i)
        if (i < count) sum[i] += part[i];
    }
  }
}

XATTN_KERNEL(kThreads, 4) states_kernel(XATTN_PARAMETER Arguments args) {
  struct alignas(16) Half {
    float x[4];
  };
  struct alignas(16) Packed {
    uint32_t x[4];
  };
  const int64_t runs = args.padded / kRun, matrix = args.padded * args.padded;
  for (int64_t work = block_index(); work < args.works; work += block_count()) {
    const int64_t i = work % args.segments * kThreads + thread_index(), state = work / args.segments;
    const int64_t output = state / args.batch, b = state % args.batch;
    if (i >= (args.padded + 1) * runs) continue;
    const bool is_z = i >= args.padded * runs;
    // Cores follow each other by rows of cores, their rows one by one; else rows follow each other.
    int64_t row = i / runs, run = i % runs;
    if (args.bfloat16 && !is_z) {
      row = i / 8 / runs * 8 + i % 8;
      run = i / 8 % runs;
    }
    const int64_t left = args.channels - run * kRun;
    const bool empty = left <= 0 || (!is_z && row >= args.channels);
    float sum[kRun];
    sum_run(args, output, b, is_z ? args.channels : row, run * kRun,
            empty         ? 0
            : left < kRun ? static_cast<int>(left)
                          : kRun,
            sum);
    if (args.bfloat16 && !is_z) {
      Packed packed;
      XATTN_UNROLL
      for (int j = 0; j < 4; ++j) packed.x[j] = pack_bfloat16(sum[2 * j], sum[2 * j + 1]);
      *reinterpret_cast<Packed*>(args.states.s + (state * matrix + i * kRun) * 2) = packed;
    } else {
      float* to = is_z ? args.states.z + state * args.padded + run * kRun
                       : reinterpret_cast<float*>(args.states.s) + state * matrix + i * kRun;
      reinterpret_cast<Half*>(to)[0] = {{sum[0], sum[1], sum[2], sum[3]}};
      reinterpret_cast<Half*>(to)[1] = {{sum[4], sum[5], sum[6], sum[7]}};
    }
  }
}

}  // namespace

int64_t choose_tokens(int64_t longest, int64_t parallel, int64_t tile, int64_t resident, int64_t overhead) {
  const int64_t tiles = std::max<int64_t>(1, (longest + tile - 1) / tile);
  int64_t best = tiles, least = 0;
  for (int64_t per = 1; per <= std::min(tiles, kMost / tile); ++per) {
    const int64_t works = (tiles + per - 1) / per * std::max<int64_t>(parallel, 1);
    const int64_t time = (works + resident - 1) / resident * (100 * per + overhead);
    // Of equals the longest: fewer partial sums.
    if (least == 0 || time <= least) {
      least = time;
      best = per;
    }
  }
  return best * tile;
}

int64_t checked_works(int64_t works, const char* kernel) {
  if (works > std::numeric_limits<int>::max() / 2)
    throw std::runtime_error(std::string(kernel) + ": " + std::to_string(works) +
                             " pieces of work, too many of samples or edges");
  return works;
}

void sum_block_states(Dtype dtype, int64_t outputs, int lists, const Table& table, const Chunks& chunks,
                      const float* partial, const BlockStates& states, Stream stream) {
  const int64_t padded = padded_channels(chunks.channels);
  const int64_t segments = ((padded + 1) * (padded / kRun) + kThreads - 1) / kThreads;
  const Arguments args{table,
                       states,
                       partial,
                       chunks.batch,
                       chunks.channels,
                       padded,
                       segments,
                       segments * chunks.batch * outputs,
                       lists,
                       chunks.table,
                       dtype == Dtype::kBFloat16};
  launch(states_kernel, "block_states", args.works, kThreads, 0, stream, args);
}

}  // namespace xattn::cuda
