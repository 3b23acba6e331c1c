// Rows of floats and half floats, sixteen numbers at a time.
#pragma once

#include "core/simd.h"
#include "store/args.h"

FR_NS_BEGIN

void store_gather_cpu(const StoreArgs& a);
void store_scatter_cpu(const StoreArgs& a);

// Calls f(i, m) for sixteen elements at a time; m < 16 in the last one.
template <class F>
FR_HD void each_part(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, static_cast<int>(n - i));
}
FR_HD Vec read(const float* p, int m) { return m == kLanes ? load(p) : load_n(p, m); }
FR_HD Vec read(const uint16_t* p, int m) { return m == kLanes ? load_half(p) : load_half_n(p, m); }
FR_HD void write(float* p, Vec v, int m) { m == kLanes ? store(p, v) : store_n(p, v, m); }
// To nearest, as float_to_half.
FR_HD void write(uint16_t* p, Vec v, int m) {
  alignas(64) float f[kLanes];
  store(f, v);
  uint16_t h[kLanes];
#if defined(__F16C__) || defined(__AVX512F__)
  for (int i = 0; i < kLanes; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(h + i),
                     _mm256_cvtps_ph(_mm256_load_ps(f + i), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) h[i] = float_to_half(f[i]);
#endif
  std::memcpy(p, h, static_cast<size_t>(m) * sizeof(uint16_t));
}

FR_NS_END
