// What a coefficient v of one side passes on of the gradients of its backward step, or of its extreme over a box, added
// to what is there: sides' own lines serve positive coefficients, the other side's negative ones.
#pragma once

#include "bounds/formulas.h"
#include "core/simd.h"

FR_NS_BEGIN

// From f, of v times its slope. kTwo: a slope per side.
template <bool kTwo, class V>
FR_HD void slope_grad(int side, V v, V f, V low, V up, V& to_v, V (&to_slope)[2]) {
  if (!kTwo) {
    to_slope[0] = to_slope[0] + f * v;
    to_v = to_v + f * low;
    return;
  }
  const V zero(0.f), moved = f * v;
  const auto positive = v >= zero;
  to_slope[side] = to_slope[side] + select(positive, moved, zero);
  to_slope[1 - side] = to_slope[1 - side] + select(positive, zero, moved);
  to_v = to_v + f * serving(side, v, low, up);
}

// From t, of the bound.
template <class V>
FR_HD void intercept_grad(int side, V v, V t, V low, V up, V& to_v, V (&to_intercept)[2]) {
  const V zero(0.f), moved = t * v;
  const auto positive = v >= zero;
  to_intercept[side] = to_intercept[side] + select(positive, moved, zero);
  to_intercept[1 - side] = to_intercept[1 - side] + select(positive, zero, moved);
  to_v = to_v + t * serving(side, v, low, up);
}

// From t, of v center -+ |v| radius.
template <class V>
FR_HD void extreme_grad(int side, V v, V t, V center, V radius, V& to_v, V& to_center, V& to_radius) {
  const V zero(0.f), own = side == 0 ? -t : t;
  const V turned = select(v > zero, own, select(v < zero, -own, zero));  // own * sign(v)
  to_v = to_v + t * center + turned * radius;
  to_center = to_center + t * v;
  to_radius = to_radius + turned * v;
}

FR_NS_END
