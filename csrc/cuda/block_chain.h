// Projections of tokens that never leave a warp's registers, in bfloat16.
//
// A warp has a tile of tokens x. The result of x W^T, tokens as rows, has in its lanes what the next product wants
// of an operand, once rounded and packed in pairs: tokens as rows of a left one (h W^T, with tokens as rows again)
// or as columns of a right one (W h, with tokens as columns). So chains of projections read nothing but weights
// from shared memory, 512 bytes for two products of 16 x 8 x 16 for every 16 tokens.
//
// Weights lie in cores of 8 x 8 elements, 128 bytes side by side: (rows / 8, columns / 8, 8, 8).
#pragma once

#include "maths.h"
#include "tile.h"

namespace xattn::cuda {

// What loops over channels do where a call has fewer than its kernel: run over all of them; leave out rows of weights,
// by tiles of 16; rows, and columns by 64. Every end of a loop that is unrolled costs branches, and registers where
// they meet.
enum class Loops { kWhole, kRowsCut, kCut };

// kWidth: channels that a kernel has room for, a multiple of 8; kFrom: from how many on it is used.
template <int kWidth_, int kFrom_, int kTokens_, Loops kLoops_>
struct Shape {
  static constexpr int kWidth = kWidth_, kFrom = kFrom_, kTokens = kTokens_;
  static constexpr Loops kLoops = kLoops_;
  static constexpr int kTiles = (kWidth + 15) / 16, kHalves = kWidth / 8, kPadded = 16 * kTiles;
  static constexpr int kBlocks = kTokens / 16;
  // Half a tile of channels is left: biases are columns of matrices there, and features one.
  static constexpr bool kFolded = kWidth % 16 == 8;
  static_assert(kLoops == Loops::kWhole || kWidth % 16 == 0, "tiles of 16 channels are left out, not halves of them");
};

// Channels of a call: how many, and rounded up to whole tiles of 16.
struct Channels {
  int count, padded;
};
// Tiles of 16 rows of weights, and of 16 columns.
template <class S>
XATTN_DEVICE int tiles(const Channels& channels) {
  return S::kLoops == Loops::kWhole ? S::kTiles : opaque(channels.padded) / 16;
}
constexpr int kGrain = 4;
template <class S>
XATTN_BOTH int deep_tiles(int padded) {
  return S::kLoops != Loops::kCut ? S::kTiles : (padded / 16 + kGrain - 1) / kGrain * kGrain;
}

// body(k) for all tiles of columns.
template <class S, class Body>
XATTN_DEVICE void for_columns(const Channels& channels, const Body& body) {
  XATTN_UNROLL
  for (int first = 0; first < S::kTiles; first += kGrain) {
    if (S::kLoops == Loops::kCut && first >= deep_tiles<S>(opaque(channels.padded))) continue;
    XATTN_UNROLL
    for (int k = first; k < first + kGrain && k < S::kTiles; ++k) body(k);
  }
}

// Tokens by channels: elements (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8) and their right neighbours
// of blocks of 16 tokens and tiles of 16 channels, with g = lane / 4 and t = lane % 4.
template <class S>
struct Fragments {
  uint32_t v[S::kBlocks][S::kTiles][4];
};

// Sums of 16 channels of all tokens. Tokens as rows: v[i][h] has tokens 16 i + g and + 8, channels 8 h + 2 t and
// + 1. As columns: channels g and g + 8, tokens 16 i + 8 h + 2 t and + 1.
template <class S>
struct Sums {
  float v[S::kBlocks][2][4];
};

// softplus for results that are rounded to bfloat16: relative error 6e-5.
XATTN_DEVICE float softplus_bfloat16(float x) {
  constexpr float c[] = {0.9999432563781738f, -0.4969778060913086f, 0.30630093812942505f, -0.15742720663547516f,
                         0.04134730249643326f};
  const float size = bits_float(float_bits(x) & 0x7FFFFFFFu), t = exp2_approximate(-kLog2E * size);
  return fused_multiply_add(t, polynomial(t, c), larger(x, 0.0f));
}

// Where this lane reads a core of a tile of 16 x 16 weights: of tile k of a row of tiles, 128 elements further each.
// A left operand wants rows and rows + 8 first, a right one columns and columns + 8.
template <bool kColumns>
XATTN_DEVICE int weight_offset(int padded) {
  const int core = lane() / 8, row = kColumns ? core % 2 : core / 2, column = kColumns ? core / 2 : core % 2;
  return row * 8 * padded + column * 64 + lane() % 8 * 8;
}

// How fragments are ordered: as a left operand wants them, or with those of a right one, channels 2 t and 2 t + 8, side
// by side, so that no register need be copied.
enum class Order { kLeft, kRight };

// From one order to the other.
template <class S>
XATTN_DEVICE void turn(Fragments<S>& x) {
  XATTN_UNROLL
  for (int i = 0; i < S::kBlocks; ++i) {
    XATTN_UNROLL
    for (int k = 0; k < S::kTiles; ++k) {
      const uint32_t kept = x.v[i][k][1];
      x.v[i][k][1] = x.v[i][k][2];
      x.v[i][k][2] = kept;
    }
  }
}

// sums += x W^T, of a row of tiles of W at `w` (weight_offset added). half: with tokens as rows, only 8 channels of it.
template <bool kColumns, Order kOrder, bool kRolled, class S>
XATTN_DEVICE void multiply(Sums<S>& sums, const Fragments<S>& x, const BFloat16* w, const Channels& channels,
                           bool half = false) {
  static_assert(kColumns || kOrder == Order::kLeft, "tokens as rows are a left operand");
  constexpr int kHigh = kOrder == Order::kLeft ? 2 : 1, kNext = kOrder == Order::kLeft ? 1 : 2;
  // Of few tokens, in a loop that is not unrolled, two sums at a time: products that wait for each other keep the
  // tensor cores waiting.
  constexpr int kParts = S::kBlocks == 1 && kRolled ? 2 : 1;
  Sums<S> odd{};
  for_columns<S>(channels, [&](int k) {
    uint32_t a[4];
    load_matrices(a, w + k * 128);
    Sums<S>& to = kParts == 2 && k % 2 == 1 ? odd : sums;
    XATTN_UNROLL
    for (int i = 0; i < S::kBlocks; ++i) {
      const uint32_t (&b)[4] = x.v[i][k];
      if constexpr (kColumns) {
        multiply_bfloat16(to.v[i][0], a, {b[0], b[kHigh]});
        multiply_bfloat16(to.v[i][1], a, {b[kNext], b[kNext + kHigh]});
      } else {
        multiply_bfloat16(to.v[i][0], b, {a[0], a[1]});
        if (!half) multiply_bfloat16(to.v[i][1], b, {a[2], a[3]});
      }
    }
  });
  if constexpr (kParts == 2) {
    XATTN_UNROLL
    for (int h = 0; h < 2; ++h) {
      XATTN_UNROLL
      for (int e = 0; e < 4; ++e) sums.v[0][h][e] += odd.v[0][h][e];
    }
  }
}

// Sums that begin with the biases of 16 channels, if they are not folded into the matrix.
template <bool kColumns, class S>
XATTN_DEVICE void begin_with(Sums<S>& sums, const float* bias) {
  if constexpr (S::kFolded) {
    sums = {};
    return;
  }
  const int g = lane() / 4, t = lane() % 4;
  XATTN_UNROLL
  for (int h = 0; h < 2; ++h) {
    const float low = kColumns ? bias[g] : bias[8 * h + 2 * t];
    const float high = kColumns ? bias[g + 8] : bias[8 * h + 2 * t + 1];
    XATTN_UNROLL
    for (int i = 0; i < S::kBlocks; ++i) {
      sums.v[i][h][0] = low;
      sums.v[i][h][1] = kColumns ? low : high;
      sums.v[i][h][2] = kColumns ? high : low;
      sums.v[i][h][3] = high;
    }
  }
}

// Two channels from `channel` on that are beyond the last one become zero: products with weights that are zero
// there would otherwise make NaN of infinities.
XATTN_DEVICE uint32_t within(uint32_t pair, int channel, const Channels& channels) {
  return channel + 1 < channels.count ? pair : channel < channels.count ? pair & 0xFFFFu : 0u;
}

// Features of the three columns that biases are folded into, two of them a lane.
XATTN_DEVICE uint32_t ones() {
  const int t = opaque(lane()) % 4;
  return t == 0 ? 0x3F803F80u : t == 1 ? 0x3F80u : 0u;
}

enum class Activation { kRelu, kSoftplus };

// Both elements of a pair at once.
template <Activation kActivation>
XATTN_DEVICE uint32_t activate(float low, float high) {
  return kActivation == Activation::kRelu ? pack_bfloat16_relu(low, high)
                                          : pack_bfloat16(softplus_bfloat16(low), softplus_bfloat16(high));
}

// Sums with tokens as rows to tile j of an operand; `rest` fills half a tile that has no channels.
template <Activation kActivation, class S>
XATTN_DEVICE void activate(const Sums<S>& sums, int j, const Channels& channels, uint32_t rest, Fragments<S>& to) {
  XATTN_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int channel = 16 * j + 8 * h;
    XATTN_UNROLL
    for (int i = 0; i < S::kBlocks; ++i) {
      XATTN_UNROLL
      for (int r = 0; r < 2; ++r) {
        uint32_t& pair = to.v[i][j][2 * h + r];
        if (channel >= S::kWidth) {
          pair = rest;
          continue;
        }
        pair = activate<kActivation>(sums.v[i][h][2 * r], sums.v[i][h][2 * r + 1]);
        if (channel + 8 > S::kFrom && channel + 8 > channels.count)
          pair = within(pair, channel + 2 * (lane() % 4), channels);
      }
    }
  }
}

