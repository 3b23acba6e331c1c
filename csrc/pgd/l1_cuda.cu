// The L1 step and projection on CUDA: one block an example, which bisects by block-wide sums.
#include "pgd/kernels.h"
#include "pgd/load.h"
#include "pgd/rows_cuda.h"
#include "pgd/step.h"
#include "runtime/cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 512;

// One example, as l1_threshold and l1_lambda want it; every thread gets the same answers.
template <GradType T>
struct BlockRow {
  const StepArgs& a;
  int64_t base;
  GradReader<T> g;

  __device__ double spent(float threshold) const {
    double s = 0.;
    for (int64_t i = threadIdx.x; i < a.n; i += kThreads) {
      const float gi = clean_grad(g.at(i));
      if (vabs(gi) > threshold) s += l1_headroom(a.x[base + i], gi, a.lo, a.hi);
    }
    return block_sum(s);
  }
  __device__ float top() const {
    float t = 0.f;
    for (int64_t i = threadIdx.x; i < a.n; i += kThreads) t = vmax(t, vabs(clean_grad(g.at(i))));
    return block_max(t);
  }
  __device__ L1Lengths lengths(float lambda) const {
    double total = 0., slope = 0.;
    for (int64_t i = threadIdx.x; i < a.n; i += kThreads) {
      const float x0 = a.x0[base + i], d = a.out[base + i] - x0;
      const float room = l1_room(d, x0, a.lo, a.hi), length = l1_length(d, room, lambda);
      total += length;
      slope += length > 0.f && length < room ? 1. : 0.;
    }
    total = block_sum(total);
    return {total, block_sum(slope)};
  }
  __device__ bool inside(float eps) const {
    ExactSum s;
    float outside = 0.f;
    for (int64_t i = threadIdx.x; i < a.n; i += kThreads) {
      const float y = a.out[base + i];
      exact_add(&s, y, a.x0[base + i], false);
      if (!(y >= a.lo && y <= a.hi)) outside = 1.f;
    }
    return block_max(outside) == 0.f && exact_inside(block_exact_sum<kThreads>(s), eps, false);
  }
  __device__ float top_distance() const {
    float t = 0.f;
    for (int64_t i = threadIdx.x; i < a.n; i += kThreads) t = vmax(t, vabs(a.out[base + i] - a.x0[base + i]));
    return block_max(t);
  }

  // Threads move what lies above the threshold; what lies at it shares the rest in index order, which is one thread's
  // work, done only for the stretches that have any.
  __device__ void ascend(float step) const {
    double moved = 0.;
    const float threshold = l1_threshold(*this, step, &moved);
    double left = step - moved;
    for (int64_t start = 0; start < a.n; start += kThreads) {
      const int64_t i = start + threadIdx.x;
      const float gi = i < a.n ? clean_grad(g.at(i)) : 0.f, size = vabs(gi);
      const bool tie = size == threshold && size > 0.f;
      if (i < a.n && !tie)
        a.out[base + i] = size > threshold ? l1_to_face(a.x[base + i], gi, a.lo, a.hi) : a.x[base + i];
      if (block_max(tie ? 1.f : 0.f) > 0.f && threadIdx.x == 0) {
        for (int64_t k = start; k < start + kThreads && k < a.n; ++k) {
          const float gk = clean_grad(g.at(k));
          if (vabs(gk) != threshold) continue;
          a.out[base + k] = left > 0. ? l1_take(a.x[base + k], gk, a.lo, a.hi, &left) : a.x[base + k];
        }
      }
    }
  }
};

template <GradType T>
__global__ void __launch_bounds__(kThreads) l1_kernel(StepArgs a) {
  for (int64_t row = blockIdx.x; row < a.batch; row += gridDim.x) {
    const BlockRow<T> r{a, row * a.n, GradReader<T>(a.grad, row * a.n)};
    const bool move = a.active == nullptr || a.active[row] != 0;
    if (T == GradType::none || !move) {
      for (int64_t i = threadIdx.x; i < a.n; i += kThreads) a.out[r.base + i] = a.x[r.base + i];
    } else {
      r.ascend(param_at(a.step, row, a.n, 0));
    }
    __syncthreads();
    if (!move) continue;
    const float lambda = l1_lambda(r, param_at(a.eps, row, a.n, 0));
    for (int64_t i = threadIdx.x; i < a.n; i += kThreads)
      a.out[r.base + i] = l1_project(a.out[r.base + i], a.x0[r.base + i], lambda, a.lo, a.hi);
  }
}

template <GradType T>
void launch(const StepArgs& a, void* stream) {
  FR_LAUNCH(l1_kernel<T>, static_cast<unsigned>(a.batch < 0x7fffffff ? a.batch : 0x7fffffff), kThreads, 0, stream, a);
}

}  // namespace
FR_NS_END

namespace fastrobust {

void l1_cuda(const StepArgs& a, void* stream) {
  if (a.batch * a.n == 0) return;
  with_grad_type(a.grad_type, [&](auto type) { launch<decltype(type)::value>(a, stream); });
}

}  // namespace fastrobust
