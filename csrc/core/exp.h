// exp on [-87, 88] as 2^k times a polynomial, the same roundings on every device; about 1 ulp. Below, it is 0.
#pragma once

#include "core/simd.h"

FR_NS_BEGIN

template <class V>
FR_HD V portable_exp(V a) {
  const V x = vmin(vmax(a, V(-87.f)), V(88.f));
  const V t = x * V(1.44269504f) + V(12582912.f), k = t - V(12582912.f);
  const V r = (x - k * V(0.693145752f)) - k * V(1.42860677e-6f);
  const V p =
      V(1.f) +
      r * (V(1.f) + r * (V(0.5f) +
                         r * (V(0.16666667f) + r * (V(0.041666392f) + r * (V(0.0083345085f) + r * V(0.0013944302f))))));
  return select(a < V(-87.f), V(0.f), scale_exponent(p, t));
}

FR_NS_END
