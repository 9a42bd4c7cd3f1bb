// Integers from Python as the structs of problem.h take them.
#pragma once

#include <array>
#include <vector>

#include "problem.h"

namespace xattn {

using Integers = std::vector<int64_t>;
using Views = std::vector<std::array<int64_t, 5>>;  // data pointer, batch, channel, token stride, tokens

static_assert(sizeof(View) == 5 * sizeof(int64_t), "a View is five integers");

inline Span<const View> span(const Views& views) {
  return {reinterpret_cast<const View*>(views.data()), static_cast<int64_t>(views.size())};
}
inline Span<void* const> pointers(const Integers& values) {
  static_assert(sizeof(void*) == sizeof(int64_t), "64-bit pointers");
  return {reinterpret_cast<void* const*>(values.data()), static_cast<int64_t>(values.size())};
}
inline void* pointer(int64_t address) { return reinterpret_cast<void*>(address); }

// Of a projection: weight, gamma, beta, mean, variance.
using FoldedLayers = std::vector<std::array<int64_t, 5>>;
static_assert(sizeof(FoldedLayer) == 5 * sizeof(int64_t), "a FoldedLayer is five pointers");

inline Span<const FoldedLayer> layers_of(const FoldedLayers& layers) {
  return {reinterpret_cast<const FoldedLayer*>(layers.data()), static_cast<int64_t>(layers.size())};
}

// Of a level: the view of x, channels, height, width, weight.
using Levels = std::vector<std::array<int64_t, 9>>;
static_assert(sizeof(Level) == 9 * sizeof(int64_t), "a Level is nine integers");

inline Span<const Level> span(const Levels& levels) {
  return {reinterpret_cast<const Level*>(levels.data()), static_cast<int64_t>(levels.size())};
}
inline View view(const std::array<int64_t, 5>& x) {
  return {static_cast<char*>(pointer(x[0])), x[1], x[2], x[3], x[4]};
}

}  // namespace xattn
