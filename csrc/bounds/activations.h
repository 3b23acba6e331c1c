// The smooth activations: values with the bound of their error, derivatives, and the points where the derivative takes
// a given value. Formulas on float (CUDA), Vec (CPU) and double (both).
#pragma once

#include "bounds/args.h"
#include "core/elementary.h"

FR_NS_BEGIN

template <class V>
struct Precision {  // of float and Vec
  static constexpr float kEps = FLT_EPSILON, kFlat = 1e-3f;
  static constexpr int kTangent = 3, kMiddle = 1, kOuter = 2;  // Newton's steps
};
template <>
struct Precision<double> {
  static constexpr double kEps = DBL_EPSILON, kFlat = 1e-7;
  static constexpr int kTangent = 6, kMiddle = 4, kOuter = 4;
};

// A point of the graph: value, first and second derivative, and a bound of the error of the value.
template <class V>
struct Point {
  V x, s, d, dd, error;
};

constexpr bool is_s_shaped(Activation a) {
  return a == Activation::sigmoid || a == Activation::tanh || a == Activation::arctan;
}
// s(x) = x g(x) with g(x) + g(-x) = 1, hence s'(x) + s'(-x) = 1
constexpr bool is_valley(Activation a) {
  return a == Activation::silu || a == Activation::gelu || a == Activation::gelu_tanh;
}

template <Activation kAct, class V>
FR_CALLED Point<V> point(V x, V p0, V p1) {
  const V zero(0.f), one(1.f), two(2.f);
  Point<V> r;
  r.x = x;
  V amplified = zero;  // an error of the argument, in units of eps relative to the value
  if constexpr (kAct == Activation::sigmoid || kAct == Activation::tanh) {
    const V a = vabs(x), z = exp_of(kAct == Activation::tanh ? V(-2.f) * a : -a), h = one / (one + z);
    const auto negative = x < zero;
    if constexpr (kAct == Activation::sigmoid) {
      r.s = select(negative, z * h, h);
      r.d = z * h * h;
      const V t = (one - z) * h;
      r.dd = r.d * select(negative, t, -t);
    } else {
      const V t = (one - z) * h;
      r.s = select(a < V(0.6f), tanh_near_zero(vmin(vmax(x, V(-0.6f)), V(0.6f))), select(negative, -t, t));
      r.d = V(4.f) * (z * h * h);
      r.dd = V(-2.f) * (r.s * r.d);
    }
  } else if constexpr (kAct == Activation::arctan) {
    r.s = atan_of(x);
    r.d = one / (one + x * x);
    r.dd = V(-2.f) * (x * r.d) * r.d;
  } else if constexpr (kAct == Activation::softplus) {  // p0: beta, p1: threshold
    const V y = p0 * x, z = exp_of(-vabs(y)), h = one / (one + z);
    r.s = select(y > p1, x, (vmax(y, zero) + log1p_of(z)) / p0);
    r.d = select(y > p1, one, select(y < zero, z * h, h));
    r.dd = select(y > p1, zero, p0 * (z * h * h));
    amplified = select(y < zero, vmin(-y, V(100.f)), zero);
  } else if constexpr (kAct == Activation::elu) {  // p0: alpha
    const V below = vmin(x, zero);
    r.s = select(x > zero, x, p0 * expm1_of(below));
    r.d = select(x > zero, one, p0 * exp_of(below));
    r.dd = select(x > zero, zero, r.d);
  } else if constexpr (kAct == Activation::silu) {
    const V y = vmax(x, V(-200.f)), z = exp_of(-vabs(y)), h = one / (one + z);  // s(-inf) is 0, not -inf * 0
    const auto negative = y < zero;
    const V g = select(negative, z * h, h), m = select(negative, h, z * h), c = vmin(y, V(200.f));
    r.s = y * g;
    r.d = g * (one + c * m);
    r.dd = z * h * h * (two + c * (m - g));
  } else if constexpr (kAct == Activation::gelu) {
    const V y = vmax(x, V(-50.f)), c = vmin(y, V(50.f));
    V function, density;
    normal(y, function, density);
    r.s = y * function;
    r.d = function + c * density;
    r.dd = density * (two - c * c);
  } else {  // gelu_tanh: x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))
    const V y = vmax(x, V(-20.f)), c = vmin(y, V(20.f)), cubic(0.044715), scale(1.5957691216057308);
    const V q = scale * c * (one + cubic * (c * c)), z = exp_of(-vabs(q)), h = one / (one + z);
    const auto negative = q < zero;
    const V g = select(negative, z * h, h), m = select(negative, h, z * h), gm = z * h * h;
    const V dq = scale * (one + V(3.f) * cubic * (c * c));
    r.s = y * g;
    r.d = g + c * gm * dq;
    r.dd = gm * (two * dq + c * ((m - g) * dq * dq + V(6.f) * cubic * scale * c));
    amplified = select(negative, V(3.f) * vmin(-q, V(100.f)), zero);
  }
  r.error = V(Precision<V>::kEps) * ((V(6.f) + amplified) * vabs(r.s));
  return r;
}

