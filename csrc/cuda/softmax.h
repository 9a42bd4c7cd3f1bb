// What the kernels of softmax cross-attention share: heads of tensors, and tiles of them on their way.
#pragma once

#include "maths.h"
#include "operators.h"
#include "tile.h"

namespace xattn::cuda {

constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

XATTN_BOTH constexpr int padded_width(int64_t width) { return static_cast<int>((width + 15) / 16 * 16); }
XATTN_BOTH constexpr int least(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

// A (channels, tokens) tensor: the channels from `channel` on of one sample. A view of tokens without data is
// zero everywhere.
template <class E>
struct Matrix {
  View view;
  Access access;

  XATTN_DEVICE void set(const View& from, Dtype dtype, int64_t batch, int64_t channel) {
    view = from;
    view.data += (batch * from.batch_stride + channel * from.channel_stride) * storage_bytes(dtype);
    view.batch_stride = 0;
    access = cuda::access<E>(view, dtype);
    if (from.data == nullptr) view.data = nullptr;
  }
};

// As load_tile for sizes that the compiler knows: places are found without divisions.
template <int kChannels, int kTokens, int kThreads, class E>
XATTN_DEVICE void load_exact(const Matrix<E>& from, int64_t token, int channels, int tokens, const Tile<E>& to) {
  constexpr int kPer = 16 / static_cast<int>(sizeof(E));
  const bool token_minor = to.token_minor;
  const int bytes = from.access.bytes;
  if (bytes == 0) {
    load_tile(from.view, from.access, {0, 0, token, channels, tokens}, to, kChannels, kTokens);
    return;
  }
  const int shift = bytes == 16 ? 0 : bytes == 8 ? 1 : 2, per = kPer >> shift;
  const auto row_of = [=](int i) {
    return token_minor ? (i >> shift) / (kTokens / kPer) : (i >> shift) / (kChannels / kPer);
  };
  const int vectors = (token_minor ? kTokens / kPer : kChannels / kPer) << shift;
  const int row_step = row_of(kThreads), column_step = kThreads - row_step * vectors;
  const int all_rows = token_minor ? kChannels : kTokens;
  const int rows = token_minor ? channels : tokens, columns = token_minor ? tokens : channels;
  const int64_t stride = token_minor ? from.view.channel_stride : from.view.token_stride;
  const E* data = reinterpret_cast<const E*>(from.view.data) + token * from.view.token_stride;
  int row = row_of(thread_index()), column = thread_index() - row * vectors;
  XATTN_KEEP_LOOP
  while (row < all_rows) {
    const int first = column * per, left = row < rows ? columns - first : 0;
    const int count = left < 0 ? 0 : left > per ? per : left;
    const E* here = count > 0 ? data + row * stride + first : data;
    E* there = to.data + row * to.stride + first;
    const int size = count * static_cast<int>(sizeof(E));
    if (bytes == 16)
      copy_async<16>(there, here, size);
    else if (bytes == 8)
      copy_async<8>(there, here, size);
    else
      copy_async<4>(there, here, size);
    row += row_step;
    column += column_step;
    if (column >= vectors) {
      column -= vectors;
      ++row;
    }
  }
}

// Channels [channel, channel + channels) of `tokens` tokens, padded to kTokens and to a multiple of 16.
template <int kTokens, class E>
XATTN_DEVICE void load_part(const Matrix<E>& from, int64_t token, int channel, int channels, int tokens,
                            const Tile<E>& to) {
  const Place place{0, channel, token, channels, from.view.data == nullptr ? 0 : tokens};
  load_tile(from.view, from.access, place, to, padded_width(channels), kTokens);
}

// Two neighbouring channels of a token.
template <class E>
XATTN_DEVICE void put_channels(const Tile<E>& tile, int channel, int token, float x, float y) {
  if (tile.token_minor) {
    *tile.at(channel, token) = from_float<E>(x);
    *tile.at(channel + 1, token) = from_float<E>(y);
  } else {
    store_pair(tile.at(channel, token), x, y);
  }
}

// What is rarely read lies here, in front of all else in shared memory, rather than in registers.
constexpr int kControl = 256;

// Rows of a warp, 16 kRows of them, by their channels: to a tensor, by way of shared memory that nobody else
// needs any more. For all threads of a block.
template <class P, int kTokens, int kRows, int kColumns>
XATTN_DEVICE void store_rows(Accumulator<kRows, kColumns>& from, const View& view, Dtype dtype, int64_t batch,
                             int64_t channel, int channels, int64_t token) {
  using E = typename P::Element;
  Matrix<E> to;
  to.set(view, dtype, batch, channel);
  const int width = padded_width(channels), first = warp() * 16 * kRows;
  const Tile<E> tile =
      make_tile<P>(reinterpret_cast<E*>(shared_memory() + kControl), to.access.token_minor, width, kTokens);
  sync_threads();
  from.for_pairs(16 * kRows, width,
                 [&](int row, int column, float x, float y) { put_channels(tile, column, first + row, x, y); });
  sync_threads();
  store_tile(to.view, to.access, {0, 0, token, channels, least(view.tokens - token, kTokens)}, tile);
  sync_threads();
}

}  // namespace xattn::cuda
