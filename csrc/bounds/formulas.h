// The formulas of the bounds family: templates on float (CUDA, tails) and on Vec.
#pragma once

#include "bounds/args.h"
#include "core/simd.h"

FR_NS_BEGIN

// The neighbours of one coefficient: which line serves it depends on its sign.
template <class V>
FR_HD V by_sign(V a, V positive, V negative) {
  return select(a >= V(0.f), positive, negative);
}
// The same for a bound of one side, 0 lower and 1 upper: its own line serves positive coefficients.
template <class V>
FR_HD V serving(int side, V a, V low, V up) {
  return side == 0 ? by_sign(a, low, up) : by_sign(a, up, low);
}

// center and radius of [max(x - eps, lo), min(x + eps, hi)]
template <class V>
FR_HD void cut_box(V x, V eps, V lo, V hi, V& lower, V& upper) {
  const V l = x - eps, u = x + eps;
  lower = select(l < lo, lo, l);  // NaN stays
  upper = select(u > hi, hi, u);
}
template <class V>
FR_HD void to_center(V& a, V& b) {
  const V half(0.5f), c = half * a + half * b, r = half * b - half * a;  // sums of ends may overflow
  a = c;
  b = r;
}
template <class V>
FR_HD void from_center(V& a, V& b) {
  const V l = a - b, u = a + b;
  a = l;
  b = u;
}
template <class V>
FR_HD V relu(V a) {
  return select(a < V(0.f), V(0.f), a);  // NaN stays
}

template <class V>
FR_HD void relu_center(V& a, V& b) {
  from_center(a, b);
  a = relu(a);
  b = relu(b);
  to_center(a, b);
}

template <class V>
FR_HD void interval_step(const IntervalStepArgs& s, V& a, V& b) {
  switch (s.step) {
    case IntervalStep::to_center:
      return to_center(a, b);
    case IntervalStep::from_center:
      return from_center(a, b);
    case IntervalStep::relu_center:
      return relu_center(a, b);
    default: {
      V l, u;
      cut_box(a, b, V(s.lo), V(s.hi), l, u);
      a = l;
      b = u;
      if (s.step == IntervalStep::box) to_center(a, b);
    }
  }
}

// Thesis, equation 3.4, for max(x, left * x) with 0 <= left <= 1; adaptive: the lower slope of CROWN.
// NaN bounds give NaN lines; infinite widths give the horizontal lines left * l and u.
template <class V>
FR_HD void relu_lines(V l, V u, V left, bool adaptive, V& slope_low, V& slope_up, V& low, V& up) {
  const V zero(0.f), one(1.f), width = u - l;
  const auto positive = l >= zero, negative = u <= zero;
  const V chord = (u - left * l) / select(width > zero, width, one);
  slope_up = select(positive, one, select(negative, left, chord));
  const V sum = width * zero;  // 0, or NaN when an end is NaN or infinite
  const V gap = (left - chord) * l;
  up = select(positive, zero, select(negative, zero, gap));
  slope_low = adaptive ? select(positive, one, select(negative, left, select(u > zero - l, one, left))) : slope_up;
  low = zero;
  // not finite
  const auto fine = sum == zero;
  const auto number = (l == l) & (u == u);
  const V nan = sum;  // where it is not fine, sum is NaN
  slope_up = select(fine, slope_up, select(number, zero, nan));
  slope_low = select(fine, slope_low, select(number, zero, nan));
  const auto flat = left == zero;  // not 0 * inf
  low = select(fine, low, select(number, select(l < zero, select(flat, zero, left * l), l), nan));
  up = select(fine, up, select(number, select(u < zero, select(flat, zero, left * u), u), nan));
}

// Gradients of an end of the interval through the slope d = (u - left * l) / (u - l) and the intercept (left - d) * l
// of the upper line; everything else is constant.
template <class V>
FR_HD void relu_lines_grad(V l, V u, V left, V from_slope, V from_intercept, V& to_lower, V& to_upper) {
  const V zero(0.f), one(1.f), width = u - l;
  const auto between = (l < zero) & (u > zero) & (width * zero == zero);
  const V w = select(between, width, one), d = (u - left * l) / w, to_d = (from_slope - from_intercept * l) / w;
  to_lower = select(between, to_d * (d - left) + from_intercept * (left - d), zero);
  to_upper = select(between, to_d * (one - d), zero);
}

FR_NS_END
