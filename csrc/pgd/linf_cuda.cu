// L-inf step and projection on CUDA: one pass, eight elements a thread by 16-byte accesses where the addresses allow.
#include "pgd/kernels.h"
#include "pgd/rows_cuda.h"
#include "pgd/step.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 256;

// grid: x covers an example's elements, y the examples.
template <GradType T, bool kWide>
__global__ void __launch_bounds__(kThreads) linf_kernel(StepArgs a, int shift) {
  for (int64_t row = blockIdx.y; row < a.batch; row += gridDim.y) {
    const int64_t base = row * a.n;
    const bool move = a.active == nullptr || a.active[row] != 0;
    if (!move && a.out == a.x) continue;
    const GradReader<T> g(a.grad, base);
    const StepRow at(a, row);
    each_element<kWide, kUnit<T>>(a.n, shift + base, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                                  static_cast<int64_t>(gridDim.x) * kThreads, [&](auto i) {
                                    const auto x = load_at(a.x + base, i);
                                    if (!move) return store_at(a.out + base, i, x);
                                    store_at(a.out + base, i, at.linf(x, load_at(a.x0 + base, i), grad_at(g, i), i));
                                  });
  }
}

template <GradType T, bool kWide>
__global__ void __launch_bounds__(kThreads) apgd_linf_kernel(StepArgs a, int shift) {
  for (int64_t row = blockIdx.y; row < a.batch; row += gridDim.y) {
    const int64_t base = row * a.n;
    const GradReader<T> g(a.grad, base);
    const StepRow at(a, row);
    each_element<kWide, kUnit<T>>(a.n, shift + base, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                                  static_cast<int64_t>(gridDim.x) * kThreads, [&](auto i) {
                                    const auto x = load_at(a.x + base, i), before = load_at(a.previous + base, i);
                                    const auto x0 = load_at(a.x0 + base, i);
                                    store_at(a.out + base, i, at.apgd(a, x, before, x0, grad_at(g, i), i));
                                  });
  }
}

template <GradType T>
void launch(const StepArgs& a, void* stream) {
  const Addresses lie = addresses_of(a);
  const int64_t per_block = 8 * kThreads, blocks = (a.n + per_block - 1) / per_block;
  const dim3 grid(static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff), grid_y(a.batch));
  if constexpr (T != GradType::none) {
    if (a.previous != nullptr && a.momentum != 1.f) {
      if (lie.aligned)
        FR_LAUNCH((apgd_linf_kernel<T, true>), grid, kThreads, 0, stream, a, lie.shift);
      else
        FR_LAUNCH((apgd_linf_kernel<T, false>), grid, kThreads, 0, stream, a, 0);
      return;
    }
  }
  if (lie.aligned)
    FR_LAUNCH((linf_kernel<T, true>), grid, kThreads, 0, stream, a, lie.shift);
  else
    FR_LAUNCH((linf_kernel<T, false>), grid, kThreads, 0, stream, a, 0);
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
