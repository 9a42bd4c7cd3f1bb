// Strided tensors of any dtype to and from the kernels' scratch matrices.
#pragma once

#include "gemm.h"

namespace xattn {
namespace XATTN_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float to_float(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Shift into place and correct the exponent's bias by a product, which also makes subnormals right.
  uint32_t bits = static_cast<uint32_t>(x.bits & 0x7FFF) << 13;
  float y;
  std::memcpy(&y, &bits, 4);
  y *= 5.192296858534828e33f;  // 2^112
  std::memcpy(&bits, &y, 4);
  if ((x.bits & 0x7C00) == 0x7C00) bits |= 0x7F800000;
  bits |= static_cast<uint32_t>(x.bits & 0x8000) << 16;
  std::memcpy(&y, &bits, 4);
  return y;
#endif
}
inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }

template <class S>
S from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Float16 from_float<Float16>(float x) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return {static_cast<uint16_t>(sign | 0x7E00)};
  if (bits >= 0x477FF000) return {static_cast<uint16_t>(sign | 0x7C00)};
  if (bits < 0x38800000) {  // subnormal in half: let float addition round at the right place
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return {static_cast<uint16_t>(sign | (bits - 0x3F000000))};
  }
  bits += 0xC8000FFF + (bits >> 13 & 1);
  return {static_cast<uint16_t>(sign | bits >> 13)};
#endif
}
template <class S>
inline S from_float(double x);
template <>
inline double from_float<double>(double x) {
  return x;
}

// Calls body with a value of the storage type of `dtype`; Real decides whether that is double.
template <class Real, class Body>
inline void with_storage(Dtype dtype, Body&& body) {
  if constexpr (sizeof(Real) == 8) {
    body(double{});
  } else if (dtype == Dtype::kFloat32) {
    body(float{});
  } else if (dtype == Dtype::kBFloat16) {
    body(BFloat16{});
  } else {
    body(Float16{});
  }
}

constexpr int64_t kTransposeBlock = 16;

// destination[r][c] = source[r * row_stride + c * column_stride], one panel wide at most.
template <class S, class Real>
void copy_in(const S* source, ptrdiff_t row_stride, ptrdiff_t column_stride, int64_t rows, int64_t columns,
             Real* destination, ptrdiff_t destination_row) {
  if (column_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      const S* from = source + r * row_stride;
      Real* to = destination + r * destination_row;
      for (int64_t c = 0; c < columns; ++c) to[c] = to_float(from[c]);
    }
    return;
  }
  // Read along the rows where they are contiguous, in blocks that the first-level cache holds.
  for (int64_t r0 = 0; r0 < rows; r0 += kTransposeBlock) {
    const int64_t r1 = min64(r0 + kTransposeBlock, rows);
    for (int64_t c = 0; c < columns; ++c) {
      const S* from = source + c * column_stride;
      Real* to = destination + c;
      for (int64_t r = r0; r < r1; ++r) to[r * destination_row] = to_float(from[r * row_stride]);
    }
  }
}

// The reverse of copy_in.
template <class S, class Real>
void copy_out(const Real* source, ptrdiff_t source_row, int64_t rows, int64_t columns, S* destination,
              ptrdiff_t row_stride, ptrdiff_t column_stride) {
  if (column_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      const Real* from = source + r * source_row;
      S* to = destination + r * row_stride;
      for (int64_t c = 0; c < columns; ++c) to[c] = from_float<S>(from[c]);
    }
    return;
  }
  for (int64_t r0 = 0; r0 < rows; r0 += kTransposeBlock) {
    const int64_t r1 = min64(r0 + kTransposeBlock, rows);
    for (int64_t c = 0; c < columns; ++c) {
      const Real* from = source + c;
      S* to = destination + c * column_stride;
      for (int64_t r = r0; r < r1; ++r) to[r * row_stride] = from_float<S>(from[r * source_row]);
    }
  }
}

// A rows x columns piece of a tensor into a matrix of Reals. Columns beyond `columns` up to whole
// vectors are zero.
template <class Op>
void load_matrix(Dtype dtype, const char* data, int64_t offset, ptrdiff_t row_stride, ptrdiff_t column_stride,
                 int64_t rows, int64_t columns, Panels<typename Op::Real> to) {
  using Real = typename Op::Real;
  with_storage<Real>(dtype, [&](auto storage) {
    using S = decltype(storage);
    const S* source = reinterpret_cast<const S*>(data) + offset;
    for (int64_t c = 0; c < columns; c += kPanel<Op>) {
      const int64_t width = min64(columns - c, kPanel<Op>);
      Real* panel = to.data + c / kPanel<Op> * to.panel;
      copy_in(source + c * column_stride, row_stride, column_stride, rows, width, panel, to.row);
      const int64_t padded = round_up(width, kLanes<Real>);
      if (padded != width) {
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = width; i < padded; ++i) panel[r * to.row + i] = Real(0);
        }
      }
    }
  });
}

