#include "pgd/kernels.h"
#include "pgd/load.h"
#include "pgd/random_start.h"
#include "runtime/cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 256;

// A thread draws the four elements of one counter block. grid: x covers an example, y the examples.
#define FR_EACH_FOUR(a)                                                                          \
  for (int64_t row = blockIdx.y; row < (a).batch; row += gridDim.y)                              \
    for (int64_t i = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x); i < (a).n; \
         i += 4 * static_cast<int64_t>(gridDim.x) * kThreads)

__global__ void __launch_bounds__(kThreads) linf_kernel(RandomStartArgs a) {
  FR_EACH_FOUR(a) {
    const Philox4 p =
        philox(a.seed, kStreamElements, static_cast<uint32_t>(a.first_example + row), static_cast<uint64_t>(i / 4));
    for (int k = 0; k < 4 && i + k < a.n; ++k) {
      const int64_t j = row * a.n + i + k;
      a.out[j] = random_linf(a.x0[j], param_at(a.eps, row, a.n, i + k), a.lo, a.hi, uniform_half_open(p.r[k]));
    }
  }
}

// Sums are integers: the order in which threads add them does not matter.
__global__ void __launch_bounds__(kThreads) ball_sum_kernel(RandomStartArgs a, unsigned long long* sums) {
  const bool l2 = a.norm == Norm::l2;
  FR_EACH_FOUR(a) {
    const Philox4 p =
        philox(a.seed, kStreamElements, static_cast<uint32_t>(a.first_example + row), static_cast<uint64_t>(i / 4));
    const Normal2 first = random_ball2(p.r[0], p.r[1], l2), second = random_ball2(p.r[2], p.r[3], l2);
    const float t[4] = {first.a, first.b, second.a, second.b};
    int64_t s = 0;
    for (int k = 0; k < 4 && i + k < a.n; ++k) {
      s += ball_term(t[k], l2);
      a.out[row * a.n + i + k] = t[k];
    }
    atomicAdd(&sums[row], static_cast<unsigned long long>(s));
  }
}
__global__ void __launch_bounds__(kThreads) ball_write_kernel(RandomStartArgs a, const unsigned long long* sums) {
  const bool l2 = a.norm == Norm::l2;
  FR_EACH_FOUR(a) {
    const float scale = ball_scale(static_cast<int64_t>(sums[row]), param_at(a.eps, row, a.n, 0), l2, a.seed,
                                   static_cast<uint32_t>(a.first_example + row));
    for (int k = 0; k < 4 && i + k < a.n; ++k) {
      const int64_t j = row * a.n + i + k;
      a.out[j] = random_ball(a.x0[j], a.out[j], scale, a.lo, a.hi);
    }
  }
}

}  // namespace
FR_NS_END

namespace fastrobust {

void random_start_cuda(const RandomStartArgs& a, int64_t* workspace, void* stream) {
  if (a.batch * a.n == 0) return;
  const int64_t blocks = (a.n + 4 * kThreads - 1) / (4 * kThreads);
  const dim3 grid(static_cast<unsigned>(blocks < 65536 ? blocks : 65536), grid_y(a.batch));
  if (a.norm == Norm::linf) {
    FR_LAUNCH(linf_kernel, grid, kThreads, 0, stream, a);
    return;
  }
  unsigned long long* sums = reinterpret_cast<unsigned long long*>(workspace);
  FR_CUDA_CHECK(
      cudaMemsetAsync(sums, 0, static_cast<size_t>(a.batch) * sizeof(*sums), static_cast<cudaStream_t>(stream)));
  FR_LAUNCH(ball_sum_kernel, grid, kThreads, 0, stream, a, sums);
  FR_LAUNCH(ball_write_kernel, grid, kThreads, 0, stream, a, sums);
}

}  // namespace fastrobust
