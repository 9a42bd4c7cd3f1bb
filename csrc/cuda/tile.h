// Tiles of (batch, channels, tokens) tensors of any strides, in shared memory and back.
//
// A tile lies there as it lies in global memory: rows of tokens where these are side by side, else rows of
// channels. Products read either. Where storage is what products want and addresses allow, copies of 16, 8
// or 4 bytes go on by themselves; what must be converted comes in vectors where addresses allow; else
// elements are loaded one by one.
#pragma once

#include "../problem.h"
#include "product.h"

namespace xattn::cuda {

template <class E>
struct Tile {
  E* data;
  int stride;
  bool token_minor;
  XATTN_DEVICE E* at(int channel, int token) const {
    return token_minor ? data + channel * stride + token : data + token * stride + channel;
  }
  // As an operand that is summed over channels, or over tokens.
  XATTN_DEVICE Operand<E> over_channels() const { return {data, stride, !token_minor}; }
  XATTN_DEVICE Operand<E> over_tokens() const { return {data, stride, token_minor}; }
};

// x as an operand has it. What is lost can be a second operand: both together have a float's digits, or nearly.
template <class P>
XATTN_DEVICE float rounded(float x) {
  if constexpr (std::is_same_v<P, Tf32Products>)
    return bits_float(float_to_tf32(x));
  else
    return to_float(from_float<typename P::Element>(x));
}

// Elements of rows in shared memory that are `minor` elements long; of a tile whichever way it lies.
// `channels` and `tokens` are multiples of 16.
template <class P>
XATTN_BOTH constexpr int row_stride(int minor) {
  return minor + P::kPad;
}
template <class P>
XATTN_BOTH constexpr int tile_elements(int channels, int tokens) {
  return channels * row_stride<P>(tokens) > tokens * row_stride<P>(channels) ? channels * row_stride<P>(tokens)
                                                                             : tokens * row_stride<P>(channels);
}
template <class P>
XATTN_DEVICE Tile<typename P::Element> make_tile(typename P::Element* data, bool token_minor, int channels,
                                                 int tokens) {
  return {data, row_stride<P>(token_minor ? tokens : channels), token_minor};
}

// Bytes of an element of a tensor.
XATTN_DEVICE int storage_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }
template <class E>
XATTN_DEVICE bool is_storage(Dtype dtype) {
  return sizeof(E) == 4 ? dtype == Dtype::kFloat32 : dtype == Dtype::kBFloat16;
}

XATTN_BOTH bool is_token_minor(const View& view) {
  return view.token_stride == 1 || (view.channel_stride != 1 && view.token_stride <= view.channel_stride);
}

// The widest of 16, 8 and 4 bytes of which all rows of a view begin at a multiple; 0 if its minor dimension
// is not side by side or none fits.
XATTN_DEVICE int aligned_bytes(const View& view, int element_bytes) {
  const bool token_minor = is_token_minor(view);
  if ((token_minor ? view.token_stride : view.channel_stride) != 1) return 0;
  const int64_t row = token_minor ? view.channel_stride : view.token_stride;
  const int64_t bits = reinterpret_cast<int64_t>(view.data) | row * element_bytes | view.batch_stride * element_bytes;
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 0;
}

XATTN_DEVICE float load_element(const char* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kFloat32:
      return reinterpret_cast<const float*>(data)[i];
    case Dtype::kBFloat16:
      return to_float(reinterpret_cast<const BFloat16*>(data)[i]);
    default:
      return to_float(reinterpret_cast<const Float16*>(data)[i]);
  }
}
XATTN_DEVICE void store_element(char* data, Dtype dtype, int64_t i, float x) {
  switch (dtype) {
    case Dtype::kFloat32:
      reinterpret_cast<float*>(data)[i] = x;
      break;
    case Dtype::kBFloat16:
      reinterpret_cast<BFloat16*>(data)[i] = from_float<BFloat16>(x);
      break;
    default:
      reinterpret_cast<Float16*>(data)[i] = from_float<Float16>(x);
  }
}

