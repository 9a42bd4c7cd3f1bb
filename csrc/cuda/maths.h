// Feature maps and exponentials. Softplus takes one instruction of the special-function units, not two:
// of log1p only a polynomial is needed, as its argument lies between 0 and 1.
#pragma once

#include "../problem.h"
#include "device.h"

namespace xattn::cuda {

constexpr float kLog2E = 1.4426950408889634f;

// c[0] + c[1] x + ... by Horner's rule.
template <int kCount>
XATTN_DEVICE float polynomial(float x, const float (&c)[kCount]) {
  float y = c[kCount - 1];
  XATTN_UNROLL
  for (int i = kCount - 2; i >= 0; --i) y = fused_multiply_add(y, x, c[i]);
  return y;
}

// log(1 + t) for t in [0, 1]; t times a minimax polynomial, so that small values keep all their digits.
// Relative error 2e-7, or 9e-6 where results are rounded to bfloat16 anyway.
template <bool kExact>
XATTN_DEVICE float log1p_of_fraction(float t) {
  if constexpr (kExact) {
    constexpr float c[] = {0.9999999403953552f,  -0.4999949336051941f,   0.3331909477710724f,
                           -0.2484297752380371f, 0.1910598874092102f,    -0.1366320699453354f,
                           0.07822549343109131f, -0.029504956677556038f, 0.005232624243944883f};
    return t * polynomial(t, c);
  } else {
    constexpr float c[] = {0.9999915957450867f,   -0.4993613362312317f, 0.325206458568573f,
                           -0.21004803478717804f, 0.10122154653072357f, -0.023868856951594353f};
    return t * polynomial(t, c);
  }
}

// exp(x) for x <= 0. The exponent's rounding grows with it: 1e-6 of the result at -30, where that counts.
template <bool kExact>
XATTN_DEVICE float exponential(float x) {
  const float exponent = kLog2E * x, y = exp2_approximate(exponent);
  if constexpr (!kExact) return y;
  // What is lost times log(2); below -150 the result is zero, and infinities have no remainder.
  const float lost = fused_multiply_add(x, kLog2E, -exponent) + x * 1.9259630e-8f;
  return exponent > -150.0f ? fused_multiply_add(y, lost * 0.6931472f, y) : y;
}

// 2^x for x < 100 on the units of multiply-adds: relative error 3e-6, 2^0 = 1, zero below 2^-127.
XATTN_DEVICE float exp2_polynomial(float x) {
  constexpr float c[] = {1.0f, 0.6931241750717163f, 0.24024099111557007f, 0.055906426161527634f, 0.009582852944731712f};
  constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23, where floats are integers, and the exponent's bias
  x = x < -127.0f ? -127.0f : x;                  // keeps what is not a number
  const float rounded = x + kRound;
  return polynomial(x - (rounded - kRound), c) * bits_float(float_bits(rounded) << 23);
}

// log(1 + exp(x)) without cancellation for any x.
template <bool kExact>
XATTN_DEVICE float softplus(float x) {
  const float t = exponential<kExact>(x < 0.0f ? x : -x);
  return (x < 0.0f ? 0.0f : x) + log1p_of_fraction<kExact>(t);
}

template <bool kExact>
XATTN_DEVICE float feature_map(FeatureMap name, float x) {
  switch (name) {
    case FeatureMap::kSoftplus:
      return softplus<kExact>(x);
    case FeatureMap::kRelu:
      return x < 0.0f ? 0.0f : x;
    case FeatureMap::kElu:
      return x > 0.0f ? x + 1.0f : exponential<kExact>(x);
    default:
      return x;
  }
}

// phi'(x) from y = phi(x), so that x need not be kept: with softplus 1 - exp(-y).
template <bool kExact>
XATTN_DEVICE float feature_map_slope(FeatureMap name, float y) {
  switch (name) {
    case FeatureMap::kSoftplus: {
      if (y > 0.5f) return 1.0f - exponential<false>(-y);
      constexpr float c[] = {1.0f, -0.5f, 0.16666667f, -0.041666668f, 0.008333334f, -0.0013888889f, 1.984127e-4f};
      if constexpr (kExact) return y * polynomial(y, c);
      constexpr float few[] = {1.0f, -0.49983f, 0.164615f, -0.034429f};
      return y * polynomial(y, few);
    }
    case FeatureMap::kRelu:
      return y > 0.0f ? 1.0f : 0.0f;
    case FeatureMap::kElu:
      return y < 1.0f ? y : 1.0f;
    default:
      return 1.0f;
  }
}

}  // namespace xattn::cuda