// to = activation(x W^T + b). `rows(j)` gives a row of 16 x 16 tiles of W in shared memory. The result of relu is
// to be projected again.
template <Activation kActivation, class S, class Rows>
XATTN_DEVICE void project(const Fragments<S>& x, const float* bias, const Channels& channels, const Rows& rows,
                          Fragments<S>& to) {
  const int offset = weight_offset<false>(16 * deep_tiles<S>(channels.padded));
  XATTN_UNROLL
  for (int j = 0; j < S::kTiles; ++j) {
    if (S::kLoops != Loops::kWhole && j >= tiles<S>(channels)) {
      XATTN_UNROLL
      for (int i = 0; i < S::kBlocks; ++i) {
        XATTN_UNROLL
        for (int r = 0; r < 4; ++r) to.v[i][j][r] = 0;
      }
      continue;
    }
    Sums<S> sums;
    begin_with<false>(sums, bias + 16 * j);
    multiply<false, Order::kLeft, false>(sums, x, rows(j) + offset, channels, 16 * j + 8 >= S::kWidth);
    activate<kActivation>(sums, j, channels, kActivation == Activation::kRelu ? ones() : 0u, to);
  }
}

// Tokens and channels in a warp's own part of shared memory, lying as they do in global memory. Of rows of
// tokens, pieces of 16 bytes are exchanged, of rows of channels there is an odd number: eight neighbouring rows
// are in different banks.
template <int kTokens>
struct Slab {
  BFloat16* data;
  int row;  // elements of a row of channels
  bool token_minor;

