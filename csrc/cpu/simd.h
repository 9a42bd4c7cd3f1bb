// Vectors of the instruction set a source is compiled for, on GCC/Clang vector extensions.
//
// Every file under kernels/ is compiled once per instruction set with XATTN_ISA set to its name. All
// its code lives in a namespace of that name, and uses no inline library code that the linker could
// take from another instruction set's object.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC bug 105593: _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "../problem.h"
#include "parallel.h"

#ifndef XATTN_ISA
#error "XATTN_ISA names the instruction set; the build sets it"
#endif

namespace xattn {
namespace XATTN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;
using IntVec = Vec<int32_t>;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}
template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}
// The larger of the two; x where x is NaN.
inline Vec<double> at_least(Vec<double> floor, Vec<double> x) { return floor > x ? floor : x; }
#if defined(__AVX512F__)
inline Vec<float> at_least(Vec<float> floor, Vec<float> x) {
  return (Vec<float>)_mm512_max_ps((__m512)floor, (__m512)x);
}
#elif defined(__AVX2__)
inline Vec<float> at_least(Vec<float> floor, Vec<float> x) {
  return (Vec<float>)_mm256_max_ps((__m256)floor, (__m256)x);
}
#else
inline Vec<float> at_least(Vec<float> floor, Vec<float> x) { return floor > x ? floor : x; }
#endif

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// A matrix whose columns lie in panels of kPanel columns, rows of a panel `row` elements apart. A plain
// row-major matrix is one whose panel stride is the panel's width.
template <class T>
struct Panels {
  T* data;
  ptrdiff_t row, panel;
};

}  // namespace XATTN_ISA
}  // namespace xattn
