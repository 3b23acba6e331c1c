// Sixteen float lanes on every processor: one zmm, two ymm or four xmm registers. Formulas are templates over V and
// work on Vec and on float alike (the CUDA kernels use float), so a formula has one home. Because a Vec always has
// sixteen lanes, reductions add in the same order on every instruction set and give the same bits.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstring>

#include "core/half.h"
#include "core/macros.h"
#if !defined(__CUDACC__)
#include "core/quads.h"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

FR_NS_BEGIN

constexpr int kLanes = 16;

// ---- scalars, host and device ----
FR_HD float select(bool m, float a, float b) { return m ? a : b; }
FR_HD float vmin(float a, float b) { return a < b ? a : b; }
FR_HD float vmax(float a, float b) { return a > b ? a : b; }
FR_HD float vabs(float a) { return fabsf(a); }
FR_HD float root_of(float a) { return sqrtf(a); }
FR_HD double select(bool m, double a, double b) { return m ? a : b; }
FR_HD double vmin(double a, double b) { return a < b ? a : b; }
FR_HD double vmax(double a, double b) { return a > b ? a : b; }
FR_HD double vabs(double a) { return fabs(a); }
FR_HD double root_of(double a) { return sqrt(a); }
FR_HD bool any(bool m) { return m; }
// p * 2^k, where k sits in the low bits of t = k + 1.5 * 2^23 (the sum with the magic number rounds to an integer).
FR_HD float scale_exponent(float p, float t) { return float_from_bits(bits_of(p) + (bits_of(t) << 23)); }

#if !defined(__CUDACC__)

#if defined(__AVX512F__)

struct Mask {
  __mmask16 m;
  friend FR_HD Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.m & b.m)}; }
  friend FR_HD Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.m | b.m)}; }
  friend FR_HD Mask operator!(Mask a) { return {static_cast<__mmask16>(~a.m)}; }
};
FR_HD bool any(Mask a) { return a.m != 0; }
// Lane i as bit i.
FR_HD uint32_t bits(Mask a) { return a.m; }

struct Vec {
  __m512 v;
  Vec() = default;
  FR_HD Vec(__m512 a) : v(a) {}
  FR_HD Vec(float a) : v(_mm512_set1_ps(a)) {}
  friend FR_HD Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
  friend FR_HD Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
  friend FR_HD Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
  friend FR_HD Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
  friend FR_HD Vec operator-(Vec a) { return _mm512_xor_ps(a.v, _mm512_set1_ps(-0.f)); }
  friend FR_HD Mask operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
  friend FR_HD Mask operator>(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
  friend FR_HD Mask operator<=(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
  friend FR_HD Mask operator>=(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
  friend FR_HD Mask operator==(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
};
FR_HD Vec select(Mask m, Vec a, Vec b) { return _mm512_mask_blend_ps(m.m, b.v, a.v); }
FR_HD Vec vmin(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
FR_HD Vec vmax(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
FR_HD Vec vabs(Vec a) { return _mm512_abs_ps(a.v); }
FR_HD Vec root_of(Vec a) { return _mm512_sqrt_ps(a.v); }
FR_HD Vec load(const float* p) { return _mm512_loadu_ps(p); }
FR_HD Vec load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p); }
FR_HD void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
FR_HD void store_n(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v); }
FR_HD void store_stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
FR_HD Vec load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FR_HD Vec load_bfloat(const uint16_t* p) {
  const __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
}
// The neighbouring float away from zero (dir = 1) or towards it (dir = -1), bitwise.
FR_HD Vec step_bits(Vec a, int dir) {
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(dir)));
}
FR_HD Vec scale_exponent(Vec p, Vec t) {
  return _mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(p.v), _mm512_slli_epi32(_mm512_castps_si512(t.v), 23)));
}

