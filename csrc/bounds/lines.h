// Lines around activations on an interval [l, u], and their derivatives (reference/relaxations.py is the definition).
//
// For any slope d the tightest valid intercepts are the extremes of s(x) - d x over the ends of the interval and the
// points inside it where s'(t) = d or where s has a kink. Every point inside is a candidate that does no harm; so a
// root that is found too roughly costs, at most, the square of its error. Intercepts of smooth activations are padded
// by what the values, the products and the sums can be wrong.
#pragma once

#include "bounds/activations.h"
#include "bounds/formulas.h"

FR_NS_BEGIN

// A slope and its derivatives with respect to the ends.
template <class V>
struct Slope {
  V d, by_l, by_u;
};

// The line of one side. The intercept is s(x) - d x at x = at: its derivative is -at with respect to the slope, and
// by_l, by_u with respect to the ends while the slope stays.
template <class V>
struct Side {
  Slope<V> slope;
  V b, at, by_l, by_u, error;
};
template <class V>
struct Pair {
  Side<V> low, up;
};

// What all lines on one interval share.
template <class V>
struct Span {
  Point<V> l, u, mid;
  V width;
  Slope<V> chord, tangent;  // tangent: at the midpoint
};

template <class V, class M>
FR_HD Slope<V> choose(M m, const Slope<V>& a, const Slope<V>& b) {
  return {select(m, a.d, b.d), select(m, a.by_l, b.by_l), select(m, a.by_u, b.by_u)};
}
template <class V, class M>
FR_HD Side<V> choose(M m, const Side<V>& a, const Side<V>& b) {
  return {choose(m, a.slope, b.slope), select(m, a.b, b.b),       select(m, a.at, b.at),
          select(m, a.by_l, b.by_l),   select(m, a.by_u, b.by_u), select(m, a.error, b.error)};
}

template <class V>
FR_HD auto is_narrow(const Span<V>& s) {
  return s.width < V(0.01f);  // there the chord's slope would be a difference of rounding errors
}

template <Activation kAct, class V>
FR_HD Span<V> span_of(V l, V u, V p0, V p1) {
  Span<V> s;
  s.width = u - l;
  s.l = point<kAct>(l, p0, p1);
  s.u = point<kAct>(u, p0, p1);
  s.mid = point<kAct>(l + V(0.5f) * s.width, p0, p1);
  const V half = V(0.5f) * s.mid.dd;
  s.tangent = {s.mid.d, half, half};
  const auto narrow = is_narrow(s);
  const V w = select(narrow, V(1.f), s.width), d = (s.u.s - s.l.s) / w;
  s.chord = choose(narrow, s.tangent, Slope<V>{d, (d - s.l.d) / w, (s.u.d - d) / w});
  return s;
}

// The extreme over the ends alone, and then also over another point.
template <bool kLow, class V>
FR_HD Side<V> at_ends(const Span<V>& s, const Slope<V>& slope) {
  const V zero(0.f), d = slope.d, a = s.l.s - d * s.l.x, b = s.u.s - d * s.u.x;
  const auto first = kLow ? a <= b : a >= b;
  return {slope,
          select(first, a, b),
          select(first, s.l.x, s.u.x),
          select(first, s.l.d - d, zero),
          select(first, zero, s.u.d - d),
          vmax(s.l.error, s.u.error)};
}
template <bool kLow, class V>
FR_HD void consider(const Span<V>& s, V x, V value, V error, Side<V>& e) {
  const V zero(0.f), c = value - e.slope.d * x;
  const auto inside = (s.l.x < x) & (x < s.u.x);
  const auto better = inside & (kLow ? c < e.b : c > e.b);
  e.b = select(better, c, e.b);
  e.at = select(better, x, e.at);
  e.by_l = select(better, zero, e.by_l);
  e.by_u = select(better, zero, e.by_u);
  e.error = select(inside, vmax(e.error, error), e.error);
}
template <bool kLow, class V>
FR_HD void consider(const Span<V>& s, const Point<V>& p, Side<V>& e) {
  consider<kLow>(s, p.x, p.s, p.error, e);
}
// The mirror image of a point of an S-shaped activation.
template <Activation kAct, class V>
FR_HD Point<V> mirrored(const Point<V>& p) {
  const V s = kAct == Activation::sigmoid ? V(1.f) - p.s : -p.s;
  return {-p.x, s, p.d, -p.dd, V(6.f * Precision<V>::kEps) * vmax(vabs(s), vabs(p.s))};
}

