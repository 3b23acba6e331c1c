// Copies feature maps between layouts on CUDA: one thread per element of the destination; per four images side by side
// of the fast layout, or per four images times four columns of a plain tensor, where these are neighbours in memory.
#include "binary/kernels.h"
#include "binary/layout.h"
#include "runtime/wide_cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 256;

// Every float of every plane of a fast layout, borders and missing images with zeros. P: Four images or One.
template <class P>
__global__ void __launch_bounds__(kThreads) fill_kernel(RelayoutArgs a, int64_t total) {
  const Layout& d = a.to;
  const bool alike = a.from.lanes == d.lanes;
  for (int64_t q = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; q < total / P::count;
       q += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t i = q * P::count, block = i / d.block, in_block = i % d.block, phase = in_block / d.phase;
    const int64_t in_phase = in_block % d.phase, c = in_phase / a.plane, p = in_phase % a.plane - d.origin;
    Values<float, P::count> value = {};
    if (p >= 0) {
      const int64_t n = block * d.lanes + p % d.lanes;
      const int64_t y = p / d.row * d.phases_h + phase / d.phases_w;
      const int64_t x = p % d.row / d.col * d.phases_w + phase % d.phases_w;
      if (y < a.height && x < a.width) {
        if (alike && n < a.batch) value = load_at<Use::again>(a.src, P{address(a.from, n, c, y, x)});
        for (int k = 0; k < P::count; ++k) {
          if (n + k >= a.batch) value.v[k] = 0.f;
          if (!alike && n + k < a.batch) value.v[k] = a.src[address(a.from, n + k, c, y, x)];
        }
      }
    }
    store_at(a.dst, P{i}, value);
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

// From the fast layout to a plain one: four images of four columns are read by image and written by column.
__global__ void __launch_bounds__(kThreads) turn_kernel(RelayoutArgs a, int64_t total) {
  const int64_t columns = a.width / 4;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t x = i % columns * 4, y = i / columns % a.height;
    const int64_t c = i / columns / a.height % a.channels, n = i / columns / a.height / a.channels * 4;
    Values<float, 4> from[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) from[k] = load_at<Use::again>(a.src, Four{address(a.from, n, c, y, x + k)});
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (n + k < a.batch)
        store_at(a.dst, Four{address(a.to, n + k, c, y, x)},
                 Values<float, 4>{{from[0].v[k], from[1].v[k], from[2].v[k], from[3].v[k]}});
  }
}

// Whether all that a layout adds to an address, but for `col` in plain tensors, is a multiple of four.
bool by_fours(const Layout& l) {
  return (l.block | l.channel | l.row | l.phase | l.origin | (l.lanes == 1 ? 0 : l.col)) % 4 == 0;
}

}  // namespace
FR_NS_END

namespace fastrobust {

void relayout_cuda(const RelayoutArgs& a, void* stream) {
  const bool aligned = Addresses().add(a.src).add(a.dst).whole(4);
  const bool from_fours = aligned && a.from.lanes % 4 == 0 && by_fours(a.from);
  const bool to_fours = aligned && a.to.lanes % 4 == 0 && by_fours(a.to) && (a.from.lanes != a.to.lanes || from_fours);
  if (a.plane > 0) {
    const int64_t total = (a.batch + a.to.lanes - 1) / a.to.lanes * a.to.block;
    if (to_fours)
      FR_LAUNCH(fill_kernel<Four>, blocks_of(total, 4 * kThreads), kThreads, 0, stream, a, total);
    else
      FR_LAUNCH(fill_kernel<One>, blocks_of(total, kThreads), kThreads, 0, stream, a, total);
  } else if (from_fours && a.to.lanes == 1 && a.to.col == 1 && a.to.phases_w == 1 && a.width % 4 == 0 &&
             by_fours(a.to)) {
    const int64_t total = (a.batch + 3) / 4 * a.channels * a.height * (a.width / 4);
    FR_LAUNCH(turn_kernel, blocks_of(total, kThreads), kThreads, 0, stream, a, total);
  } else {
    const int64_t total = a.batch * a.channels * a.height * a.width;
    FR_LAUNCH(copy_kernel, blocks_of(total, kThreads), kThreads, 0, stream, a, total);
  }
}

}  // namespace fastrobust
