// The L1 step and projection on CUDA: one block an example, which bisects by block-wide sums.
#include "pgd/kernels.h"
#include "pgd/rows_cuda.h"
#include "pgd/step.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 512;

// One example, as l1_threshold and l1_lambda want it; every thread gets the same answers.
template <GradType T, bool kWide>
struct BlockRow {
  const StepArgs& a;
  int64_t base;
  GradReader<T> g;

  // Sums in the order of a plain loop over the threads (see each_in_order).
  template <int kTerms, class Natural, class Add>
  __device__ __forceinline__ void each_term(Natural natural, Add add) const {
    each_in_order<kWide, kUnit<T>, kTerms, kThreads, kThreads>(0, a.n, natural, add);
  }
  template <class Body>
  __device__ __forceinline__ void each(Body body) const {
    each_element<kWide, kUnit<T>>(a.n, 0, threadIdx.x, kThreads, body);
  }

  __device__ double spent(float threshold) const {
    double s = 0.;
    each_term<1>(
        [&](auto i, auto& t) {
          const auto x = load_at(a.x + base, i), gi = grad_at(g, i);
          for (int k = 0; k < i.count; ++k) {
            const float c = clean_grad(gi.v[k]);
            t.v[0][k] = vabs(c) > threshold ? l1_headroom(x.v[k], c, a.lo, a.hi) : 0.f;
          }
        },
        [&](const float* t) { s += t[0]; });
    return block_sum(s);
  }
  // What sparse_threshold asks; a sum of ones is exact.
  __device__ int64_t at_least(float threshold) const {
    double s = 0.;
    each([&](auto i) {
      const auto gi = grad_at(g, i);
      for (int k = 0; k < i.count; ++k) s += vabs(clean_grad(gi.v[k])) >= threshold ? 1. : 0.;
    });
    return static_cast<int64_t>(block_sum(s));
  }
  __device__ float top() const {
    float t = 0.f;
    each([&](auto i) {
      const auto gi = grad_at(g, i);
      for (int k = 0; k < i.count; ++k) t = vmax(t, vabs(clean_grad(gi.v[k])));
    });
    return block_max(t);
  }
  __device__ L1Lengths lengths(float lambda) const {
    double total = 0., slope = 0.;
    each_term<2>(
        [&](auto i, auto& t) {
          const auto x0 = load_at(a.x0 + base, i), y = load_at(a.out + base, i);
          for (int k = 0; k < i.count; ++k) {
            const float d = y.v[k] - x0.v[k], room = l1_room(d, x0.v[k], a.lo, a.hi),
                        length = l1_length(d, room, lambda);
            t.v[0][k] = length;
            t.v[1][k] = length > 0.f && length < room ? 1.f : 0.f;
          }
        },
        [&](const float* t) {
          total += t[0];
          slope += t[1];
        });
    total = block_sum(total);
    return {total, block_sum(slope)};
  }
  __device__ bool inside(float eps) const {
    ExactSum s;
    float outside = 0.f;
    each_term<2>(
        [&](auto i, auto& t) {
          const auto x0 = load_at(a.x0 + base, i), y = load_at(a.out + base, i);
          for (int k = 0; k < i.count; ++k) {
            t.v[0][k] = y.v[k];
            t.v[1][k] = x0.v[k];
          }
        },
        [&](const float* t) {
          exact_add(&s, t[0], t[1], false);
          if (!(t[0] >= a.lo && t[0] <= a.hi)) outside = 1.f;
        });
    return block_max(outside) == 0.f && exact_inside(block_exact_sum<kThreads>(s), eps, false);
  }
  __device__ float top_distance() const {
    float t = 0.f;
    each([&](auto i) {
      const auto x0 = load_at(a.x0 + base, i), y = load_at(a.out + base, i);
      for (int k = 0; k < i.count; ++k) t = vmax(t, vabs(y.v[k] - x0.v[k]));
    });
    return block_max(t);
  }

  // Threads move what lies above the threshold; what lies at it shares the rest in index order, which is one thread's
  // work, done only for the stretches that have any.
  __device__ void ascend(float step) const {
    constexpr int64_t kStretch = 8 * kThreads;
    double moved = 0.;
    const float threshold = l1_threshold(*this, step, &moved);
    double left = step - moved;
    for (int64_t start = 0; start < a.n; start += kStretch) {
      const int64_t size = start + kStretch < a.n ? kStretch : a.n - start;
      const GradReader<T> from(a.grad, base + start);
      float ties = 0.f;
      each_element<kWide, kUnit<T>>(size, 0, threadIdx.x, kThreads, [&](auto i) {
        const auto gi = grad_at(from, i);
        auto x = load_at(a.x + base + start, i);
        for (int k = 0; k < i.count; ++k) {
          const float c = clean_grad(gi.v[k]);
          if (vabs(c) == threshold && vabs(c) > 0.f) ties = 1.f;
          if (vabs(c) > threshold) x.v[k] = l1_to_face(x.v[k], c, a.lo, a.hi);
        }
        store_at(a.out + base + start, i, x);
      });
      if (block_max(ties) > 0.f && threadIdx.x == 0) {
        for (int64_t k = start; k < start + size; ++k) {
          const float c = clean_grad(g.at(k));
          if (vabs(c) != threshold) continue;
          a.out[base + k] = left > 0. ? l1_take(a.x[base + k], c, a.lo, a.hi, &left) : a.x[base + k];
        }
      }
    }
  }
};

