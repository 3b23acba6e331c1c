// exp as 2^k times a polynomial, the same roundings on every device; about 1 ulp.
#pragma once

#include "core/simd.h"

FR_NS_BEGIN

// exp(x) = p 2^k; k is in the low bits of t (see scale_exponent).
template <class V>
FR_HD V exp_parts(V x, V& t) {
  t = x * V(1.44269504f) + V(12582912.f);
  const V k = t - V(12582912.f);
  const V r = (x - k * V(0.693145752f)) - k * V(1.42860677e-6f);
  return V(1.f) +
         r * (V(1.f) + r * (V(0.5f) + r * (V(0.16666667f) +
                                           r * (V(0.041666392f) + r * (V(0.0083345085f) + r * V(0.0013944302f))))));
}

// On [-87, 88]. Below, it is 0.
template <class V>
FR_HD V portable_exp(V a) {
  V t;
  const V p = exp_parts(vmin(vmax(a, V(-87.f)), V(88.f)), t);
  return select(a < V(-87.f), V(0.f), scale_exponent(p, t));
}

// Of the nearest number in [-87, 87].
template <class V>
FR_HD V bounded_exp(V a) {
  V t;
  const V p = exp_parts(vmin(vmax(a, V(-87.f)), V(87.f)), t);
  return scale_exponent(p, t);
}

// Of any number: overflow to infinity, NaN; 0 below -87, where a subnormal number would take the processor long.
template <class V>
FR_HD V quick_exp(V a) {
  V t;
  const V p = exp_parts(vmin(vmax(a, V(-87.f)), V(89.f)), t);
  const V e = select(a < V(-87.f), V(0.f), scale_exponent(p, t));
  return select(a > V(88.7228394f), V(HUGE_VALF), select(a == a, e, a));
}

// Of numbers <= 0 and NaN; 0 below -87.
template <class V>
FR_HD V decay(V a) {
  V t;
  const V p = exp_parts(vmax(a, V(-87.f)), t);
  const V e = select(a < V(-87.f), V(0.f), scale_exponent(p, t));
  return select(a == a, e, a);
}

// Of any number, with subnormal results, down to -104.
template <class V>
FR_HD V whole_exp(V a) {
  V t;
  const V p = exp_parts(vmin(vmax(a, V(-104.f)), V(89.f)), t);
  const auto small = a < V(-80.f);  // 2^k may be no normal number
  const V scale = select(a < V(-104.f), V(0.f), select(small, V(5.42101086e-20f), V(1.f)));
  const V e = scale_exponent(p, select(small, t + V(64.f), t)) * scale;
  return select(a > V(88.7228394f), V(HUGE_VALF), select(a == a, e, a));
}

FR_NS_END
