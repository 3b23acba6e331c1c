// Steps that need a number per example before they can move: L2, L1, FOSC and ATAS; and the steps of Auto-PGD. One
// example is one work item, so its passes find it in cache; sums run over sixteen double lanes in a fixed order
// whatever the threads or the batch.
#include <algorithm>

#include "pgd/row_cpu.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kGrainElements = 8192;

// One example.
template <GradType T>
struct Row {
  const StepArgs& a;
  const float* x;
  const float* x0;
  GradReader<T> g;
  float* out;
  int64_t n;
  float step, eps;

  Row(const StepArgs& args, int64_t row)
      : a(args),
        x(args.x + row * args.n),
        x0(args.x0 + row * args.n),
        g(args.grad, row * args.n),
        out(args.out == nullptr ? nullptr : args.out + row * args.n),
        n(args.n),
        step(args.step.per == Per::element ? 0.f : param_at(args.step, row, args.n, 0)),
        eps(args.eps.per == Per::element ? 0.f : param_at(args.eps, row, args.n, 0)) {}

  template <bool kClean>
  FR_HD Vec grad(int64_t i, int m) const {
    const Vec v = m == kLanes ? g.vec(i) : g.vec(i, m);
    return kClean ? clean_grad(v) : v;
  }

  template <bool kClean>
  double sum_squares() const {
    DVec s(0.);
    each_vec(n, [&](int64_t i, int m) FR_INLINE_LAMBDA {
      const DVec w = widen(grad<kClean>(i, m));
      s = s + w * w;
    });
    return sum(s);
  }

  // The squared norm of the cleaned gradient. float squares never overflow a double, so a sum that is not finite
  // tells that a coordinate is not: only then is the gradient cleaned, here and in the later passes.
  double grad_norm2(bool* clean) const {
    const double s = sum_squares<false>();
    *clean = !(s <= DBL_MAX);
    return *clean ? sum_squares<true>() : s;
  }

  // Does y lie in the ball, exactly? Asked only next to the sphere.
  __attribute__((noinline)) bool inside(const float* y, float radius, bool l2_norm) const {
    ExactSum s;
    for (int64_t i = 0; i < n; ++i) exact_add(&s, y[i], x0[i], l2_norm);
    return exact_inside(s, radius, l2_norm);
  }

  // ---- L2 ----
  template <bool kClean>
  double l2_move(double norm2) const {
    const L2Ascent ascent = l2_ascent(norm2, step, a.normalize);
    const Vec pow2(ascent.pow2), scale(ascent.scale);
    // Copies, because a store might otherwise change the members. The moved point waits in out for its projection;
    // without a gradient it is x itself.
    const float *from = x, *center = x0;
    const GradReader<T> gradient = g;
    float* to = out;
    DVec s(0.);
    each_vec(n, [&, from, center, gradient, to](int64_t i, int m) FR_INLINE_LAMBDA {
      Vec v = load_m(from + i, m);
      if (T != GradType::none) {
        const Vec gv = m == kLanes ? gradient.vec(i) : gradient.vec(i, m);
        v = l2_ascend(v, kClean ? clean_grad(gv) : gv, pow2, scale);
        store_m(to + i, v, m);
      }
      const DVec d = widen(v - load_m(center + i, m));
      s = s + d * d;
    });
    return sum(s);
  }
  double l2_move() const {
    bool clean = false;
    const double norm2 = T == GradType::none ? 0. : grad_norm2(&clean);
    return clean ? l2_move<true>(norm2) : l2_move<false>(norm2);
  }
  float l2_factor(const float* y, double distance2) const {
    const float shrink = l2_shrink(distance2, eps);
    return shrink < 1.f && near_sphere(std::sqrt(distance2), eps) && inside(y, eps, true) ? 1.f : shrink;
  }
  void l2_write(const float* y, double distance2) const {
    const float shrink = l2_factor(y, distance2);
    const Vec lo(a.lo), hi(a.hi);
    const float* center = x0;
    float* to = out;
    each_vec(n, [=](int64_t i, int m) FR_INLINE_LAMBDA {
      store_m(to + i, l2_project(load_m(y + i, m), load_m(center + i, m), shrink, lo, hi), m);
    });
  }
  void l2() const {
    const double distance2 = l2_move();
    l2_write(T == GradType::none ? x : out, distance2);
  }

