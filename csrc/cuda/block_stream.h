// Matrices that all warps of a block read, row of tiles by row of tiles, for every tile of tokens anew: kept in
// shared memory, or where they are too large, in three pieces of a few rows that follow each other.
#pragma once

#include "block.h"
#include "block_chain.h"

namespace xattn::cuda {

// A matrix in cores of 8 x 8 to shared memory, `columns` of them, zero where it has no elements.
XATTN_DEVICE void copy_matrix(char* to, int to_padded, int columns, const char* from, int padded) {
  const int row = padded * 16, to_row = to_padded * 16;  // bytes of a row of cores
  for_rows(to_padded / 8, columns, [&](int r, int i) {
    const bool valid = 8 * r < padded && i < padded;
    copy_async<16>(to + r * to_row + 16 * i, valid ? from + r * row + 16 * i : from, valid ? 16 : 0);
  });
}

// Projections of a shape that keeps them in shared memory: `count` matrices and their biases, which are folded into
// the matrices where that is what the shape has: as three numbers of bfloat16 they keep all their digits.
template <class S>
XATTN_DEVICE void copy_projections(char* matrices, float* biases, const PackedBlock& packed, int64_t first, int count,
                                   int padded) {
  struct alignas(16) Row {
    uint32_t x[4];
  };
  constexpr int kMatrix = S::kPadded * S::kPadded * 2;
  XATTN_KEEP_LOOP
  for (int i = 0; i < count; ++i)
    copy_matrix(matrices + i * kMatrix, S::kPadded, S::kFolded ? S::kWidth : S::kPadded,
                packed.matrices + (first + i) * padded * padded * 2, padded);
  for_rows(count, S::kPadded, [&](int matrix, int channel) {
    const float b = channel < padded ? packed.biases[(first + matrix) * padded + channel] : -1e30f;
    if constexpr (S::kFolded) {
      const uint32_t high = pack_bfloat16(b, 0.0f);
      const float left = b - bfloat16_to_float(static_cast<uint16_t>(high));
      const bool whole = !(left - left == 0.0f);  // of an infinity nothing is left
      const uint32_t low = pack_bfloat16(whole ? 0.0f : left, 0.0f);
      const uint32_t rest = pack_bfloat16(whole ? 0.0f : left - bfloat16_to_float(static_cast<uint16_t>(low)), 0.0f);
      const int place = channel / 8 * 16 * S::kPadded + S::kWidth * 16 + channel % 8 * 16;
      *reinterpret_cast<Row*>(matrices + matrix * kMatrix + place) = {{high | low << 16, rest, 0, 0}};
    } else {
      biases[matrix * S::kPadded + channel] = b;
    }
  });
}

// Biases of a stream's projections.
XATTN_DEVICE void copy_biases(float* to, const float* from, int padded, int count) {
  for (int i = thread_index(); i < count * padded; i += thread_count()) to[i] = from[i];
}

constexpr int kStreamStages = 3;

// `Source`: matrix i of a tile's, in global memory. All threads of a block call everything together.
template <bool kStream, class Source>
class MatrixStream {
 public:
  // Shared memory for `piece` rows of tiles at a time; of a stream that is kept, for all of them.
  XATTN_DEVICE MatrixStream(char* memory, int padded, int piece, int matrices, int uses, const Source& source)
      : source_(source), memory_(memory), padded_(padded), piece_(piece), matrices_(matrices) {
    if (kStream) left_ = uses * matrices * ((padded / 16 + piece - 1) / piece);
  }

  // Copies begin; of a stream that is kept, those of matrices from `first` on, to be waited for before they are used.
  XATTN_DEVICE void begin(int first, int source_padded) {
    if constexpr (kStream) {
      issue();
      issue();
    } else {
      XATTN_KEEP_LOOP
      for (int i = first; i < matrices_; ++i)
        copy_matrix(memory_ + i * padded_ * padded_ * 2, padded_, padded_, source_(i), source_padded);
      commit_copies();
    }
  }

  // The next row of 16 x 16 tiles. With kStream, copies that a thread has begun since its last call are complete
  // two pieces later.
  XATTN_DEVICE const BFloat16* next() {
    if constexpr (kStream) {
      if (row_ == 0 || in_piece_ == piece_) {
        wait_copies<1>();
        sync_threads();
        issue();
        at_ = used_ * piece_ * padded_ * 16;
        used_ = used_ + 1 == kStreamStages ? 0 : used_ + 1;
        in_piece_ = 0;
      }
      if (++row_ == padded_ / 16) row_ = 0;
      return reinterpret_cast<const BFloat16*>(memory_) + at_ + in_piece_++ * 16 * padded_;
    } else {
      return reinterpret_cast<const BFloat16*>(memory_) + row_++ * 16 * padded_;
    }
  }
  // Before the matrices are used once more.
  XATTN_DEVICE void restart() { row_ = 0; }