  static XATTN_BOTH constexpr int row_of(int channels) { return (channels / 8 | 1) * 8; }
  static XATTN_BOTH constexpr int bytes(int channels) {
    return static_cast<int>(sizeof(BFloat16)) * kTokens * row_of(channels);
  }
  static XATTN_DEVICE Slab make(char* data, int channels, bool token_minor) {
    return {reinterpret_cast<BFloat16*>(data), row_of(channels), token_minor};
  }
  // Element i of a row.
  XATTN_DEVICE BFloat16* at(int r, int i) const {
    if (!token_minor) return data + r * row + i;
    const int other = kTokens == 32 ? r / 2 % 4 : r / 4 % 2;
    return data + r * kTokens + ((i / 8 ^ other) * 8 + i % 8);
  }
};

// A run of tokens of one sample in global memory: where it begins, bytes from row to row (of tokens, or of channels)
// and bytes that are copied at a time; 0: elements lie apart, or at odd addresses.
struct Run {
  char* data;
  int64_t step;
  bool token_minor;
  int bytes;
};
XATTN_DEVICE Run run_of(const View& view, int64_t batch, int64_t begin) {
  const Access how = access<BFloat16>(view, Dtype::kBFloat16);
  return {view.data + 2 * (batch * view.batch_stride + begin * view.token_stride),
          2 * (how.token_minor ? view.channel_stride : view.token_stride), how.token_minor, how.bytes};
}

