// a * b + c with one rounding where the processor has it (v2 rounds twice), and lane sums.
#pragma once

#include "core/simd.h"

FR_NS_BEGIN

#if !defined(__CUDACC__)

#if defined(__AVX512F__)
FR_HD Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
FR_HD float lane_sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
#else
FR_HD Vec fmadd(Vec a, Vec b, Vec c) {
#if defined(__FMA__)
  for (int i = 0; i < kRegs; ++i) c.r[i] = (NativeF)_mm256_fmadd_ps((__m256)a.r[i], (__m256)b.r[i], (__m256)c.r[i]);
  return c;
#elif defined(__aarch64__)
  for (int i = 0; i < kRegs; ++i)
    c.r[i] = (NativeF)vfmaq_f32((float32x4_t)c.r[i], (float32x4_t)a.r[i], (float32x4_t)b.r[i]);
  return c;
#else
  return a * b + c;
#endif
}
// In the order of _mm512_reduce_add_ps: halves, quarters, eighths.
FR_HD float lane_sum(Vec a) {
  float s[kLanes];
  store(s, a);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  return s[0];
}
#endif

#endif  // !__CUDACC__

FR_NS_END
