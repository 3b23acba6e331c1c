// What a coefficient v of one side passes on of the gradients of its backward step, added to what is there: sides' own
// lines serve positive coefficients, the other side's negative ones.
#pragma once

#include "bounds/formulas.h"
#include "core/simd.h"

FR_NS_BEGIN

// From f, of v times its slope. kTwo: a slope per side.
template <bool kTwo>
FR_HD void slope_grad(int side, Vec v, Vec f, Vec low, Vec up, Vec& to_v, Vec (&to_slope)[2]) {
  if (!kTwo) {
    to_slope[0] = to_slope[0] + f * v;
    to_v = to_v + f * low;
    return;
  }
  const Vec zero(0.f), moved = f * v;
  const auto positive = v >= zero;
  to_slope[side] = to_slope[side] + select(positive, moved, zero);
  to_slope[1 - side] = to_slope[1 - side] + select(positive, zero, moved);
  to_v = to_v + f * (side == 0 ? by_sign(v, low, up) : by_sign(v, up, low));
}

// From t, of the bound.
FR_HD void intercept_grad(int side, Vec v, Vec t, Vec low, Vec up, Vec& to_v, Vec (&to_intercept)[2]) {
  const Vec zero(0.f), moved = t * v;
  const auto positive = v >= zero;
  to_intercept[side] = to_intercept[side] + select(positive, moved, zero);
  to_intercept[1 - side] = to_intercept[1 - side] + select(positive, zero, moved);
  to_v = to_v + t * (side == 0 ? by_sign(v, low, up) : by_sign(v, up, low));
}

FR_NS_END
