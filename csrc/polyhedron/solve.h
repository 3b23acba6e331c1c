// Problem (3.14) of Liu (2022) for one row, one home for both devices: the decisions are here, and the passes over the
// row (sums over its m elements) come from the kernel as `Passes`.
//
// With w = |a| and c the room of the box against the sign of a the row asks for
// the cheapest d, 0 <= d <= c, with w.d >= b. For p > 1 the optimum is d = min(t v, c); F(t) = w.min(t v, c) is
// concave, and for ANY set S
//     F(t) <= sum_S w c + t sum_{not S} w v,   so   t_S = (b - sum_S w c) / sum_{not S} w v   is at most the root.
// That is the greedy Algorithm 3.4, read as Newton's method from the left: S = {c <= t v} and t = t_S in turn. Whatever
// S the float32 passes suggest, the float64 passes at the end turn it into a lower bound with a proven error term.
#pragma once

#include <cmath>

#include "core/rounding.h"
#include "core/simd.h"
#include "polyhedron/args.h"

// The solver calls passes that are device code under nvcc.
#if defined(__CUDACC__)
#define FR_SOLVE __device__ __forceinline__
#else
#define FR_SOLVE FR_HD
#endif

FR_NS_BEGIN

// ---- element formulas; V is Vec, DVec, float or double ----
template <Distance kKind, class V>
FR_HD V cap_at(V t, V w) {  // t v
  if constexpr (kKind == Distance::linf) return t;
  if constexpr (kKind == Distance::l3) return t * root_of(w);
  if constexpr (kKind == Distance::l3_2) return t * (w * w);
  return t * w;
}
template <Distance kKind, class V>
FR_HD V slope_of(V w) {  // w v
  if constexpr (kKind == Distance::linf) return w;
  if constexpr (kKind == Distance::l3) return w * root_of(w);
  if constexpr (kKind == Distance::l3_2) return w * (w * w);
  return w * w;
}
template <Distance kKind, class V>
FR_HD V power_of(V c) {  // c^p; not needed for inf
  if constexpr (kKind == Distance::l3) return c * (c * c);
  if constexpr (kKind == Distance::l3_2) return c * root_of(c);
  return c * c;
}

// sums over a row
struct FastSums {  // float32 accuracy
  double used;     // sum_S w c
  double slope;    // sum_{not S} w v
};
struct BandSums {  // of what lies outside a band of t: float32 products, added up in short runs and then in float64
  double used, slope, powers;
};
struct RowSums {  // float64, every product of two float32 exact
  double used, slope;
  double powers;  // sum_S c^p
  bool changed;   // does S grow somewhere in (t, t_high]
};
struct PowerSums {  // general p
  double used;
  double top;      // largest log2 w of the free elements, -inf without any
  double slope;    // sum_{not S} 2^(q (log2 w - top))
  double largest;  // max_S c
  double powers;   // sum_S (c / largest)^p
};
struct FillStep {  // p = 1, float32 accuracy
  double used;     // sum of w c over w > level
  float above;     // the smallest w above the level, inf without any
  float up_to;     // the largest w not above the level, 0 without any
};
struct FillSums {              // p = 1
  double used, cost;           // over w > level: sum w c, sum c
  double tie_room, tie_count;  // over w == level: sum of the finite c, number of infinite ones
};

// A number as an unevaluated sum high + low.
struct Pair {
  double high, low;
};
FR_HD Pair add_exact(double x, double y) {
  const double s = x + y, z = s - x;
  return {s, (x - (s - z)) + (y - z)};
}
FR_HD Pair add(Pair x, double y) {
  const Pair s = add_exact(x.high, y);
  return {s.high, s.low + x.low};
}

struct RowResult {
  double value = 0.;       // the distance: at most (magnitudes to be negated: at least) the exact one
  double multiplier = 0.;  // d value / d b
  // the point: l2, linf: min(level v, c). lp: min(level 2^(rate (log2 w - top)), c). l1: c where w > level, and where
  // w == level the fraction `share` of c, or the length `share` where c is infinite.
  double level = 0., top = 0., share = 0.;
};

constexpr double kInf = __builtin_huge_val();
// A float64 sum of m terms in any order is wrong by less than this, relative to the sum of the absolute values.
FR_HD double sum_error(int64_t m) { return static_cast<double>(m + 16) * 0x1p-53; }
constexpr double kTolerance = 0x1p-27;  // the error term may take this share of the result; else sums are compensated
constexpr double kBelow = 1. - 0x1p-49, kAbove = 1. + 0x1p-49;  // covers a handful of roundings