// tau in (0, e] such that the tangent at -tau passes through (e, s(e)), for tanh and arctan: s'(tau) (e + tau) = s(e) +
// s(tau), whose difference falls in tau. The point only decides how tight a line is, never whether it holds.
template <Activation kAct, class V>
FR_CALLED V opposite_tangent(V e) {
  const V half(0.5f), one(1.f), end = vmin(e, V(1e37f));
  const V s = point<kAct>(end, one, one).s;
  V t;
  if constexpr (kAct == Activation::tanh)
    t = half * log_of(end + select(end > V(1e9f), end, root_of(one + end * end)));  // asinh
  else
    t = half * end / root_of(one + V(0.785f) * (end * (end / (end + V(1.5f)))));
  FR_NO_UNROLL
  for (int k = 0; k < Precision<V>::kTangent; ++k) {
    const Point<V> q = point<kAct>(t, one, one);
    const V slope = q.dd * (end + t), gap = q.d * (end + t) - (s + q.s);
    const auto fine = slope < V(0.f);
    t = vmin(vmax(select(fine, t - gap / select(fine, slope, one), t), V(0.f)), end);
  }
  return t;
}
template <class V>
FR_HD V opposite_tangent_sigmoid(V e) {  // sigmoid(x) = (1 + tanh(x / 2)) / 2
  return V(2.f) * opposite_tangent<Activation::tanh>(V(0.5f) * e);
}

// t >= 0 with s'(t) = d (and s'(-t) = d) of the S-shaped ones (thesis, table 3.1, in forms that do not cancel).
template <Activation kAct, class V>
FR_CALLED V s_shaped_root(V d) {
  const V one(1.f), tiny(FLT_MIN);
  if constexpr (kAct == Activation::sigmoid) {
    const V p = vmin(vmax(d, tiny), V(0.25f)), r = root_of(one - V(4.f) * p);
    return V(2.f) * log1p_of(r) - (V(1.3862943611198906) + log_of(p));
  } else if constexpr (kAct == Activation::tanh) {
    const V p = vmin(vmax(d, tiny), one), r = root_of(one - p);
    return log1p_of(r) - V(0.5f) * log_of(p);
  } else {
    const V p = vmin(vmax(d, tiny), one);
    return root_of((one - p) / p);
  }
}

// Constants of the activations that have a valley: inflection point -w, s'(-w), the minimum and where it lies, and
// starting points for the two roots of s'(t) = e, e <= 1/2: by r = sqrt((e - s'(-w)) / (1/2 - s'(-w))) the one in
// [-w, 0], by q = sqrt(log(s'(-w) / e)) the one below -w, which exists for e < 0.
struct Valley {
  double w, steepest, at, bottom, middle[6], outer[6];
};
template <Activation kAct>
FR_HD constexpr Valley valley() {
  if constexpr (kAct == Activation::silu)
    return {2.3993572805154675,
            -0.09983932012886694,
            -1.2784645427610739,
            -0.27846454276107385,
            {3.61170409, -3.44262403, 4.61801891, -4.24365225, 2.3525695, -0.496777728},
            {1.46671901, 0.596411921, 0.0960021156, -0.0141790622, 0.00110761484, -3.48162009e-05}};
  else if constexpr (kAct == Activation::gelu)
    return {1.4142135623730951,
            -0.12890414518515475,
            -0.75179152469356458,
            -0.16997120747990366,
            {1.73832336, -1.01963467, 1.25660721, -0.958814623, 0.446935634, -0.0492382818},
            {0.794083497, 0.210892358, -0.0474632167, 0.00643784372, -0.000469844847, 1.40718354e-05}};
  else
    return {1.4185040087908281,
            -0.12899306865877169,
            -0.75246142207101607,
            -0.17004075057125403,
            {1.75025023, -1.02933359, 1.25314016, -0.94595364, 0.436271014, -0.0459047456},
            {0.784215273, 0.255181296, -0.0855910203, 0.0134609591, -0.00107018099, 3.42604352e-05}};
}

template <Activation kAct, class V>
FR_HD V newton(V t, V e, int steps) {
  const V one(1.f), flat(Precision<V>::kFlat);
  FR_NO_UNROLL
  for (int k = 0; k < steps; ++k) {
    const Point<V> q = point<kAct>(t, one, one);
    // where s' is flat (at the inflection point) the step would be rounding errors
    const auto fine = vabs(q.dd) > flat * vmin(one, vabs(q.d) + vabs(q.dd));
    t = select(fine, t - (q.d - e) / select(fine, q.dd, one), t);
  }
  return t;
}

// The points with s'(t) = d of the activations with a valley: one between the inflection points, and one outside when d
// < 0 or d > 1 (else a point of no meaning). Any values where there is none.
template <Activation kAct, class V>
FR_CALLED void valley_roots(V d, V& middle, V& outer) {
  constexpr Valley c = valley<kAct>();
  const V zero(0.f), one(1.f), half(0.5f), steepest(c.steepest), w(c.w);
  const auto upper = d > half;
  const V e = vmax(select(upper, one - d, d), steepest);
  const V r = root_of((e - steepest) * V(1. / (0.5 - c.steepest)));
  V t = r * polynomial(r, c.middle[0], c.middle[1], c.middle[2], c.middle[3], c.middle[4], c.middle[5]) - w;
  t = newton<kAct>(t, e, Precision<V>::kMiddle);
  middle = select(upper, -t, t);
  outer = middle;
  const auto beyond = e < zero;
  if (!any(beyond)) return;
  const V f = select(beyond, vmin(e, V(-1e-30f)), steepest), q = root_of(vmax(log_of(steepest / f), zero));
  t = -(q * polynomial(q, c.outer[0], c.outer[1], c.outer[2], c.outer[3], c.outer[4], c.outer[5]) + w);
  t = vmin(newton<kAct>(t, f, Precision<V>::kOuter), -w);
  outer = select(beyond, select(upper, -t, t), middle);
}

FR_NS_END
