// Backward step and concretisation on CUDA: one block a row, neighbours on neighbouring addresses.
#include "bounds/formulas.h"
#include "bounds/kernels.h"
#include "bounds/window.h"
#include "runtime/cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 128;

// Position i of a row on its map, or -1 outside.
__device__ __forceinline__ int64_t map_of(const Rows& r, int64_t row, int64_t i) {
  if (r.corner_y == nullptr) return i;
  const int64_t line = r.width * r.channels, y = r.corner_y[row] + i / line,
                x = r.corner_x[row] + i % line / r.channels;
  if (y < 0 || y >= r.map_height || x < 0 || x >= r.map_width) return -1;
  return (y * r.map_width + x) * r.channels + i % r.channels;
}

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

__global__ void __launch_bounds__(kThreads) concretize_kernel(ConcretizeArgs g) {
  const Rows& r = g.rows;
  const bool box = g.center != nullptr;
  for (int64_t row = blockIdx.x; row < r.count; row += gridDim.x) {
    const int64_t base = example_of(r, row) * map_size(r);
    for (int side = 0; side < r.sides; ++side) {
      double mid = 0., reach = 0., at_x = 0., size = 0.;
      float top = 0.f;
      bool nan = false;
      for (int64_t i = threadIdx.x; i < r.length; i += kThreads) {
        const int64_t m = map_of(r, row, i);
        if (m < 0) continue;
        const float v = coefficient(r, row, side * r.side_stride, i);
        if (box) {
          mid += static_cast<double>(v) * g.center[base + m];
          reach += static_cast<double>(vabs(v)) * g.radius[base + m];
        }
        if (g.dual != Dual::none) {
          const float w = vabs(v * g.eps[base + m]);
          at_x += static_cast<double>(v) * g.x[base + m];
          if (g.dual == Dual::l2) size += static_cast<double>(w) * w;
          if (g.dual == Dual::l1) size += static_cast<double>(w);
          top = vmax(w, top);
          nan = nan || !(w == w);
        }
      }
      mid = block_sum(mid);
      reach = block_sum(reach);
      double best = side == 0 ? mid - reach : mid + reach;
      if (g.dual != Dual::none) {
        at_x = block_sum(at_x);
        size = block_sum(size);
        const double highest = block_max(top), bad = block_sum(nan ? 1. : 0.);
        double length = g.dual == Dual::linf ? highest : (g.dual == Dual::l2 ? sqrt(size) : size);
        if (bad > 0.) length = static_cast<double>(nanf(""));
        const double ball = side == 0 ? at_x - length : at_x + length;
        const bool take = side == 0 ? !(ball <= best) : !(ball >= best);
        if (!box || (take && best == best)) best = ball;
      }
      if (threadIdx.x == 0) g.out[side * r.count + row] = g.b[side * r.count + row] + static_cast<float>(best);
    }
  }
}

unsigned blocks_of(const Rows& r) {
  return static_cast<unsigned>(r.count < (int64_t{1} << 30) ? r.count : (int64_t{1} << 30));
}

}  // namespace
FR_NS_END

namespace fastrobust {

void back_cuda(const BackArgs& g, void* stream) {
  if (g.rows.count > 0) FR_LAUNCH(back_kernel, dim3(blocks_of(g.rows)), dim3(kThreads), 0, stream, g);
}
void concretize_cuda(const ConcretizeArgs& g, void* stream) {
  if (g.rows.count > 0) FR_LAUNCH(concretize_kernel, dim3(blocks_of(g.rows)), dim3(kThreads), 0, stream, g);
}

}  // namespace fastrobust