// b - sum_S w c with a bound of its error.
struct Rest {
  double value, error;
};
template <class Exact>
FR_SOLVE Rest rest_of(double b, double used, int64_t m, double room, const Exact& exact) {
  double rest = b - used, error = sum_error(m) * used;
  if (error > kTolerance * fabs(rest) || (room > 0. && error > kTolerance * room)) {
    const Pair sum = exact();
    const Pair gap = add_exact(b, -sum.high);
    rest = gap.high + (gap.low - sum.low);
    error = static_cast<double>(m + 16) * 0x1p-102 * used + 0x1p-52 * fabs(rest);
  }
  return {rest, error};
}

template <Distance kKind>
FR_HD double norm_of(double t, double squares, double slope) {
  return kKind == Distance::linf ? t : sqrt(squares + t * t * slope);
}

// ---- p = 2 and p = inf ----
// Where Newton's method starts: any t, and the end of a range behind it in which no element is expected to change
// sides.
struct Start {
  double t, high;
};

// A start from float32 passes, for kernels that read the whole row every time. all_slope: sum of w v over all elements.
template <Distance kKind, class Passes>
FR_SOLVE Start start_in_float32(Passes& passes, double b, double all_slope) {
  double t = b / all_slope;
  if (!(all_slope > 0x1p-80 && all_slope < 0x1p80 && t > 0x1p-60 && t < 0x1p60)) return {0., 0.};
  while (true) {
    const FastSums s = passes.template fast<kKind>(static_cast<float>(t));
    const double next = (b - s.used) / s.slope;
    if (!(next > t * (1. + 0x1p-17)) || !(next < 0x1p60)) break;
    t = next;
  }
  return {t * (1. - 0x1p-16), t * (1. + 0x1p-16)};
}

// kNarrow: elements are compared in float32. For inf that is exact; for 2 it may count elements with c above t w by a
// relative 2^-22 as fixed, which changes the norm by its square only (the step stays on a.d = -b, so the deviation is
// orthogonal to the optimum): kSecondOrder. Returns false where float32 could over- or underflow.
// A NaN or infinite coefficient gives the value NaN.
constexpr double kSecondOrder = 0x1p-43;

template <Distance kKind, bool kNarrow, class Passes>
FR_SOLVE bool solve_quadratic(Passes& passes, double b, Start start, int64_t m, bool round_up, RowResult& result) {
  const double slack = sum_error(m) + (kNarrow ? kSecondOrder : 0.);
  result = RowResult();
  double t = start.t, high = start.high;
  bool proven = t == 0.;  // t is known to be at most the root
  RowSums s;
  // from both sides of the root a step ends on the left of it; then until no element changes sides
  while (true) {
    if (kNarrow && !(t < 0x1p60)) return false;
    s = passes.template sums<kKind, kNarrow>(t, high);
    if (!(s.used + s.slope < kInf)) {
      if (kNarrow) return false;
      result.value = result.level = kInf * 0.;
      return true;
    }
    const auto exact = [&] { return passes.template exact_used<kKind, kNarrow>(t); };
    const Rest rest = rest_of(b, s.used, m, 0., exact);
    if (!(s.slope > 0.)) {  // everything is at the box
      if (rest.value > rest.error) {
        result.value = result.level = kInf;
        return true;
      }
      if (proven) break;
    } else {
      const double next = (rest.value - rest.error) / s.slope * (kBelow - slack);
      if (next > 0. || proven) {
        if (next >= t && next <= high && !s.changed) {
          t = next;
          break;
        }
        if (proven && next <= t) {  // rounding has the last word
          // When the elements that are left meet the box within rounding of t, b may be out of reach by as little.
          if (s.changed) {
            const Pair room = passes.template exact_used<kKind, false>(kInf);
            const Pair gap = add_exact(b, -room.high);
            if (gap.high + (gap.low - room.low) > static_cast<double>(m + 16) * 0x1p-102 * room.high) {
              result.value = result.level = kInf;
              return true;
            }
          }
          break;
        }
        // Newton's error is of second order: what is still missing after this step is guessed from its length
        const double step = (next - t) / next;
        high = next * (1. + 0x1p-20 + (step > 0x1p-10 || step < -0x1p-10 ? step * step * 0x1p-4 : 0.));
        if (!(high < kInf)) high = next;
        t = next;
        proven = true;
        continue;
      }
    }
    t = high = 0.;  // the start was far past the end
    proven = true;
  }
  const double norm = norm_of<kKind>(t, s.powers, s.slope);
  if (kNarrow && !(norm > 0x1p-60 && norm < 0x1p60)) return false;
  result.level = t;
  result.value = norm * (kBelow - slack);
  result.multiplier =
      s.slope > 0. ? (kKind == Distance::linf ? 1. / s.slope : (t > 0. ? t / norm : 1. / sqrt(s.slope))) : 0.;
  if (!round_up) return true;
  // the smallest t that surely reaches b: Newton again, with every error on the other side
  double up = t * kAbove;
  while (true) {
    const RowSums u = passes.template sums<kKind, false>(up, up);
    const auto exact = [&] { return passes.template exact_used<kKind, false>(up); };
    const Rest rest = rest_of(b, u.used, m, 0., exact);
    const double missing = rest.value + rest.error;
    if (missing <= 0. || missing <= up * u.slope * (kBelow - slack)) {
      result.value = norm_of<kKind>(up, u.powers, u.slope) * (kAbove + slack);
      return true;
    }
    if (!(u.slope > 0.)) {
      result.value = kInf;
      return true;
    }
    const double next = missing / u.slope * (kAbove + 2. * slack);
    up = next > up * kAbove ? next : up * kAbove;
  }
}