// A run and its length, in shared memory: registers are for what products need.
struct Tokens {
  Run run;
  int count;
};
constexpr int kTokensBytes = 64;  // with what a kernel adds

// What of a run a slab has: `channels` from `channel` on of `tokens` from `token` on.
struct Part {
  int token, channel, channels, tokens;
  // Address of the first element of a run with rows.
  XATTN_DEVICE char* in(const Run& run) const {
    return run.token_minor ? run.data + channel * run.step + 2 * token : run.data + token * run.step + 2 * channel;
  }
};

// body(row, column) for all pieces of kPer elements of rows of kColumns, neighbours along a row.
template <int kPer, int kColumns, class Body>
XATTN_DEVICE void for_pieces(int rows, const Body& body) {
  constexpr int kPieces = kColumns / kPer;
  XATTN_KEEP_LOOP
  for (int i = opaque(lane()); i < rows * kPieces; i += kWarp) body(i / kPieces, i % kPieces * kPer);
}

template <int kBytes, int kColumns, int kTokens>
XATTN_DEVICE void copy_rows(const Run& run, const Part& part, int rows, int valid_rows, int valid,
                            const Slab<kTokens>& to) {
  constexpr int kPer = kBytes / 2;
  const char* from = part.in(run);
  for_pieces<kPer, kColumns>(rows, [&](int row, int column) {
    const int left = row < valid_rows ? valid - column : 0;
    const int count = left < 0 ? 0 : left > kPer ? kPer : left;
    copy_async<kBytes>(to.at(row, column), count > 0 ? from + row * run.step + 2 * column : run.data, 2 * count);
  });
}

template <int kBytes, int kWidth, int kTokens>
XATTN_DEVICE void copy_part(const Run& run, const Part& part, int width, const Slab<kTokens>& to) {
  if (to.token_minor)
    copy_rows<kBytes, kTokens>(run, part, width, part.channels, part.tokens, to);
  else
    copy_rows<kBytes, kWidth>(run, part, kTokens, part.tokens, part.channels, to);
}

// What a run is of: a sample and a first token of a tensor.
struct Whole {
  View view;
  int64_t batch, begin;
};

// body(channel, token, offset) for all elements of a part, `offset` that of the tensor.
template <int kTokens, class Body>
XATTN_DEVICE void for_elements(const Whole& whole, const Part& part, int channels, int tokens, const Body& body) {
  const View& view = whole.view;
  XATTN_KEEP_LOOP
  for (int i = opaque(lane()); i < kTokens * channels; i += kWarp) {
    const int token = i % kTokens, channel = i / kTokens;
    if (token >= tokens) continue;
    body(channel, token,
         whole.batch * view.batch_stride + (part.channel + channel) * view.channel_stride +
             (whole.begin + part.token + token) * view.token_stride);
  }
}

// From global memory, channels from the first one on, zero beyond the part. `width` channels in rows of tokens,
// kWidth of them in rows of channels. To be committed, waited for, and then seen by the warp after sync_warp.
// whole_of() is what the run is of.
template <int kWidth, int kTokens, class WholeOf>
XATTN_DEVICE void load_part(const Run& run, const WholeOf& whole_of, const Part& part, int width,
                            const Slab<kTokens>& to) {
  switch (run.bytes) {
    case 16:
      return copy_part<16, kWidth>(run, part, width, to);
    case 8:
      return copy_part<8, kWidth>(run, part, width, to);
    case 4:
      return copy_part<4, kWidth>(run, part, width, to);
  }
  const Whole whole = whole_of();
  for_elements<kTokens>(whole, part, width, kTokens, [&](int channel, int token, int64_t offset) {
    BFloat16 x{0};
    if (channel < part.channels && token < part.tokens) x = reinterpret_cast<const BFloat16*>(whole.view.data)[offset];
    *(to.token_minor ? to.at(channel, token) : to.at(token, channel)) = x;
  });
}

