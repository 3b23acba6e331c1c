// The elementwise L-inf step over part of one example; shared by the step, FOSC and ATAS kernels.
#pragma once

#include "pgd/load.h"
#include "pgd/step.h"

FR_NS_BEGIN

void linf_cpu(const StepArgs& a);
void rows_cpu(const StepArgs& a, Norm norm);
void random_start_cpu(const RandomStartArgs& a);
void loss_cpu(const LossArgs& a);

template <GradType T, bool kStepEach, bool kEpsEach, bool kStream>
void linf_block(const StepArgs& a, int64_t row, int64_t begin, int64_t end) {
  const int64_t base = row * a.n;
  const float* FR_RESTRICT x = a.x + base;
  const float* FR_RESTRICT x0 = a.x0 + base;
  const GradReader<T> g(a.grad, base);
  float* out = a.out + base;
  const float* steps = kStepEach ? a.step.data + base : nullptr;
  const float* sizes = kEpsEach ? a.eps.data + base : nullptr;
  const Vec step_all(kStepEach ? 0.f : param_at(a.step, row, a.n, 0));
  const Vec eps_all(kEpsEach ? 0.f : param_at(a.eps, row, a.n, 0));
  const Vec lo(a.lo), hi(a.hi);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    const Vec step = kStepEach ? load(steps + i) : step_all;
    const Vec eps = kEpsEach ? load(sizes + i) : eps_all;
    const Vec y = linf_project(linf_ascend(load(x + i), g.vec(i), step), load(x0 + i), eps, lo, hi);
    if (kStream)
      store_stream(out + i, y);
    else
      store(out + i, y);
  }
  if (i < end) {
    const int m = static_cast<int>(end - i);
    const Vec step = kStepEach ? load_n(steps + i, m) : step_all;
    const Vec eps = kEpsEach ? load_n(sizes + i, m) : eps_all;
    store_n(out + i, linf_project(linf_ascend(load_n(x + i, m), g.vec(i, m), step), load_n(x0 + i, m), eps, lo, hi), m);
  }
}

FR_NS_END