struct DVec {
  __m512d lo, hi;
  DVec() = default;
  FR_HD DVec(__m512d a, __m512d b) : lo(a), hi(b) {}
  FR_HD DVec(double a) : lo(_mm512_set1_pd(a)), hi(lo) {}
  friend FR_HD DVec operator+(DVec a, DVec b) { return {_mm512_add_pd(a.lo, b.lo), _mm512_add_pd(a.hi, b.hi)}; }
  friend FR_HD DVec operator-(DVec a, DVec b) { return {_mm512_sub_pd(a.lo, b.lo), _mm512_sub_pd(a.hi, b.hi)}; }
  friend FR_HD DVec operator*(DVec a, DVec b) { return {_mm512_mul_pd(a.lo, b.lo), _mm512_mul_pd(a.hi, b.hi)}; }
};
FR_HD DVec widen(Vec a) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))};
}
FR_HD void store(double* p, DVec a) {
  _mm512_storeu_pd(p, a.lo);
  _mm512_storeu_pd(p + 8, a.hi);
}
// The order of the portable sum below: halves onto each other.
FR_HD double sum(DVec a) {
  const __m512d s8 = _mm512_add_pd(a.lo, a.hi);
  const __m256d s4 = _mm256_add_pd(_mm512_castpd512_pd256(s8), _mm512_extractf64x4_pd(s8, 1));
  const __m128d s2 = _mm_add_pd(_mm256_castpd256_pd128(s4), _mm256_extractf128_pd(s4, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s2, _mm_unpackhi_pd(s2, s2)));
}
FR_HD float max_lane(Vec a) { return _mm512_reduce_max_ps(a.v); }

#else  // registers narrower than sixteen floats: arrays of GCC vectors, every loop unrolled away

#if defined(__AVX__)
constexpr int kWidth = 32;
#else
constexpr int kWidth = 16;
#endif
constexpr int kRegs = 64 / kWidth;
typedef float NativeF __attribute__((vector_size(kWidth)));
typedef int32_t NativeI __attribute__((vector_size(kWidth)));
typedef uint32_t NativeU __attribute__((vector_size(kWidth)));  // bits wrap; signed ones must not
typedef double NativeD __attribute__((vector_size(kWidth)));
typedef NativeF UnalignedF __attribute__((aligned(4), may_alias));
typedef NativeD UnalignedD __attribute__((aligned(8), may_alias));

#define FR_EACH _Pragma("GCC unroll 8") for (int i = 0; i < kRegs; ++i)
#define FR_EACH2 _Pragma("GCC unroll 8") for (int i = 0; i < 2 * kRegs; ++i)

// One load that broadcasts where a comes from memory; a sum with zero would add, shuffle, and lose the sign of -0.
FR_HD NativeF splat(float a) {
#if defined(__AVX__)
  return (NativeF)_mm256_set1_ps(a);
#elif defined(__x86_64__)
  return (NativeF)_mm_set1_ps(a);
#else
  return (NativeF)vdupq_n_f32(a);
#endif
}
FR_HD NativeD splat(double a) {
#if defined(__AVX__)
  return (NativeD)_mm256_set1_pd(a);
#elif defined(__x86_64__)
  return (NativeD)_mm_set1_pd(a);
#else
  return (NativeD)vdupq_n_f64(a);
#endif
}

struct Mask {
  NativeI r[kRegs];
#define FR_MASK_OP(sign)                            \
  friend FR_HD Mask operator sign(Mask a, Mask b) { \
    Mask c;                                         \
    FR_EACH c.r[i] = a.r[i] sign b.r[i];            \
    return c;                                       \
  }
  FR_MASK_OP(&)
  FR_MASK_OP(|)
#undef FR_MASK_OP
  friend FR_HD Mask operator!(Mask a) {
    FR_EACH a.r[i] = ~a.r[i];
    return a;
  }
};
FR_HD uint32_t bits(Mask a) {
  uint32_t b = 0;
#if defined(__AVX__)
  FR_EACH b |= static_cast<uint32_t>(_mm256_movemask_ps((__m256)a.r[i])) << (8 * i);
#elif defined(__x86_64__)
  FR_EACH b |= static_cast<uint32_t>(_mm_movemask_ps((__m128)a.r[i])) << (4 * i);
#else
  FR_EACH for (int j = 0; j < kWidth / 4; ++j) b |= static_cast<uint32_t>(a.r[i][j] & 1) << (i * (kWidth / 4) + j);
#endif
  return b;
}
FR_HD bool any(Mask a) {
#if defined(__x86_64__)
  return bits(a) != 0;
#else
  NativeI c = a.r[0];
  FR_EACH c |= a.r[i];
  int32_t found = 0;
  for (int i = 0; i < kWidth / 4; ++i) found |= c[i];
  return found != 0;
#endif
}

