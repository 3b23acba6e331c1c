// Sixteen float64 lanes compared and added up, square roots, and sixteen float lanes packed: what the solver's passes
// need beyond core/simd.h.
#pragma once

#include "core/simd.h"

FR_NS_BEGIN

#if defined(__AVX512F__)

struct WideMask {
  __mmask8 lo, hi;
  friend FR_HD WideMask operator|(WideMask a, WideMask b) {
    return {static_cast<__mmask8>(a.lo | b.lo), static_cast<__mmask8>(a.hi | b.hi)};
  }
  // a and not b
  friend FR_HD WideMask operator-(WideMask a, WideMask b) {
    return {static_cast<__mmask8>(a.lo & ~b.lo), static_cast<__mmask8>(a.hi & ~b.hi)};
  }
};
FR_HD WideMask no_lane() { return {0, 0}; }
FR_HD bool any(WideMask a) { return (a.lo | a.hi) != 0; }
FR_HD WideMask at_most(DVec a, DVec b) {
  return {_mm512_cmp_pd_mask(a.lo, b.lo, _CMP_LE_OQ), _mm512_cmp_pd_mask(a.hi, b.hi, _CMP_LE_OQ)};
}
// where the mask is set a, else 0
FR_HD DVec keep(WideMask m, DVec a) { return {_mm512_maskz_mov_pd(m.lo, a.lo), _mm512_maskz_mov_pd(m.hi, a.hi)}; }
FR_HD DVec drop(WideMask m, DVec a) {
  return {_mm512_maskz_mov_pd(static_cast<__mmask8>(~m.lo), a.lo),
          _mm512_maskz_mov_pd(static_cast<__mmask8>(~m.hi), a.hi)};
}
// where the sign of x is set a, else b
FR_HD Vec select_by_sign(Vec x, Vec a, Vec b) {
  const __m512i sign = _mm512_srai_epi32(_mm512_castps_si512(x.v), 31);
  const __m512i chosen = _mm512_ternarylogic_epi32(sign, _mm512_castps_si512(a.v), _mm512_castps_si512(b.v), 0xca);
  return _mm512_castsi512_ps(chosen);
}
// Lane i from bit i.
FR_HD Mask mask_of(uint32_t bits) { return {static_cast<__mmask16>(bits)}; }
FR_HD DVec root_of(DVec a) { return {_mm512_sqrt_pd(a.lo), _mm512_sqrt_pd(a.hi)}; }
// The nearest floats.
FR_HD Vec narrow(DVec a) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a.lo)), _mm512_cvtpd_ps(a.hi), 1);
}
// Stores the lanes of x and y where the mask is set without gaps, and returns how many. May write kLanes elements.
FR_HD int pack(float* px, float* py, Mask m, Vec x, Vec y) {
  const int count = __builtin_popcount(m.m);
  const __m512 a = _mm512_maskz_compress_ps(m.m, x.v), b = _mm512_maskz_compress_ps(m.m, y.v);
  if (count <= 8) {  // half as much to store, and most stores here straddle two cache lines
    _mm256_storeu_ps(px, _mm512_castps512_ps256(a));
    _mm256_storeu_ps(py, _mm512_castps512_ps256(b));
  } else {
    _mm512_storeu_ps(px, a);
    _mm512_storeu_ps(py, b);
  }
  return count;
}

#else

typedef int64_t NativeL __attribute__((vector_size(kWidth)));
constexpr int kWideRegs = 2 * kRegs;
#define FR_EACH_WIDE _Pragma("GCC unroll 8") for (int i = 0; i < kWideRegs; ++i)

struct WideMask {
  NativeL r[kWideRegs];
  friend FR_HD WideMask operator|(WideMask a, WideMask b) {
    FR_EACH_WIDE a.r[i] |= b.r[i];
    return a;
  }
  friend FR_HD WideMask operator-(WideMask a, WideMask b) {
    FR_EACH_WIDE a.r[i] &= ~b.r[i];
    return a;
  }
};
FR_HD WideMask no_lane() {
  WideMask m;
  FR_EACH_WIDE m.r[i] = NativeL{};
  return m;
}
FR_HD bool any(WideMask a) {
  NativeL c = a.r[0];
  FR_EACH_WIDE c |= a.r[i];
  int64_t bits = 0;
  for (int i = 0; i < kWidth / 8; ++i) bits |= c[i];
  return bits != 0;
}
FR_HD WideMask at_most(DVec a, DVec b) {
  WideMask m;
  FR_EACH_WIDE m.r[i] = a.r[i] <= b.r[i];
  return m;
}
FR_HD DVec keep(WideMask m, DVec a) {
  FR_EACH_WIDE a.r[i] = (NativeD)((NativeL)a.r[i] & m.r[i]);
  return a;
}
FR_HD DVec drop(WideMask m, DVec a) {
  FR_EACH_WIDE a.r[i] = (NativeD)((NativeL)a.r[i] & ~m.r[i]);
  return a;
}

