// Uniform points of a ball inside the box.
// L-inf: uniform on the intersection, coordinate by coordinate.
// L2, L1: t / (sum |t|^p + E)^(1/p), with t_i of density ~ exp(-|t|^p) and E exponential, is uniform in the unit ball
// (Barthe et al. 2005). A coordinate that leaves the box is reflected to the other side of x0 where that lies inside,
// and clipped otherwise; with every face at distance 0 or at least eps the result is uniform on the intersection.
#pragma once

#include "core/philox.h"
#include "core/rounding.h"
#include "pgd/args.h"

FR_NS_BEGIN

constexpr uint32_t kStreamElements = 0, kStreamRadius = 1;
// The sum of |t|^p is kept in integers, so that it does not depend on the order of addition. Each term is rounded up:
// the sum is never below the true one, and the point never outside the ball.
constexpr float kSumScale = 0x1p20f;

FR_HD uint32_t example_of(const RandomStartArgs& a, int64_t row) {
  return static_cast<uint32_t>(a.numbers == nullptr ? a.first_example + row : a.numbers[row]);
}

// u is uniform on [0, 1).
template <class V>
FR_HD V random_linf(V x0, V eps, V lo, V hi, V u) {
  const V from = vmax(lo, add_up(x0, -eps)), to = vmin(hi, add_down(x0, eps));
  return vmin(vmax(from + u * (to - from), from), to);
}

// Two coordinates of t from two words.
FR_HD Normal2 random_ball2(uint32_t u, uint32_t v, bool l2) {
  if (l2) return normal_pair(u, v);
  const float a = -portable_log(uniform_open(u)), b = -portable_log(uniform_open(v));
  return {(u & 1) != 0 ? -a : a, (v & 1) != 0 ? -b : b};  // the sizes do not use the low bit
}
FR_HD int64_t ball_term(float t, bool l2) { return static_cast<int32_t>((l2 ? t * t : vabs(t)) * kSumScale) + 1; }

// In a ball this small the coordinates are subnormal, whose rounding is not relative: the margin below does not cover
// it.
constexpr float kLeastRadius = 0x1p-96f;
// Larger ones count as this: eps over a small size would overflow.
constexpr float kMostRadius = 0x1p100f;

// eps / (sum |t|^p + E)^(1/p), a little below; 0, the centre alone, for radii below kLeastRadius.
FR_HD float ball_scale(int64_t sum, float eps, bool l2, uint64_t seed, uint32_t example) {
  if (!(eps >= kLeastRadius)) return 0.f;
  eps = vmin(eps, kMostRadius);
  const double e = -static_cast<double>(portable_log(uniform_open(philox(seed, kStreamRadius, example, 0).r[0])));
  const double s = static_cast<double>(sum) / kSumScale;
  const double size = l2 ? sqrt(s + 2. * e) : s + e;
  return static_cast<float>(eps * (1. - 0x1p-20) / size);
}

template <class V>
FR_HD V random_ball(V x0, V t, V scale, V lo, V hi) {
  const V d = t * scale, above = hi - x0, below = x0 - lo;
  const auto leaves_above = (d > above) & (d <= below), leaves_below = (-d > below) & (-d <= above);
  return vmin(hi, vmax(lo, add_inward(x0, select(leaves_above | leaves_below, -d, d))));
}

FR_NS_END
