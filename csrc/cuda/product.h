// Products of matrices in shared memory, by warps: three kinds with one layout of results.
//
//   BFloat16Products  bfloat16 operands, mma.sync m16n8k16
//   Tf32Products      float operands, rounded to tf32 when they are loaded, mma.sync m16n8k8
//   IeeeProducts      float operands, fused multiply-adds
//
// All accumulate in float. A warp's result is kRows tiles of 16 rows by kColumns tiles of 8 columns; with
// g = lane / 4 and t = lane % 4, a lane has rows g and g + 8 and columns 2 t and 2 t + 1 of each.
#pragma once

#include <type_traits>

#include "device.h"

namespace xattn::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

XATTN_DEVICE float to_float(float x) { return x; }
XATTN_DEVICE float to_float(BFloat16 x) { return bfloat16_to_float(x.bits); }
XATTN_DEVICE float to_float(Float16 x) { return float16_to_float(x.bits); }

template <class T>
XATTN_DEVICE T from_float(float x);
template <>
XATTN_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
XATTN_DEVICE BFloat16 from_float<BFloat16>(float x) {
  return {static_cast<uint16_t>(pack_bfloat16(x, x))};
}
template <>
XATTN_DEVICE Float16 from_float<Float16>(float x) {
  return {float_to_float16(x)};
}

// Two elements side by side, the first at a multiple of two.
XATTN_DEVICE void store_pair(float* to, float x, float y) {
  struct alignas(8) Pair {
    float x, y;
  };
  *reinterpret_cast<Pair*>(to) = {x, y};
}
XATTN_DEVICE void store_pair(BFloat16* to, float x, float y) { *reinterpret_cast<uint32_t*>(to) = pack_bfloat16(x, y); }

// Element: of operands in shared memory. kPad: elements that keep rows of a power of two apart in the
// banks. kExact: whether results are to be as exact as float32 allows.
struct BFloat16Products {
  using Element = BFloat16;
  static constexpr int kPad = 8;
  static constexpr bool kExact = false;
};
struct Tf32Products {
  using Element = float;
  static constexpr int kPad = 4;
  static constexpr bool kExact = true;
};
struct IeeeProducts {
  using Element = float;
  static constexpr int kPad = 4;
  static constexpr bool kExact = true;
};

// An operand of a product: rows of a left one, columns of a right one are `i`, what is summed over `k`.
template <class E>
struct Operand {
  const E* data;
  int stride;        // of whichever is not minor; of bfloat16 a multiple of 8
  bool depth_minor;  // whether k lies side by side, or else i
  XATTN_DEVICE const E* at(int i, int k) const {
    return depth_minor ? data + static_cast<int64_t>(i) * stride + k : data + static_cast<int64_t>(k) * stride + i;
  }
};

template <int kRows, int kColumns>
struct Accumulator {
  float v[kRows][kColumns][4];

  XATTN_DEVICE void clear() {
    XATTN_UNROLL
    for (int m = 0; m < kRows; ++m) {
      XATTN_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        XATTN_UNROLL
        for (int i = 0; i < 4; ++i) v[m][n][i] = 0.0f;
      }
    }
  }
  // body(row, column, x, y) for elements (row, column) and (row, column + 1) of this lane, in tiles that
  // begin before `rows` and `columns`.
  template <class Body>
  XATTN_DEVICE void for_pairs(int rows, int columns, const Body& body) {
    const int g = lane() / 4, t = lane() % 4;
    XATTN_UNROLL
    for (int m = 0; m < kRows; ++m) {
      if (16 * m >= rows) continue;
      XATTN_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        if (8 * n >= columns) continue;
        body(16 * m + g, 8 * n + 2 * t, v[m][n][0], v[m][n][1]);
        body(16 * m + g + 8, 8 * n + 2 * t, v[m][n][2], v[m][n][3]);
      }
    }
  }
};