// Walks the threads of a block over rows x columns, neighbours along a row: body(row, column).
template <class Body>
XATTN_DEVICE void for_rows(int rows, int columns, const Body& body) {
  const int row_step = thread_count() / columns, column_step = thread_count() % columns;
  int row = thread_index() / columns, column = thread_index() % columns;
  XATTN_KEEP_LOOP
  while (row < rows) {
    body(row, column);
    row += row_step;
    column += column_step;
    if (column >= columns) {
      column -= columns;
      ++row;
    }
  }
}

// Where a tile lies in a tensor: channels [channel, channel + channels), tokens [token, token + tokens).
struct Place {
  int64_t batch, channel, token;
  int channels, tokens;
};

// What load_tile and store_tile shall do with a tensor; the same for all of its tiles.
struct Access {
  Dtype dtype;
  bool token_minor;
  int bytes;  // that are moved at a time; 0: element by element
};
template <class E>
XATTN_DEVICE Access access(const View& view, Dtype dtype) {
  return {dtype, is_token_minor(view), aligned_bytes(view, storage_bytes(dtype))};
}

// Offset of an element within a tensor.
XATTN_DEVICE int64_t element_of(const View& view, const Place& place, int channel, int token) {
  return place.batch * view.batch_stride + (place.channel + channel) * view.channel_stride +
         (place.token + token) * view.token_stride;
}

template <int kBytes, class E>
XATTN_DEVICE void copy_tile(const View& view, const Place& place, const Tile<E>& to, int padded_channels,
                            int padded_tokens) {
  constexpr int kPer = kBytes / static_cast<int>(sizeof(E));
  const int rows = to.token_minor ? place.channels : place.tokens;
  const int columns = to.token_minor ? place.tokens : place.channels;
  const int64_t row_step = to.token_minor ? view.channel_stride : view.token_stride;
  const E* from = reinterpret_cast<const E*>(view.data) + element_of(view, place, 0, 0);
  for_rows(to.token_minor ? padded_channels : padded_tokens, (to.token_minor ? padded_tokens : padded_channels) / kPer,
           [&](int row, int i) {
             const int left = row < rows ? columns - i * kPer : 0;
             const int count = left < 0 ? 0 : left > kPer ? kPer : left;
             copy_async<kBytes>(to.data + row * to.stride + i * kPer,
                                count > 0 ? from + row * row_step + i * kPer : from,
                                count * static_cast<int>(sizeof(E)));
           });
}

// Tiles of float from float16, four elements at a time: a second load is on its way before the first is
// needed.
XATTN_DEVICE void convert_tile(const View& view, const Place& place, const Tile<float>& to, int padded_channels,
                               int padded_tokens) {
  constexpr int kPer = 4, kAhead = 2;
  struct alignas(2 * kPer) Vector {
    Float16 x[kPer];
  };
  struct alignas(4 * kPer) Floats {
    float x[kPer];
  };
  const int rows = to.token_minor ? place.channels : place.tokens;
  const int columns = to.token_minor ? place.tokens : place.channels;
  const int64_t row_step = to.token_minor ? view.channel_stride : view.token_stride;
  const Float16* from = reinterpret_cast<const Float16*>(view.data) + element_of(view, place, 0, 0);
  const int per_row = (to.token_minor ? padded_tokens : padded_channels) / kPer;
  const int count = (to.token_minor ? padded_channels : padded_tokens) * per_row;
  XATTN_KEEP_LOOP
  for (int first = thread_index(); first < count; first += kAhead * thread_count()) {
    Vector v[kAhead];
    XATTN_UNROLL
    for (int j = 0; j < kAhead; ++j) {
      const int i = first + j * thread_count(), row = i / per_row, column = i % per_row * kPer;
      const Float16* x = from + row * row_step + column;
      if (i < count && row < rows && column + kPer <= columns) {
        v[j] = *reinterpret_cast<const Vector*>(x);
      } else {
        XATTN_UNROLL
        for (int e = 0; e < kPer; ++e) v[j].x[e] = i < count && row < rows && column + e < columns ? x[e] : Float16{0};
      }
    }
    XATTN_UNROLL
    for (int j = 0; j < kAhead; ++j) {
      const int i = first + j * thread_count();
      if (i >= count) continue;
      Floats y;
      XATTN_UNROLL
      for (int e = 0; e < kPer; ++e) y.x[e] = to_float(v[j].x[e]);
      *reinterpret_cast<Floats*>(to.data + i / per_row * to.stride + i % per_row * kPer) = y;
    }
  }
}

