// a * b + c with one rounding where the processor has it (v2 rounds twice), lane sums and the terms of norms.
#pragma once

#include <cmath>

#include "bounds/args.h"
#include "bounds/support.h"
#include "core/simd.h"

FR_NS_BEGIN

FR_HD float fmadd(float a, float b, float c) { return fmaf(a, b, c); }

#if !defined(__CUDACC__)

#if defined(__AVX512F__)
FR_HD Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
FR_HD float lane_sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
#else
FR_HD NativeF fmadd_native(NativeF a, NativeF b, NativeF c) {
#if defined(__FMA__)
  return (NativeF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (NativeF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
FR_HD Vec fmadd(Vec a, Vec b, Vec c) {
  for (int i = 0; i < kRegs; ++i) c.r[i] = fmadd_native(a.r[i], b.r[i], c.r[i]);
  return c;
}
// In the order of _mm512_reduce_add_ps: halves, quarters, eighths.
FR_HD Quad quarters(Vec a) {
  return fold(a, [](auto x, auto y) FR_INLINE_LAMBDA { return x + y; });
}
FR_HD float lane_sum(Vec a) {
  const Quad s = quarters(a);
  return (s[0] + s[2]) + (s[1] + s[3]);
}
#endif

// NaN wins.
FR_HD Vec vmax_nan(Vec a, Vec b) { return select(a < b, b, select(b == b, a, b)); }
// The sum of a norm with one coordinate's size more.
template <Dual kDual>
FR_HD Vec norm_term(Vec w, Vec sums) {
  if (kDual == Dual::l2) return fmadd(w, w, sums);
  if (kDual == Dual::l1) return sums + w;
  return vmax_nan(sums, w);
}

// Calls end(term) with how a coefficient v and a reach r of the input set join a sum: |v| r of a box, else the norm's.
template <class F>
FR_HD void with_term(bool box, Dual dual, const F& end) {
  if (box)
    end([](Vec v, Vec r, Vec sum) FR_INLINE_LAMBDA { return fmadd(vabs(v), r, sum); });
  else if (dual == Dual::l1)
    end([](Vec v, Vec r, Vec sum) FR_INLINE_LAMBDA { return norm_term<Dual::l1>(vabs(v * r), sum); });
  else if (dual == Dual::l2)
    end([](Vec v, Vec r, Vec sum) FR_INLINE_LAMBDA { return norm_term<Dual::l2>(vabs(v * r), sum); });
  else
    end([](Vec v, Vec r, Vec sum) FR_INLINE_LAMBDA { return norm_term<Dual::linf>(vabs(v * r), sum); });
}
// The norm from its lanes' sums; l2: its square.
FR_HD float norm_of(Vec sums, Dual dual) {
  if (dual == Dual::linf) {  // max_lane passes over NaN
    const float top = max_lane(sums), nan = lane_sum(sums - sums);
    return nan == nan ? top : nan;
  }
  return lane_sum(sums);
}

// The sum of the squares of all lanes; those of floats neither overflow nor vanish in double.
FR_HD double squares_of(Vec w) {
  float lanes[kLanes];
  store(lanes, w);
  double sum = 0.;
  for (const float x : lanes) sum += static_cast<double>(x) * x;
  return sum;
}
// The root of a sum of squares; wide(): the sum once more in double, where the floats' one is out of its range.
template <class Wide>
FR_HD float root_of_squares(float total, Wide wide) {
  if (scale_of_squares(total) == 1.f) return std::sqrt(total);
  return static_cast<float>(std::sqrt(wide()));
}

#endif  // !__CUDACC__

FR_NS_END
