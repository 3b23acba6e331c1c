// L-inf step and projection on CUDA: one pass, four elements a thread, 16-byte accesses where the addresses allow.
#include "pgd/kernels.h"
#include "pgd/load.h"
#include "pgd/step.h"
#include "runtime/cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 256;
constexpr int kPerBlock = 4 * kThreads * 2;

struct Four {
  float v[4];
};
__device__ __forceinline__ Four load4(const float* p) {
  const float4 q = *reinterpret_cast<const float4*>(p);
  return {{q.x, q.y, q.z, q.w}};
}
__device__ __forceinline__ void store4(float* p, const Four& f) {
  *reinterpret_cast<float4*>(p) = make_float4(f.v[0], f.v[1], f.v[2], f.v[3]);
}
template <GradType T>
__device__ __forceinline__ Four load_grad4(const GradReader<T>& g, int64_t i) {
  if constexpr (T == GradType::f32) {
    return load4(g.p + i);
  } else if constexpr (T == GradType::none) {
    return {{0.f, 0.f, 0.f, 0.f}};
  } else {  // four 16-bit numbers in one 8-byte load
    const uint2 q = *reinterpret_cast<const uint2*>(g.p + i);
    const uint16_t h[4] = {static_cast<uint16_t>(q.x & 0xffff), static_cast<uint16_t>(q.x >> 16),
                           static_cast<uint16_t>(q.y & 0xffff), static_cast<uint16_t>(q.y >> 16)};
    Four f;
    for (int k = 0; k < 4; ++k) f.v[k] = T == GradType::f16 ? half_to_float(h[k]) : bfloat_to_float(h[k]);
    return f;
  }
}

// grid: x covers an example's elements, y the examples.
template <GradType T, bool kAligned>
__global__ void __launch_bounds__(kThreads) linf_kernel(StepArgs a) {
  for (int64_t row = blockIdx.y; row < a.batch; row += gridDim.y) {
    const int64_t base = row * a.n;
    const bool move = a.active == nullptr || a.active[row] != 0;
    if (!move && a.out == a.x) continue;
    const GradReader<T> g(a.grad, base);
    const bool step_each = a.step.per == Per::element, eps_each = a.eps.per == Per::element;
    const float step_all = step_each ? 0.f : param_at(a.step, row, a.n, 0);
    const float eps_all = eps_each ? 0.f : param_at(a.eps, row, a.n, 0);
    for (int64_t i = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x); i < a.n;
         i += 4 * static_cast<int64_t>(gridDim.x) * kThreads) {
      if (kAligned) {
        const Four x = load4(a.x + base + i);
        if (!move) {
          store4(a.out + base + i, x);
          continue;
        }
        const Four x0 = load4(a.x0 + base + i), gv = load_grad4<T>(g, i);
        const Four step = step_each ? load4(a.step.data + base + i) : Four{{step_all, step_all, step_all, step_all}};
        const Four eps = eps_each ? load4(a.eps.data + base + i) : Four{{eps_all, eps_all, eps_all, eps_all}};
        Four y;
        for (int k = 0; k < 4; ++k)
          y.v[k] = linf_project(linf_ascend(x.v[k], gv.v[k], step.v[k]), x0.v[k], eps.v[k], a.lo, a.hi);
        store4(a.out + base + i, y);
      } else {
        for (int64_t k = i; k < i + 4 && k < a.n; ++k) {
          const float x = a.x[base + k];
          const float step = step_each ? a.step.data[base + k] : step_all,
                      eps = eps_each ? a.eps.data[base + k] : eps_all;
          a.out[base + k] = move ? linf_project(linf_ascend(x, g.at(k), step), a.x0[base + k], eps, a.lo, a.hi) : x;
        }
      }
    }
  }
}

template <GradType T>
void launch(const StepArgs& a, void* stream) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.x0) |
                        reinterpret_cast<uintptr_t>(a.out) |
                        (a.step.per == Per::element ? reinterpret_cast<uintptr_t>(a.step.data) : 0) |
                        (a.eps.per == Per::element ? reinterpret_cast<uintptr_t>(a.eps.data) : 0);
  const uintptr_t grad = reinterpret_cast<uintptr_t>(a.grad);
  const bool aligned = all % 16 == 0 && grad % (T == GradType::f32 ? 16 : 8) == 0 && a.n % 4 == 0;
  const int64_t blocks = (a.n + kPerBlock - 1) / kPerBlock;
  const dim3 grid(static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff), grid_y(a.batch));
  if (aligned)
    FR_LAUNCH((linf_kernel<T, true>), grid, kThreads, 0, stream, a);
  else
    FR_LAUNCH((linf_kernel<T, false>), grid, kThreads, 0, stream, a);
}

}  // namespace
FR_NS_END

namespace fastrobust {

void linf_cuda(const StepArgs& given, void* stream) {
  StepArgs a = given;
  if (a.batch * a.n == 0) return;
  if (a.step.per != Per::example && a.eps.per != Per::example && a.active == nullptr) {
    a.n *= a.batch;
    a.batch = 1;
  }
  with_grad_type(a.grad_type, [&](auto type) { launch<decltype(type)::value>(a, stream); });
}

}  // namespace fastrobust