  // ---- L1 ----
  // What l1_threshold and l1_lambda ask of an example.
  double spent(float threshold) const {
    DVec s(0.);
    const Vec t(threshold), lo(a.lo), hi(a.hi);
    each_vec(n, [&](int64_t i, int m) FR_INLINE_LAMBDA {
      const Vec gv = grad<true>(i, m);
      s = s + widen(select(vabs(gv) > t, l1_headroom(load_m(x + i, m), gv, lo, hi), Vec(0.f)));
    });
    return sum(s);
  }
  float top() const {
    Vec t(0.f);
    each_vec(n, [&](int64_t i, int m) FR_INLINE_LAMBDA { t = vmax(t, vabs(grad<true>(i, m))); });
    return max_lane(t);
  }
  L1Lengths lengths(float lambda) const {
    DVec total(0.), slope(0.);
    const Vec l(lambda), lo(a.lo), hi(a.hi);
    each_vec(n, [&](int64_t i, int m) FR_INLINE_LAMBDA {
      const Vec v0 = load_m(x0 + i, m), d = load_m(out + i, m) - v0;
      const Vec room = l1_room(d, v0, lo, hi), length = l1_length(d, room, l);
      total = total + widen(length);
      slope = slope + widen(select((length > Vec(0.f)) & (length < room), Vec(1.f), Vec(0.f)));
    });
    return {sum(total), sum(slope)};
  }
  bool inside(float radius) const {
    for (int64_t i = 0; i < n; ++i)
      if (!(out[i] >= a.lo && out[i] <= a.hi)) return false;
    return inside(out, radius, false);
  }
  float top_distance() const {
    Vec t(0.f);
    each_vec(n, [&](int64_t i, int m) FR_INLINE_LAMBDA { t = vmax(t, vabs(load_m(out + i, m) - load_m(x0 + i, m))); });
    return max_lane(t);
  }

  // Moves x to out by the steepest step of L1 length `step` inside the box.
  void l1_ascend() const {
    double moved = 0.;
    const float threshold = l1_threshold(*this, step, &moved);
    double left = step - moved;
    const Vec t(threshold), lo(a.lo), hi(a.hi);
    each_vec(n, [&](int64_t i, int m) FR_INLINE_LAMBDA {
      const Vec gv = grad<true>(i, m), v = load_m(x + i, m), size = vabs(gv);
      store_m(out + i, select(size > t, l1_to_face(v, gv, lo, hi), v), m);
      if (threshold > 0.f && any(size == t)) l1_ties(i, m, threshold, &left);
    });
  }
  // Coordinates at the threshold share what is left, in index order; out holds their x.
  __attribute__((noinline)) void l1_ties(int64_t i, int m, float threshold, double* left) const {
    for (int64_t j = i; j < i + m; ++j) {
      const float gj = clean_grad(g.at(j));
      if (vabs(gj) == threshold && *left > 0.) out[j] = l1_take(out[j], gj, a.lo, a.hi, left);
    }
  }
  void l1() const {
    if (T == GradType::none && n == 0) return;
    if (T == GradType::none)
      std::memmove(out, x, static_cast<size_t>(n) * sizeof(float));
    else
      l1_ascend();
    l1_project_out();
  }
  void l1_project_out() const {
    const Vec lambda(l1_lambda(*this, eps)), lo(a.lo), hi(a.hi);
    each_vec(n, [&](int64_t i, int m) FR_INLINE_LAMBDA {
      store_m(out + i, l1_project(load_m(out + i, m), load_m(x0 + i, m), lambda, lo, hi), m);
    });
  }

