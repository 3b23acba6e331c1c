// What follows an interval product where a ReLU reads it, and its gradients: formulas on float (CUDA) and on Vec.
#pragma once

#include "bounds/fma.h"
#include "bounds/formulas.h"

FR_NS_BEGIN

// Gradients that the bias and a shared radius get are added up over at most so many runs of examples, then over these.
FR_HD int64_t examples_of_run(int64_t batch) { return batch > kReluBoxRuns ? (batch - 1) / kReluBoxRuns + 1 : 1; }
FR_HD int64_t runs_of(int64_t batch) { return (batch + examples_of_run(batch) - 1) / examples_of_run(batch); }

// The ReLU's lines on c -+ r, in terms of the product without its bias.
template <class V>
FR_HD void relu_box_lines(V c, V r, V bias, bool adaptive, V& slope_low, V& slope_up, V& low, V& up) {
  relu_lines(c - r, c + r, V(0.f), adaptive, slope_low, slope_up, low, up);
  low = fmadd(slope_low, bias, low);
  up = fmadd(slope_up, bias, up);
}

// From the gradients of the lines those of both ends; returns what the lines bring to the bias. from_slope: of the
// upper slope, or of the only one.
template <class V>
FR_HD V relu_box_lines_grad(V c, V r, V bias, bool adaptive, V from_slope, V from_low, V from_up, V& to_l, V& to_u) {
  const V zero(0.f), l = c - r, u = c + r;
  V slope_low, slope_up, low, up;
  relu_lines(l, u, zero, adaptive, slope_low, slope_up, low, up);
  const V to_slope = fmadd(bias, adaptive ? from_up : from_low + from_up, from_slope);
  relu_lines_grad(l, u, zero, to_slope, from_up, to_l, to_u);
  return fmadd(slope_low, from_low, slope_up * from_up);
}

// From the gradients of centre and radius of the ReLU's range those of both ends, added to what is there.
template <class V>
FR_HD void relu_center_grad(V c, V r, V from_center, V from_radius, V& to_l, V& to_u) {
  const V zero(0.f), half(0.5f);
  to_l = to_l + select(c - r > zero, half * (from_center - from_radius), zero);
  to_u = to_u + select(c + r > zero, half * (from_center + from_radius), zero);
}

FR_NS_END