// A tile from global memory, zero beyond `place` up to padded_channels x padded_tokens (multiples of 16;
// place.token, and in a row of channels place.channel, as well). Copies are not waited for: commit_copies,
// wait_copies and a barrier make all of it visible.
template <class E>
XATTN_DEVICE void load_tile(const View& view, const Access& access, const Place& place, const Tile<E>& to,
                            int padded_channels, int padded_tokens) {
  if (is_storage<E>(access.dtype)) {
    switch (access.bytes) {
      case 16:
        return copy_tile<16>(view, place, to, padded_channels, padded_tokens);
      case 8:
        return copy_tile<8>(view, place, to, padded_channels, padded_tokens);
      case 4:
        return copy_tile<4>(view, place, to, padded_channels, padded_tokens);
    }
  } else if constexpr (sizeof(E) == 4) {
    if (access.bytes >= 8) return convert_tile(view, place, to, padded_channels, padded_tokens);
  }
  for_rows(to.token_minor ? padded_channels : padded_tokens, to.token_minor ? padded_tokens : padded_channels,
           [&](int row, int i) {
             const int channel = to.token_minor ? row : i, token = to.token_minor ? i : row;
             float x = 0.0f;
             if (channel < place.channels && token < place.tokens)
               x = load_element(view.data, access.dtype, element_of(view, place, channel, token));
             to.data[row * to.stride + i] = from_float<E>(x);
           });
}

// Stores whole vectors of kBytes, and elements where less of a row is left. T: what the tensor has.
template <int kBytes, class T, class E>
XATTN_DEVICE void write_tile(const View& view, const Place& place, const Tile<E>& from) {
  constexpr int kPer = kBytes / static_cast<int>(sizeof(T));
  struct alignas(kBytes) Vector {
    T x[kPer];
  };
  struct alignas(kPer * sizeof(E)) Elements {
    E x[kPer];
  };
  const int rows = from.token_minor ? place.channels : place.tokens;
  const int columns = from.token_minor ? place.tokens : place.channels;
  const int64_t row_step = from.token_minor ? view.channel_stride : view.token_stride;
  T* to = reinterpret_cast<T*>(view.data) + element_of(view, place, 0, 0);
  for_rows(rows, (columns + kPer - 1) / kPer, [&](int row, int i) {
    T* there = to + row * row_step + i * kPer;
    const Elements here = *reinterpret_cast<const Elements*>(from.data + row * from.stride + i * kPer);
    Vector v;
    XATTN_UNROLL
    for (int j = 0; j < kPer; ++j) {
      if constexpr (sizeof(T) == sizeof(E))
        v.x[j] = here.x[j];
      else
        v.x[j] = from_float<T>(to_float(here.x[j]));
    }
    if (columns - i * kPer >= kPer) {
      *reinterpret_cast<Vector*>(there) = v;
    } else {
      XATTN_UNROLL
      for (int j = 0; j < kPer; ++j) {
        if (j < columns - i * kPer) there[j] = v.x[j];
      }
    }
  });
}

