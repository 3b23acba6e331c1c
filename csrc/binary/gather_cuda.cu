// Sums of shifted contiguous runs on CUDA (see args.h): a thread sums kPer elements of one row, the lists are the same
// for all threads of a block, so their loads are broadcasts and those of x are coalesced.
#include "binary/epilogue.h"
#include "binary/kernels.h"
#include "binary/layout.h"
#include "runtime/cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 128;
constexpr int kPer = 4;

__device__ __forceinline__ float finish(const Epilogue& e, float v, int64_t channel, int64_t at) {
  if (e.scale != nullptr || e.shift != nullptr)
    v = affine(v, e.scale == nullptr ? 1.f : e.scale[channel], e.shift == nullptr ? 0.f : e.shift[channel]);
  if (e.residual != nullptr) v = v + e.residual[at];
  if (e.relu) v = relu(v);
  if (e.gate != nullptr) v = through(v, e.gate[at]);
  if (e.pre != nullptr) e.pre[at] = v;
  return e.post == nullptr ? v : v * e.post[channel];
}

// grid: x covers a plane, y the rows, z the groups of images.
__global__ void __launch_bounds__(kThreads) gather_kernel(GatherArgs a) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kPer + threadIdx.x;
  for (int64_t block = blockIdx.z; block < a.blocks; block += gridDim.z) {
    const float* const x = a.x + block * a.x_block + a.x_origin;
    for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
      float acc[kPer];
      bool pixel[kPer];
      int64_t at[kPer];
      for (int i = 0; i < kPer; ++i) {
        acc[i] = 0.f;
        at[i] = first + i * kThreads - a.out_origin;
        pixel[i] = is_pixel(a, at[i]);
      }
      for (int64_t segment = 0; segment < a.segments; ++segment) {
        const int32_t* const ptr = a.ptr + 2 * (segment * a.rows + row);
        for (int32_t e = ptr[0]; e < ptr[1]; ++e)
          for (int i = 0; i < kPer; ++i)
            if (pixel[i]) acc[i] = acc[i] + x[a.offsets[e] + at[i]];
        for (int32_t e = ptr[1]; e < ptr[2]; ++e)
          for (int i = 0; i < kPer; ++i)
            if (pixel[i]) acc[i] = acc[i] - x[a.offsets[e] + at[i]];
      }
      const int64_t plane = block * a.out_block + row * a.out_plane;
      for (int i = 0; i < kPer; ++i) {
        const int64_t to = plane + first + i * kThreads;
        if (first + i * kThreads >= a.out_plane) break;
        if (pixel[i]) {
          a.out[to] = finish(a.epilogue, acc[i], row % a.epilogue.channels, to);
        } else {
          a.out[to] = 0.f;
          if (a.epilogue.pre != nullptr) a.epilogue.pre[to] = 0.f;
        }
      }
    }
  }
}

}  // namespace
FR_NS_END

namespace fastrobust {

void gather_cuda(const GatherArgs& a, void* stream) {
  if (a.blocks == 0 || a.rows == 0 || a.height == 0 || a.width == 0) return;
  const int64_t tiles = (a.out_plane + kThreads * kPer - 1) / (kThreads * kPer);
  const dim3 grid(static_cast<unsigned>(tiles), grid_y(a.rows), grid_y(a.blocks));
  FR_LAUNCH(gather_kernel, grid, kThreads, 0, stream, a);
}

}  // namespace fastrobust
