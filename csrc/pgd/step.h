// The formulas of the PGD family, one home each. V is Vec in the CPU kernels and float in the CUDA kernels.
#pragma once

#include <cfloat>
#include <cmath>

#include "core/ball.h"
#include "pgd/args.h"

FR_NS_BEGIN

// ---- gradients ----
// A NaN coordinate counts as zero; an infinite one as the largest finite number, so that norms stay finite.
template <class V>
FR_HD V clean_grad(V g) {
  g = select(g == g, g, V(0.f));
  return vmin(vmax(g, V(-FLT_MAX)), V(FLT_MAX));
}

// ---- L-inf (thesis eq. 2.2): linf_project(x + step sign(g)); sign(0) = sign(NaN) = 0 ----
template <class V>
FR_HD V linf_ascend(V x, V g, V step) {
  return x + select(g > V(0.f), step, select(g < V(0.f), -step, V(0.f)));
}

// ---- Auto-PGD (Croce and Hein 2020, algorithm 1, line 8): the step averaged with the last move, before projection
// ----
template <class V>
FR_HD V averaged(V x, V previous, V z, float momentum, float rest) {
  return x + V(momentum) * (z - x) + V(rest) * (x - previous);
}

// ---- L2: y = x + step g / ||g||, or y = x + step g ----
// g / ||g|| as (g * pow2) * scale: pow2 is a power of two that brings the norm near 1, so that neither factor over- or
// underflows for gradients of any size. A longer step than kLongest ends at the same point of any ball that is not
// itself so large, and its squares stay finite.
constexpr float kLongest = 0x1p100f;
struct L2Ascent {
  float pow2;
  float scale;
};
FR_HD L2Ascent l2_ascent(double sum_g2, float step, bool normalize) {
  if (!normalize) return {1.f, step};
  const double norm = sqrt(sum_g2);
  if (!(norm > 0.)) return {0.f, 0.f};
  step = vmin(vmax(step, -kLongest), kLongest);
  int exponent;
  frexp(norm, &exponent);
  exponent = exponent > 126 ? 126 : (exponent < -126 ? -126 : exponent);
  const double pow2 = ldexp(1., -exponent);
  return {static_cast<float>(pow2), static_cast<float>(step / (norm * pow2))};
}
template <class V>
FR_HD V l2_ascend(V x, V g, V pow2, V scale) {
  const V p = (g * pow2) * scale;
  return select(p == V(0.f), x, x + p);
}

// ---- shrinking onto an L2 or L1 ball, rounded inwards ----
// d = fl(y - x0) carries a relative error of 2^-24. A point counts as inside when the computed size is at most
// (1 - kAccept) eps, and a point outside is shrunk to (1 - kShrink) eps before the last addition is rounded towards x0:
// kAccept covers the error of d, kShrink > kAccept makes the projection idempotent. Both are a few ulp of eps.
constexpr double kAccept = 0x1p-23;
constexpr double kShrink = 0x1p-21;

// Between (1 - kAccept) eps and (1 + kAccept) eps the point itself decides: one on the sphere stays. hi + lo is the sum
// of what was added but for `bound`, which is zero where every addition was exact.
struct ExactSum {
  double hi = 0., lo = 0., bound = 0.;
};
template <class T>
FR_HD T sum_error(T a, T b, T s) {
  const T bb = s - a;
  return (a - (s - bb)) + (b - bb);
}
FR_HD void exact_add(ExactSum* s, double v) {
  const double hi = s->hi + v, error = sum_error(s->hi, v, hi), lo = s->lo + error;
  s->bound += vabs(sum_error(s->lo, error, lo));
  s->hi = hi;
  s->lo = lo;
}
// A coordinate's share of ||y - x0||^2 or of the L1 norm: products of floats, exact in double.
FR_HD void exact_add(ExactSum* s, float y, float x0, bool l2) {
  const float d = y - x0;
  const double h = d, l = sum_error(y, -x0, d);
  exact_add(s, l2 ? h * h : vabs(h));
  exact_add(s, l2 ? 2. * h * l : (h < 0. ? -l : l));
  exact_add(s, l2 ? l * l : 0.);
}
FR_HD void exact_add(ExactSum* s, const ExactSum& other) {
  exact_add(s, other.hi);
  exact_add(s, other.lo);
  s->bound += other.bound;
}
FR_HD bool exact_inside(const ExactSum& s, float eps, bool l2) {
  const double limit = l2 ? static_cast<double>(eps) * eps : static_cast<double>(eps);
  const double slack = s.bound > 0. ? 2. * s.bound + 0x1p-50 * vabs(s.lo) : 0.;
  return (s.hi - limit) + (s.lo + slack) <= 0.;
}
// norm is the computed one.
FR_HD bool near_sphere(double norm, float eps) { return norm > eps * (1. - kAccept) && norm <= eps * (1. + kAccept); }

