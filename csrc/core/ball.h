// Projections on the box and on an L-inf ball that hold exactly. V is Vec in the CPU kernels and float in the CUDA
// kernels.
#pragma once

#include "core/rounding.h"

FR_NS_BEGIN

// To the box. The operands' order keeps a -0 that equals a face, and a NaN.
template <class V>
FR_HD V clip_to(V y, V lo, V hi) {
  return vmin(hi, vmax(lo, y));
}

// To the L-inf ball around x0, then to the box. The ball's faces are x0 -+ eps rounded inwards, so |out - x0| <= eps
// holds exactly.
template <class V>
FR_HD V linf_project(V y, V x0, V eps, V lo, V hi) {
  y = vmin(vmax(y, add_up(x0, -eps)), add_down(x0, eps));
  return clip_to(y, lo, hi);
}
// The same while the processor rounds up (RoundingUp): add_up is a plain addition, add_down its mirror.
template <class V>
FR_HD V linf_project_rounding_up(V y, V x0, V eps, V lo, V hi) {
  y = vmin(vmax(y, x0 + -eps), -(-x0 + -eps));
  return clip_to(y, lo, hi);
}

FR_NS_END
