// What the steps on CUDA share.
#pragma once

#include "pgd/args.h"
#include "pgd/load.h"
#include "pgd/step.h"
#include "runtime/wide_cuda.h"

namespace fastrobust {
void linf_cuda(const StepArgs& a, void* stream);
// Steepest step in the box and exact projection, one block an example.
void l1_cuda(const StepArgs& a, void* stream);
}  // namespace fastrobust

FR_NS_BEGIN

// Sixteen bytes of gradient: eight 16-bit numbers or four floats.
template <GradType T>
constexpr int kUnit = T == GradType::f16 || T == GradType::bf16 ? 8 : 4;

template <GradType T, class P>
__device__ __forceinline__ Values<float, P::count> grad_at(const GradReader<T>& g, P i) {
  if constexpr (T == GradType::f32) {
    return load_at(g.p, i);
  } else if constexpr (T == GradType::none) {
    return all_equal(0.f, i);
  } else if constexpr (P::count == 8) {  // neighbours all (each_element with kUnit 8)
    const Values<uint16_t, 8> h = load_wide<8>(g.p + i.first);
    Values<float, 8> r;
#pragma unroll
    for (int k = 0; k < 8; ++k) r.v[k] = T == GradType::f16 ? half_to_float(h.v[k]) : bfloat_to_float(h.v[k]);
    return r;
  } else {
    static_assert(P::count == 1, "eight or one");
    return {{g.at(i.first)}};
  }
}

// How the tensors of a step lie.
inline Addresses addresses_of(const StepArgs& a) {
  Addresses lie;
  const int64_t grad_size = a.grad_type == GradType::f32 ? 4 : 2;
  if (a.previous != nullptr) lie.add(a.previous);
  lie.add(a.x).add(a.x0).add(a.out).add(a.grad_type == GradType::none ? nullptr : a.grad, grad_size);
  if (a.step.per == Per::element) lie.add(a.step.data);
  if (a.eps.per == Per::element) lie.add(a.eps.data);
  return lie;
}

// Step size and radius of one example.
struct StepRow {
  const float *step_data, *eps_data;  // of the example, where each element has its own; else null
  float step_all, eps_all, lo, hi;

  __device__ __forceinline__ StepRow(const StepArgs& a, int64_t row)
      : step_data(a.step.per == Per::element ? a.step.data + row * a.n : nullptr),
        eps_data(a.eps.per == Per::element ? a.eps.data + row * a.n : nullptr),
        step_all(step_data != nullptr ? 0.f : param_at(a.step, row, a.n, 0)),
        eps_all(eps_data != nullptr ? 0.f : param_at(a.eps, row, a.n, 0)),
        lo(a.lo),
        hi(a.hi) {}

  template <class P>
  __device__ __forceinline__ Values<float, P::count> eps(P i) const {
    return load_or(eps_data, eps_data != nullptr, eps_all, i);
  }
  // Auto-PGD's: the step, averaged with the last move
  template <class V, class P>
  __device__ __forceinline__ V apgd(const StepArgs& a, const V& x, const V& before, const V& x0, const V& g,
                                    P i) const {
    const V step = load_or(step_data, step_data != nullptr, step_all, i), e = eps(i);
    V y;
#pragma unroll
    for (int k = 0; k < P::count; ++k) {
      const float z = linf_project(linf_ascend(x.v[k], g.v[k], step.v[k]), x0.v[k], e.v[k], lo, hi);
      y.v[k] = linf_project(averaged(x.v[k], before.v[k], z, a.momentum, a.rest), x0.v[k], e.v[k], lo, hi);
    }
    return y;
  }
  template <class V, class P>
  __device__ __forceinline__ V linf(const V& x, const V& x0, const V& g, P i) const {
    const V step = load_or(step_data, step_data != nullptr, step_all, i), e = eps(i);
    V y;
#pragma unroll
    for (int k = 0; k < P::count; ++k)
      y.v[k] = linf_project(linf_ascend(x.v[k], g.v[k], step.v[k]), x0.v[k], e.v[k], lo, hi);
    return y;
  }
};

// The sum over the threads of a block; every thread gets it.
template <int kThreads>
__device__ ExactSum block_exact_sum(const ExactSum& mine) {
  __shared__ double parts[3 * kThreads];
  parts[3 * threadIdx.x] = mine.hi;
  parts[3 * threadIdx.x + 1] = mine.lo;
  parts[3 * threadIdx.x + 2] = mine.bound;
  __syncthreads();
  ExactSum all;
  for (int t = 0; t < kThreads; ++t) {
    ExactSum part;
    part.hi = parts[3 * t];
    part.lo = parts[3 * t + 1];
    part.bound = parts[3 * t + 2];
    exact_add(&all, part);
  }
  __syncthreads();
  return all;
}

FR_NS_END