// ---- one pass: p = 2, inf, 3 and 1.5 ----
// What a band of t leaves out is settled: sum_S w c of what meets the box before it, sum w v of what does not before
// its end. What lies within is packed, and Newton's method goes on there alone, in float64. Most rows take one pass.
//
// Relative errors of the settled sums: the roundings of a term, and three for its run of eight.
template <Distance kKind>
struct Roundings {
  static constexpr int slope = kKind == Distance::linf ? 3 : kKind == Distance::l2 ? 4 : 5;
  static constexpr int powers = kKind == Distance::l2 ? 4 : 5;
};
constexpr int kUsedRoundings = 4;
FR_HD double error_of(int roundings) { return roundings * 0x1.00001p-24; }
constexpr double kApart = 0x1p-20;  // the root lies this far inside the band: more than float32 comparisons err by

template <Distance kKind>
FR_HD double quick_norm(double t, double powers, double slope) {
  if constexpr (kKind == Distance::linf) return t;
  if constexpr (kKind == Distance::l3) return cbrt(powers + t * t * t * slope);
  if constexpr (kKind == Distance::l3_2) {
    const double root = cbrt(powers + t * sqrt(t) * slope);
    return root * root;
  }
  return sqrt(powers + t * t * slope);
}

// For rows where the error of float32 does not show: most. Returns false for the others, with a better start. spread:
// how far, relatively, the start may be from the root. Without a start the whole row is the band. The limits on t, norm
// and slope keep every product that matters away from under- and overflow.
template <Distance kKind, class Passes>
FR_SOLVE bool solve_quick(Passes& passes, double b, double p, Start& start, double spread, int64_t m,
                          RowResult& result) {
  if (!(b > 0x1p-80 && b < 0x1p80)) return false;
  double low = start.t * (1. - spread), high = start.t > 0. ? start.t * (1. + spread) : 0x1p60;
  for (int tries = 0; tries < 8; ++tries) {
    const float from = round_down(low), to = round_down(high);
    const BandSums out = passes.template band<kKind>(from, to);
    // Newton's method from the left: S is what is settled, and grows
    RowSums in = passes.template within<kKind>(0.);
    double t = (b - out.used) / (out.slope + in.slope);
    while (true) {
      if (!(t > 0x1p-60 && t < 0x1p60)) return false;
      if (t > to) break;
      in = passes.template within<kKind>(t);
      const double next = (b - (out.used + in.used)) / (out.slope + in.slope);
      if (!(next > t)) break;
      t = next;
    }
    start.t = t * (1. - 0x1p-19);
    start.high = t * (1. + 0x1p-19);
    if (t >= from * (1. + kApart) && t <= to * (1. - kApart)) {
      const double used = out.used + in.used;
      const double rest = (b - used) - (out.used * error_of(kUsedRoundings) + 2. * sum_error(m) * (b + used));
      if (!((b - used) - rest <= rest * 0x1p-23)) return false;
      const double error = error_of(Roundings<kKind>::slope), slack = sum_error(m) + 0x1p-40;
      t = rest / (out.slope * (1. + error) + in.slope) * (kBelow - slack);
      if (kKind != Distance::linf) in = passes.template within<kKind>(t);
      const double slope = out.slope * (1. - error) + in.slope;
      const double powers = out.powers * (1. - error_of(Roundings<kKind>::powers)) + in.powers;
      const double norm = quick_norm<kKind>(t, powers, slope);
      if (!(norm > 0x1p-30 && norm < 0x1p60 && slope > 0x1p-80)) return false;
      result = RowResult();
      result.level = t;
      result.value = norm * (kBelow - slack);
      result.multiplier = kKind == Distance::linf ? 1. / slope
                          : kKind == Distance::l2 ? t / norm
                                                  : pow(t / norm, p - 1.);
      return true;
    }
    // t is on the left of the root, by an error of second order
    const double step = t > to ? (t - to) / t : t < from ? (from - t) / t : 0.;
    low = start.t;
    high = t * (1. + 0x1p-10 + (step < 0.5 ? step * step : 0.5));
  }
  return false;
}

