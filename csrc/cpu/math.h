// exp, softplus and its derivative on vectors; coefficients are minimax fits of relative error.
#pragma once

#include "simd.h"

namespace xattn {
namespace XATTN_ISA {

template <int N>
inline Vec<float> polynomial(const float (&c)[N], Vec<float> x) {
  Vec<float> y = splat(c[N - 1]);
#pragma GCC unroll 16
  for (int i = N - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}

// 2^n * p for n in [-160, 128], integers as floats; subnormal results are right.
inline Vec<float> scale_by_power(Vec<float> p, Vec<float> n) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const float magic = 12582912.0f;  // 1.5 * 2^23: the low bits of n + magic are n
  IntVec bits = (IntVec)(n + magic) - 0x4B400000;
  IntVec half = bits >> 1;
  return p * (Vec<float>)((half + 127) << 23) * (Vec<float>)((bits - half + 127) << 23);
#endif
}

// exp(x) for x <= 0 (NaN stays NaN), 2 ulp; 0 below the smallest subnormal.
inline Vec<float> exp_negative(Vec<float> x) {
  constexpr float kExp2[] = {1.000000001f,    0.6931472057f,   0.2402264689f,   0.05550328777f,
                             0.009618488882f, 0.001339993114f, 0.0001534583266f};
  const float magic = 12582912.0f;
  x = at_least(splat(-105.0f), x);
  Vec<float> n = (x * 1.44269504f + magic) - magic;
  Vec<float> r = x - n * 0.693359375f;  // ln 2 in two parts
  r = r + n * 2.12194440e-4f;
  return scale_by_power(polynomial(kExp2, r * 1.44269504f), n);
}

// 2^n * p for n in [-126, 0], integers as floats.
inline Vec<float> scale_by_normal_power(Vec<float> p, Vec<float> n) {
#if defined(__AVX512F__)
  return scale_by_power(p, n);
#else
  return p * (Vec<float>)(((IntVec)(n + 12582912.0f) - 0x4B400000 + 127) << 23);
#endif
}

// 2^x for x <= 0 with relative error 9e-8, exact at 0, and a floor of 2^-126: the weights of a softmax row.
inline Vec<float> exp2_weight(Vec<float> x) {
  constexpr float kExp2[] = {1.0f, 0.6931469776f, 0.2402224209f, 0.05550733742f, 0.009671512642f, 0.001326472749f};
  const float magic = 12582912.0f;
  x = at_least(splat(-126.0f), x);
  const Vec<float> n = (x + magic) - magic;
  return scale_by_normal_power(polynomial(kExp2, x - n), n);
}
inline Vec<double> exp2_weight(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp2(x[i]);
  return x;
}

inline Vec<float> negative_magnitude(Vec<float> x) { return (Vec<float>)((IntVec)x | INT32_MIN); }

// log1p(t) / t for t in [0, 1].
constexpr float kLog1p[] = {0.9999999699f,  -0.4999949312f, 0.3331909636f,   -0.2484297921f, 0.1910599684f,
                            -0.1366322785f, 0.07822577122f, -0.02950514385f, 0.005232674001f};

// softplus(x) = max(x, 0) + log1p(exp(-|x|)). PyTorch returns x above 20; in float that is the same
// number.
inline Vec<float> softplus(Vec<float> x) {
  Vec<float> t = exp_negative(negative_magnitude(x));
  return at_least(Vec<float>{}, x) + t * polynomial(kLog1p, t);
}
inline Vec<double> softplus(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = x[i] > 20 ? x[i] : ::log1p(::exp(x[i]));
  return x;
}

#if defined(__AVX512BF16__)
// softplus to 4.7e-4 relative, an eighth of the rounding of a bfloat16 result. 2^y = 2^(y - floor(y)) 2^floor(y),
// each factor's exponent by one instruction; both are right for infinite y.
inline Vec<float> softplus_for_bfloat16(Vec<float> x) {
  constexpr float kExp2[] = {0.9999252188f, 0.6958335417f, 0.2260671463f, 0.07802453077f};
  constexpr float kLog1p[] = {0.9996070246f, -0.4864141264f, 0.2540249562f, -0.07434306364f};
  const __m512 y = (__m512)(negative_magnitude(x) * 1.44269504f);
  const Vec<float> fraction = (Vec<float>)_mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF);
  const Vec<float> t = (Vec<float>)_mm512_scalef_ps((__m512)polynomial(kExp2, fraction), y);
  return at_least(Vec<float>{}, x) + t * polynomial(kLog1p, t);
}
#endif

// d softplus / dx = sigmoid(x), 1 above PyTorch's threshold.
inline Vec<float> softplus_derivative(Vec<float> x) {
  Vec<float> t = exp_negative(negative_magnitude(x));
  Vec<float> numerator = x < 0 ? t : splat(1.0f);
  return numerator / (1.0f + t);
}
inline Vec<double> softplus_derivative(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) {
    double t = ::exp(x[i]);
    x[i] = x[i] > 20 ? 1.0 : t / (t + 1.0);
  }
  return x;
}