struct Vec {
  NativeF r[kRegs];
  Vec() = default;
  FR_HD Vec(float a) { FR_EACH r[i] = splat(a); }
#define FR_ARITH(sign)                           \
  friend FR_HD Vec operator sign(Vec a, Vec b) { \
    FR_EACH a.r[i] = a.r[i] sign b.r[i];         \
    return a;                                    \
  }
  FR_ARITH(+)
  FR_ARITH(-)
  FR_ARITH(*)
  FR_ARITH(/)
#undef FR_ARITH
#define FR_COMPARE(sign)                          \
  friend FR_HD Mask operator sign(Vec a, Vec b) { \
    Mask m;                                       \
    FR_EACH m.r[i] = a.r[i] sign b.r[i];          \
    return m;                                     \
  }
  FR_COMPARE(<)
  FR_COMPARE(>)
  FR_COMPARE(<=)
  FR_COMPARE(>=)
  FR_COMPARE(==)
#undef FR_COMPARE
  friend FR_HD Vec operator-(Vec a) {
    FR_EACH a.r[i] = -a.r[i];
    return a;
  }
};
FR_HD Vec select(Mask m, Vec a, Vec b) {
  FR_EACH a.r[i] = m.r[i] ? a.r[i] : b.r[i];
  return a;
}
FR_HD Vec vmin(Vec a, Vec b) {
  FR_EACH a.r[i] = a.r[i] < b.r[i] ? a.r[i] : b.r[i];
  return a;
}
FR_HD Vec vmax(Vec a, Vec b) {
  FR_EACH a.r[i] = a.r[i] > b.r[i] ? a.r[i] : b.r[i];
  return a;
}
FR_HD Vec vabs(Vec a) {
  FR_EACH a.r[i] = (NativeF)((NativeI)a.r[i] & 0x7fffffff);
  return a;
}
FR_HD Vec root_of(Vec a) {
  FR_EACH {
#if defined(__AVX__)
    a.r[i] = (NativeF)_mm256_sqrt_ps((__m256)a.r[i]);
#elif defined(__x86_64__)
    a.r[i] = (NativeF)_mm_sqrt_ps((__m128)a.r[i]);
#else
    for (int k = 0; k < kWidth / 4; ++k) a.r[i][k] = sqrtf(a.r[i][k]);
#endif
  }
  return a;
}
// Register by register: a memcpy of the whole struct would keep it on the stack.
FR_HD Vec load(const float* p) {
  Vec a;
  FR_EACH a.r[i] = *reinterpret_cast<const UnalignedF*>(p + i * (kWidth / 4));
  return a;
}
FR_HD void store(float* p, Vec a) { FR_EACH* reinterpret_cast<UnalignedF*>(p + i * (kWidth / 4)) = a.r[i]; }
#if defined(__AVX2__)
// All bits of the lanes below n in register i.
FR_HD __m256i lanes_below(int n, int i) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8 * i), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FR_HD Vec load_n(const float* p, int n) {
  Vec a;
  FR_EACH a.r[i] = (NativeF)_mm256_maskload_ps(p + 8 * i, lanes_below(n, i));
  return a;
}
FR_HD void store_n(float* p, Vec a, int n) {
  FR_EACH _mm256_maskstore_ps(p + 8 * i, lanes_below(n, i), (__m256)a.r[i]);
}
#else
FR_HD Vec load_n(const float* p, int n) {
  float f[kLanes] = {};
  std::memcpy(f, p, static_cast<size_t>(n) * sizeof(float));
  return load(f);
}
FR_HD void store_n(float* p, Vec a, int n) {
  float f[kLanes];
  store(f, a);
  std::memcpy(p, f, static_cast<size_t>(n) * sizeof(float));
}
#endif
FR_HD void store_stream(float* p, Vec a) {
#if defined(__AVX__)
  FR_EACH _mm256_stream_ps(p + 8 * i, (__m256)a.r[i]);
#elif defined(__x86_64__)
  FR_EACH _mm_stream_ps(p + 4 * i, (__m128)a.r[i]);
#else
  store(p, a);
#endif
}
FR_HD Vec load_half(const uint16_t* p) {
  Vec a;
#if defined(__F16C__)
  FR_EACH a.r[i] = (NativeF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
#else
  float f[kLanes];
  for (int i = 0; i < kLanes; ++i) f[i] = half_to_float(p[i]);
  a = load(f);
#endif
  return a;
}
FR_HD Vec load_bfloat(const uint16_t* p) {
  float f[kLanes];
  for (int i = 0; i < kLanes; ++i) f[i] = bfloat_to_float(p[i]);
  return load(f);
}
FR_HD Vec step_bits(Vec a, int dir) {
  FR_EACH a.r[i] = (NativeF)((NativeU)a.r[i] + static_cast<uint32_t>(dir));
  return a;
}
FR_HD Vec scale_exponent(Vec p, Vec t) {
  FR_EACH p.r[i] = (NativeF)((NativeU)p.r[i] + ((NativeU)t.r[i] << 23));
  return p;
}

struct DVec {
  NativeD r[2 * kRegs];
  DVec() = default;
  FR_HD DVec(double a) { FR_EACH2 r[i] = splat(a); }
#define FR_ARITH(sign)                              \
  friend FR_HD DVec operator sign(DVec a, DVec b) { \
    FR_EACH2 a.r[i] = a.r[i] sign b.r[i];           \
    return a;                                       \
  }
  FR_ARITH(+)
  FR_ARITH(-)
  FR_ARITH(*)
#undef FR_ARITH
};
FR_HD DVec widen(Vec a) {
  DVec d;
#if defined(__AVX__)
  FR_EACH {
    d.r[2 * i] = (NativeD)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)a.r[i]));
    d.r[2 * i + 1] = (NativeD)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)a.r[i], 1));
  }