template <int kBytes, int kColumns, int kTokens>
XATTN_DEVICE void write_rows(const Run& run, const Part& part, int rows, int valid, const Slab<kTokens>& from) {
  constexpr int kPer = kBytes / 2;
  struct alignas(kBytes) Vector {
    BFloat16 x[kPer];
  };
  char* to = part.in(run);
  for_pieces<kPer, kColumns>(rows, [&](int row, int column) {
    if (column >= valid) return;
    const BFloat16* here = from.at(row, column);
    BFloat16* there = reinterpret_cast<BFloat16*>(to + row * run.step) + column;
    if (column + kPer <= valid) {
      *reinterpret_cast<Vector*>(there) = *reinterpret_cast<const Vector*>(here);
    } else {
      for (int j = 0; j < valid - column; ++j) there[j] = here[j];
    }
  });
}

template <int kBytes, int kWidth, int kTokens>
XATTN_DEVICE void write_part(const Run& run, const Part& part, const Slab<kTokens>& from) {
  if (from.token_minor)
    write_rows<kBytes, kTokens>(run, part, part.channels, part.tokens, from);
  else
    write_rows<kBytes, kWidth>(run, part, part.tokens, part.channels, from);
}

// A part of at most kWidth channels to global memory.
template <int kWidth, int kTokens, class WholeOf>
XATTN_DEVICE void store_part(const Run& run, const WholeOf& whole_of, const Part& part, const Slab<kTokens>& from) {
  if (part.tokens <= 0) return;
  switch (run.bytes) {
    case 16:
      return write_part<16, kWidth>(run, part, from);
    case 8:
      return write_part<8, kWidth>(run, part, from);
    case 4:
      return write_part<4, kWidth>(run, part, from);
  }
  const Whole whole = whole_of();
  for_elements<kTokens>(whole, part, part.channels, part.tokens, [&](int channel, int token, int64_t offset) {
    reinterpret_cast<BFloat16*>(whole.view.data)[offset] =
        *(from.token_minor ? from.at(channel, token) : from.at(token, channel));
  });
}

// All of a slab's tokens and channels as an operand.
template <bool kTokenMinor, Order kOrder, class S>
XATTN_DEVICE void load_fragments(const Slab<S::kTokens>& from, const Channels& channels, Fragments<S>& x) {
  const int l = opaque(lane()), core = l / 8, row = l % 8;
  const int token_core = kOrder == Order::kLeft ? core % 2 : core / 2;
  const int channel_core = kOrder == Order::kLeft ? core / 2 : core % 2;
  for_columns<S>(channels, [&](int k) {
    const bool whole = 16 * k + 8 < S::kWidth;
    const int channel = 16 * k + (whole ? channel_core * 8 : 0);
    XATTN_UNROLL
    for (int i = 0; i < S::kBlocks; ++i) {
      const int token = 16 * i + token_core * 8;
      if constexpr (kTokenMinor)
        load_matrices_transposed(x.v[i][k], from.at(channel + row, token));
      else
        load_matrices(x.v[i][k], from.at(token + row, channel));
      if (!whole) {
        XATTN_UNROLL
        for (int r = 0; r < 2; ++r) x.v[i][k][kOrder == Order::kLeft ? 2 + r : 2 * r + 1] = ones();
      }
    }
  });
}

// All of a slab's tokens and channels as an operand.
template <Order kOrder, class S>
XATTN_DEVICE void load_fragments(const Slab<S::kTokens>& from, const Channels& channels, Fragments<S>& x) {
  if (from.token_minor)
    load_fragments<true, kOrder>(from, channels, x);
  else
    load_fragments<false, kOrder>(from, channels, x);
}

}  // namespace xattn::cuda
