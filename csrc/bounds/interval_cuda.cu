// Interval products of small batches and the elementwise passes on CUDA.
#include "bounds/formulas.h"
#include "bounds/kernels.h"
#include "runtime/wide_cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kExamples = 8;  // examples a warp serves with one read of a row of W
constexpr int kTile = 256;    // columns at a time

// `rows` rows of kTile columns from `column` on into shared memory, by `threads` threads. What lies beyond the matrix
// of n columns is left as it is.
template <bool kWide>
__device__ __forceinline__ void stage(const float* p, int rows, int64_t n, int64_t column, float (*to)[kTile],
                                      int thread, int threads) {
  constexpr int kEach = kWide ? 4 : 1, kPieces = kTile / kEach;
#pragma unroll 2
  for (int i = thread; i < rows * kPieces; i += threads) {
    const int row = i / kPieces, at = i % kPieces * kEach;
    if (column + at >= n) continue;
    const float* const from = p + row * n + column + at;
    if constexpr (kWide) {
      const Values<float, 4> v = load_wide<4, Use::again>(from);
      *reinterpret_cast<float4*>(&to[row][at]) = make_float4(v.v[0], v.v[1], v.v[2], v.v[3]);
    } else {
      to[row][at] = *from;
    }
  }
}

// The warps of a block take a row of W each, for the same examples. A lane adds columns lane, lane + 32, ...
template <bool kWide>
__global__ void __launch_bounds__(kThreads, 3) interval_kernel(IntervalArgs g) {
  __shared__ __align__(16) float center[kExamples][kTile], radius[kExamples][kTile], weight[kWarps][kTile];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kExamples;
  const int count = static_cast<int>(g.batch - first < kExamples ? g.batch - first : kExamples);
  for (int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps; block < g.m;
       block += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t j = block + warp;
    float mid[kExamples] = {}, reach[kExamples] = {};
    for (int64_t column = 0; column < g.n; column += kTile) {
      const int thread = static_cast<int>(threadIdx.x);
      __syncthreads();
      stage<kWide>(g.center + first * g.n, count, g.n, column, center, thread, kThreads);
      stage<kWide>(g.radius + (g.shared ? 0 : first * g.n), g.shared ? 1 : count, g.n, column, radius, thread,
                   kThreads);
      if (j < g.m) stage<kWide>(g.weight + j * g.n, 1, g.n, column, weight + warp, lane, kWarp);
      __syncthreads();
#pragma unroll 2
      for (int k = lane; k < kTile && column + k < g.n; k += kWarp) {
        const float w = weight[warp][k], a = vabs(w);
#pragma unroll
        for (int e = 0; e < kExamples; ++e) {
          if (e >= count) break;
          mid[e] = fmaf(w, center[e][k], mid[e]);
          reach[e] = fmaf(a, radius[g.shared ? 0 : e][k], reach[e]);
        }
      }
    }
    if (j >= g.m) continue;
#pragma unroll
    for (int e = 0; e < kExamples; ++e) {
      if (e >= count) break;
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

template <bool kWide>
__global__ void __launch_bounds__(kThreads) interval_step_kernel(IntervalStepArgs g, int shift) {
  each_element<kWide, 4>(g.count, shift, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                         static_cast<int64_t>(gridDim.x) * kThreads, [&](auto i) {
                           auto a = load_at(g.a, i), b = load_or(g.b, g.b != nullptr, g.eps_value, i);
                           for (int k = 0; k < i.count; ++k) interval_step(g, a.v[k], b.v[k]);
                           store_at(g.out_a, i, a);
                           store_at(g.out_b, i, b);
                         });
}

}  // namespace
FR_NS_END

namespace fastrobust {

void interval_cuda(const IntervalArgs& g, void* stream) {
  if (g.batch * g.m == 0) return;
  const int64_t groups = (g.batch + kExamples - 1) / kExamples;
  const dim3 grid(static_cast<unsigned>((g.m + kWarps - 1) / kWarps), static_cast<unsigned>(groups));
  if (Addresses().add(g.weight).add(g.center).add(g.radius).whole(g.n))
    FR_LAUNCH(interval_kernel<true>, grid, dim3(kThreads), 0, stream, g);
  else
    FR_LAUNCH(interval_kernel<false>, grid, dim3(kThreads), 0, stream, g);
}
void interval_step_cuda(const IntervalStepArgs& g, void* stream) {
  if (g.count == 0) return;
  const Addresses lie = Addresses().add(g.a).add(g.b).add(g.out_a).add(g.out_b);
  const dim3 grid(blocks_of(g.count, 8 * kThreads));
  if (lie.aligned)
    FR_LAUNCH(interval_step_kernel<true>, grid, dim3(kThreads), 0, stream, g, lie.shift);
  else
    FR_LAUNCH(interval_step_kernel<false>, grid, dim3(kThreads), 0, stream, g, 0);
}

}  // namespace fastrobust