#elif defined(__x86_64__)
  FR_EACH {
    d.r[2 * i] = (NativeD)_mm_cvtps_pd((__m128)a.r[i]);
    d.r[2 * i + 1] = (NativeD)_mm_cvtps_pd(_mm_movehl_ps((__m128)a.r[i], (__m128)a.r[i]));
  }
#elif defined(__aarch64__)
  FR_EACH {
    d.r[2 * i] = (NativeD)vcvt_f64_f32(vget_low_f32((float32x4_t)a.r[i]));
    d.r[2 * i + 1] = (NativeD)vcvt_high_f64_f32((float32x4_t)a.r[i]);
  }
#else
  float f[kLanes];
  double w[kLanes];
  store(f, a);
  for (int i = 0; i < kLanes; ++i) w[i] = f[i];
  FR_EACH2 d.r[i] = *reinterpret_cast<const UnalignedD*>(w + i * (kWidth / 8));
#endif
  return d;
}
FR_HD void store(double* p, DVec a) { FR_EACH2* reinterpret_cast<UnalignedD*>(p + i * (kWidth / 8)) = a.r[i]; }

#undef FR_EACH
#undef FR_EACH2

// Sums and maxima over the lanes in one fixed order: halves onto each other.
FR_HD double sum(DVec a) {
#pragma GCC unroll 4
  for (int n = kRegs; n > 0; n /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) a.r[i] = a.r[i] + a.r[i + n];
#if defined(__AVX__)
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128((__m256d)a.r[0]), _mm256_extractf128_pd((__m256d)a.r[0], 1));
  return s[0] + s[1];
#else
  return a.r[0][0] + a.r[0][1];
#endif
}
// Lanes i, i + 4, i + 8 and i + 12 by op.
template <class Op>
FR_HD Quad fold(Vec a, const Op& op) {
#pragma GCC unroll 4
  for (int n = kRegs / 2; n > 0; n /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) a.r[i] = op(a.r[i], a.r[i + n]);
#if defined(__AVX__)
  return op((Quad)_mm256_castps256_ps128((__m256)a.r[0]), (Quad)_mm256_extractf128_ps((__m256)a.r[0], 1));
#else
  return (Quad)a.r[0];
#endif
}
FR_HD float max_lane(Vec a) {
  const auto larger = [](auto x, auto y) FR_INLINE_LAMBDA { return y > x ? y : x; };
  const Quad m = fold(a, larger);
  return larger(larger(m[0], m[2]), larger(m[1], m[3]));
}
#endif  // __AVX512F__

// Makes streamed stores visible before other threads are told that they are done.
FR_HD void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

FR_HD Vec load_half_n(const uint16_t* p, int n) {
  uint16_t u[kLanes] = {};
  std::memcpy(u, p, static_cast<size_t>(n) * sizeof(uint16_t));
  return load_half(u);
}
FR_HD Vec load_bfloat_n(const uint16_t* p, int n) {
  uint16_t u[kLanes] = {};
  std::memcpy(u, p, static_cast<size_t>(n) * sizeof(uint16_t));
  return load_bfloat(u);
}

#endif  // !__CUDACC__

FR_NS_END
