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

FR_HD float random_linf(float x0, float eps, float lo, float hi, uint32_t u) {
  const float from = vmax(add_up(x0, -eps), lo), to = vmin(add_down(x0, eps), hi);
  return vmin(vmax(from + uniform_half_open(u) * (to - from), from), to);
}

// Four coordinates of t from one counter block.
struct Ball4 {
  float t[4];
};
FR_HD Ball4 random_ball4(const Philox4& p, bool l2) {
  Ball4 b;
  if (l2) {
    const Normal2 first = normal_pair(p.r[0], p.r[1]), second = normal_pair(p.r[2], p.r[3]);
    b.t[0] = first.a;
    b.t[1] = first.b;
    b.t[2] = second.a;
    b.t[3] = second.b;
  } else {
    for (int k = 0; k < 4; ++k) {
      const float size = -portable_log(uniform_open(p.r[k]));
      b.t[k] = (p.r[k] & 1) != 0 ? -size : size;  // the low bit is not used by the size
    }
  }
  return b;
}
FR_HD int64_t ball_term(float t, bool l2) { return static_cast<int32_t>((l2 ? t * t : vabs(t)) * kSumScale) + 1; }

// eps / (sum |t|^p + E)^(1/p), a little below.
FR_HD float ball_scale(int64_t sum, float eps, bool l2, uint64_t seed, uint32_t example) {
  const double e = -static_cast<double>(portable_log(uniform_open(philox(seed, kStreamRadius, example, 0).r[0])));
  const double s = static_cast<double>(sum) / kSumScale;
  const double size = l2 ? sqrt(s + 2. * e) : s + e;
  return static_cast<float>(eps * (1. - 0x1p-20) / size);
}

FR_HD float random_ball(float x0, float t, float scale, float lo, float hi) {
  float d = t * scale;
  const float above = hi - x0, below = x0 - lo;
  if ((d > above && d <= below) || (-d > below && -d <= above)) d = -d;
  return vmin(vmax(add_inward(x0, d), lo), hi);
}

FR_NS_END
