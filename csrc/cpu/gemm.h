// The matrix product all CPU operators are made of: C[m][n] (+)= sum_k A[k][m] B[k][n].
//
// Both operands are k-major, so one kernel serves every product of the attention passes: tokens may
// be the vector dimension (n) or the broadcast one (m), and the output of one product is, as it lies,
// an operand of the next. A register tile is kRows x kPanelVectors vectors; A is broadcast.
//
// Limits: columns of B and C are read and written in whole vectors, so buffers are padded to them.
#pragma once

#include <type_traits>

#include "math.h"

namespace xattn {
namespace XATTN_ISA {

constexpr int kPanelVectors = 3;

// What is multiplied. Unit: one element of A or B, `kDepth` consecutive k each. Real: sums.
struct Float32 {
  using Unit = float;
  using Real = float;
  static constexpr int kDepth = 1;
  static Vec<Real> multiply_add(Vec<Real> sum, Vec<Unit> a, Vec<Unit> b) { return sum + a * b; }
  static Vec<Real> softplus(Vec<Real> x) { return XATTN_ISA::softplus(x); }
};
struct Float64 {
  using Unit = double;
  using Real = double;
  static constexpr int kDepth = 1;
  static Vec<Real> multiply_add(Vec<Real> sum, Vec<Unit> a, Vec<Unit> b) { return sum + a * b; }
  static Vec<Real> softplus(Vec<Real> x) { return XATTN_ISA::softplus(x); }
};

#if defined(__AVX512BF16__)
#define XATTN_HAVE_BFLOAT16_DOT 1
// Pairs of bfloat16 (k, k + 1), products summed in float.
struct BFloat16Pair {
  using Unit = uint32_t;
  using Real = float;
  static constexpr int kDepth = 2;
  static Vec<Real> multiply_add(Vec<Real> sum, Vec<Unit> a, Vec<Unit> b) {
    return (Vec<Real>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static Vec<Real> softplus(Vec<Real> x) { return softplus_for_bfloat16(x); }
};
// bfloat16 of two vectors, interleaved.
inline Vec<uint32_t> make_pairs(Vec<float> even, Vec<float> odd) {
  const __m512i interleave = (__m512i)(Vec<uint16_t>{0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (Vec<uint32_t>)_mm512_permutexvar_epi16(interleave, both);
}
#endif

template <class Op>
constexpr int kPanel = kPanelVectors * kLanes<typename Op::Real>;

// Rows of a register tile: as many as the registers hold, and a divisor of the panel's width.
#if defined(__AVX512F__)
template <class Op>
constexpr int kRows = 8;
#else
template <class Op>
constexpr int kRows = kPanel<Op> % 4 == 0 ? 4 : 2;
#endif

enum class Activation { kNone, kRelu, kSoftplus };

// What is written: the sums; the sums added to what is there; or the activated sums as units, of which
// bfloat16 has pairs of rows (to be summed over rows) or pairs of columns.
enum class Output { kReal, kAccumulate, kUnits, kColumnUnits };

template <class Op>
struct Product {
  using Unit = typename Op::Unit;
  using Real = typename Op::Real;
  int64_t m, n, k;  // k in units
  Panels<const Unit> a, b;
  const Real* row_bias = nullptr;     // m values
  const Real* column_bias = nullptr;  // n values
  Activation activation = Activation::kNone;
  ptrdiff_t a_column = 1;  // kAccumulate: elements between columns of A, so that A may be m-major
  ptrdiff_t a_jump = 0;    // kAccumulate: elements that A goes on by more after every kPanel k, which are a panel
};

template <class Op, Output kOutput, int kM, int kV, class Element>
__attribute__((noinline)) void register_tile(const Product<Op>& p, int64_t k0, int64_t k1, int64_t m, int64_t n,
                                             Element* c, ptrdiff_t c_row) {
  using Real = typename Op::Real;
  using Unit = typename Op::Unit;
  constexpr int kW = kLanes<Real>;
  constexpr int kWidth = kPanel<Op>;
  Vec<Real> sum[kM][kV];
#pragma GCC unroll 8
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      sum[i][v] = Vec<Real>{};
      if constexpr (kOutput != Output::kAccumulate) {
        if (p.row_bias) sum[i][v] = splat(p.row_bias[m + i]);
        if (p.column_bias) sum[i][v] = load(p.column_bias + n + v * kW);
      }
    }
  }
  const ptrdiff_t a_row = p.a.row, b_row = p.b.row;
  const ptrdiff_t a_column = kOutput == Output::kAccumulate ? p.a_column : 1;
  const Unit* a = p.a.data + m / kWidth * p.a.panel + m % kWidth * a_column + k0 * a_row + k0 / kWidth * p.a_jump;
  const Unit* b = p.b.data + n / kWidth * p.b.panel + k0 * b_row;
  const int64_t stretch = kOutput == Output::kAccumulate && p.a_jump != 0 ? kWidth : k1 - k0;
  for (int64_t k = k0; k < k1; a += p.a_jump) {
    for (const int64_t end = min64(k + stretch, k1); k < end; ++k, a += a_row, b += b_row) {
      Vec<Unit> right[kV];
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) right[v] = load(b + v * kW);
#pragma GCC unroll 8
      for (int i = 0; i < kM; ++i) {
        const Vec<Unit> left = splat(a[i * a_column]);
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) sum[i][v] = Op::multiply_add(sum[i][v], left, right[v]);
      }
    }
    if constexpr (kOutput != Output::kAccumulate) break;
  }
  const Vec<Real> zero{};
  if constexpr (kOutput == Output::kUnits || kOutput == Output::kColumnUnits) {
    if (p.activation == Activation::kRelu) {
#pragma GCC unroll 8
      for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) sum[i][v] = at_least(zero, sum[i][v]);
      }
    } else if (p.activation == Activation::kSoftplus) {
#pragma GCC unroll 8
      for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) sum[i][v] = Op::softplus(sum[i][v]);
      }
    }
  }