// A tile to global memory, rounded to its type there; the tile lies as the tensor does (access.token_minor).
template <class E>
XATTN_DEVICE void store_tile(const View& view, const Access& access, const Place& place, const Tile<E>& from) {
  if (is_storage<E>(access.dtype)) {
    switch (access.bytes) {
      case 16:
        return write_tile<16, E>(view, place, from);
      case 8:
        return write_tile<8, E>(view, place, from);
      case 4:
        return write_tile<4, E>(view, place, from);
    }
  } else if constexpr (sizeof(E) == 4) {
    if (access.bytes >= 8) return write_tile<8, Float16>(view, place, from);
  }
  const int rows = from.token_minor ? place.channels : place.tokens;
  const int columns = from.token_minor ? place.tokens : place.channels;
  for_rows(rows, columns, [&](int row, int i) {
    const int channel = from.token_minor ? row : i, token = from.token_minor ? i : row;
    store_element(view.data, access.dtype, element_of(view, place, channel, token),
                  to_float(from.data[row * from.stride + i]));
  });
}

// Two neighbouring tokens of a channel.
template <class E>
XATTN_DEVICE void put_pair(const Tile<E>& tile, int channel, int token, float x, float y) {
  if (tile.token_minor) {
    store_pair(tile.at(channel, token), x, y);
  } else {
    *tile.at(channel, token) = from_float<E>(x);
    *tile.at(channel, token + 1) = from_float<E>(y);
  }
}

// What a tile has where 16 rows of a warp's result have elements: for_pairs' x and y are at(n, half, 0) and
// at(n, half, 1), where half 1 is 8 rows below.
template <class E, int kColumns>
class Elements {
 public:
  XATTN_DEVICE Elements(const Tile<E>& tile, int row, int column) {
    if constexpr (sizeof(E) == 2) {
      const int matrix = lane() / 8, r = lane() % 8;
      XATTN_UNROLL
      for (int n = 0; n < kColumns / 2; ++n) {
        const int channel = row + matrix % 2 * 8, token = column + 16 * n + matrix / 2 * 8;
        if (tile.token_minor)
          load_matrices(pairs_[n], tile.at(channel + r, token));
        else
          load_matrices_transposed(pairs_[n], tile.at(channel, token + r));
      }
    } else {
      first_ = tile.at(row + lane() / 4, column + 2 * (lane() % 4));
      row_ = tile.token_minor ? tile.stride : 1;
      column_ = tile.token_minor ? 1 : tile.stride;
    }
  }
  XATTN_DEVICE float at(int n, int half, int i) const {
    if constexpr (sizeof(E) == 2) {
      const uint32_t pair = pairs_[n / 2][n % 2 * 2 + half];
      return bits_float(i == 0 ? pair << 16 : pair & 0xFFFF0000u);
    } else {
      return first_[8 * half * row_ + (8 * n + i) * column_];
    }
  }

 private:
  uint32_t pairs_[kColumns / 2][4];
  const E* first_;
  int row_, column_;
};

// Replaces elements x of channels x tokens by map(x, channel, token), four at a time.
template <class E, class Map>
XATTN_DEVICE void map_tile(const Tile<E>& tile, int channels, int tokens, const Map& map) {
  struct alignas(4 * sizeof(E)) Vector {
    E x[4];
  };
  for_rows(tile.token_minor ? channels : tokens, (tile.token_minor ? tokens : channels) / 4, [&](int row, int i) {
    Vector* place = reinterpret_cast<Vector*>(tile.data + row * tile.stride + 4 * i);
    Vector v = *place;
    float y[4];
    XATTN_UNROLL
    for (int j = 0; j < 4; ++j)
      y[j] = tile.token_minor ? map(to_float(v.x[j]), row, 4 * i + j) : map(to_float(v.x[j]), 4 * i + j, row);
    store_pair(v.x, y[0], y[1]);
    store_pair(v.x + 2, y[2], y[3]);
    *place = v;
  });
}

}  // namespace xattn::cuda
