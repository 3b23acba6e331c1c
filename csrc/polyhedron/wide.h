// Comparisons of sixteen float64 lanes, for the certified passes.
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

#undef FR_EACH_WIDE
#endif

FR_NS_END