// Rounding errors of a product, a sum and the value; what a root missed by a little and what vanishes below the
// smallest numbers are far less. jump: where s itself steps down (torch's softplus).
template <bool kLow, class V>
FR_HD void pad(const Span<V>& s, V jump, Side<V>& e) {
  const V reach = vmax(vabs(s.l.x), vabs(s.u.x)), eps(4.f * Precision<V>::kEps);
  const V by = e.error + eps * (vabs(e.slope.d) * reach + vabs(e.b)) + (jump + V(1e-28f));
  e.b = kLow ? e.b - by : e.b + by;
}

template <Activation kAct, class V>
FR_HD V jump_of(V p0, V p1) {
  return kAct == Activation::softplus ? exp_of(-p1) / p0 : V(0.f);
}

// Both sides for one slope: that of the chord (on a narrow interval the tangent at the midpoint), or any.
template <Activation kAct, bool kAnySlope, class V>
FR_CALLED Pair<V> around(const Span<V>& s, const Slope<V>& slope, V p0, V p1) {
  Pair<V> r = {at_ends<true>(s, slope), at_ends<false>(s, slope)};
  const auto also = [&](const Point<V>& p) FR_INLINE_LAMBDA {
    consider<true>(s, p, r.low);
    consider<false>(s, p, r.up);
  };
  const V tiny(FLT_MIN), one(1.f);
  also(s.mid);
  if constexpr (is_s_shaped(kAct)) {
    const V root = s_shaped_root<kAct>(slope.d);
    const V at = kAnySlope ? root : select(is_narrow(s), vabs(s.mid.x), root);
    const Point<V> q = point<kAct>(-at, p0, p1);  // 1 - s is exact on that side
    also(q);
    also(mirrored<kAct>(q));
  } else if constexpr (kAct == Activation::softplus) {
    const V p = vmin(vmax(slope.d, tiny), one - V(Precision<V>::kEps));
    also(point<kAct>((log_of(p) - log_of(one - p)) / p0, p0, p1));
    also(point<kAct>(p1 / p0, p0, p1));
  } else if constexpr (kAct == Activation::elu) {
    also(point<kAct>(V(0.f), p0, p1));
    also(point<kAct>(log_of(vmax(slope.d / vmax(p0, tiny), tiny)), p0, p1));
  } else {
    V middle, outer;
    valley_roots<kAct>(slope.d, middle, outer);
    also(point<kAct>(middle, p0, p1));
    also(point<kAct>(outer, p0, p1));
  }
  const V jump = jump_of<kAct>(p0, p1);
  pad<true>(s, jump, r.low);
  pad<false>(s, jump, r.up);
  return r;
}

// The line that touches at t: the tangent through the end beyond the inflection point where t is not the midpoint, the
// tangent at the midpoint elsewhere, and the chord where the activation does not bend across it.
template <Activation kAct, bool kLow, class V, class M>
FR_HD Side<V> s_shaped_side(const Span<V>& s, M bend, V t, const Point<V>& end, V p0, V p1) {
  const V zero(0.f);
  const Point<V> q = point<kAct>(t, p0, p1);
  const auto through = kLow ? t < s.mid.x : t > s.mid.x;
  const V rate = (end.d - q.d) / select(through, end.x - t, V(1.f));
  const Slope<V> tangent = {q.d, kLow ? zero : rate, kLow ? rate : zero};
  Side<V> e = at_ends<kLow>(s, choose(bend, choose(through, tangent, s.tangent), s.chord));
  consider<kLow>(s, q, e);
  consider<kLow>(s, mirrored<kAct>(q), e);
  pad<kLow>(s, zero, e);
  return e;
}