// ---- general p > 1 ----
// Level: T, the step of the largest free element; an element moves by T 2^(rate (log2 w - top)), rate = 1 / (p - 1).
// Elements are compared in log2 lambda, lambda the multiplier of the constraint, so that no power over- or underflows.
// (sum_S c^p + T^p slope)^(1/p), scaled by the larger term
FR_HD double power_norm(double level, const PowerSums& s, double p) {
  const double fixed = s.largest > 0. ? s.largest * pow(s.powers, 1. / p) : 0.;
  const double moved = s.slope > 0. && level > 0. ? level * pow(s.slope, 1. / p) : 0.;
  const double large = fixed > moved ? fixed : moved, small = fixed > moved ? moved : fixed;
  return large > 0. ? large * pow(1. + pow(small / large, p), 1. / p) : 0.;
}

// at: where Newton's method starts, log2 lambda; -inf, or a guess on either side of the root.
template <class Passes>
FR_SOLVE RowResult solve_power(Passes& passes, double b, double p, double at, int64_t m, bool round_up) {
  // log2 w up to 150 in size, times q, plus the library's exp2, log2 and pow
  const double slack = sum_error(m) + 0x1p-44 * (p + p / (p - 1.) + 8.);
  RowResult result;
  bool proven = !(at > -kInf);  // at is known to be at most the root
  PowerSums s;
  Rest rest;
  while (true) {
    s = passes.power(at);
    const auto exact = [&] { return passes.exact_used_power(at); };
    rest = rest_of(b, s.used, m, 0., exact);
    if (!(s.slope > 0.)) {
      if (!proven) {  // the guess was past the end
        at = -kInf;
        proven = true;
        continue;
      }
      if (rest.value > rest.error) {
        result.value = result.level = kInf;
        return result;
      }
      result.level = result.top = 0.;
      break;
    }
    const double level = (rest.value - rest.error) / (exp2(s.top) * s.slope);
    const double next = level > 0. ? (p - 1.) * log2(level) - s.top : -kInf;
    if (!proven) {  // from either side a step ends on the left of the root
      at = next;
      proven = true;
      continue;
    }
    result.level = level > 0. ? level : 0.;
    result.top = s.top;
    if (!(next > at)) break;
    at = next;
  }
  const double norm = power_norm(result.level, s, p);
  result.value = norm * (kBelow - 4. * slack);
  if (s.slope > 0.)
    result.multiplier =
        norm > 0. ? pow(result.level / norm, p - 1.) / exp2(s.top) : pow(s.slope, 1. / p - 1.) / exp2(s.top);
  if (!round_up || !(b > 0.)) return result;
  // the smallest lambda that surely reaches b
  double up = result.level;
  while (true) {
    if (s.slope > 0.) {
      up = (rest.value + rest.error) / (exp2(s.top) * s.slope) * (kAbove + 2. * slack);
      const double next = (p - 1.) * log2(up) - s.top;
      at = next > at ? next : at + 0x1p-40 * (1. + fabs(at));
    } else if (rest.value + rest.error > 0.) {
      result.value = kInf;
      return result;
    }
    s = passes.power(at);
    const auto exact = [&] { return passes.exact_used_power(at); };
    rest = rest_of(b, s.used, m, 0., exact);
    up = s.slope > 0. ? exp2((at + s.top) / (p - 1.)) : 0.;
    const double missing = rest.value + rest.error;
    if (missing <= 0. || missing <= up * exp2(s.top) * s.slope * (kBelow - 4. * slack)) {
      result.value = power_norm(up, s, p) * (kAbove + 8. * slack);
      return result;
    }
  }
}