  // ---- Auto-PGD ----
  // What sparse_threshold asks. Exact: below 2^24 coordinates a lane's count is a float.
  int64_t at_least(float threshold) const {
    int64_t count = 0;
    constexpr int64_t kStretch = int64_t{1} << 24;
    const Vec t(threshold);
    for (int64_t from = 0; from < n; from += kStretch) {
      Vec s(0.f);
      each_vec(std::min(kStretch, n - from), [&](int64_t k, int m) FR_INLINE_LAMBDA {
        s = s + select(vabs(grad<true>(from + k, m)) >= t, Vec(1.f), Vec(0.f));
      });
      count += static_cast<int64_t>(sum(widen(s)));
    }
    return count;
  }
  void sparse_move(int64_t row) const {
    int64_t count = 0;
    const Vec t(sparse_threshold(*this, a.keep == nullptr ? n : a.keep[row], &count)), share(sparse_share(count)),
        length(step);
    each_vec(n, [&](int64_t i, int m) FR_INLINE_LAMBDA {
      store_m(out + i, sparse_ascend(load_m(x + i, m), grad<true>(i, m), t, share, length), m);
    });
  }
  FR_HD Vec average_at(int64_t i, int m, Vec z) const {
    return averaged(load_m(x + i, m), load_m(a.previous + (x - a.x) + i, m), z, a.momentum, a.rest);
  }
  void apgd_l2() const {
    const double distance2 = l2_move();
    if (a.momentum == 1.f) return l2_write(out, distance2);
    const float shrink = l2_factor(out, distance2), momentum = a.momentum, rest = a.rest;
    const Vec lo(a.lo), hi(a.hi);
    const float *from = x, *center = x0, *before = a.previous + (x - a.x);
    float* to = out;
    DVec s(0.);
    each_vec(n, [&, from, center, before, to](int64_t i, int m) FR_INLINE_LAMBDA {
      const Vec v0 = load_m(center + i, m), z = l2_project(load_m(to + i, m), v0, shrink, lo, hi);
      const Vec v = averaged(load_m(from + i, m), load_m(before + i, m), z, momentum, rest);
      store_m(to + i, v, m);
      // Read again: in lanes beyond the end a box without 0 leaves something of z.
      const DVec d = widen(load_m(to + i, m) - v0);
      s = s + d * d;
    });
    l2_write(out, sum(s));
  }
  void apgd_l1(int64_t row) const {
    sparse_move(row);
    l1_project_out();
    if (a.momentum == 1.f) return;
    each_vec(n, [&](int64_t i, int m) FR_INLINE_LAMBDA { store_m(out + i, average_at(i, m, load_m(out + i, m)), m); });
    l1_project_out();
  }
  void apgd_linf(int64_t row) const {
    if (a.momentum == 1.f) return linf(row);
    const bool step_each = a.step.per == Per::element, eps_each = a.eps.per == Per::element;
    if (step_each)
      eps_each ? apgd_linf_block<T, true, true>(a, row, 0, n) : apgd_linf_block<T, true, false>(a, row, 0, n);
    else
      eps_each ? apgd_linf_block<T, false, true>(a, row, 0, n) : apgd_linf_block<T, false, false>(a, row, 0, n);
  }
  void apgd(int64_t row, Norm norm) const {
    if (norm == Norm::linf)
      apgd_linf(row);
    else if (norm == Norm::l2)
      apgd_l2();
    else
      apgd_l1(row);
  }

  // ---- L-inf over a whole example ----
  void linf(int64_t row) const {
    const bool step_each = a.step.per == Per::element, eps_each = a.eps.per == Per::element;
    if (step_each)
      eps_each ? linf_block<T, true, true, false>(a, row, 0, n) : linf_block<T, true, false, false>(a, row, 0, n);
    else
      eps_each ? linf_block<T, false, true, false>(a, row, 0, n) : linf_block<T, false, false, false>(a, row, 0, n);
  }

  // ---- FOSC ----
  struct Fosc {
    DVec dual, inner;
    Vec top;
  };
  FR_HD void fosc_add(Fosc* f, Vec gv, Vec d, Vec eps_i, Norm norm) const {
    const DVec wide = widen(gv);
    f->inner = f->inner + widen(d) * wide;
    if (norm == Norm::linf)
      f->dual = f->dual + widen(vabs(gv)) * widen(eps_i);
    else if (norm == Norm::l2)
      f->dual = f->dual + wide * wide;
    else
      f->top = vmax(f->top, vabs(gv));
  }
  float fosc_end(const Fosc& f, Norm norm) const {
    const double dual =
        norm == Norm::linf ? sum(f.dual) : eps * (norm == Norm::l2 ? std::sqrt(sum(f.dual)) : double{max_lane(f.top)});
    return fosc_value(dual, sum(f.inner));
  }
  template <bool kEpsEach>
  float fosc(int64_t row, Norm norm) const {
    Fosc f{DVec(0.), DVec(0.), Vec(0.f)};
    const float* sizes = kEpsEach ? a.eps.data + row * n : nullptr;
    each_vec(n, [&](int64_t i, int m) FR_INLINE_LAMBDA {
      fosc_add(&f, grad<true>(i, m), load_m(x + i, m) - load_m(x0 + i, m), kEpsEach ? load_m(sizes + i, m) : Vec(eps),
               norm);
    });
    return fosc_end(f, norm);
  }
  // Criterion and L-inf step in one pass over the example.
  template <bool kStepEach, bool kEpsEach>
  float fosc_linf(int64_t row) const {
    Fosc f{DVec(0.), DVec(0.), Vec(0.f)};
    const float* steps = kStepEach ? a.step.data + row * n : nullptr;
    const float* sizes = kEpsEach ? a.eps.data + row * n : nullptr;
    const Vec lo(a.lo), hi(a.hi);
    each_vec(n, [&](int64_t i, int m) FR_INLINE_LAMBDA {
      const Vec gv = grad<true>(i, m), v = load_m(x + i, m), v0 = load_m(x0 + i, m);
      const Vec eps_i = kEpsEach ? load_m(sizes + i, m) : Vec(eps);
      fosc_add(&f, gv, v - v0, eps_i, Norm::linf);
      store_m(out + i,
              linf_project(linf_ascend(v, gv, kStepEach ? load_m(steps + i, m) : Vec(step)), v0, eps_i, lo, hi), m);
    });
    return fosc_end(f, Norm::linf);
  }

