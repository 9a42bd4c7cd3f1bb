// Bilinear interpolation along one axis and its adjoint, for the kernels of the pyramid projection.
#pragma once

#include "pack.h"

namespace xattn {
namespace XATTN_ISA {

// Sample j of `out` is left[j] x[first[j]] + right[j] x[first[j] + 1], where the sample after the last is
// the last: align_corners=False. `first` and the weights are valid to the next whole vector.
template <class Real>
struct Taps {
  int64_t in, out;
  int32_t* first;
  Real *left, *right;
  bool windowed;  // the samples of a vector come from within a vector

  static Taps make(Arena& arena, int64_t in, int64_t out) {
    const int64_t padded = round_up(out, kLanes<float>);
    Taps taps{in, out, arena.take<int32_t>(padded), arena.take<Real>(padded), arena.take<Real>(padded), true};
    if (arena.counts()) return taps;
    const double ratio = static_cast<double>(in) / static_cast<double>(out);
    for (int64_t j = 0; j < padded; ++j) {
      const double middle = (static_cast<double>(min64(j, out - 1)) + 0.5) * ratio - 0.5;
      const double x = middle > 0.0 ? middle : 0.0;
      const int64_t below = min64(static_cast<int64_t>(x), in - 1);
      const double fraction = below + 1 < in ? x - static_cast<double>(below) : 0.0;
      taps.first[j] = static_cast<int32_t>(below);
      taps.right[j] = static_cast<Real>(fraction);
      taps.left[j] = static_cast<Real>(1.0 - fraction);
      if (below - taps.first[j / kLanes<float> * kLanes<float>] >= kLanes<float>) taps.windowed = false;
    }
    return taps;
  }
  int64_t last(int64_t j) const { return min64(first[j] + 1, in - 1); }
};

// y = taps x for x with kStretchPad more samples, all like the last; y is written to whole vectors.
constexpr int64_t kStretchPad = kLanes<float> + 1;
template <class Real>
void stretch(const Taps<Real>& taps, const Real* x, Real* y) {
  int64_t j = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4) {
    for (; taps.windowed && j < taps.out; j += kLanes<float>) {
      const Real* base = x + taps.first[j];
      const __m512i index = _mm512_sub_epi32(_mm512_loadu_si512(taps.first + j), _mm512_set1_epi32(taps.first[j]));
      const Vec<float> left = (Vec<float>)_mm512_permutexvar_ps(index, (__m512)load(base));
      const Vec<float> right = (Vec<float>)_mm512_permutexvar_ps(index, (__m512)load(base + 1));
      store(y + j, left * load(taps.left + j) + right * load(taps.right + j));
    }
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(Real) == 4) {
    for (; taps.windowed && j < taps.out; j += kLanes<float>) {
      const Real* base = x + taps.first[j];
      const __m256i index = _mm256_sub_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(taps.first + j)),
                                             _mm256_set1_epi32(taps.first[j]));
      const Vec<float> left = (Vec<float>)_mm256_permutevar8x32_ps((__m256)load(base), index);
      const Vec<float> right = (Vec<float>)_mm256_permutevar8x32_ps((__m256)load(base + 1), index);
      store(y + j, left * load(taps.left + j) + right * load(taps.right + j));
    }
  }
#endif
  for (; j < taps.out; ++j) y[j] = x[taps.first[j]] * taps.left[j] + x[taps.first[j] + 1] * taps.right[j];
}

// x = taps^T y. Sample i gathers from the `count[i]` samples of y that it contributes to.
template <class Real>
struct Gather {
  int64_t in, most;
  int32_t *begin, *count;
  Real* weight;  // (in, most)

  static Gather make(Arena& arena, const Taps<Real>& taps) {
    const int64_t in = taps.in, most = 2 * ceil_div(taps.out, in) + 2;
    Gather gather{in, most, arena.take<int32_t>(in), arena.take<int32_t>(in), arena.take<Real>(in * most)};
    if (arena.counts()) return gather;
    std::memset(gather.count, 0, sizeof(int32_t) * static_cast<size_t>(in));
    std::memset(gather.weight, 0, sizeof(Real) * static_cast<size_t>(in * most));
    for (int64_t j = 0; j < taps.out; ++j) {
      gather.add(taps.first[j], j, taps.left[j]);
      gather.add(taps.last(j), j, taps.right[j]);
    }
    return gather;
  }
  void apply(const Real* y, Real* x) const {
    for (int64_t i = 0; i < in; ++i) {
      Real sum = 0;
      for (int64_t n = 0; n < count[i]; ++n) sum += weight[i * most + n] * y[begin[i] + n];
      x[i] = sum;
    }
  }

  void add(int64_t i, int64_t j, Real share) {
    if (share == Real(0)) return;
    if (count[i] == 0) begin[i] = static_cast<int32_t>(j);
    count[i] = static_cast<int32_t>(j - begin[i] + 1);
    weight[i * most + j - begin[i]] += share;
  }
};

// to (+)= the weighted sum of two rows, over whole vectors.
template <bool kAdd, class Real>
void blend(const Real* top, const Real* bottom, Real top_weight, Real bottom_weight, int64_t count, Real* to) {
  for (int64_t j = 0; j < count; j += kLanes<Real>) {
    Vec<Real> sum = load(top + j) * top_weight + load(bottom + j) * bottom_weight;
    if (kAdd) sum += load(to + j);
    store(to + j, sum);
  }
}

// Sum of f(x): a vector's lanes over a short stretch, stretches in double.
template <class Real, class F>
Real sum_of(const Real* x, int64_t count, const F& f) {
  constexpr int64_t kStretch = 16 * kLanes<Real>;
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kStretch) {
    const int64_t end = min64(begin + kStretch, count);
    Vec<Real> sums{};
    int64_t n = begin;
    for (; n + kLanes<Real> <= end; n += kLanes<Real>) sums += f(load(x + n));
    Real sum = 0;
    for (int i = 0; i < kLanes<Real>; ++i) sum += sums[i];
    for (; n < end; ++n) sum += f(x[n]);
    total += static_cast<double>(sum);
  }
  return static_cast<Real>(total);
}

}  // namespace XATTN_ISA
}  // namespace xattn