#ifdef XATTN_HAVE_BFLOAT16_DOT
  if constexpr (kOutput == Output::kUnits && Op::kDepth == 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kM; i += 2) {
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v)
        store(c + i / 2 * c_row + v * kW, make_pairs(sum[i][v], kM == 1 ? zero : sum[(i + 1) % kM][v]));
    }
    return;
  }
  if constexpr (kOutput == Output::kColumnUnits && Op::kDepth == 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + i * c_row + v * kW / 2),
                            (__m256i)_mm512_cvtneps_pbh((__m512)sum[i][v]));
    }
    return;
  }
#endif
  if constexpr (std::is_same_v<Element, Real>) {
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) {
        if constexpr (kOutput == Output::kAccumulate) sum[i][v] += load(c + i * c_row + v * kW);
        store(c + i * c_row + v * kW, sum[i][v]);
      }
    }
  }
}

// All rows of one panel of columns.
template <class Op, Output kOutput, int kV, class Element>
void panel_rows(const Product<Op>& p, int64_t k0, int64_t k1, int64_t n, Element* c, ptrdiff_t c_row) {
  constexpr int kDepth = kOutput == Output::kUnits ? Op::kDepth : 1;
  int64_t m = 0;
  for (; m + kRows<Op> <= p.m; m += kRows<Op>)
    register_tile<Op, kOutput, kRows<Op>, kV>(p, k0, k1, m, n, c + m / kDepth * c_row, c_row);
  if constexpr (kRows<Op> > 4) {
    for (; m + 4 <= p.m; m += 4) register_tile<Op, kOutput, 4, kV>(p, k0, k1, m, n, c + m / kDepth * c_row, c_row);
  }
  if constexpr (kRows<Op> > 2) {
    for (; m + 2 <= p.m; m += 2) register_tile<Op, kOutput, 2, kV>(p, k0, k1, m, n, c + m / kDepth * c_row, c_row);
  }
  for (; m < p.m; ++m) register_tile<Op, kOutput, 1, kV>(p, k0, k1, m, n, c + m / kDepth * c_row, c_row);
}

template <class Op, Output kOutput, class Element>
void multiply(const Product<Op>& p, Panels<Element> c) {
  constexpr int kW = kLanes<typename Op::Real>;
  // A long sum is cut, so that the rows of A and B stay in the first-level cache for all of C; each part
  // is summed from zero, which also keeps rounding errors from growing with the number of terms.
  constexpr int64_t kBlock = kOutput == Output::kAccumulate ? 144 : INT64_MAX;
  static_assert(kOutput != Output::kAccumulate || kBlock % kPanel<Op> == 0, "a block is of whole panels");
  for (int64_t k0 = 0; k0 < p.k;) {
    const int64_t k1 = p.k - k0 > kBlock ? k0 + kBlock : p.k;
    for (int64_t n = 0; n < p.n; n += kPanel<Op>) {
      Element* column = c.data + n / kPanel<Op> * c.panel;
      const int64_t vectors = ceil_div(min64(p.n - n, kPanel<Op>), kW);
      if (vectors == 3) {
        panel_rows<Op, kOutput, 3>(p, k0, k1, n, column, c.row);
      } else if (vectors == 2) {
        panel_rows<Op, kOutput, 2>(p, k0, k1, n, column, c.row);
      } else {
        panel_rows<Op, kOutput, 1>(p, k0, k1, n, column, c.row);
      }
    }
    k0 = k1;
  }
}

}  // namespace XATTN_ISA
}  // namespace xattn