// sum += a b over k in [begin, end), multiples of 16: rows of `a` from `row`, columns of `b` from `column`.
// Tiles of 16 rows from `rows` on and of 16 columns from `columns` on are left out and not read.
template <class P, int kRows, int kColumns>
XATTN_DEVICE void multiply_add(Accumulator<kRows, kColumns>& sum, const Operand<typename P::Element>& a, int row,
                               const Operand<typename P::Element>& b, int column, int begin, int end,
                               int rows = 16 * kRows, int columns = 8 * kColumns) {
  static_assert(kColumns % 2 == 0, "columns come in tiles of 16");
  if constexpr (sizeof(typename P::Element) == 2) {
    const int matrix = lane() / 8, r = lane() % 8;
    XATTN_KEEP_LOOP
    for (int k = begin; k < end; k += 16) {
      uint32_t right[kColumns / 2][4];
      XATTN_UNROLL
      for (int n = 0; n < kColumns / 2; ++n) {
        if (16 * n >= columns) continue;
        const int i = column + 16 * n;
        if (b.depth_minor)
          load_matrices(right[n], b.at(i + matrix / 2 * 8 + r, k + matrix % 2 * 8));
        else
          load_matrices_transposed(right[n], b.at(i + matrix / 2 * 8, k + matrix % 2 * 8 + r));
      }
      XATTN_UNROLL
      for (int m = 0; m < kRows; ++m) {
        if (16 * m >= rows) continue;
        uint32_t left[4];
        const int i = row + 16 * m;
        if (a.depth_minor)
          load_matrices(left, a.at(i + matrix % 2 * 8 + r, k + matrix / 2 * 8));
        else
          load_matrices_transposed(left, a.at(i + matrix % 2 * 8, k + matrix / 2 * 8 + r));
        XATTN_UNROLL
        for (int n = 0; n < kColumns / 2; ++n) {
          if (16 * n >= columns) continue;
          multiply_bfloat16(sum.v[m][2 * n], left, {right[n][0], right[n][1]});
          multiply_bfloat16(sum.v[m][2 * n + 1], left, {right[n][2], right[n][3]});
        }
      }
    }
  } else if constexpr (std::is_same_v<P, Tf32Products>) {
    const int g = lane() / 4, t = lane() % 4;
    XATTN_KEEP_LOOP
    for (int k = begin; k < end; k += 8) {
      uint32_t right[kColumns][2];
      XATTN_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        if (8 * n >= columns) continue;
        XATTN_UNROLL
        for (int i = 0; i < 2; ++i) right[n][i] = float_to_tf32(*b.at(column + 8 * n + g, k + t + 4 * i));
      }
      XATTN_UNROLL
      for (int m = 0; m < kRows; ++m) {
        if (16 * m >= rows) continue;
        uint32_t left[4];
        XATTN_UNROLL
        for (int i = 0; i < 4; ++i) left[i] = float_to_tf32(*a.at(row + 16 * m + g + i % 2 * 8, k + t + i / 2 * 4));
        XATTN_UNROLL
        for (int n = 0; n < kColumns; ++n) {
          if (8 * n >= columns) continue;
          multiply_tf32(sum.v[m][n], left, right[n]);
        }
      }
    }
  } else {
    const int g = lane() / 4, t = lane() % 4;
    XATTN_KEEP_LOOP
    for (int k = begin; k < end; ++k) {
      float right[kColumns][2];
      XATTN_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        if (8 * n >= columns) continue;
        XATTN_UNROLL
        for (int i = 0; i < 2; ++i) right[n][i] = *b.at(column + 8 * n + 2 * t + i, k);
      }
      XATTN_UNROLL
      for (int m = 0; m < kRows; ++m) {
        if (16 * m >= rows) continue;
        const float left[2] = {*a.at(row + 16 * m + g, k), *a.at(row + 16 * m + g + 8, k)};
        XATTN_UNROLL
        for (int n = 0; n < kColumns; ++n) {
          if (8 * n >= columns) continue;
          XATTN_UNROLL
          for (int i = 0; i < 4; ++i) sum.v[m][n][i] = fused_multiply_add(left[i / 2], right[n][i % 2], sum.v[m][n][i]);
        }
      }
    }
  }
}