FR_HD Vec select_by_sign(Vec x, Vec a, Vec b) {
#pragma GCC unroll 4
  for (int i = 0; i < kRegs; ++i) {
    const NativeI sign = (NativeI)x.r[i] >> 31;
    a.r[i] = (NativeF)(((NativeI)a.r[i] & sign) | ((NativeI)b.r[i] & ~sign));
  }
  return a;
}
FR_HD Mask mask_of(uint32_t bits) {
  Mask m;
#pragma GCC unroll 4
  for (int i = 0; i < kRegs; ++i)
    for (int k = 0; k < kWidth / 4; ++k) m.r[i][k] = -static_cast<int32_t>(bits >> (i * (kWidth / 4) + k) & 1);
  return m;
}
FR_HD DVec root_of(DVec a) {
  FR_EACH_WIDE {
#if defined(__AVX__)
    a.r[i] = (NativeD)_mm256_sqrt_pd((__m256d)a.r[i]);
#elif defined(__x86_64__)
    a.r[i] = (NativeD)_mm_sqrt_pd((__m128d)a.r[i]);
#else
    for (int k = 0; k < kWidth / 8; ++k) a.r[i][k] = sqrt(a.r[i][k]);
#endif
  }
  return a;
}
FR_HD Vec narrow(DVec a) {
  Vec x;
#pragma GCC unroll 4
  for (int i = 0; i < kRegs; ++i) {
#if defined(__AVX__)
    const __m128 low = _mm256_cvtpd_ps((__m256d)a.r[2 * i]), high = _mm256_cvtpd_ps((__m256d)a.r[2 * i + 1]);
    x.r[i] = (NativeF)_mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
#elif defined(__x86_64__)
    x.r[i] = (NativeF)_mm_movelh_ps(_mm_cvtpd_ps((__m128d)a.r[2 * i]), _mm_cvtpd_ps((__m128d)a.r[2 * i + 1]));
#else
    for (int k = 0; k < kWidth / 8; ++k) {
      x.r[i][k] = static_cast<float>(a.r[2 * i][k]);
      x.r[i][k + kWidth / 8] = static_cast<float>(a.r[2 * i + 1][k]);
    }
#endif
  }
  return x;
}
#if defined(__AVX2__)
// kGaps[m]: the positions of the set bits of m.
struct Gaps {
  uint8_t of[256][8];
  constexpr Gaps() : of() {
    for (int m = 0; m < 256; ++m)
      for (int i = 0, k = 0; i < 8; ++i)
        if (m >> i & 1) of[m][k++] = static_cast<uint8_t>(i);
  }
};
static constexpr Gaps kGaps;
FR_HD int pack(float* px, float* py, Mask m, Vec x, Vec y) {
  int count = 0;
#pragma GCC unroll 2
  for (int i = 0; i < kRegs; ++i) {
    const int bits = _mm256_movemask_ps((__m256)m.r[i]);
    const __m256i from = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kGaps.of[bits])));
    _mm256_storeu_ps(px + count, _mm256_permutevar8x32_ps((__m256)x.r[i], from));
    _mm256_storeu_ps(py + count, _mm256_permutevar8x32_ps((__m256)y.r[i], from));
    count += __builtin_popcount(static_cast<unsigned>(bits));
  }
  return count;
}
#else
FR_HD int pack(float* px, float* py, Mask m, Vec x, Vec y) {
  int count = 0;
#pragma GCC unroll 4
  for (int i = 0; i < kRegs; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < kWidth / 4; ++k) {
      px[count] = x.r[i][k];
      py[count] = y.r[i][k];
      count -= m.r[i][k];
    }
  return count;
}
#endif

#undef FR_EACH_WIDE
#endif

FR_NS_END
