// Transposition of tiles between panels (channels as rows, tokens along the vectors) and plain rows of
// tokens (channels along the vectors).
#pragma once

#include <type_traits>

#include "pack.h"

namespace xattn {
namespace XATTN_ISA {

template <class T>
using LaneIndex = Vec<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;

template <int... kLane>
struct Lanes {};
template <int kCount, int... kLane>
struct LanesUpTo : LanesUpTo<kCount - 1, kCount - 1, kLane...> {};
template <int... kLane>
struct LanesUpTo<0, kLane...> {
  using type = Lanes<kLane...>;
};

// Lanes of a where kIndex is below a vector's length, of b beyond it.
template <int... kIndex, class V>
inline V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndex...);
#else
  return __builtin_shuffle(a, b, LaneIndex<std::remove_reference_t<decltype(a[0])>>{kIndex...});
#endif
}

// One step of the transposition of a square: blocks of kStep lanes change places between rows.
template <int kStep, int kW, class V, int... kLane>
inline void exchange(V* rows, Lanes<kLane...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kW; ++i) {
    if (i & kStep) continue;
    const V a = rows[i], b = rows[i + kStep];
    rows[i] = shuffle<((kLane & kStep) ? kW + kLane - kStep : kLane)...>(a, b);
    rows[i + kStep] = shuffle<((kLane & kStep) ? kW + kLane : kLane + kStep)...>(a, b);
  }
}
template <int kStep, int kW, class V>
inline void exchange_all(V* rows) {
  exchange<kStep, kW>(rows, typename LanesUpTo<kW>::type{});
  if constexpr (kStep > 1) exchange_all<kStep / 2, kW>(rows);
}

template <int kStep, class V, int... kLane>
inline V add_rotated(V x, Lanes<kLane...> lanes) {
  x += shuffle<(kLane ^ kStep)...>(x, x);
  if constexpr (kStep > 1) x = add_rotated<kStep / 2>(x, lanes);
  return x;
}
template <class T>
inline T sum_lanes(Vec<T> x) {
  return add_rotated<kLanes<T> / 2>(x, typename LanesUpTo<kLanes<T>>::type{})[0];
}

// A square of a vector's length, of which `in` rows are read (others are zero) and `out` written.
template <class T>
inline void transpose_square(const T* from, ptrdiff_t from_row, int64_t in, T* to, ptrdiff_t to_row, int64_t out) {
  constexpr int kW = kLanes<T>;
  Vec<T> rows[kW];
  if (in >= kW) {
#pragma GCC unroll 16
    for (int i = 0; i < kW; ++i) rows[i] = load(from + i * from_row);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kW; ++i) rows[i] = i < in ? load(from + i * from_row) : Vec<T>{};
  }
  exchange_all<kW / 2, kW>(rows);
  if (out >= kW) {
#pragma GCC unroll 16
    for (int i = 0; i < kW; ++i) store(to + i * to_row, rows[i]);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kW; ++i)
      if (i < out) store(to + i * to_row, rows[i]);
  }
}

// Panels of tokens to rows of tokens; rows are written to whole vectors.
template <class Op>
void transpose_to_rows(Panels<const typename Op::Real> from, int64_t channels, int64_t tokens,
                       Panels<typename Op::Real> to) {
  constexpr int64_t kW = kLanes<typename Op::Real>;
  for (int64_t n = 0; n < tokens; n += kW)
    for (int64_t c = 0; c < channels; c += kW)
      transpose_square(column<Op>(from, n) + c * from.row, from.row, channels - c, to.data + n * to.row + c, to.row,
                       tokens - n);
}
// The reverse; panels are written to whole vectors, with zeros behind the last token.
template <class Op>
void transpose_to_panels(Panels<const typename Op::Real> from, int64_t channels, int64_t tokens,
                         Panels<typename Op::Real> to) {
  constexpr int64_t kW = kLanes<typename Op::Real>;
  for (int64_t n = 0; n < tokens; n += kW)
    for (int64_t c = 0; c < channels; c += kW)
      transpose_square(from.data + n * from.row + c, from.row, tokens - n, column<Op>(to, n) + c * to.row, to.row,
                       channels - c);
}

}  // namespace XATTN_ISA
}  // namespace xattn
