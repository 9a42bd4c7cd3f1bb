#include "values.h"

namespace xattn::cuda {
namespace twin {

void exchange_values(Collective kind, Operands* const* lanes) {
  uint64_t values[kWarp];
  uint64_t all = 0;
  for (int i = 0; i < kWarp; i++) all |= values[i] = lanes[i]->value;
  for (int i = 0; i < kWarp; i++) {
    if (kind == Collective::kShuffleXor) lanes[i]->value = values[i ^ lanes[i]->number];
    if (kind == Collective::kShuffle) lanes[i]->value = values[lanes[i]->number];
    if (kind == Collective::kAny) lanes[i]->value = all;
  }
}

void load(Operands* const* lanes, bool transposed) {
  // All rows are read before anything is written.
  uint16_t rows[32][8];
  for (int i = 0; i < kWarp; i++) std::memcpy(rows[i], lanes[i]->a, 16);
  for (int i = 0; i < kWarp; i++) {
    uint32_t* result = static_cast<uint32_t*>(lanes[i]->result);
    const int g = i / 4, t = i % 4;
    for (int m = 0; m < 4; m++) {
      const auto matrix = &rows[8 * m];
      const uint32_t low = transposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint32_t high = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      result[m] = low | high << 16;
    }
  }
}

int conflicts(Operands* const* lanes, const char* shared) {
  int more = 0;
  for (int matrix = 0; matrix < 4; matrix++) {
    int most = 0, rows_of[8] = {};
    for (int i = 0; i < 8; i++) {
      const std::ptrdiff_t row = (static_cast<const char*>(lanes[8 * matrix + i]->a) - shared) / 16;
      bool again = false;  // the same row twice is read once
      for (int j = 0; j < i; j++) again = again || lanes[8 * matrix + j]->a == lanes[8 * matrix + i]->a;
      if (!again && ++rows_of[row % 8] > most) most = rows_of[row % 8];
    }
    more += most - 1;
  }
  return more;
}

void multiply(Operands* const* lanes, bool bfloat16) {
  float a[16][16], b[16][8], d[16][8];
  const int depth = bfloat16 ? 16 : 8;
  for (int i = 0; i < kWarp; i++) {
    const int g = i / 4, t = i % 4;
    const uint32_t* of_a = static_cast<const uint32_t*>(lanes[i]->a);
    const uint32_t* of_b = static_cast<const uint32_t*>(lanes[i]->b);
    const float* of_d = static_cast<const float*>(lanes[i]->result);
    if (bfloat16) {
      const auto low = [](uint32_t x) { return bits_float(x << 16); };
      const auto high = [](uint32_t x) { return bits_float(x & 0xFFFF0000u); };
      for (int j = 0; j < 4; j++) {
        const int row = g + 8 * (j % 2), column = 2 * t + 8 * (j / 2);
        a[row][column] = low(of_a[j]);
        a[row][column + 1] = high(of_a[j]);
      }
      for (int j = 0; j < 2; j++) {
        b[2 * t + 8 * j][g] = low(of_b[j]);
        b[2 * t + 8 * j + 1][g] = high(of_b[j]);
      }
    } else {
      const auto seen = [](uint32_t x) { return bits_float(x & 0xFFFFE000u); };
      for (int j = 0; j < 4; j++) a[g + 8 * (j % 2)][t + 4 * (j / 2)] = seen(of_a[j]);
      for (int j = 0; j < 2; j++) b[t + 4 * j][g] = seen(of_b[j]);
    }
    for (int j = 0; j < 4; j++) d[g + 8 * (j / 2)][2 * t + j % 2] = of_d[j];
  }
  for (int row = 0; row < 16; row++) {
    for (int k = 0; k < depth; k++) {
      for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int i = 0; i < kWarp; i++) {
    float* of_d = static_cast<float*>(lanes[i]->result);
    for (int j = 0; j < 4; j++) of_d[j] = d[i / 4 + 8 * (j / 2)][2 * (i % 4) + j % 2];
  }
}

}  // namespace twin

namespace {

// To the nearest, ties to even; every NaN becomes the one that the GPU makes.
uint32_t round_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if (x != x) return 0x7FFF;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

}  // namespace

uint32_t pack_bfloat16(float low, float high) { return round_bfloat16(low) | round_bfloat16(high) << 16; }

float float16_to_float(uint16_t x) {
  const int exponent = x >> 10 & 31, mantissa = x & 1023;
  float y = exponent == 31
                ? (mantissa ? NAN : INFINITY)
                : std::ldexp(static_cast<float>(exponent ? mantissa + 1024 : mantissa), (exponent ? exponent : 1) - 25);
  return x >> 15 ? -y : y;
}

uint16_t float_to_float16(float x) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
  if (size > 0x7F800000) return 0x7FFF;
  if (size >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // from 65520 on
  if (size < 0x38800000) {
    // Below 2^-14 the step is 2^-24; rint takes ties to even.
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::rint(std::ldexp(bits_float(size), 24))));
  }
  return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13));
}

// To the nearest, ties away from zero.
uint32_t float_to_tf32(float x) {
  const uint32_t bits = float_bits(x);
  if (x != x) return 0x7FFFFFFF;
  if ((bits & 0x7F800000) == 0x7F800000) return bits;
  return (bits + 0x1000) & 0xFFFFE000u;
}

}  // namespace xattn::cuda
