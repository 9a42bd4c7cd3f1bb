// What the kernels of softmax cross-attention share: heads of tensors, and tiles of them on their way.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "maths.h"
#include "operators.h"
#include "tile.h"

namespace xattn::cuda {

constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

XATTN_BOTH constexpr int padded_width(int64_t width) { return static_cast<int>((width + 15) / 16 * 16); }
XATTN_BOTH constexpr int least(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

// x / y, with what 1 / y is known to be, and rounded as a division is.
template <bool kExact>
XATTN_DEVICE float quotient(float x, float y, float inverse) {
  const float q = x * inverse;
  if constexpr (!kExact) return q;
  const float corrected = fused_multiply_add(fused_multiply_add(-q, y, x), inverse, q);
  return q - q == 0.0f ? corrected : q;  // infinities have no remainder
}

// How many pieces of work a kernel has, which counts them in 32 bits.
inline uint32_t works(const char* name, std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (size > 0 && product > INT32_MAX / size)
      throw std::runtime_error(std::string(name) + ": too large, more than 2^31 pieces of work");
    product *= size;
  }
  return static_cast<uint32_t>(product);
}

// How tensors lie in memory, if all lie alike. Kernels of exact widths ask for that.
enum class Layout : int { kTokenMinor, kChannelMinor, kMixed };

inline Layout common_layout(std::initializer_list<Span<const View>> tensors) {
  bool token_minor = false, channel_minor = false;
  for (const Span<const View>& views : tensors) {
    for (int64_t i = 0; i < views.size; ++i)
      if (views[i].data != nullptr) (is_token_minor(views[i]) ? token_minor : channel_minor) = true;
  }
  return token_minor && channel_minor ? Layout::kMixed : channel_minor ? Layout::kChannelMinor : Layout::kTokenMinor;
}

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

// A part of a matrix on its way to shared memory: channels and tokens of it, and of the tile with its padding.
struct TilePart {
  int64_t token;
  int channel, channels, tokens, padded_channels, padded_tokens;
};

// As load_tile. kChannels: all padded channels if the compiler knows them, so that places are found without
// divisions; then channel is 0, and padded_tokens are a power of two.
template <int kChannels, class E>
XATTN_DEVICE void load_part(const Matrix<E>& from, const TilePart& part, const Tile<E>& to) {
  const View& view = from.view;
  const int present = view.data == nullptr ? 0 : part.tokens;
  const int bytes = from.access.bytes;
  if (kChannels == 0 || bytes == 0) {
    load_tile(view, {from.access.dtype, from.access.token_minor, kChannels == 0 ? bytes : 0},
              {0, part.channel, part.token, part.channels, present}, to, part.padded_channels, part.padded_tokens);
    return;
  }
  constexpr int kPer = 16 / static_cast<int>(sizeof(E)), kVectors = kChannels == 0 ? 1 : kChannels / kPer;
  const bool token_minor = to.token_minor;
  const int shift = bytes == 16 ? 0 : bytes == 8 ? 1 : 2, per = kPer >> shift;
  const int token_vectors = part.padded_tokens / kPer;
  const auto row_of = [=](int i) { return token_minor ? (i >> shift) / token_vectors : (i >> shift) / kVectors; };
  const int vectors = (token_minor ? token_vectors : kVectors) << shift;
  const int row_step = row_of(thread_count()), column_step = thread_count() - row_step * vectors;
  const int all_rows = token_minor ? kChannels : part.padded_tokens;
  const int rows = token_minor ? part.channels : present, columns = token_minor ? present : part.channels;
  const int64_t stride = token_minor ? view.channel_stride : view.token_stride;
  const E* data = reinterpret_cast<const E*>(view.data) + part.token * view.token_stride;
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

// body(a, b), where the compiler knows a and b, for operands of 16 bits: see Pieces.
template <class E, class Body>
XATTN_DEVICE void with_layouts(bool a, bool b, const Body& body) {
  if constexpr (sizeof(E) == 4)
    body(a, b);
  else if (a)
    b ? body(true, true) : body(true, false);
  else
    b ? body(false, true) : body(false, false);
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
constexpr int kControl = 384;

// Rows of a warp, 16 kRows of them, by their channels: to a tensor, by way of shared memory that nobody else
// needs any more. For all threads of a block; what they do next to shared memory, after a barrier of its own.
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
}

}  // namespace xattn::cuda