// Factor for d, or 1 when y is inside. A radius of zero gives x0 itself, whatever the sign of a zero in y.
FR_HD float l2_shrink(double sum_d2, float eps) {
  const double norm = sqrt(sum_d2);
  const double bound = static_cast<double>(eps);
  if (!(bound > 0.)) return 0.f;
  if (norm <= bound * (1. - kAccept)) return 1.f;
  if (!(norm > 0.)) return 0.f;
  return round_down(bound * (1. - kShrink) / norm);
}
template <class V>
FR_HD V l2_project(V y, V x0, float shrink, V lo, V hi) {
  return clip_to(shrink < 1.f ? add_inward(x0, (y - x0) * V(shrink)) : y, lo, hi);
}

// ---- L1: exact projection on the intersection of the ball and the box ----
// z = clip(x0 + sign(d) max(|d| - lambda, 0)) with lambda such that ||z - x0||_1 = eps; lambda = 0 inside.
// room: how far the box lets a coordinate move in the direction of d.
template <class V>
FR_HD V l1_room(V d, V x0, V lo, V hi) {
  return select(d > V(0.f), hi - x0, x0 - lo);
}
template <class V>
FR_HD V l1_length(V d, V room, V lambda) {
  return vmax(vmin(vabs(d) - lambda, room), V(0.f));  // never negative, also in unused lanes, where room may be
}
template <class V>
FR_HD V l1_project(V y, V x0, V lambda, V lo, V hi) {
  const V d = y - x0;
  const V length = vmax(vabs(d) - lambda, V(0.f));
  const V shrunk = add_inward(x0, select(d < V(0.f), -length, length));
  return clip_to(select(lambda > V(0.f), shrunk, y), lo, hi);
}

// ---- L1 steepest ascent in the box: max <g, p> with ||p||_1 <= step and lo <= x + p <= hi ----
// A fractional knapsack: coordinates in order of |g| move to the face of the box until the length is spent. Those with
// |g| above a threshold move all the way, those equal to it share what is left in index order.
template <class V>
FR_HD V l1_headroom(V x, V g, V lo, V hi) {
  return vmax(select(g > V(0.f), hi - x, select(g < V(0.f), x - lo, V(0.f))), V(0.f));
}

// Where a coordinate above the threshold goes, and one at it that may take `left`.
template <class V>
FR_HD V l1_to_face(V x, V g, V lo, V hi) {
  return select(g > V(0.f), vmax(x, hi), vmin(x, lo));
}
FR_HD float l1_take(float x, float g, float lo, float hi, double* left) {
  const double room = l1_headroom(x, g, lo, hi), take = room < *left ? room : *left;
  *left -= take;
  return x + (g > 0.f ? round_down(take) : -round_down(take));
}

// The smallest threshold that spends at most `step`; R gives spent(threshold) over the example and top(), the largest
// |g|. Positive floats order as their bits, so bisection over the bits ends after 31 sums.
template <class R>
FR_HD float l1_threshold(const R& r, float step, double* spent) {
  *spent = r.spent(0.f);
  if (*spent <= step) return 0.f;
  uint32_t low = 0, high = bits_of(r.top());
  while (high - low > 1) {
    const uint32_t mid = low + (high - low) / 2;
    if (r.spent(float_from_bits(mid)) > step)
      low = mid;
    else
      high = mid;
  }
  *spent = r.spent(float_from_bits(high));
  return float_from_bits(high);
}