// CROWN's lines of an S-shaped activation, those that leave the least area: chord, tangent through the far end, or
// tangent at the midpoint.
template <Activation kAct, class V>
FR_HD Pair<V> s_shaped_lines(const Span<V>& s, V p0, V p1) {
  const V zero(0.f), one(1.f), l = s.l.x, u = s.u.x, mid = s.mid.x;
  const auto wide = !is_narrow(s);
  const auto mixed = (l < zero) & (u > zero) & wide;
  const auto bend_low = (s.chord.d > s.l.d) & wide, bend_up = (s.chord.d > s.u.d) & wide;
  V t_low = mid, t_up = mid;
  if (any(mixed & (bend_low | bend_up))) {
    const V end_low = select(mixed & bend_low, u, one), end_up = select(mixed & bend_up, -l, one);
    V far_low, far_up;
    if constexpr (kAct == Activation::sigmoid) {
      far_low = opposite_tangent_sigmoid(end_low);
      far_up = opposite_tangent_sigmoid(end_up);
    } else {
      far_low = opposite_tangent<kAct>(end_low);
      far_up = opposite_tangent<kAct>(end_up);
    }
    t_low = select(mixed & bend_low & (-far_low < mid), vmax(-far_low, l), mid);
    t_up = select(mixed & bend_up & (far_up > mid), vmin(far_up, u), mid);
  }
  return {s_shaped_side<kAct, true>(s, bend_low, t_low, s.u, p0, p1),
          s_shaped_side<kAct, false>(s, bend_up, t_up, s.l, p0, p1)};
}

// The tangent at the midpoint below, the chord above.
template <Activation kAct, class V>
FR_HD Pair<V> convex_lines(const Span<V>& s, V p0, V p1) {
  Pair<V> r = {at_ends<true>(s, s.tangent), at_ends<false>(s, s.chord)};
  consider<true>(s, s.mid, r.low);
  const Point<V> kink = point<kAct>(kAct == Activation::softplus ? p1 / p0 : V(0.f), p0, p1);
  consider<true>(s, kink, r.low);
  consider<false>(s, kink, r.up);
  const V jump = jump_of<kAct>(p0, p1);
  pad<true>(s, jump, r.low);
  pad<false>(s, jump, r.up);
  return r;
}

// On each side the chord's slope or the derivative at the midpoint, whichever line is the tighter there.
template <Activation kAct, class V>
FR_HD Pair<V> midpoint_lines(const Span<V>& s, V p0, V p1) {
  const Pair<V> a = around<kAct, false>(s, s.chord, p0, p1), b = around<kAct, false>(s, s.tangent, p0, p1);
  const V mid = s.mid.x;
  const auto height = [mid](const Side<V>& e) FR_INLINE_LAMBDA { return e.slope.d * mid + e.b; };
  return {choose(height(b.low) > height(a.low), b.low, a.low), choose(height(b.up) < height(a.up), b.up, a.up)};
}