  float fosc_linf(int64_t row) const {
    const bool step_each = a.step.per == Per::element, eps_each = a.eps.per == Per::element;
    if (step_each) return eps_each ? fosc_linf<true, true>(row) : fosc_linf<true, false>(row);
    return eps_each ? fosc_linf<false, true>(row) : fosc_linf<false, false>(row);
  }
  float fosc(int64_t row, Norm norm) const {
    return a.eps.per == Per::element ? fosc<true>(row, norm) : fosc<false>(row, norm);
  }

  void move_by(int64_t row, Norm norm) const {
    if (norm == Norm::linf)
      linf(row);
    else if (norm == Norm::l2)
      l2();
    else
      l1();
  }
};

// The criterion decides on the move. Where x stays at hand one pass does both, and a move too many is taken back.
template <GradType T>
void do_fosc(const Row<T>& row, const StepArgs& a, Norm norm, int64_t i) {
  if (a.active_out == nullptr) {
    a.fosc[i] = row.fosc(i, norm);
    return;
  }
  const bool may = a.active == nullptr || a.active[i] != 0;
  const bool together = norm == Norm::linf && may && (a.active == nullptr || a.out != a.x);
  a.fosc[i] = together ? row.fosc_linf(i) : row.fosc(i, norm);
  const bool move = fosc_moves(a.active, i, a.fosc[i], a.threshold);
  a.active_out[i] = move;
  if (move && !together) row.move_by(i, norm);
  if (!move && a.n > 0 && a.out != a.x) std::memcpy(row.out, row.x, static_cast<size_t>(a.n) * sizeof(float));
}

template <GradType T>
void do_row(const StepArgs& a, Norm norm, int64_t i) {
  Row<T> row(a, i);
  if (a.fosc != nullptr) return do_fosc(row, a, norm, i);
  const bool move = a.active == nullptr || a.active[i] != 0;
  if (!move && a.n > 0 && a.out != a.x) std::memcpy(row.out, row.x, static_cast<size_t>(a.n) * sizeof(float));
  if (a.v_out != nullptr) {
    bool clean = false;
    const double norm2 = row.grad_norm2(&clean);
    a.v_out[i] = move ? atas_average(a.v[i], norm2, a.beta) : a.v[i];
    a.step_out[i] = atas_step_size(a.v_out[i], param_at(a.step, i, a.n, 0), a.c, a.authors, a.min_step, a.max_step);
    StepArgs adapted = a;
    adapted.step.per = Per::all;
    adapted.step.value = a.step_out[i];
    if (move) Row<T>(adapted, i).move_by(i, norm);
  } else if (a.previous != nullptr) {
    row.apgd(i, norm);
  } else if (move) {
    row.move_by(i, norm);
  }
}

}  // namespace

void rows_cpu(const StepArgs& a, Norm norm) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, a.n));
  parallel_for(a.batch, grain, [&](int64_t begin, int64_t end) {
    with_grad_type(a.grad_type, [&](auto type) {
      for (int64_t i = begin; i < end; ++i) do_row<decltype(type)::value>(a, norm, i);
    });
  });
}

namespace {

// Points and gradients of the rows of which `noted` says so.
template <class Note>
void copy_noted(int64_t batch, int64_t n, const float* from, const float* from_grad, float* to, float* to_grad,
                const Note& noted) {
  const size_t bytes = static_cast<size_t>(n) * sizeof(float);
  const int64_t grain = std::max<int64_t>(1, 4 * kGrainElements / std::max<int64_t>(1, n));
  parallel_for(batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (!noted(row) || n == 0) continue;
      std::memcpy(to + row * n, from + row * n, bytes);
      std::memcpy(to_grad + row * n, from_grad + row * n, bytes);
    }
  });
}

}  // namespace

void ascent_cpu(const AscentArgs& a) {
  copy_noted(a.batch, a.n, a.left, a.left_grad, a.best, a.best_grad, [&](int64_t row) { return ascent_note(a, row); });
}

void ascent_check_cpu(const AscentCheckArgs& a) {
  copy_noted(a.batch, a.n, a.best, a.best_grad, a.x, a.grad, [&](int64_t row) { return ascent_check(a, row); });
}

FR_NS_END
