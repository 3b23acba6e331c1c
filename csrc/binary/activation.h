// The activations of a network and their derivatives, for float and for sixteen lanes; torch's definitions, in forms
// that neither cancel nor overflow. The reference is python's ops/binary/_activation.py.
#pragma once

#include "binary/args.h"
#include "core/elementary.h"

FR_NS_BEGIN

// Zero for negative values; NaN stays NaN as in torch.
template <class V>
FR_HD V relu(V v) {
  return select(v < V(0.f), V(0.f), v);
}

template <class V>
FR_HD V clamped(V x, V low, V high) {
  const V y = select(x < low, low, x);
  return select(y > high, high, y);
}

template <class V>
FR_HD V sigmoid_of(V x) {
  return V(1.f) / (V(1.f) + quick_exp(-x));
}

// sigmoid(x) and sigmoid(-x) = 1 - sigmoid(x) from one exponential, neither of which cancels.
template <class V>
FR_HD void sigmoids(V x, V& s, V& rest) {
  const V m = decay(-vabs(x)), near = V(1.f) / (V(1.f) + m), far = m * near;
  const auto negative = x < V(0.f);
  s = select(negative, far, near);
  rest = select(negative, near, far);
}

// The same with less work: s is 0 below -87 and rest 0 above 87, and neither is meant for NaN, which x itself carries
// on.
template <class V>
FR_HD void silu_sigmoids(V x, V& s, V& rest) {
  const V limit(87.f), m = bounded_exp(-x), near = V(1.f) / (V(1.f) + m);
  s = select(x < -limit, V(0.f), near);
  rest = select(x > limit, V(0.f), m * near);
}

template <class V>
FR_HD V tanh_of(V x) {
  const V a = vabs(x), far = V(1.f) - V(2.f) / (V(1.f) + quick_exp(a + a));
  return select(a <= V(0.6f), tanh_near_zero(x), select(x < V(0.f), -far, far));
}

// The normal distribution's function, to 1e-7 of 1 as torch's own (1 + erf(x / sqrt(2))) / 2: erf as a quotient of
// polynomials, fitted to 2e-8.
template <class V>
FR_HD V normal_function(V x) {
  const V y = x * V(0.707106781f), a = vabs(y), z = vmin(a, V(3.92f)), u = z * z;
  const V top = polynomial(u, 1.12837911, 0.19320441, 0.0530960629, 0.00388034142, 0.000286516681, 2.01543692e-06);
  const V bottom = polynomial(u, 1., 0.504555073, 0.115245453, 0.0151984046, 0.00118867435, 3.78199618e-05);
  const V erf = select(a >= V(3.92f), V(1.f), z * top / bottom), half = V(0.5f) * erf;
  const V function = select(x < V(0.f), V(0.5f) - half, V(0.5f) + half);
  return select(x == x, function, x);
}

// gelu_tanh(x) is x sigmoid(u); u and du / dx
template <class V>
FR_HD V gelu_inner(V x) {
  return V(1.59576912f) * (x + V(0.044715f) * (x * x * x));
}
template <class V>
FR_HD V gelu_inner_slope(V x) {
  return V(1.59576912f) + V(0.21406462f) * (x * x);
}

// tanh(log(1 + exp(x))) = top / bottom, from m = exp(-|x|)
template <class V>
FR_HD V mish_top(V x, V m) {
  return select(x < V(0.f), m * (m + V(2.f)), V(1.f) + V(2.f) * m);
}
template <class V>
FR_HD V mish_rest(V x, V m) {  // bottom - top
  return select(x < V(0.f), V(2.f), V(2.f) * (m * m));
}

// Where the derivative of relu, leaky_relu and hardtanh is 1; elsewhere it is slope_of.
template <class V>
FR_HD auto is_open(const Act& act, V v) {
  const bool both = act.kind == ActKind::hardtanh;
  return (v > V(both ? act.a : 0.f)) & !(v >= V(both ? act.b : NAN));
}

FR_HD float slope_of(const Act& act) { return act.kind == ActKind::leaky_relu ? act.a : 0.f; }

