// log2 and exp2 of sixteen float64 lanes, for general p. Only additions, multiplications, divisions and bits, without
// fused operations, so that every instruction set gives the same result.
#pragma once

#include "polyhedron/wide.h"

FR_NS_BEGIN

#if defined(__AVX512F__)

FR_HD DVec vmax(DVec a, DVec b) { return {_mm512_max_pd(a.lo, b.lo), _mm512_max_pd(a.hi, b.hi)}; }
FR_HD DVec vmin(DVec a, DVec b) { return {_mm512_min_pd(a.lo, b.lo), _mm512_min_pd(a.hi, b.hi)}; }
FR_HD DVec divide(DVec a, DVec b) { return {_mm512_div_pd(a.lo, b.lo), _mm512_div_pd(a.hi, b.hi)}; }
FR_HD double lane_max(DVec a) { return _mm512_reduce_max_pd(_mm512_max_pd(a.lo, a.hi)); }
// where the mask is set a, else b
FR_HD DVec select(WideMask m, DVec a, DVec b) {
  return {_mm512_mask_mov_pd(b.lo, m.lo, a.lo), _mm512_mask_mov_pd(b.hi, m.hi, a.hi)};
}
FR_HD DVec load_wide(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
FR_HD __m512i bits(__m512d a) { return _mm512_castpd_si512(a); }
// p 2^k for the integer k in the low bits of t
FR_HD __m512d scale_exponent(__m512d p, __m512d t) {
  return _mm512_castsi512_pd(_mm512_add_epi64(bits(p), _mm512_slli_epi64(bits(t), 52)));
}
FR_HD DVec scale_exponent(DVec p, DVec t) { return {scale_exponent(p.lo, t.lo), scale_exponent(p.hi, t.hi)}; }
// x = m 2^k with m between sqrt(1/2) and sqrt(2), for positive normal x: k in the low bits of a number in [2^52, 2^53)
// with `origin` added, and m
FR_HD void split(__m512d x, __m512d& k, __m512d& m, int64_t origin, int64_t biased) {
  const __m512i shifted = _mm512_add_epi64(bits(x), _mm512_set1_epi64(origin));
  const __m512i exponent = _mm512_srli_epi64(shifted, 52);
  k = _mm512_castsi512_pd(_mm512_or_epi64(exponent, _mm512_set1_epi64(biased)));
  const __m512i lift = _mm512_sub_epi64(_mm512_set1_epi64(1023), exponent);
  m = _mm512_castsi512_pd(_mm512_add_epi64(bits(x), _mm512_slli_epi64(lift, 52)));
}
FR_HD void split(DVec x, DVec& k, DVec& m, int64_t origin, int64_t biased) {
  split(x.lo, k.lo, m.lo, origin, biased);
  split(x.hi, k.hi, m.hi, origin, biased);
}

#else

typedef uint64_t NativeUL __attribute__((vector_size(kWidth)));
#define FR_EACH_WIDE _Pragma("GCC unroll 8") for (int i = 0; i < kWideRegs; ++i)

FR_HD DVec vmax(DVec a, DVec b) {
  FR_EACH_WIDE a.r[i] = a.r[i] > b.r[i] ? a.r[i] : b.r[i];
  return a;
}
FR_HD DVec vmin(DVec a, DVec b) {
  FR_EACH_WIDE a.r[i] = a.r[i] < b.r[i] ? a.r[i] : b.r[i];
  return a;
}
FR_HD DVec divide(DVec a, DVec b) {
  FR_EACH_WIDE a.r[i] = a.r[i] / b.r[i];
  return a;
}
FR_HD double lane_max(DVec a) {
  double s[kLanes];
  store(s, a);
  double m = s[0];
  for (int i = 1; i < kLanes; ++i) m = s[i] > m ? s[i] : m;
  return m;
}
FR_HD DVec select(WideMask m, DVec a, DVec b) {
  FR_EACH_WIDE a.r[i] = (NativeD)(((NativeL)a.r[i] & m.r[i]) | ((NativeL)b.r[i] & ~m.r[i]));
  return a;
}
FR_HD DVec load_wide(const double* p) {
  DVec a;
  FR_EACH_WIDE a.r[i] = *reinterpret_cast<const UnalignedD*>(p + i * (kWidth / 8));
  return a;
}
FR_HD DVec scale_exponent(DVec p, DVec t) {
  FR_EACH_WIDE p.r[i] = (NativeD)((NativeUL)p.r[i] + ((NativeUL)t.r[i] << 52));
  return p;
}
FR_HD void split(DVec x, DVec& k, DVec& m, int64_t origin, int64_t biased) {
  FR_EACH_WIDE {
    const NativeUL from = (NativeUL)x.r[i], exponent = (from + static_cast<uint64_t>(origin)) >> 52;
    k.r[i] = (NativeD)(exponent | static_cast<uint64_t>(biased));
    m.r[i] = (NativeD)(from + ((1023u - exponent) << 52));
  }
}

#undef FR_EACH_WIDE
#endif

// 2^x with a relative error below 2^-50; x below -1020 counts as -1020, above 1020 as 1020.
FR_HD DVec exp2_lanes(DVec x) {
  constexpr double kLn2 = 0.693147180559945309417232;
  x = vmin(vmax(x, DVec(-1020.)), DVec(1020.));
  const DVec magic(0x1.8p52), t = x + magic, r = x - (t - magic);
  double term = 1.;  // ln(2)^n / n!, constants to the compiler
  double c[14];
#pragma GCC unroll 14
  for (int n = 0; n < 14; ++n) {
    c[n] = term;
    term *= kLn2 / (n + 1);
  }
  DVec p(c[13]);
#pragma GCC unroll 13
  for (int n = 12; n >= 0; --n) p = p * r + DVec(c[n]);
  return scale_exponent(p, t);
}

// log2 x of positive normal x with an absolute error below 2^-51 plus a rounding: log2 m = 2 / ln 2 artanh s.
FR_HD DVec log2_lanes(DVec x) {
  constexpr int64_t kOne = 0x3ff0000000000000, kRootHalf = 0x3fe6a09e667f3bcd, kTwo52 = 0x4330000000000000;
  DVec k, m;
  split(x, k, m, kOne - kRootHalf, kTwo52);
  const DVec one(1.), s = divide(m - one, m + one), z = s * s;
  DVec p(1. / 21.);
#pragma GCC unroll 10
  for (int n = 19; n >= 1; n -= 2) p = p * z + DVec(1. / n);
  return (k - DVec(0x1p52 + 1023.)) + DVec(2.8853900817779268147) * (s * p);
}

FR_NS_END