// Pieces of 16 x 16 elements of a bfloat16 operand, as a lane reads them: its address in the first piece, and
// how far it is from piece to piece. For loops that are unrolled, where an address is one addition then. How
// the operand lies is known to the compiler: what lanes do together must not depend on what might differ
// between them, or they are made to wait for each other at every step.
template <bool kDepthMinor>
struct Pieces {
  const BFloat16* first;
  int stride;
  // (16 i .. 16 i + 15, 16 k .. 16 k + 15) beyond the first.
  XATTN_DEVICE void load(uint32_t (&r)[4], int i, int k) const {
    if constexpr (kDepthMinor)
      load_matrices(r, first + 16 * i * stride + 16 * k);
    else
      load_matrices_transposed(r, first + 16 * k * stride + 16 * i);
  }
};
template <bool kDepthMinor>
XATTN_DEVICE Pieces<kDepthMinor> left_pieces(const Operand<BFloat16>& a, int row) {
  const int matrix = lane() / 8, r = lane() % 8, i = row + matrix % 2 * 8, k = matrix / 2 * 8;
  return {kDepthMinor ? a.data + (i + r) * a.stride + k : a.data + (k + r) * a.stride + i, a.stride};
}
template <bool kDepthMinor>
XATTN_DEVICE Pieces<kDepthMinor> right_pieces(const Operand<BFloat16>& b, int column, int begin) {
  const int matrix = lane() / 8, r = lane() % 8, i = column + matrix / 2 * 8, k = begin + matrix % 2 * 8;
  return {kDepthMinor ? b.data + (i + r) * b.stride + k : b.data + (k + r) * b.stride + i, b.stride};
}

// One step of 16 of a product: sum += left b, of piece k of b.
template <int kRows, int kColumns, class Right>
XATTN_DEVICE void multiply_step(Accumulator<kRows, kColumns>& sum, const uint32_t (&left)[kRows][4], const Right& b,
                                int k, int columns = 8 * kColumns) {
  XATTN_UNROLL
  for (int n = 0; n < kColumns / 2; ++n) {
    if (16 * n >= columns) continue;
    uint32_t right[4];
    b.load(right, n, k);
    XATTN_UNROLL
    for (int m = 0; m < kRows; ++m) {
      multiply_bfloat16(sum.v[m][2 * n], left[m], {right[0], right[1]});
      multiply_bfloat16(sum.v[m][2 * n + 1], left[m], {right[2], right[3]});
    }
  }
}
template <int kRows, int kDepth, int kColumns, class Right>
XATTN_DEVICE void multiply_pieces(Accumulator<kRows, kColumns>& sum, const Accumulator<kRows, kDepth>& a,
                                  const Right& b, int columns, int depth) {
  XATTN_UNROLL
  for (int k = 0; k < kDepth / 2; ++k) {
    if (16 * k >= depth) continue;
    uint32_t left[kRows][4];
    XATTN_UNROLL
    for (int m = 0; m < kRows; ++m) {
      XATTN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float (&v)[4] = a.v[m][2 * k + i / 2];
        left[m][i] = pack_bfloat16(v[i % 2 * 2], v[i % 2 * 2 + 1]);
      }
    }
    multiply_step(sum, left, b, k, columns);
  }
}

