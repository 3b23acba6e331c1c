// Steps that need a number per example before they can move: L2, L1, FOSC and ATAS. One example is one work item, so
// its passes find it in cache; sums run over sixteen double lanes in a fixed order whatever the threads or the batch.
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
  void l2(double norm2) const {
    const L2Ascent ascent = l2_ascent(norm2, step, a.normalize);
    const Vec pow2(ascent.pow2), scale(ascent.scale), lo(a.lo), hi(a.hi);
    // Copies, because a store might otherwise change the members. The moved point waits in out for its projection;
    // without a gradient it is x itself.
    const float *from = x, *center = x0;
    const GradReader<T> gradient = g;
    float* to = out;
    const float* y = T == GradType::none ? from : to;
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
    const double distance2 = sum(s);
    float shrink = l2_shrink(distance2, eps);
    if (shrink < 1.f && near_sphere(std::sqrt(distance2), eps) && inside(y, eps, true)) shrink = 1.f;
    each_vec(n, [=](int64_t i, int m) FR_INLINE_LAMBDA {
      store_m(to + i, l2_project(load_m(y + i, m), load_m(center + i, m), shrink, lo, hi), m);
    });
  }
  void l2() const {
    bool clean = false;
    const double norm2 = T == GradType::none ? 0. : grad_norm2(&clean);
    clean ? l2<true>(norm2) : l2<false>(norm2);
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
    const Vec lambda(l1_lambda(*this, eps)), lo(a.lo), hi(a.hi);
    each_vec(n, [&](int64_t i, int m) FR_INLINE_LAMBDA {
      store_m(out + i, l1_project(load_m(out + i, m), load_m(x0 + i, m), lambda, lo, hi), m);
    });
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

  // Criterion first, then the step if the example is still active (`move`).
  float fosc_step(int64_t row, Norm norm, bool move) const {
    const bool step_each = a.step.per == Per::element, eps_each = a.eps.per == Per::element;
    if (norm == Norm::linf && move) {
      if (step_each) return eps_each ? fosc_linf<true, true>(row) : fosc_linf<true, false>(row);
      return eps_each ? fosc_linf<false, true>(row) : fosc_linf<false, false>(row);
    }
    const float value = eps_each ? fosc<true>(row, norm) : fosc<false>(row, norm);
    if (move) move_by(row, norm);
    return value;
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

template <GradType T>
void do_row(const StepArgs& a, Norm norm, int64_t i) {
  Row<T> row(a, i);
  const bool move = a.active == nullptr || a.active[i] != 0;
  const bool writes = a.out != nullptr;
  if (writes && !move && a.n > 0 && a.out != a.x) std::memcpy(row.out, row.x, static_cast<size_t>(a.n) * sizeof(float));
  if (a.fosc != nullptr) {
    a.fosc[i] = row.fosc_step(i, norm, writes && move);
    if (a.active_out != nullptr) a.active_out[i] = move && a.fosc[i] > a.threshold;
  } else if (a.v_out != nullptr) {
    bool clean = false;
    const double norm2 = row.grad_norm2(&clean);
    a.v_out[i] = move ? atas_average(a.v[i], norm2, a.beta) : a.v[i];
    a.step_out[i] = atas_step_size(a.v_out[i], param_at(a.step, i, a.n, 0), a.c, a.authors, a.min_step, a.max_step);
    StepArgs adapted = a;
    adapted.step.per = Per::all;
    adapted.step.value = a.step_out[i];
    if (move) Row<T>(adapted, i).move_by(i, norm);
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

FR_NS_END
