// Interval products of small batches and the elementwise passes on CUDA.
#include "bounds/formulas.h"
#include "bounds/kernels.h"
#include "runtime/cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kExamples = 8;  // examples a warp serves with one read of a row of W

__global__ void __launch_bounds__(kThreads) interval_kernel(IntervalArgs g) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kExamples;
  const int count = static_cast<int>(g.batch - first < kExamples ? g.batch - first : kExamples);
  for (int64_t j = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; j < g.m;
       j += static_cast<int64_t>(gridDim.x) * kWarps) {
    float mid[kExamples] = {}, reach[kExamples] = {};
    for (int64_t k = lane; k < g.n; k += kWarp) {
      const float w = g.weight[j * g.n + k], a = vabs(w);
#pragma unroll
      for (int e = 0; e < kExamples; ++e) {
        if (e >= count) break;
        mid[e] = fmaf(w, g.center[(first + e) * g.n + k], mid[e]);
        reach[e] = fmaf(a, g.radius[(g.shared ? 0 : first + e) * g.n + k], reach[e]);
      }
    }
    for (int e = 0; e < count; ++e) {
      float x = static_cast<float>(warp_sum(static_cast<double>(mid[e]))) + (g.bias != nullptr ? g.bias[j] : 0.f);
      float y = static_cast<float>(warp_sum(static_cast<double>(reach[e])));
      if (g.finish == Finish::ends) from_center(x, y);
      if (g.finish == Finish::relu_center) relu_center(x, y);
      if (lane == 0) {
        g.out_a[(first + e) * g.m + j] = x;
        g.out_b[(first + e) * g.m + j] = y;
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) interval_step_kernel(IntervalStepArgs g) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < g.count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    float a = g.a[i], b = g.b != nullptr ? g.b[i] : g.eps_value;
    interval_step(g, a, b);
    g.out_a[i] = a;
    g.out_b[i] = b;
  }
}

dim3 grid_of(int64_t count) {
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  return dim3(static_cast<unsigned>(blocks < 65535 * 16 ? blocks : 65535 * 16));
}

}  // namespace
FR_NS_END

namespace fastrobust {

void interval_cuda(const IntervalArgs& g, void* stream) {
  if (g.batch * g.m == 0) return;
  const int64_t groups = (g.batch + kExamples - 1) / kExamples;
  const dim3 grid(static_cast<unsigned>((g.m + kWarps - 1) / kWarps), static_cast<unsigned>(groups));
  FR_LAUNCH(interval_kernel, grid, dim3(kThreads), 0, stream, g);
}
void interval_step_cuda(const IntervalStepArgs& g, void* stream) {
  if (g.count > 0) FR_LAUNCH(interval_step_kernel, grid_of(g.count), dim3(kThreads), 0, stream, g);
}

}  // namespace fastrobust