// sum += a b where a product's result is the left operand: what is summed over are its columns, and rows of b
// from `begin`. It stays in the registers of its lanes: two of its tiles side by side are what a left operand of
// bfloat16 is made of; one is what is wanted of tf32 if the rows of b are taken in another order; float32 asks
// the lanes that have it. Columns of b from `column`, left out in tiles of 16 from `columns` on, and what is
// summed over from `depth` on.
template <class P, int kRows, int kDepth, int kColumns>
XATTN_DEVICE void multiply_add(Accumulator<kRows, kColumns>& sum, const Accumulator<kRows, kDepth>& a,
                               const Operand<typename P::Element>& b, int column, int begin, int columns = 8 * kColumns,
                               int depth = 8 * kDepth) {
  static_assert(kDepth % 2 == 0 && kColumns % 2 == 0, "tiles come in pairs");
  if constexpr (sizeof(typename P::Element) == 2) {
    if (b.depth_minor)
      multiply_pieces(sum, a, right_pieces<true>(b, column, begin), columns, depth);
    else
      multiply_pieces(sum, a, right_pieces<false>(b, column, begin), columns, depth);
    return;
  }
  const int g = lane() / 4, t = lane() % 4;
  const int along = b.depth_minor ? b.stride : 1, deep = b.depth_minor ? 1 : b.stride;
  const auto* from = reinterpret_cast<const float*>(b.data) + column * along + begin * deep;
  if constexpr (std::is_same_v<P, Tf32Products>) {
    from += g * along + 2 * t * deep;
    XATTN_UNROLL
    for (int k = 0; k < kDepth; ++k) {
      if (8 * k >= depth) continue;
      uint32_t left[kRows][4];
      XATTN_UNROLL
      for (int m = 0; m < kRows; ++m) {
        XATTN_UNROLL
        for (int i = 0; i < 4; ++i) left[m][i] = float_to_tf32(a.v[m][k][i % 2 * 2 + i / 2]);
      }
      XATTN_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        if (8 * n >= columns) continue;
        const float* at = from + 8 * n * along;
        const uint32_t right[2] = {float_to_tf32(at[0]), float_to_tf32(at[deep])};
        XATTN_UNROLL
        for (int m = 0; m < kRows; ++m) multiply_tf32(sum.v[m][n], left[m], right);
      }
      from += 8 * deep;
    }
  } else {
    from += 2 * t * along;
    XATTN_UNROLL
    for (int k = 0; k < kDepth; ++k) {
      if (8 * k >= depth) continue;
      XATTN_KEEP_LOOP
      for (int pair = 0; pair < 4; ++pair) {
        float left[kRows][4];
        XATTN_UNROLL
        for (int m = 0; m < kRows; ++m) {
          XATTN_UNROLL
          for (int i = 0; i < 4; ++i) left[m][i] = shuffle(a.v[m][k][i], 4 * g + pair);
        }
        XATTN_UNROLL
        for (int n = 0; n < kColumns; ++n) {
          if (8 * n >= columns) continue;
          const float* at = from + 8 * n * along;
          const float right[2][2] = {{at[0], at[along]}, {at[deep], at[deep + along]}};
          XATTN_UNROLL
          for (int m = 0; m < kRows; ++m) {
            XATTN_UNROLL
            for (int i = 0; i < 4; ++i) {
              sum.v[m][n][i] = fused_multiply_add(left[m][i / 2 * 2], right[0][i % 2], sum.v[m][n][i]);
              sum.v[m][n][i] = fused_multiply_add(left[m][i / 2 * 2 + 1], right[1][i % 2], sum.v[m][n][i]);
            }
          }
        }
        from += 2 * deep;
      }
    }
  }
}

// The product of a block's warps: each takes every warp_count()th tile of the rows x columns result and
// calls body(row, column, accumulator, rows, columns) with its place and with what of the tile lies
// within. rows, columns and depth are multiples of 16.
template <class P, int kRows, int kColumns, class Body>
XATTN_DEVICE void multiply_tiles(const Operand<typename P::Element>& a, const Operand<typename P::Element>& b, int rows,
                                 int columns, int depth, const Body& body) {
  const int row_tiles = (rows + 16 * kRows - 1) / (16 * kRows);
  const int tiles = row_tiles * ((columns + 8 * kColumns - 1) / (8 * kColumns));
  XATTN_KEEP_LOOP
  for (int tile = warp(); tile < tiles; tile += warp_count()) {
    const int row = tile % row_tiles * 16 * kRows, column = tile / row_tiles * 8 * kColumns;
    Accumulator<kRows, kColumns> sum;
    sum.clear();
    multiply_add<P>(sum, a, row, b, column, 0, depth, rows - row, columns - column);
    body(row, column, sum, rows - row, columns - column);
  }
}

}  // namespace xattn::cuda
