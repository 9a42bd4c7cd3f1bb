#include <algorithm>

#include "states.h"

namespace xattn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kSegment = 1024;  // elements of a state that a block sums

struct Arguments {
  Table table;
  const float* partial;
  int64_t batch, channels, rows, segments, works;
  int first;
  StateSums sums;
};

XATTN_KERNEL(kThreads, 4) sum_kernel(XATTN_PARAMETER Arguments args) {
  const int64_t square = args.rows * args.channels, elements = square + args.channels;
  for (int64_t work = block_index(); work < args.works; work += block_count()) {
    const int64_t segment = work % args.segments, b = work / args.segments % args.batch;
    const int64_t list = work / args.segments / args.batch;
    const int64_t begin = args.table[args.sums.lists + list], end = args.table[args.sums.lists + list + 1];
    for (int64_t i = segment * kSegment + thread_index(); i < (segment + 1) * kSegment && i < elements; i += kThreads) {
      const bool is_s = i < square;
      const float* start = is_s ? args.sums.start_s : args.sums.start_z;
      const int64_t size = is_s ? square : args.channels, j = is_s ? i : i - square;
      float sum = start != nullptr && !args.sums.by_member ? start[(list * args.batch + b) * size + j] : 0.0f;
      for (int64_t m = begin; m < end; ++m) {
        const int64_t slot = args.table[m];
        if (start != nullptr && args.sums.by_member) sum += start[(slot * args.batch + b) * size + j];
        const int64_t last = args.table[args.first + slot + 1];
        for (int64_t chunk = args.table[args.first + slot]; chunk < last; ++chunk)
          sum += args.partial[(chunk * args.batch + b) * elements + i];
      }
      (is_s ? args.sums.s : args.sums.z)[(list * args.batch + b) * size + j] = sum;
    }
  }
}

}  // namespace

int64_t chunk_tokens(int64_t longest, int64_t parallel, int64_t tile, int processors) {
  int64_t size = std::max<int64_t>(tile, 256 / tile * tile);
  while (size < 2048 && longest / (2 * size) * parallel >= 4 * processors) size *= 2;
  return size;
}

Chunks make_chunks(const std::vector<int64_t>& tokens, int64_t batch, int64_t rows, int64_t channels, int64_t size,
                   TableBuilder& table, Scratch& scratch) {
  std::vector<int64_t> first{0};
  int64_t longest = 0;
  for (const int64_t n : tokens) {
    first.push_back(first.back() + (n + size - 1) / size);
    longest = std::max(longest, n);
  }
  Chunks chunks{batch,        channels, rows, size, (longest + size - 1) / size, static_cast<int64_t>(tokens.size()),
                first.back(), 0,        0};
  chunks.table = table.add(first);
  chunks.offset = scratch.reserve<float>(chunks.total * batch * chunks.elements());
  return chunks;
}

void sum_states(const Table& table, const Chunks& chunks, const float* partial, const StateSums& sums, Stream stream) {
  const int64_t segments = (chunks.elements() + kSegment - 1) / kSegment;
  const Arguments args{
      table,        partial, chunks.batch, chunks.channels, chunks.rows, segments, segments * chunks.batch * sums.count,
      chunks.table, sums};
  launch(sum_kernel, "sum_states", args.works, kThreads, 0, stream, args);
}

}  // namespace xattn::cuda
