// Copies feature maps between layouts on CUDA: one thread per element of the destination.
#include "binary/kernels.h"
#include "binary/layout.h"
#include "runtime/cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 256;

// Every float of every plane of a fast layout, borders and missing images with zeros.
__global__ void __launch_bounds__(kThreads) fill_kernel(RelayoutArgs a, int64_t total) {
  const Layout& d = a.to;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t block = i / d.block, in_block = i % d.block, phase = in_block / d.phase;
    const int64_t in_phase = in_block % d.phase, c = in_phase / a.plane, p = in_phase % a.plane - d.origin;
    float value = 0.f;
    if (p >= 0) {
      const int64_t n = block * d.lanes + p % d.lanes;
      const int64_t y = p / d.row * d.phases_h + phase / d.phases_w;
      const int64_t x = p % d.row / d.col * d.phases_w + phase % d.phases_w;
      if (n < a.batch && y < a.height && x < a.width) value = a.src[address(a.from, n, c, y, x)];
    }
    a.dst[i] = value;
  }
}

__global__ void __launch_bounds__(kThreads) copy_kernel(RelayoutArgs a, int64_t total) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t x = i % a.width, y = i / a.width % a.height;
    const int64_t c = i / a.width / a.height % a.channels, n = i / a.width / a.height / a.channels;
    a.dst[address(a.to, n, c, y, x)] = a.src[address(a.from, n, c, y, x)];
  }
}

unsigned blocks_for(int64_t n) {
  const int64_t blocks = (n + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20);
}

}  // namespace
FR_NS_END

namespace fastrobust {

void relayout_cuda(const RelayoutArgs& a, void* stream) {
  if (a.plane > 0) {
    const int64_t total = (a.batch + a.to.lanes - 1) / a.to.lanes * a.to.block;
    FR_LAUNCH(fill_kernel, blocks_for(total), kThreads, 0, stream, a, total);
  } else {
    const int64_t total = a.batch * a.channels * a.height * a.width;
    FR_LAUNCH(copy_kernel, blocks_for(total), kThreads, 0, stream, a, total);
  }
}

}  // namespace fastrobust