template <class Op>
void store_matrix(Panels<const typename Op::Real> from, int64_t rows, int64_t columns, Dtype dtype, char* data,
                  int64_t offset, ptrdiff_t row_stride, ptrdiff_t column_stride) {
  using Real = typename Op::Real;
  with_storage<Real>(dtype, [&](auto storage) {
    using S = decltype(storage);
    S* destination = reinterpret_cast<S*>(data) + offset;
    for (int64_t c = 0; c < columns; c += kPanel<Op>) {
      const int64_t width = min64(columns - c, kPanel<Op>);
      copy_out(from.data + c / kPanel<Op> * from.panel, from.row, rows, width, destination + c * column_stride,
               row_stride, column_stride);
    }
  });
}

// Token range [t, t + count) of batch entry b of a view, with channels as rows (tokens lie along the
// vectors) or tokens as rows.
template <class Op>
void load_channels(Dtype dtype, const View& view, int64_t b, int64_t t, int64_t count, int64_t channel0,
                   int64_t channels, Panels<typename Op::Real> to) {
  load_matrix<Op>(dtype, view.data, b * view.batch_stride + channel0 * view.channel_stride + t * view.token_stride,
                  view.channel_stride, view.token_stride, channels, count, to);
}
template <class Op>
void load_tokens(Dtype dtype, const View& view, int64_t b, int64_t t, int64_t count, int64_t channel0,
                 int64_t channels, Panels<typename Op::Real> to) {
  load_matrix<Op>(dtype, view.data, b * view.batch_stride + channel0 * view.channel_stride + t * view.token_stride,
                  view.token_stride, view.channel_stride, count, channels, to);
}
template <class Op>
void store_channels(Panels<const typename Op::Real> from, int64_t channel0, int64_t channels, int64_t count,
                    Dtype dtype, const View& view, int64_t b, int64_t t) {
  store_matrix<Op>(from, channels, count, dtype, view.data,
                   b * view.batch_stride + channel0 * view.channel_stride + t * view.token_stride,
                   view.channel_stride, view.token_stride);
}

// Length of a row of a row-major matrix: whole vectors, and not a multiple of 1 KiB, whose rows would
// share a few sets of the first-level cache.
template <class Op>
int64_t row_length(int64_t columns) {
  constexpr int64_t kW = kLanes<typename Op::Real>;
  const int64_t length = round_up(columns, kW);
  return length * static_cast<int64_t>(sizeof(typename Op::Real)) % 1024 == 0 ? length + kW : length;
}

// A plain row-major matrix and a matrix of panels of `rows` rows.
template <class Op, class T>
Panels<T> row_major(T* data, int64_t columns) {
  return {data, static_cast<ptrdiff_t>(row_length<Op>(columns)), kPanel<Op>};
}
template <class Op, class T>
Panels<T> panelled(T* data, int64_t rows) {
  return {data, kPanel<Op>, static_cast<ptrdiff_t>(rows * kPanel<Op>)};
}

template <class T>
Panels<const T> constant(Panels<T> x) {
  return {x.data, x.row, x.panel};
}

// Address of column n, row 0.
template <class Op, class T>
T* column(Panels<T> x, int64_t n) {
  return x.data + n / kPanel<Op> * x.panel + n % kPanel<Op>;
}

// Tokens of a tile: whole panels, the tile's matrices of `channels` rows within `bytes` each.
template <class Op>
int64_t tile_tokens(int64_t channels, int64_t bytes) {
  const int64_t panels = bytes / (static_cast<int64_t>(sizeof(typename Op::Real)) * max64(channels, 1) * kPanel<Op>);
  return max64(panels, 1) * kPanel<Op>;
}

// `tokens` in tiles of nearly equal size, whole panels but for the last.
template <class Op>
int64_t even_tile(int64_t tokens, int64_t most) {
  const int64_t tiles = max64(ceil_div(tokens, most), 1);
  return max64(round_up(ceil_div(tokens, tiles), kPanel<Op>), kPanel<Op>);
}

// Cuts buffers from scratch; with a null start it only counts the bytes.
class Arena {
 public:
  explicit Arena(char* start) : start_(start), next_(start) {}
  template <class T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(next_);
    next_ += round_up(count * static_cast<int64_t>(sizeof(T)) + kVectorBytes, 64);
    return result;
  }
  size_t bytes() const { return static_cast<size_t>(next_ - start_); }

 private:
  char *start_, *next_;
};

// Bytes of the buffers that `Buffers(arena, arguments...)` takes.
template <class Buffers, class... Arguments>
size_t bytes_of(const Arguments&... arguments) {
  Arena arena(nullptr);
  Buffers buffers(arena, arguments...);
  return arena.bytes();
}

}  // namespace XATTN_ISA
}  // namespace xattn