// f(a function of V) with the activation's function; the switch is outside of the loop over values.
template <class V, class F>
FR_HD void with_act(const Act& act, const F& f) {
  const V zero(0.f), a(act.a), b(act.b);
  switch (act.kind) {
    case ActKind::none:
      break;
    case ActKind::relu:
      f([](V x) FR_INLINE_LAMBDA { return relu(x); });
      break;
    case ActKind::leaky_relu:
      f([=](V x) FR_INLINE_LAMBDA { return select(x > zero, x, x * a); });
      break;
    case ActKind::hardtanh:
      f([=](V x) FR_INLINE_LAMBDA { return clamped(x, a, b); });
      break;
    case ActKind::silu:
      f([](V x) FR_INLINE_LAMBDA {
        V s, rest;
        silu_sigmoids(x, s, rest);
        return x * s;
      });
      break;
    case ActKind::gelu:
      f([](V x) FR_INLINE_LAMBDA { return x * normal_function(x); });
      break;
    case ActKind::gelu_tanh:
      f([](V x) FR_INLINE_LAMBDA {
        V s, rest;
        sigmoids(gelu_inner(x), s, rest);
        return x * s;
      });
      break;
    case ActKind::hardswish:
      f([=](V x) FR_INLINE_LAMBDA { return x * (clamped(x + V(3.f), zero, V(6.f)) * V(1.f / 6.f)); });
      break;
    case ActKind::elu:
      f([=](V x) FR_INLINE_LAMBDA { return select(x <= zero, a * expm1_of(x), x); });
      break;
    case ActKind::tanh:
      f([](V x) FR_INLINE_LAMBDA { return tanh_of(x); });
      break;
    case ActKind::sigmoid:
      f([](V x) FR_INLINE_LAMBDA { return sigmoid_of(x); });
      break;
    case ActKind::hardsigmoid:
      f([=](V x) FR_INLINE_LAMBDA { return clamped(x + V(3.f), zero, V(6.f)) * V(1.f / 6.f); });
      break;
    case ActKind::softplus:
      f([=](V x) FR_INLINE_LAMBDA {
        const V z = x * a;
        return select(z > b, x, (vmax(z, zero) + log1p_of(whole_exp(-vabs(z)))) / a);
      });
      break;
    case ActKind::mish:
      f([](V x) FR_INLINE_LAMBDA {
        const V m = whole_exp(-vabs(x)), top = mish_top(x, m);
        return x * (top / (top + mish_rest(x, m)));
      });
      break;
  }
}

// f(a function (x, slope&) of V) with the activation and its derivative at x: the same value as `with_act`'s.
template <class V, class F>
FR_HD void with_act_and_slope(const Act& act, const F& f) {
  const V one(1.f), zero(0.f), a(act.a), slope(slope_of(act));
  switch (act.kind) {
    case ActKind::silu:
      f([=](V x, V& d) FR_INLINE_LAMBDA {
        V s, rest;
        silu_sigmoids(x, s, rest);
        d = s * (one + x * rest);
        return x * s;
      });
      return;
    case ActKind::gelu:
      f([](V x, V& d) FR_INLINE_LAMBDA {
        const V function = normal_function(x);
        d = function + x * (V(0.398942280f) * decay(V(-0.5f) * (x * x)));
        return x * function;
      });
      return;
    case ActKind::gelu_tanh:
      f([](V x, V& d) FR_INLINE_LAMBDA {
        // Beyond 14 the second term is 0, and its factors are infinite.
        const V y = vmin(vmax(x, V(-14.f)), V(14.f));
        V s, rest;
        sigmoids(gelu_inner(x), s, rest);
        d = s + s * rest * (y * gelu_inner_slope(y));
        return x * s;
      });
      return;
    default:
      break;
  }
  const auto both = [&](const auto& derivative) {
    with_act<V>(act, [&](const auto& function) {
      f([=](V x, V& d) FR_INLINE_LAMBDA {
        d = derivative(x);
        return function(x);
      });
    });
  };
  switch (act.kind) {
    case ActKind::relu:
    case ActKind::leaky_relu:
    case ActKind::hardtanh:
      both([=](V x) FR_INLINE_LAMBDA { return select(is_open(act, x), one, slope); });
      break;
    case ActKind::hardswish:
      both([=](V x) FR_INLINE_LAMBDA {
        const V inside = select(x < V(3.f), x * V(1.f / 3.f) + V(0.5f), one);
        return select(x <= V(-3.f), zero, inside);
      });
      break;
    case ActKind::elu:
      both([=](V x) FR_INLINE_LAMBDA { return select(x <= zero, a * whole_exp(x), one); });
      break;
    case ActKind::tanh:
      both([=](V x) FR_INLINE_LAMBDA {
        const V h = vabs(x), e = whole_exp(-(h + h)), d = one + e;
        return V(4.f) * e / (d * d);
      });
      break;
    case ActKind::sigmoid:
      both([](V x) FR_INLINE_LAMBDA {
        V s, rest;
        sigmoids(x, s, rest);
        return s * rest;
      });
      break;
    case ActKind::hardsigmoid:
      both([=](V x) FR_INLINE_LAMBDA { return select((x > V(-3.f)) & (x < V(3.f)), V(1.f / 6.f), zero); });
      break;
    case ActKind::softplus: {
      const V b(act.b);
      both([=](V x) FR_INLINE_LAMBDA {
        const V z = x * a;
        return select(z > b, one, sigmoid_of(z));
      });
      break;
    }
    case ActKind::mish:
      both([=](V x) FR_INLINE_LAMBDA {
        const V m = whole_exp(-vabs(x)), top = mish_top(x, m), rest = mish_rest(x, m), bottom = top + rest;
        const V s = select(x < zero, m, one) / (one + m);
        return top / bottom + x * s * (rest * (bottom + top) / (bottom * bottom));
      });
      break;
    default:
      break;
  }
}

// The gradient behind an activation, by what is known of its derivative (see Epilogue for gate).
template <class V>
FR_HD V through(const Act& act, V g, V gate) {
  const bool sided = act.kind == ActKind::relu || act.kind == ActKind::leaky_relu || act.kind == ActKind::hardtanh;
  const float slope = slope_of(act);
  // Not times 0: what a closed side is given may be infinite.
  if (!sided || slope < 0.f) return select(gate == V(0.f), V(0.f), g * gate);
  return select(is_open(act, gate), g, slope == 0.f ? V(0.f) : g * V(slope));
}

FR_NS_END
