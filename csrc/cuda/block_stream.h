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

// What a kernel does with a tile: its shape; threads and blocks of a processor; rows of tiles in a piece of a matrix,
// 0: matrices stay in shared memory.
template <class Shape, int kThreads_, int kResident_, int kPiece_>
struct ChainPlan {
  using S = Shape;
  static constexpr int kThreads = kThreads_, kResident = kResident_, kPiece = kPiece_;
  static constexpr bool kStream = kPiece > 0;
  // Tiles of 16 channels that are gathered in shared memory before they are stored.
  static constexpr int kGather = kStream ? 3 : S::kTiles;
  static constexpr int kGathered = kStream ? 48 : S::kWidth;
  static constexpr int kSlab = Slab<S::kTokens>::bytes(S::kWidth);
  static constexpr int kWarpBytes = kSlab + Slab<S::kTokens>::bytes(kGathered);
};

// `source(i)`: matrix i of a tile's, in global memory. All threads of a block call everything together.
template <class Plan, class Source>
class MatrixStream {
 public:
  using S = typename Plan::S;

  // `matrices` of them, for `uses` tiles of tokens.
  XATTN_DEVICE MatrixStream(char* memory, const Channels& channels, int matrices, int uses, const Source& source)
      : source_(source), memory_(memory), channels_(channels), matrices_(matrices) {
    if constexpr (Plan::kStream) left_ = uses * matrices * pieces();
  }

  // Copies begin; of matrices that stay, those from `first` on. To be waited for before the first use.
  XATTN_DEVICE void begin(int first) {
    if constexpr (Plan::kStream) {
      issue();
    } else {
      XATTN_KEEP_LOOP
      for (int i = first; i < matrices_; ++i)
        copy_matrix(memory_ + i * deep() * deep() * 2, deep(), deep(), source_(i), channels_.padded);
      commit_copies();
    }
  }

  // Row j of 16 x 16 tiles of a matrix; of a stream, one after the other. All that a thread has committed before
  // a piece begins is there then.
  XATTN_DEVICE const BFloat16* row(int matrix, int j) {
    const BFloat16* memory = reinterpret_cast<const BFloat16*>(memory_);
    if constexpr (Plan::kStream) {
      if (j % Plan::kPiece == 0) {
        wait_copies<0>();
        sync_threads();
        stage_ ^= 1;
        issue();
      }
      return memory + (stage_ * Plan::kPiece + j % Plan::kPiece) * 16 * deep();
    } else {
      return memory + (matrix * S::kTiles + j) * 16 * deep();
    }
  }

 private:
  XATTN_DEVICE int deep() const { return 16 * deep_tiles<S>(channels_.padded); }
  XATTN_DEVICE int pieces() const { return (tiles<S>(channels_) + Plan::kPiece - 1) / Plan::kPiece; }

  // The piece after the one at hand, if there is one, to where the one before was. A warp copies a row of cores.
  XATTN_DEVICE void issue() {
    if (left_ > 0) {
      --left_;
      if (piece_ == 0) from_ = source_(matrix_);
      const int left = 2 * (tiles<S>(channels_) - piece_ * Plan::kPiece);
      const int rows = left < 2 * Plan::kPiece ? left : 2 * Plan::kPiece;
      char* to = memory_ + (stage_ ^ 1) * Plan::kPiece * deep() * 32;
      XATTN_KEEP_LOOP
      for (int r = opaque(warp()); r < rows; r += warp_count()) {
        XATTN_KEEP_LOOP
        for (int i = opaque(lane()); i < deep(); i += kWarp) {
          const bool valid = S::kLoops == Loops::kWhole || i < channels_.padded;
          copy_async<16>(to + 16 * (r * deep() + i), valid ? from_ + 16 * (r * channels_.padded + i) : from_,
                         valid ? 16 : 0);
        }
      }
      from_ += rows * channels_.padded * 16;
      if (++piece_ == pieces()) {
        piece_ = 0;
        matrix_ = matrix_ + 1 == matrices_ ? 0 : matrix_ + 1;
      }
    }
    commit_copies();
  }

  const Source& source_;
  char* memory_;
  Channels channels_;
  int matrices_;
  // The stage that is read; what is copied next, from where, and how many pieces that are left.
  int stage_ = 1, matrix_ = 0, piece_ = 0, left_ = 0;
  const char* from_ = nullptr;
};

// Sizes that a call chooses: warps, and matrices that stay; bytes of shared memory.
struct ChainGeometry {
  int threads, tile;
  int biases, run, slabs, shared;  // offsets and size
};

// The most warps that fit `limit` bytes: threads of 0 where none does.
template <class Plan>
ChainGeometry chain_geometry(int padded, int matrices, int limit) {
  using S = typename Plan::S;
  const int width = 16 * deep_tiles<S>(padded);
  for (int warps = Plan::kThreads / kWarp; warps > 0; warps -= 2) {
    ChainGeometry g{warps * kWarp, warps * S::kTokens, 0, 0, 0, 0};
    g.biases = Plan::kStream ? 2 * Plan::kPiece * width * 32 : matrices * width * width * 2;
    g.run = g.biases + 3 * width * static_cast<int>(sizeof(float));
    g.slabs = g.run + kTokensBytes;
    g.shared = g.slabs + warps * Plan::kWarpBytes;
    if (g.shared <= limit) return g;
  }
  return {};
}

// Everything that a warp computes from 16 channels after another: row(m) of a matrix times x, gathered and stored.
// pair(sums, m, i, h, r): elements 2 r and 2 r + 1 of sums.v[i][h], finished and packed; flush(first, count): tiles
// of 16 channels from `first` on are gathered.
template <class Plan, bool kColumns, Order kOrder, class Row, class Begin, class Pair, class Flush>
XATTN_DEVICE void gather(const Fragments<typename Plan::S>& x, const Channels& channels,
                         const Slab<Plan::S::kTokens>& to, const Row& row, const Begin& begin, const Pair& pair,
                         const Flush& flush) {
  using S = typename Plan::S;
  const int g = lane() / 4, t = lane() % 4, count = tiles<S>(channels);
  const int offset = weight_offset<kColumns>(16 * deep_tiles<S>(channels.padded));
  XATTN_KEEP_LOOP
  for (int m = 0; m < count; ++m) {
    const int first = m / Plan::kGather * Plan::kGather, at = 16 * (m - first);
    Sums<S> sums;
    begin(sums, m);
    multiply<kColumns, kOrder, true>(sums, x, row(m) + offset, channels);
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