// hardtanh: p0 and p1 are its kinks (ReLU6: 0 and 6).
template <class V>
FR_CALLED Pair<V> clamp_lines(V l, V u, V lo, V hi, bool adaptive) {
  const V zero(0.f), one(1.f), width = u - l;
  const auto below = u <= lo;
  const auto linear = (l >= lo) & (u <= hi);
  const auto stable = below | linear | (l >= hi);
  const auto clamped = [&](V x) FR_INLINE_LAMBDA { return vmin(vmax(x, lo), hi); };
  const auto slope_at = [&](V x) FR_INLINE_LAMBDA { return select((x > lo) & (x < hi), one, zero); };
  Span<V> s;
  s.width = width;
  s.l = {l, clamped(l), slope_at(l), zero, zero};
  s.u = {u, clamped(u), slope_at(u), zero, zero};
  const V w = select(stable, one, width), d = (s.u.s - s.l.s) / w;
  const Slope<V> chord = {d, (d - s.l.d) / w, (s.u.d - d) / w}, flat = {zero, zero, zero};
  Pair<V> r = {at_ends<true>(s, chord), at_ends<false>(s, chord)};
  if (!adaptive) {
    consider<true>(s, lo, lo, zero, r.low);
    consider<true>(s, hi, hi, zero, r.low);
    consider<false>(s, lo, lo, zero, r.up);
    consider<false>(s, hi, hi, zero, r.up);
  } else {  // through the lower kink below, through the upper one above, with the slope that leaves the smaller area
    const auto convex = l < lo;
    const auto concave = u > hi;
    const V wide = select(convex, u - lo, one), long_ = select(concave, hi - l, one);
    const V k_low = (s.u.s - lo) / wide, k_up = (hi - s.l.s) / long_;
    const Slope<V> low = choose(u - lo > lo - l, Slope<V>{k_low, zero, (s.u.d - k_low) / wide}, flat);
    const Slope<V> up = choose(hi - l > u - hi, Slope<V>{k_up, (k_up - s.l.d) / long_, zero}, flat);
    // s - chord x has its extreme at the end that is not beyond the kink
    r.low = choose(convex, Side<V>{low, lo - low.d * lo, lo, zero, zero, zero},
                   Side<V>{chord, s.l.s - d * l, l, s.l.d - d, zero, zero});
    r.up = choose(concave, Side<V>{up, hi - up.d * hi, hi, zero, zero, zero},
                  Side<V>{chord, s.u.s - d * u, u, zero, s.u.d - d, zero});
  }
  // a stable interval's line is exact
  const V exact = select(linear, zero, select(below, lo, hi));
  const Side<V> line = {{select(linear, one, zero), zero, zero}, exact, zero, zero, zero, zero};
  return {choose(stable, line, r.low), choose(stable, line, r.up)};
}

// The lines on a finite interval. ReLU and leaky ReLU (p0: the slope below 0) have formulas of their own, in
// formulas.h.
template <Activation kAct, class V>
FR_CALLED Pair<V> finite_lines(V l, V u, V p0, V p1, bool adaptive) {
  if constexpr (kAct == Activation::hardtanh) {
    return clamp_lines(l, u, p0, p1, adaptive);
  } else {
    const Span<V> s = span_of<kAct>(l, u, p0, p1);
    if (!adaptive) return around<kAct, false>(s, s.chord, p0, p1);
    if constexpr (is_s_shaped(kAct))
      return s_shaped_lines<kAct>(s, p0, p1);
    else if constexpr (kAct == Activation::softplus)
      return convex_lines<kAct>(s, p0, p1);
    else if constexpr (kAct == Activation::elu)
      return any(p0 <= V(1.f)) ? convex_lines<kAct>(s, p0, p1) : midpoint_lines<kAct>(s, p0, p1);
    else
      return midpoint_lines<kAct>(s, p0, p1);
  }
}

// The tightest intercept of a line of slope d below (above) the activation on a finite interval, and the point where
// the line touches: minus the derivative of the intercept by d.
template <Activation kAct, class V>
FR_HD void support(V d, V l, V u, V p0, V p1, bool above, V& b, V& at) {
  const V zero(0.f);
  const Slope<V> slope = {d, zero, zero};
  Pair<V> r;
  if constexpr (kAct == Activation::relu || kAct == Activation::hardtanh) {
    constexpr bool kRelu = kAct == Activation::relu;
    const auto value = [&](V x)
                           FR_INLINE_LAMBDA { return kRelu ? select(x < zero, p0 * x, x) : vmin(vmax(x, p0), p1); };
    Span<V> s;
    s.l = {l, value(l), zero, zero, zero};
    s.u = {u, value(u), zero, zero, zero};
    r = {at_ends<true>(s, slope), at_ends<false>(s, slope)};
    const V first = kRelu ? zero : p0, second = kRelu ? zero : p1;  // the kinks lie on the diagonal
    consider<true>(s, first, first, zero, r.low);
    consider<true>(s, second, second, zero, r.low);
    consider<false>(s, first, first, zero, r.up);
    consider<false>(s, second, second, zero, r.up);
  } else {
    r = around<kAct, true>(span_of<kAct>(l, u, p0, p1), slope, p0, p1);
  }
  b = above ? r.up.b : r.low.b;
  at = above ? r.up.at : r.low.at;
}

