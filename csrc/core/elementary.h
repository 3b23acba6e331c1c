// Elementary functions: on float and Vec by polynomials with the same operations on every device,
// on double by the C library (float64 checks them). Errors are relative, in units in the last place (ulp), over all
// arguments that the activations give; tests/bounds/test_lines.py measures what they come to.
#pragma once

#include <math.h>

#include <cfloat>

#include "core/exp.h"
#include "core/simd.h"

FR_NS_BEGIN

// Functions that are too large to be copied to every call on the CPU.
#if defined(__CUDACC__)
#define FR_CALLED FR_HD
#else
#define FR_CALLED __attribute__((noinline))
#endif

// Newton's steps stay loops: their bodies are large.
#if defined(__CUDA_ARCH__)
#define FR_NO_UNROLL _Pragma("unroll 1")
#else
#define FR_NO_UNROLL
#endif

// a = m 2^k with m in [sqrt(1/2), sqrt(2)), for positive normal a; returns k.
FR_HD float split_exponent(float a, float& m) {
  const uint32_t bits = bits_of(a), shifted = bits - 0x3f3504f3u;
  const int32_t k = static_cast<int32_t>(shifted) >> 23;
  m = float_from_bits(bits - (static_cast<uint32_t>(k) << 23));
  return static_cast<float>(k);
}

#if !defined(__CUDACC__)
#if defined(__AVX512F__)
FR_HD Vec split_exponent(Vec a, Vec& m) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i k = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
  m = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(k, 23)));
  return _mm512_cvtepi32_ps(k);
}
#else
FR_HD Vec split_exponent(Vec a, Vec& m) {
  Vec k;
  for (int i = 0; i < kRegs; ++i) {
    const NativeU bits = (NativeU)a.r[i];
    const NativeI e = (NativeI)(bits - 0x3f3504f3u) >> 23;
    m.r[i] = (NativeF)(bits - ((NativeU)e << 23));
    k.r[i] = __builtin_convertvector(e, NativeF);
  }
  return k;
}
#endif
#endif  // !__CUDACC__

// ---- functions ----
template <class V>
FR_HD V polynomial(V, double c) {
  return V(static_cast<float>(c));
}
// c + x (rest)
template <class V, class... Rest>
FR_HD V polynomial(V x, double c, Rest... rest) {
  return V(static_cast<float>(c)) + x * polynomial(x, rest...);
}

template <class V>
FR_HD V exp_of(V a) {
  return portable_exp(a);
}
FR_HD double exp_of(double a) { return exp(a); }

// atanh(y) / y from v = y^2 <= 1/9, to 1e-10
template <class V>
FR_HD V atanh_ratio(V v) {
  return polynomial(v, 1., 0.333333397, 0.199993455, 0.143103609, 0.106966264, 0.122065301);
}
// log(1 + z) for 0 <= z <= 1
template <class V>
FR_HD V log1p_of(V z) {
  // Squares that are subnormal numbers would take the processor long; the ratio is 1 there.
  const V y = z / (V(2.f) + z), c = vmax(y, V(1e-18f));
  return (y + y) * atanh_ratio(c * c);
}
FR_HD double log1p_of(double z) { return log1p(z); }

// log(a) for positive normal a
template <class V>
FR_HD V log_of(V a) {
  V m;
  const V k = split_exponent(a, m);
  const V y = (m - V(1.f)) / (m + V(1.f));
  return k * V(0.693145752f) + (k * V(1.42860677e-6f) + (y + y) * atanh_ratio(y * y));
}
FR_HD double log_of(double a) { return log(a); }

// tanh(x) for |x| <= 0.6
template <class V>
FR_HD V tanh_near_zero(V x) {
  const V v = x * x;
  return x * polynomial(v, 0.999999998, -0.333332833, 0.133316889, -0.0537687036, 0.0207536255, -0.00585216493);
}
FR_HD double tanh_near_zero(double x) { return tanh(x); }

// exp(x) - 1 for x <= 0
template <class V>
FR_HD V expm1_of(V x) {
  const V t = tanh_near_zero(vmax(x, V(-1.2f)) * V(0.5f));
  return select(x > V(-1.2f), (t + t) / (V(1.f) - t), exp_of(x) - V(1.f));
}
FR_HD double expm1_of(double x) { return expm1(x); }

template <class V>
FR_HD V atan_of(V x) {
  const V a = vabs(x), one(1.f);
  const auto far = a > V(2.41421356f), between = a > V(0.41421356f);  // tan(3 pi / 8), tan(pi / 8)
  const V top = select(far, V(-1.f), select(between, a - one, a));
  const V y = top / select(far, a, select(between, a + one, one)), v = y * y;
  const V r = y * polynomial(v, 0.999999982, -0.33332799, 0.199744633, -0.138520121, 0.0798648347);
  const V s = select(far, V(1.57079633f), select(between, V(0.785398163f), V(0.f))) + r;
  return select(x < V(0.f), -s, s);
}
FR_HD double atan_of(double x) { return atan(x); }

// The normal distribution's function and density. exp(-x^2/2) erfcx(|x| / sqrt(2)) / 2 below 0; the rounding error of
// x^2 is worked out exactly (Dekker), or it would be the larger the smaller the result.
template <class V>
FR_HD void normal(V x, V& function, V& density) {
  const V a = vmin(vabs(x), V(14.f)), one(1.f), square = a * a;
  const V big = a * V(4097.f), high = big - (big - a), low = a - high;
  const V error = ((high * high - square) + V(2.f) * (high * low)) + low * low;
  const V e = exp_of(V(-0.5f) * square) * (one - V(0.5f) * error);
  const V t = one / (one + V(0.282842712f) * a);
  const V tail = V(0.5f) * e * t *
                 polynomial(t, 0.225709861, 0.224895212, 0.215386947, 0.127513783, 0.278286657, -0.295881941,
                            0.561202676, -0.509083145, 0.202361792, -0.0303918349);
  function = select(x < V(0.f), tail, one - tail);
  density = V(0.398942280f) * e;
}
FR_HD void normal(double x, double& function, double& density) {
  function = 0.5 * erfc(-0.70710678118654752 * x);
  density = 0.39894228040143268 * exp(-0.5 * x * x);
}

FR_NS_END
