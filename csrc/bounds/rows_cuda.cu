// Backward step on CUDA: one block a row, neighbours on neighbouring addresses.
#include "bounds/formulas.h"
#include "bounds/kernels.h"
#include "bounds/window.h"
#include "runtime/cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) back_kernel(BackArgs g) {
  const Rows& r = g.rows;
  const int64_t maps = map_size(r);
  for (int64_t row = blockIdx.x; row < r.count; row += gridDim.x) {
    const int64_t ex = example_of(r, row) * maps;
    double low = 0., up = 0.;
    for (int64_t i = threadIdx.x; i < r.length; i += kThreads) {
      const int64_t m = map_of(r, row, i), o = row * r.length + i;
      if (m < 0) {
        g.out[o] = 0.f;
        if (g.sides_out == 2) g.out[r.count * r.length + o] = 0.f;
        continue;
      }
      const float a = coefficient(r, row, 0, i), sl = g.slopes[ex + m];
      const float su = g.slope_sides == 2 ? g.slopes[g.examples * maps + ex + m] : sl;
      const float il = g.intercepts[ex + m], iu = g.intercepts[g.examples * maps + ex + m];
      low += static_cast<double>(a * by_sign(a, il, iu));
      g.out[o] = a * by_sign(a, sl, su);
      if (r.sides == 2) {
        const float c = r.side_stride == 0 ? a : coefficient(r, row, r.side_stride, i);
        up += static_cast<double>(c * by_sign(c, iu, il));
        if (g.sides_out == 2) g.out[r.count * r.length + o] = c * by_sign(c, su, sl);
      }
    }
    low = block_sum(low);
    if (r.sides == 2) up = block_sum(up);
    if (threadIdx.x == 0) {
      g.b_out[row] = g.b[row] + static_cast<float>(low);
      if (r.sides == 2) g.b_out[r.count + row] = g.b[r.count + row] + static_cast<float>(up);
    }
  }
}

}  // namespace
FR_NS_END

namespace fastrobust {

void back_cuda(const BackArgs& g, void* stream) {
  const int64_t rows = g.rows.count, most = int64_t{1} << 30;
  if (rows > 0)
    FR_LAUNCH(back_kernel, dim3(static_cast<unsigned>(rows < most ? rows : most)), dim3(kThreads), 0, stream, g);
}

}  // namespace fastrobust
