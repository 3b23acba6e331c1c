// A thread draws the four elements of one counter block. grid: x covers an example, y the examples.
#include "pgd/kernels.h"
#include "pgd/load.h"
#include "pgd/random_start.h"
#include "runtime/wide_cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 256;

// body(row, first element): four at a time.
template <class Body>
__device__ __forceinline__ void each_four(const RandomStartArgs& a, Body body) {
  for (int64_t row = blockIdx.y; row < a.batch; row += gridDim.y)
    for (int64_t i = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x); i < a.n;
         i += 4 * static_cast<int64_t>(gridDim.x) * kThreads)
      body(row, i);
}
// part(place, k) for Four with kWide, else for One after the other; k: of the first among the four
template <bool kWide, class Part>
__device__ __forceinline__ void in_parts(int64_t n, int64_t i, Part part) {
  if constexpr (kWide) {
    part(Four{i}, 0);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (i + k < n) part(One{i + k}, k);
  }
}
__device__ __forceinline__ Philox4 draw(const RandomStartArgs& a, int64_t row, int64_t i) {
  return philox(a.seed, kStreamElements, example_of(a, row), static_cast<uint64_t>(i / 4));
}

template <bool kWide>
__global__ void __launch_bounds__(kThreads) linf_kernel(RandomStartArgs a) {
  const bool each = a.eps.per == Per::element;
  each_four(a, [&](int64_t row, int64_t i) {
    const int64_t base = row * a.n;
    const float eps_all = each ? 0.f : param_at(a.eps, row, a.n, 0);
    const Philox4 p = draw(a, row, i);
    in_parts<kWide>(a.n, i, [&](auto at, int first) {
      auto x = load_at(a.x0 + base, at);
      const auto eps = load_or(a.eps.data + base, each, eps_all, at);
      for (int k = 0; k < at.count; ++k)
        x.v[k] = random_linf(x.v[k], eps.v[k], a.lo, a.hi, uniform_half_open(p.r[first + k]));
      store_at(a.out + base, at, x);
    });
  });
}

// Sums are integers: the order in which threads add them does not matter.
template <bool kWide>
__global__ void __launch_bounds__(kThreads) ball_sum_kernel(RandomStartArgs a, unsigned long long* sums) {
  const bool l2 = a.norm == Norm::l2;
  each_four(a, [&](int64_t row, int64_t i) {
    const Philox4 p = draw(a, row, i);
    const Normal2 one = random_ball2(p.r[0], p.r[1], l2), two = random_ball2(p.r[2], p.r[3], l2);
    const float t[4] = {one.a, one.b, two.a, two.b};
    int64_t s = 0;
    in_parts<kWide>(a.n, i, [&](auto at, int first) {
      Values<float, decltype(at)::count> v;
      for (int k = 0; k < at.count; ++k) {
        v.v[k] = t[first + k];
        s += ball_term(v.v[k], l2);
      }
      store_at(a.out + row * a.n, at, v);
    });
    atomicAdd(&sums[row], static_cast<unsigned long long>(s));
  });
}
template <bool kWide>
__global__ void __launch_bounds__(kThreads) ball_write_kernel(RandomStartArgs a, const unsigned long long* sums) {
  const bool l2 = a.norm == Norm::l2;
  each_four(a, [&](int64_t row, int64_t i) {
    const int64_t base = row * a.n;
    const float scale =
        ball_scale(static_cast<int64_t>(sums[row]), param_at(a.eps, row, a.n, 0), l2, a.seed, example_of(a, row));
    in_parts<kWide>(a.n, i, [&](auto at, int) {
      auto x = load_at(a.x0 + base, at);
      const auto t = load_at(a.out + base, at);
      for (int k = 0; k < at.count; ++k) x.v[k] = random_ball(x.v[k], t.v[k], scale, a.lo, a.hi);
      store_at(a.out + base, at, x);
    });
  });
}

template <bool kWide>
void launch(const RandomStartArgs& a, int64_t* workspace, void* stream) {
  const int64_t blocks = (a.n + 4 * kThreads - 1) / (4 * kThreads);
  const dim3 grid(static_cast<unsigned>(blocks < 65536 ? blocks : 65536), grid_y(a.batch));
  if (a.norm == Norm::linf) {
    FR_LAUNCH(linf_kernel<kWide>, grid, kThreads, 0, stream, a);
    return;
  }
  unsigned long long* sums = reinterpret_cast<unsigned long long*>(workspace);
  FR_CUDA_CHECK(
      cudaMemsetAsync(sums, 0, static_cast<size_t>(a.batch) * sizeof(*sums), static_cast<cudaStream_t>(stream)));
  FR_LAUNCH(ball_sum_kernel<kWide>, grid, kThreads, 0, stream, a, sums);
  FR_LAUNCH(ball_write_kernel<kWide>, grid, kThreads, 0, stream, a, sums);
}

}  // namespace
FR_NS_END

namespace fastrobust {

void random_start_cuda(const RandomStartArgs& a, int64_t* workspace, void* stream) {
  if (a.batch * a.n == 0) return;
  Addresses lie;
  lie.add(a.x0).add(a.out).add(a.eps.per == Per::element ? a.eps.data : nullptr);
  lie.whole(a.n) ? launch<true>(a, workspace, stream) : launch<false>(a, workspace, stream);
}

}  // namespace fastrobust