// ---- p = 1 ----
// The elements are used in the order of falling w. The level is the w of the last one, found by a search on w
// (its bits are ordered like itself). For every level, cost + (b - used) / level is the dual value at 1 / level and
// hence at most the distance, so the level decides about tightness and never about soundness.
template <class Passes>
FR_SOLVE RowResult solve_fill(Passes& passes, double b, float largest, int64_t m, bool round_up) {
  RowResult result;
  // the wanted level is an element's w in [low, high]; interpolation and bisection of the bits take turns
  float low, high = largest;
  double mass_low, mass_high = 0.;
  {
    const FillStep s = passes.fill_start(b);
    low = s.above;
    mass_low = s.used;
  }
  if (!(mass_low > b)) high = low < high ? low : high;
  for (bool interpolate = true; low < high; interpolate = !interpolate) {
    const uint32_t first = bits_of(low), last = bits_of(high);
    float level = float_from_bits(first + (last - first) / 2);
    const double share = (mass_low - b) / (mass_low - mass_high);
    if (interpolate && share >= 0. && share <= 1.) level = low + static_cast<float>(share) * (high - low);
    if (!(level < high)) level = float_from_bits(last - 1);
    if (level < low) level = low;
    const FillStep s = passes.fill_fast(level);
    if (s.used >= b) {
      low = s.above;
      mass_low = s.used;
    } else {
      high = s.up_to;
      mass_high = s.used;
    }
  }
  float level = largest > 0.f ? high : 0.f;
  double best = -1.;
  FillSums s{};
  Rest rest{};
  bool down = false, up = false;
  while (level > 0.f) {
    s = passes.fill(level);
    const auto exact = [&] { return passes.exact_above(level); };
    rest = rest_of(b, s.used, m, b, exact);
    const double size = static_cast<double>(level);
    const double value = s.cost * (kBelow - sum_error(m)) + (rest.value - rest.error) / size * kBelow;
    if (value > best) best = value;
    const double tie = s.tie_count > 0. ? kInf : size * s.tie_room;
    // too low: the elements above are enough, or just enough, and a division by a small w would blow the error up
    if (((rest.value <= rest.error && s.used > 0.) || s.used == kInf) && !down) {
      up = true;
      level = passes.fill_fast(level).above;
    } else if (rest.value > tie + rest.error + sum_error(m) * tie && !up) {
      down = true;
      const float next = passes.fill_fast(float_from_bits(bits_of(level) - 1)).up_to;
      if (next > 0.f) {
        level = next;
        continue;
      }
      result.value = result.level = kInf;  // the last one does not suffice
      return result;
    } else {
      break;
    }
  }
  if (!(level > 0.f)) {  // no element at all
    result.value = result.level = b > 0. ? kInf : 0.;
    return result;
  }
  const double size = static_cast<double>(level);
  result.level = size;
  result.multiplier = 1. / size;
  result.value = best > 0. ? best * kBelow : 0.;
  const double left = rest.value > 0. ? rest.value / size : 0.;
  result.share = s.tie_count > 0. ? left / s.tie_count : (s.tie_room > 0. ? left / s.tie_room : 0.);
  if (s.tie_count == 0. && result.share > 1.) result.share = 1.;
  if (round_up) {
    const double missing = rest.value + rest.error, tie = s.tie_count > 0. ? kInf : size * s.tie_room;
    if (missing > tie * (kBelow - sum_error(m)) && !(passes.fill_fast(float_from_bits(bits_of(level) - 1)).up_to > 0.f))
      result.value = kInf;
    else
      result.value = (s.cost + (missing > 0. ? missing / size : 0.)) * (kAbove + sum_error(m) + 4. * kTolerance);
  }
  return result;
}

// ---- the point, one element ----
FR_HD double moved_by(const RowResult& row, Distance kind, double p, float w, float c) {
  if (!(w > 0.f) || !(row.level > 0.)) return 0.;
  const double size = static_cast<double>(w), room = static_cast<double>(c);
  double step = row.level;
  if (kind == Distance::l2) step = row.level * size;
  if (kind == Distance::lp && row.level < kInf) step = row.level * exp2((log2(size) - row.top) / (p - 1.));
  if (kind == Distance::l1 && row.level < kInf)
    step = size > row.level ? room : (size == row.level ? (room < kInf ? row.share * room : row.share) : 0.);
  return step < room ? step : room;
}

FR_NS_END