// The range of an activation over [l, u].
template <Activation kAct, class V>
FR_CALLED void range_of(V l, V u, V p0, V p1, V& low, V& up) {
  if constexpr (kAct == Activation::relu) {
    const V zero(0.f);
    low = select(l < zero, select(p0 == zero, zero, p0 * l), l);  // not 0 * inf
    up = select(u < zero, select(p0 == zero, zero, p0 * u), u);
  } else if constexpr (kAct == Activation::hardtanh) {
    low = vmin(vmax(l, p0), p1);
    up = vmin(vmax(u, p0), p1);
  } else {
    const V a = point<kAct>(l, p0, p1).s, b = point<kAct>(u, p0, p1).s;
    low = a;
    up = b;
    if constexpr (is_valley(kAct)) {
      constexpr Valley c = valley<kAct>();
      const V at(c.at);
      low = select((l <= at) & (at <= u), V(c.bottom), vmin(a, b));
      up = vmax(a, b);
    }
    if constexpr (kAct == Activation::softplus) {  // torch's steps down to the identity at the threshold
      const V at = p1 / p0;
      const auto steps = (l <= at) & (at <= u);
      low = select(steps, vmin(a, at), a);
      up = select(steps, vmax(b, at + exp_of(-p1) / p0), b);
    }
    const auto number = (l == l) & (u == u);  // maxima and minima pass over NaN
    low = select(number, low, l + u);
    up = select(number, up, l + u);
  }
}

// What the ops return: infinite widths give horizontal lines at the range, NaN ends give NaN.
template <Activation kAct, class V>
FR_HD void lines(V l, V u, V p0, V p1, bool adaptive, V& slope_low, V& slope_up, V& low, V& up) {
  if constexpr (kAct == Activation::relu) {
    relu_lines(l, u, p0, adaptive, slope_low, slope_up, low, up);
  } else {
    const Pair<V> r = finite_lines<kAct>(l, u, p0, p1, adaptive);
    slope_low = r.low.slope.d;
    slope_up = r.up.slope.d;
    low = r.low.b;
    up = r.up.b;
    const V zero(0.f), nan = (u - l) * zero;
    const auto fine = nan == zero;
    const auto number = (l == l) & (u == u);
    if (!any(!fine)) return;
    V least, most;
    range_of<kAct>(l, u, p0, p1, least, most);
    slope_low = select(fine, slope_low, select(number, zero, nan));
    slope_up = select(fine, slope_up, select(number, zero, nan));
    low = select(fine, low, select(number, least, nan));
    up = select(fine, up, select(number, most, nan));
  }
}

// Gradients of the ends from those of slopes and intercepts; one slope: from_slope_low is 0. None where the interval is
// not finite.
template <Activation kAct, class V>
FR_HD void lines_grad(V l, V u, V p0, V p1, bool adaptive, V from_slope_low, V from_slope_up, V from_low, V from_up,
                      V& to_l, V& to_u) {
  if constexpr (kAct == Activation::relu) {
    relu_lines_grad(l, u, p0, from_slope_up, from_up, to_l, to_u);
  } else {
    const Pair<V> r = finite_lines<kAct>(l, u, p0, p1, adaptive);
    const V zero(0.f), to_low = from_slope_low - from_low * r.low.at, to_up = from_slope_up - from_up * r.up.at;
    const auto fine = (u - l) * zero == zero;
    to_l = to_low * r.low.slope.by_l + from_low * r.low.by_l + to_up * r.up.slope.by_l + from_up * r.up.by_l;
    to_u = to_low * r.low.slope.by_u + from_low * r.low.by_u + to_up * r.up.slope.by_u + from_up * r.up.by_u;
    to_l = select(fine, to_l, zero);
    to_u = select(fine, to_u, zero);
  }
}

FR_NS_END