template <GradType T, bool kWide>
__device__ __forceinline__ void project_out(const StepArgs& a, const BlockRow<T, kWide>& r, float eps) {
  const float lambda = l1_lambda(r, eps);
  r.each([&](auto i) {
    const auto x0 = load_at(a.x0 + r.base, i);
    auto y = load_at(a.out + r.base, i);
    for (int k = 0; k < i.count; ++k) y.v[k] = l1_project(y.v[k], x0.v[k], lambda, a.lo, a.hi);
    store_at(a.out + r.base, i, y);
  });
}

// Auto-PGD's step: sparse, projected, and with momentum averaged and projected again.
template <GradType T, bool kWide>
__global__ void __launch_bounds__(kThreads, 1) apgd_l1_kernel(StepArgs a) {
  for (int64_t row = blockIdx.x; row < a.batch; row += gridDim.x) {
    const BlockRow<T, kWide> r{a, row * a.n, GradReader<T>(a.grad, row * a.n)};
    int64_t count = 0;
    const float threshold = sparse_threshold(r, a.keep == nullptr ? a.n : a.keep[row], &count),
                share = sparse_share(count), step = param_at(a.step, row, a.n, 0);
    r.each([&](auto i) {
      auto x = load_at(a.x + r.base, i);
      const auto gi = grad_at(r.g, i);
      for (int k = 0; k < i.count; ++k) x.v[k] = sparse_ascend(x.v[k], clean_grad(gi.v[k]), threshold, share, step);
      store_at(a.out + r.base, i, x);
    });
    for (int pass = 0; pass < (a.momentum == 1.f ? 1 : 2); ++pass) {
      if (pass > 0)
        r.each([&](auto i) {
          const auto x = load_at(a.x + r.base, i), before = load_at(a.previous + r.base, i);
          auto z = load_at(a.out + r.base, i);
          for (int k = 0; k < i.count; ++k) z.v[k] = averaged(x.v[k], before.v[k], z.v[k], a.momentum, a.rest);
          store_at(a.out + r.base, i, z);
        });
      __syncthreads();
      project_out(a, r, param_at(a.eps, row, a.n, 0));
    }
  }
}

template <GradType T, bool kWide>
__global__ void __launch_bounds__(kThreads, 1) l1_kernel(StepArgs a) {
  for (int64_t row = blockIdx.x; row < a.batch; row += gridDim.x) {
    const BlockRow<T, kWide> r{a, row * a.n, GradReader<T>(a.grad, row * a.n)};
    const bool move = a.active == nullptr || a.active[row] != 0;
    if (T == GradType::none || !move) {
      r.each([&](auto i) { store_at(a.out + r.base, i, load_at(a.x + r.base, i)); });
    } else {
      r.ascend(param_at(a.step, row, a.n, 0));
    }
    __syncthreads();
    if (!move) continue;
    project_out(a, r, param_at(a.eps, row, a.n, 0));
  }
}

template <GradType T>
void launch(const StepArgs& a, void* stream) {
  const unsigned blocks = static_cast<unsigned>(a.batch < 0x7fffffff ? a.batch : 0x7fffffff);
  if constexpr (T != GradType::none) {
    if (a.previous != nullptr) {
      if (addresses_of(a).whole(a.n))
        FR_LAUNCH((apgd_l1_kernel<T, true>), blocks, kThreads, 0, stream, a);
      else
        FR_LAUNCH((apgd_l1_kernel<T, false>), blocks, kThreads, 0, stream, a);
      return;
    }
  }
  if (addresses_of(a).whole(a.n))
    FR_LAUNCH((l1_kernel<T, true>), blocks, kThreads, 0, stream, a);
  else
    FR_LAUNCH((l1_kernel<T, false>), blocks, kThreads, 0, stream, a);
}

}  // namespace
FR_NS_END

namespace fastrobust {

void l1_cuda(const StepArgs& a, void* stream) {
  if (a.batch * a.n == 0) return;
  with_grad_type(a.grad_type, [&](auto type) { launch<decltype(type)::value>(a, stream); });
}

}  // namespace fastrobust