 private:
  // The piece after those under way, if there is one.
  XATTN_DEVICE void issue() {
    if (left_ > 0) {
      --left_;
      const int rows = padded_ / 16 - from_row_ < piece_ ? padded_ / 16 - from_row_ : piece_;
      const char* from = source_(matrix_) + from_row_ * padded_ * 32;
      char* to = memory_ + issued_ * piece_ * padded_ * 32;
      XATTN_KEEP_LOOP
      for (int i = thread_index(); i < rows * padded_ * 2; i += thread_count())
        copy_async<16>(to + 16 * i, from + 16 * i);
      issued_ = issued_ + 1 == kStreamStages ? 0 : issued_ + 1;
      from_row_ += rows;
      if (from_row_ == padded_ / 16) {
        from_row_ = 0;
        matrix_ = matrix_ + 1 == matrices_ ? 0 : matrix_ + 1;
      }
    }
    commit_copies();
  }

  const Source& source_;
  char* memory_;
  int padded_, piece_, matrices_;
  int row_ = 0, in_piece_ = 0, used_ = 0, at_ = 0;  // of what is read
  int issued_ = 0, from_row_ = 0, matrix_ = 0;      // of what is copied
  int left_ = 0;
};

// What a kernel does with a tile: its shape; threads and blocks of a processor; whether matrices are streamed.
template <class Shape, int kThreads_, int kResident_, bool kStream_>
struct ChainPlan {
  using S = Shape;
  static constexpr int kThreads = kThreads_, kResident = kResident_;
  static constexpr bool kStream = kStream_;
  // Tiles of 16 channels that are gathered in shared memory before they are stored.
  static constexpr int kGather = kStream ? 3 : S::kTiles;
  static constexpr int kGathered = kStream ? 48 : S::kWidth;
  static constexpr int kSlab = Slab<S::kTokens>::bytes(S::kWidth);
  static constexpr int kWarpBytes = kSlab + Slab<S::kTokens>::bytes(kGathered);
};

// Sizes that a call chooses: warps, rows of tiles in a piece, or matrices that are kept; bytes of shared memory.
struct ChainGeometry {
  int threads, tile, piece, matrices;
  int biases, slabs, shared;  // offsets and size
};

// The most warps, then the largest pieces, that fit `limit` bytes: threads of 0 where none does.
template <class Plan>
ChainGeometry chain_geometry(int padded, int matrices, int limit) {
  using S = typename Plan::S;
  for (int warps = Plan::kThreads / kWarp; warps > 0; warps -= 2) {
    // A matrix is three pieces at least: what is copied while the last one is multiplied has landed by its end.
    const int most = padded / 48 < 4 ? padded / 48 : 4;
    for (int piece = Plan::kStream ? most : 1; piece > 0; --piece) {
      ChainGeometry g{warps * kWarp, warps * S::kTokens, piece, matrices, 0, 0, 0};
      const int width = Plan::kStream ? padded : S::kPadded;
      g.biases = Plan::kStream ? kStreamStages * piece * width * 32 : matrices * width * width * 2;
      g.slabs = g.biases + 3 * width * static_cast<int>(sizeof(float));
      g.shared = g.slabs + warps * Plan::kWarpBytes;
      if (g.shared <= limit) return g;
    }
  }
  return {};
}

// Everything that a warp computes from 16 channels after another: rows(m) of a matrix times x, gathered and stored.
// pair(sums, m, i, h, r): elements 2 r and 2 r + 1 of sums.v[i][h], finished and packed; flush(first, count): tiles
// of 16 channels from `first` on are gathered.
template <class Plan, bool kColumns, class Next, class Begin, class Pair, class Flush>
XATTN_DEVICE void gather(const Fragments<typename Plan::S>& x, const Channels& channels,
                         const Slab<Plan::S::kTokens>& to, Next& next, const Begin& begin, const Pair& pair,
                         const Flush& flush) {
  using S = typename Plan::S;
  const int g = lane() / 4, t = lane() % 4, count = tiles<S>(channels);
  const int offset = weight_offset<kColumns>(S::kExact ? S::kPadded : channels.padded);
  XATTN_KEEP_LOOP
  for (int m = 0; m < count; ++m) {
    const int first = m / Plan::kGather * Plan::kGather, at = 16 * (m - first);
    Sums<S> sums;
    begin(sums, m);
    multiply<kColumns>(sums, x, next.next() + offset, channels);
    XATTN_UNROLL
    for (int h = 0; h < 2; ++h) {
      XATTN_UNROLL
      for (int r = 0; r < 2; ++r) {
        if (S::kWidth % 16 == 8 && 16 * m + 8 * (kColumns ? r : h) >= S::kWidth) continue;
        XATTN_UNROLL
        for (int i = 0; i < S::kBlocks; ++i) {
          const uint32_t value = pair(sums, m, i, h, r);
          BFloat16* place =
              kColumns ? to.at(at + 8 * r + g, 16 * i + 8 * h + 2 * t) : to.at(16 * i + 8 * r + g, at + 8 * h + 2 * t);
          *reinterpret_cast<uint32_t*>(place) = value;
        }
      }
    }
    if (m + 1 == count || m + 1 == first + Plan::kGather) {
      sync_warp();
      flush(first, m + 1 - first);
      sync_warp();
    }
  }
}

}  // namespace xattn::cuda
