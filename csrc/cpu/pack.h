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
template <class S>
constexpr bool kIsBFloat16 = false;
template <>
constexpr bool kIsBFloat16<BFloat16> = true;

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

template <class T>
Panels<const T> constant(Panels<T> x) {
  return {x.data, x.row, x.panel};
}

// Address of column n, row 0.
template <class Op, class T>
T* column(Panels<T> x, int64_t n) {
  return x.data + n / kPanel<Op> * x.panel + n % kPanel<Op>;
}

constexpr int64_t kTransposeBlock = 16;

// to[i] = from[i] * factors[i], rounded to the storage type.
template <class S, class Real>
inline void round_row(const Real* from, const Real* factors, int64_t count, S* to) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (kIsBFloat16<S>) {
    for (; i + kLanes<float> <= count; i += kLanes<float>) {
      const __m512 x = (__m512)(load(from + i) * load(factors + i));
      const __m512i bits = _mm512_castps_si512(x);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
      const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
      const __m512i result = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
    }
  }
#endif
  for (; i < count; ++i) to[i] = from_float<S>(from[i] * factors[i]);
}

// A rows x columns piece of a tensor into a matrix of Reals. Columns beyond `columns` up to whole
// vectors are zero. Where columns are contiguous a row is read to its end before the next, which is what
// prefetchers follow; else rows are, and are read along in blocks that the first-level cache holds.
template <class Op>
void load_matrix(Dtype dtype, const char* data, int64_t offset, ptrdiff_t row_stride, ptrdiff_t column_stride,
                 int64_t rows, int64_t columns, Panels<typename Op::Real> to) {
  using Real = typename Op::Real;
  with_storage<Real>(dtype, [&](auto storage) {
    using S = decltype(storage);
    const S* source = reinterpret_cast<const S*>(data) + offset;
    const int64_t block = column_stride == 1 ? 1 : kTransposeBlock;
    for (int64_t r0 = 0; r0 < rows; r0 += block) {
      const int64_t r1 = min64(r0 + block, rows);
      for (int64_t n = 0; n < columns; n += kPanel<Op>) {
        const int64_t width = min64(columns - n, kPanel<Op>);
        Real* panel = column<Op>(to, n);
        if (column_stride == 1) {
          const S* from = source + r0 * row_stride + n;
          for (int64_t c = 0; c < width; ++c) panel[r0 * to.row + c] = to_float(from[c]);
        } else {
          for (int64_t c = 0; c < width; ++c) {
            const S* from = source + (n + c) * column_stride;
            for (int64_t r = r0; r < r1; ++r) panel[r * to.row + c] = to_float(from[r * row_stride]);
          }
        }
        for (int64_t r = r0; r < r1; ++r)
          for (int64_t c = width; c < round_up(width, kLanes<Real>); ++c) panel[r * to.row + c] = Real(0);
      }
    }
  });
}

