// The extreme of a linear function over a ball cut by a box: formulas shared by the CPU (Vec) and CUDA (float) kernels.
//
// With w = |a| eps and room = how far each coordinate can go before it meets the box, in units of eps, the maximum of
// w.v over ||v||_p <= 1, 0 <= v <= room is the minimum over 0 <= part <= w of room.(w - part) + ||part||_q. Every
// `part` gives a bound, so rounding in the search for the best one costs tightness, never soundness.
#pragma once

#include "bounds/args.h"
#include "core/simd.h"

FR_NS_BEGIN

// What to multiply coordinates with before they are squared as floats, by the sum of their squares: 1 where squares
// that underflow or overflow cannot count.
FR_HD float scale_of_squares(double total) { return total < 0x1p-100 ? 0x1p100f : (total <= 0x1p126 ? 1.f : 0x1p-80f); }

template <class V>
FR_HD V room_of(V a, bool maximum, V center, V radius, V x, V eps) {
  const V zero(0.f), down = x - center;
  const auto positive = a >= zero;
  V room = radius + (maximum ? select(positive, zero - down, down) : select(positive, down, zero - down));
  room = select(room < zero, zero, room);  // NaN stays
  const auto moves = eps > zero;
  return select(moves, room / select(moves, eps, V(1.f)), zero);
}

// The most of w that goes to the ball where the search stands at `level`.
template <Dual kDual, class V>
FR_HD V ball_limit(V level, V room) {
  if (kDual == Dual::l2) return level * room;
  if (kDual == Dual::linf) return level;
  return select(room < V(1.f), V(0.f), V(INFINITY));  // l1: the ball is itself a box
}

// What a coordinate adds to the two sums of the search.
template <Dual kDual, class V>
FR_HD void search_terms(V w, V room, V level, V& spent, V& other) {
  const auto full = w > ball_limit<kDual>(level, room);
  const V zero(0.f), size = kDual == Dual::l2 ? room * room : room;
  spent = spent + select(full, size, zero);
  other = other + (kDual == Dual::l2 ? select(full, zero, w * w) : select(full, size * w, zero));
}

// Splits a between the ball and the box; w and level are `scale` times what they stand for.
template <Dual kDual, class V>
FR_HD V ball_part(V a, V w, V room, V eps, V level, float scale) {
  const V zero(0.f), limit = ball_limit<kDual>(level, room);
  const auto full = w > limit;
  const V part = limit * V(1.f / scale) / select(full, eps, V(1.f));
  return select(full, select(a < zero, zero - part, part), a);
}

// p = 2: the level with sum over full of room^2 + sum over the rest of w^2 / level^2 = 1; it falls from ||w||_2, the
// ball's own, as more coordinates meet the box. p = 1: the minimum over the level of the convex, piecewise linear
// gain + (1 - spent) level, between 0 and max w, by intersecting the tangents of both ends.
template <Dual kDual>
struct LevelSearch {
  double level = 0., low = 0., high = 0., spent_low = 0., gain_low = 0., spent_high = 0., gain_high = 0.;
  bool done = false;

  // Sums at level 0 (everything with w > 0 is full); top = max w (p = 1), ||w||_2^2 (p = 2).
  FR_HD void start(double spent, double gain, double top) {
    if (kDual == Dual::l2) level = sqrt(top);
    if (kDual == Dual::linf) spent_low = spent, gain_low = gain, high = top;
    if (!(spent > 1.) || kDual == Dual::l1) {  // the ball does not cut the box
      level = 0.;
      done = true;
    } else if (kDual == Dual::linf) {
      meet();
    }
  }
  FR_HD void step(double spent, double other) {
    if (kDual == Dual::l2) {
      const double found = spent < 1. ? sqrt(other / (1. - spent)) : level;
      done = !(found < level * (1. - 1e-4));  // the bound moves by less than the square of that
      if (found < level) level = found;
    } else {
      const double at = other + (1. - spent) * level, least = gain_low + (1. - spent_low) * level;
      done = !(at - least > 1e-7 * at);
      if (done) return;
      if (spent > 1.) {
        low = level, spent_low = spent, gain_low = other;
      } else {
        high = level, spent_high = spent, gain_high = other;
      }
      meet();
      if (!(level > low && level < high)) {
        level = gain_low + (1. - spent_low) * low < gain_high + (1. - spent_high) * high ? low : high;
        done = true;
      }
    }
  }

 private:
  FR_HD void meet() { level = (gain_low - gain_high) / (spent_low - spent_high); }
};

FR_NS_END