// Both of one exponential.
inline void softplus_with_derivative(Vec<float> x, Vec<float>& value, Vec<float>& derivative) {
  const Vec<float> t = exp_negative(negative_magnitude(x));
  value = at_least(Vec<float>{}, x) + t * polynomial(kLog1p, t);
  derivative = (x < 0 ? t : splat(1.0f)) / (1.0f + t);
}
inline void softplus_with_derivative(Vec<double> x, Vec<double>& value, Vec<double>& derivative) {
  value = softplus(x);
  derivative = softplus_derivative(x);
}

template <class T>
inline Vec<T> exp_nonpositive(Vec<T> x);
template <>
inline Vec<float> exp_nonpositive<float>(Vec<float> x) {
  return exp_negative(x);
}
template <>
inline Vec<double> exp_nonpositive<double>(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

// The feature map of linear attention on `count` values in place; reads and writes whole vectors.
template <class T>
void apply_feature_map(FeatureMap map, T* x, int64_t count) {
  const Vec<T> zero{};
  switch (map) {
    case FeatureMap::kSoftplus:
      for (int64_t i = 0; i < count; i += kLanes<T>) store(x + i, softplus(load(x + i)));
      return;
    case FeatureMap::kRelu:
      for (int64_t i = 0; i < count; i += kLanes<T>) store(x + i, at_least(zero, load(x + i)));
      return;
    case FeatureMap::kElu:
      for (int64_t i = 0; i < count; i += kLanes<T>) {
        Vec<T> v = load(x + i);
        store(x + i, v > 0 ? v + T(1) : exp_nonpositive<T>(-at_least(zero, -v)));
      }
      return;
    case FeatureMap::kIdentity:
      return;
  }
}

// gradient *= map'(x), x being the value before the map.
template <class T>
void multiply_by_derivative(FeatureMap map, const T* x, T* gradient, int64_t count) {
  const Vec<T> zero{};
  switch (map) {
    case FeatureMap::kSoftplus:
      for (int64_t i = 0; i < count; i += kLanes<T>)
        store(gradient + i, load(gradient + i) * softplus_derivative(load(x + i)));
      return;
    case FeatureMap::kRelu:
      for (int64_t i = 0; i < count; i += kLanes<T>) {
        Vec<T> v = load(x + i), g = load(gradient + i);
        store(gradient + i, v <= 0 ? zero : g);
      }
      return;
    case FeatureMap::kElu:
      for (int64_t i = 0; i < count; i += kLanes<T>) {
        Vec<T> v = load(x + i), g = load(gradient + i);
        store(gradient + i, v > 0 ? g : g * exp_nonpositive<T>(-at_least(zero, -v)));
      }
      return;
    case FeatureMap::kIdentity:
      return;
  }
}

}  // namespace XATTN_ISA
}  // namespace xattn