// The reverse of load_matrix, column n multiplied by factors[n]; panel by panel, as they lie in the cache.
template <class Op>
void store_matrix(Panels<const typename Op::Real> from, const typename Op::Real* factors, int64_t rows, int64_t columns,
                  Dtype dtype, char* data, int64_t offset, ptrdiff_t row_stride, ptrdiff_t column_stride) {
  using Real = typename Op::Real;
  with_storage<Real>(dtype, [&](auto storage) {
    using S = decltype(storage);
    for (int64_t n = 0; n < columns; n += kPanel<Op>) {
      const int64_t width = min64(columns - n, kPanel<Op>);
      const Real* panel = column<Op>(from, n);
      S* destination = reinterpret_cast<S*>(data) + offset + n * column_stride;
      if (column_stride == 1) {
        for (int64_t r = 0; r < rows; ++r)
          round_row(panel + r * from.row, factors + n, width, destination + r * row_stride);
        continue;
      }
      for (int64_t r0 = 0; r0 < rows; r0 += kTransposeBlock) {
        const int64_t r1 = min64(r0 + kTransposeBlock, rows);
        for (int64_t c = 0; c < width; ++c) {
          S* to = destination + c * column_stride;
          for (int64_t r = r0; r < r1; ++r)
            to[r * row_stride] = from_float<S>(panel[r * from.row + c] * factors[n + c]);
        }
      }
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
void load_tokens(Dtype dtype, const View& view, int64_t b, int64_t t, int64_t count, int64_t channel0, int64_t channels,
                 Panels<typename Op::Real> to) {
  load_matrix<Op>(dtype, view.data, b * view.batch_stride + channel0 * view.channel_stride + t * view.token_stride,
                  view.token_stride, view.channel_stride, count, channels, to);
}
// Writes channels x tokens, token n multiplied by factors[n].
template <class Op>
void store_channels(Panels<const typename Op::Real> from, const typename Op::Real* factors, int64_t channel0,
                    int64_t channels, int64_t count, Dtype dtype, const View& view, int64_t b, int64_t t) {
  store_matrix<Op>(from, factors, channels, count, dtype, view.data,
                   b * view.batch_stride + channel0 * view.channel_stride + t * view.token_stride, view.channel_stride,
                   view.token_stride);
}

template <class Op>
typename Op::Unit make_unit(const typename Op::Real* values) {
  if constexpr (Op::kDepth == 1) {
    return values[0];
  } else {
    return from_float<BFloat16>(values[0]).bits | static_cast<uint32_t>(from_float<BFloat16>(values[1]).bits) << 16;
  }
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

// Channels of a token tile as the k-major operand of the projections.
template <class Op>
void load_features(Dtype dtype, const View& view, int64_t b, int64_t t, int64_t count, int64_t channels,
                   typename Op::Unit* to) {
  const int64_t depth = ceil_div(channels, Op::kDepth);
  if constexpr (Op::kDepth == 1) {
    load_channels<Op>(dtype, view, b, t, count, 0, channels, panelled<Op>(to, depth));
  } else {
    const uint16_t* base = reinterpret_cast<const uint16_t*>(view.data) + b * view.batch_stride + t * view.token_stride;
    for (int64_t k = 0; k < depth; ++k) {
      const bool last = 2 * k + 1 == channels;
      const uint16_t* even = base + 2 * k * view.channel_stride;
      const uint16_t* odd = last ? even : even + view.channel_stride;
      const uint32_t keep = last ? 0 : 0xFFFF;
      for (int64_t n = 0; n < count; n += kPanel<Op>) {
        const int64_t width = min64(count - n, kPanel<Op>);
        uint32_t* row = to + n * depth + k * kPanel<Op>;
        if (view.token_stride == 1) {
          // The next pair's rows are pages away, where prefetchers in hardware do not look.
          __builtin_prefetch(even + 2 * view.channel_stride + n);
          __builtin_prefetch(even + 2 * view.channel_stride + n + 32);
          __builtin_prefetch(odd + 2 * view.channel_stride + n);
          __builtin_prefetch(odd + 2 * view.channel_stride + n + 32);
          for (int64_t i = 0; i < width; ++i) row[i] = even[n + i] | (odd[n + i] & keep) << 16;
        } else {
          for (int64_t i = 0; i < width; ++i) {
            const int64_t at = (n + i) * view.token_stride;
            row[i] = even[at] | (odd[at] & keep) << 16;
          }
        }
        for (int64_t i = width; i < round_up(width, kLanes<float>); ++i) row[i] = 0;
      }
    }
  }
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

// Calls body with the products that a dtype is computed with.
template <class Body>
void with_op(Dtype dtype, Body&& body) {
  if (dtype == Dtype::kFloat64) return body(Float64{});
#ifdef XATTN_HAVE_BFLOAT16_DOT
  if (dtype == Dtype::kBFloat16) return body(BFloat16Pair{});
#endif
  body(Float32{});
}

// The same, for operators that compute every 16-bit dtype in float.
template <class Body>
void with_real(Dtype dtype, Body&& body) {
  if (dtype == Dtype::kFloat64) return body(Float64{});
  body(Float32{});
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
  bool counts() const { return start_ == nullptr; }

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
