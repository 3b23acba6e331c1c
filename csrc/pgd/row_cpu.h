// The elementwise L-inf step over part of one example; shared by the step, FOSC and ATAS kernels.
#pragma once

#include "pgd/load.h"
#include "pgd/step.h"

FR_NS_BEGIN

void linf_cpu(const StepArgs& a);
void rows_cpu(const StepArgs& a, Norm norm);
void random_start_cpu(const RandomStartArgs& a);
void loss_cpu(const LossArgs& a);
void agrees_cpu(const AgreesArgs& a);
void ascent_cpu(const AscentArgs& a);
void ascent_check_cpu(const AscentCheckArgs& a);
void square_cpu(const SquareArgs& a);
void square_move_cpu(const SquareMoveArgs& a);

// Calls f(i, m) for sixteen elements at a time; m < 16 in the last one. f is inlined twice.
template <class F>
FR_HD void each_vec(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, static_cast<int>(n - i));
}
FR_HD Vec load_m(const float* p, int m) { return m == kLanes ? load(p) : load_n(p, m); }
FR_HD void store_m(float* p, Vec v, int m) { m == kLanes ? store(p, v) : store_n(p, v, m); }

// Below AVX-512, which rounds by instruction, x86 rounds by mode: part by part, first the moved points, then the faces.
#if defined(__x86_64__) && !defined(__AVX512F__)
template <bool kEpsEach, bool kStream>
__attribute__((noinline)) void linf_project_block(const float* moved, const float* x0, const float* sizes,
                                                  float eps_all, float lo, float hi, float* out, int64_t n) {
  each_vec(n, [&](int64_t i, int m) FR_INLINE_LAMBDA {
    const Vec eps = kEpsEach ? load_m(sizes + i, m) : Vec(eps_all);
    const Vec y = linf_project_rounding_up(load_m(moved + i, m), load_m(x0 + i, m), eps, Vec(lo), Vec(hi));
    kStream&& m == kLanes ? store_stream(out + i, y) : store_m(out + i, y, m);
  });
}
#endif

template <GradType T, bool kStepEach, bool kEpsEach, bool kStream>
void linf_block(const StepArgs& a, int64_t row, int64_t begin, int64_t end) {
  const int64_t base = row * a.n;
  const float* FR_RESTRICT x = a.x + base;
  const float* FR_RESTRICT x0 = a.x0 + base;
  const GradReader<T> g(a.grad, base);
  float* out = a.out + base;
  const float* steps = kStepEach ? a.step.data + base : nullptr;
  const float* sizes = kEpsEach ? a.eps.data + base : nullptr;
  const float step_all = kStepEach ? 0.f : param_at(a.step, row, a.n, 0);
  const float eps_all = kEpsEach ? 0.f : param_at(a.eps, row, a.n, 0);
  const auto moved = [&](int64_t i, int m) FR_INLINE_LAMBDA {
    const Vec step = kStepEach ? load_m(steps + i, m) : Vec(step_all);
    return linf_ascend(load_m(x + i, m), m == kLanes ? g.vec(i) : g.vec(i, m), step);
  };
#if defined(__x86_64__) && !defined(__AVX512F__)
  constexpr int64_t kPart = 1024;
  alignas(64) float part[kPart];
  for (int64_t from = begin; from < end; from += kPart) {
    const int64_t count = end - from < kPart ? end - from : kPart;
    each_vec(count, [&](int64_t i, int m) FR_INLINE_LAMBDA { store_m(part + i, moved(from + i, m), m); });
    const RoundingUp mode;
    linf_project_block<kEpsEach, kStream>(part, x0 + from, kEpsEach ? sizes + from : nullptr, eps_all, a.lo, a.hi,
                                          out + from, count);
  }
#else
  each_vec(end - begin, [&](int64_t k, int m) FR_INLINE_LAMBDA {
    const int64_t i = begin + k;
    const Vec eps = kEpsEach ? load_m(sizes + i, m) : Vec(eps_all);
    const Vec y = linf_project(moved(i, m), load_m(x0 + i, m), eps, Vec(a.lo), Vec(a.hi));
    kStream&& m == kLanes ? store_stream(out + i, y) : store_m(out + i, y, m);
  });
#endif
}

// The step of Auto-PGD over [begin, end) of an example.
template <GradType T, bool kStepEach, bool kEpsEach>
void apgd_linf_block(const StepArgs& a, int64_t row, int64_t begin, int64_t end) {
  const int64_t base = row * a.n;
  const float* FR_RESTRICT x = a.x + base;
  const float* FR_RESTRICT previous = a.previous + base;
  const float* FR_RESTRICT x0 = a.x0 + base;
  const GradReader<T> g(a.grad, base);
  float* FR_RESTRICT out = a.out + base;
  const float* steps = kStepEach ? a.step.data + base : nullptr;
  const float* sizes = kEpsEach ? a.eps.data + base : nullptr;
  const float step_all = kStepEach ? 0.f : param_at(a.step, row, a.n, 0);
  const float eps_all = kEpsEach ? 0.f : param_at(a.eps, row, a.n, 0), momentum = a.momentum, rest = a.rest;
#if defined(__x86_64__) && !defined(__AVX512F__)
  // z lies in out until it is averaged
  linf_block<T, kStepEach, kEpsEach, false>(a, row, begin, end);
  constexpr int64_t kPart = 1024;
  alignas(64) float part[kPart];
  for (int64_t from = begin; from < end; from += kPart) {
    const int64_t count = end - from < kPart ? end - from : kPart;
    each_vec(count, [&](int64_t k, int m) FR_INLINE_LAMBDA {
      const int64_t i = from + k;
      store_m(part + k, averaged(load_m(x + i, m), load_m(previous + i, m), load_m(out + i, m), momentum, rest), m);
    });
    const RoundingUp mode;
    linf_project_block<kEpsEach, false>(part, x0 + from, kEpsEach ? sizes + from : nullptr, eps_all, a.lo, a.hi,
                                        out + from, count);
  }
  (void)steps;
  (void)step_all;
#else
  const Vec lo(a.lo), hi(a.hi);
  each_vec(end - begin, [&](int64_t k, int m) FR_INLINE_LAMBDA {
    const int64_t i = begin + k;
    const Vec eps = kEpsEach ? load_m(sizes + i, m) : Vec(eps_all), v = load_m(x + i, m), v0 = load_m(x0 + i, m);
    const Vec step = kStepEach ? load_m(steps + i, m) : Vec(step_all);
    const Vec z = linf_project(linf_ascend(v, m == kLanes ? g.vec(i) : g.vec(i, m), step), v0, eps, lo, hi);
    store_m(out + i, linf_project(averaged(v, load_m(previous + i, m), z, momentum, rest), v0, eps, lo, hi), m);
  });
#endif
}

FR_NS_END