// ---- L1 step of Auto-PGD (Croce and Hein 2021): `keep` coordinates of largest |g| share the step evenly ----
// The keep-th largest |g|, below which nothing moves; `count`: how many are as large, ties with it included. Zeros
// never move. R gives at_least(threshold), how many are, and top(). Bisection over the bits, which ends early where a
// threshold cuts off as many as wanted.
template <class R>
FR_HD float sparse_threshold(const R& r, int64_t keep, int64_t* count) {
  uint32_t low = 1, high = bits_of(r.top()) + 1;
  *count = r.at_least(float_from_bits(low));
  while (*count > keep && high - low > 1) {
    const uint32_t mid = low + (high - low) / 2;
    const int64_t there = r.at_least(float_from_bits(mid));
    if (there >= keep) {
      low = mid;
      *count = there;
    } else {
      high = mid;
    }
  }
  return float_from_bits(low);
}
template <class V>
FR_HD V sparse_ascend(V x, V g, V threshold, V share, V step) {
  return x + step * select(vabs(g) >= threshold, select(g > V(0.f), share, -share), V(0.f));
}
FR_HD float sparse_share(int64_t count) { return 1.f / static_cast<float>(count < 1 ? 1 : count); }

// ---- what Auto-PGD notes of an example after a step: true where the point that was left is the best one ----
FR_HD bool ascent_note(const AscentArgs& a, int64_t row) {
  const float value = a.sign * a.value[row];
  a.rises[row] += value > a.last_value[row];
  a.last_value[row] = value;
  const bool better = value > a.best_value[row], save = !better && a.best_is_x[row] != 0;
  if (better) {
    a.best_value[row] = value;
    a.best_score[row] = a.score[row];
  }
  a.best_is_x[row] = better;
  return save;
}

// Whether the example goes back to its best point, which lies elsewhere.
FR_HD bool ascent_check(const AscentCheckArgs& a, int64_t row) {
  const bool stands = a.halved[row] == 0 && a.best_value[row] <= a.mark[row];
  const bool halve = static_cast<float>(a.rises[row]) < a.needed || stands;
  const bool back = halve && a.best_is_x[row] == 0;
  if (halve) a.factor[row] *= 0.5f;
  if (back) a.last_value[row] = a.best_value[row];
  a.halved[row] = halve;
  a.mark[row] = a.best_value[row];
  a.rises[row] = 0;
  return back;
}

// The lambda of l1_project. R gives lengths(lambda), the sum of l1_length and minus its slope, top_distance(), the
// largest |d|, and inside(), whether the point lies in box and ball exactly. Newton from the left, kept in a bracket
// that bisection closes where Newton does not.
struct L1Lengths {
  double total, slope;
};
template <class R>
FR_HD float l1_lambda(const R& r, float eps) {
  if (!(eps > 0.f)) return INFINITY;
  const double total = r.lengths(0.f).total;
  if (total <= eps * (1. - kAccept) || (near_sphere(total, eps) && r.inside(eps))) return 0.f;
  const double target = eps * (1. - kShrink);
  float low = 0.f, high = r.top_distance(), guess = 0.f;
  while (true) {
    const L1Lengths now = r.lengths(guess);
    if (now.total <= target) {
      high = guess;
      if (now.total >= target * (1. - 0x1p-24)) break;
    } else {
      low = guess;
    }
    if (bits_of(high) - bits_of(low) <= 1) break;
    const float newton = static_cast<float>(guess + (now.total - target) / now.slope);
    guess = newton > low && newton < high ? newton : 0.5f * (low + high);
    if (!(guess > low && guess < high)) guess = float_from_bits(bits_of(low) + (bits_of(high) - bits_of(low)) / 2);
  }
  return high;
}

// ---- FOSC (Wang et al. 2019, eq. 4) in the dual norm: eps ||g||_* - <x - x0, g> ----
FR_HD float fosc_value(double dual, double inner) { return static_cast<float>(dual - inner); }
// Algorithm 1 moves every example once (no mask yet), later those above the threshold among the active.
FR_HD bool fosc_moves(const uint8_t* active, int64_t row, float value, float threshold) {
  return active == nullptr || (active[row] != 0 && value > threshold);
}

// ---- ATAS (thesis eqs. 5.15, 5.16; the authors' code has its own step) ----
FR_HD float atas_average(float v, double sum_g2, float beta) {
  return static_cast<float>(static_cast<double>(beta) * v + (1. - static_cast<double>(beta)) * sum_g2);
}
FR_HD float atas_step_size(float v, float step, float c, bool authors, float min_step, float max_step) {
  const double size =
      authors ? step / (1. + sqrt(static_cast<double>(v)) / c) : step / sqrt(static_cast<double>(v) + c);
  const float s = static_cast<float>(size);
  return s < min_step ? min_step : (s > max_step ? max_step : s);
}

FR_NS_END
