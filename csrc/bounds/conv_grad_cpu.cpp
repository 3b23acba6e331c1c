// The gradient of a convolution's weight: a product of very many rows (taps x positions times positions x channels),
// summed in blocks of examples that do not depend on the threads.
#include <algorithm>
#include <cstring>

#include "bounds/entry_cpu.h"
#include "bounds/taps.h"
#include "core/floats.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

// The patch of every position of one example: [positions][patch_stride(lanes)], zero outside the image and beyond the
// taps.
void patches(const ConvGradArgs& g, const float* x, int64_t lanes, float* to) {
  const int64_t stride = patch_stride(lanes);
  std::memset(to, 0, static_cast<size_t>(g.out_h * g.out_w * stride) * sizeof(float));
  const int64_t line = g.kernel_w * g.in_c;
  for (int64_t y = 0; y < g.out_h; ++y)
    for (int64_t c = 0; c < g.out_w; ++c) {
      float* patch = to + (y * g.out_w + c) * stride;
      const int64_t top = y * g.stride_y - g.pad_y, left = c * g.stride_x - g.pad_x;
      const int64_t first = std::max<int64_t>(0, -left), last = std::min(g.kernel_w, g.in_w - left);
      const int64_t last_y = std::min(g.kernel_h, g.in_h - top);
      for (int64_t ky = std::max<int64_t>(0, -top); ky < last_y; ++ky) {
        const float* from = x + ((top + ky) * g.in_w + left) * g.in_c;
        float* row = patch + ky * line;
        for (int64_t i = first * g.in_c; i < last * g.in_c; ++i) row[i] = from[i];
      }
    }
}

// Sums of a times patches of x over `count` examples: [out_c][lanes].
Floats sums_of(const ConvGradArgs& g, const float* x, const float* a, int64_t count, int64_t lanes) {
  const int64_t per = std::max<int64_t>(4, (count + 15) / 16), blocks = (count + per - 1) / per;
  const int64_t size = g.out_c * lanes, positions = g.out_h * g.out_w;
  Floats partial = Floats::zeros(std::max<int64_t>(1, blocks) * size);
  parallel_for(blocks, 1, [&](int64_t first, int64_t last) {
    const Floats patch(positions * patch_stride(lanes));
    for (int64_t i = first * per; i < std::min(count, last * per); ++i) {
      patches(g, x + i * g.in_h * g.in_w * g.in_c, lanes, patch.get());
      add_sums_of_taps(a + i * positions * g.out_c, g.out_c, patch.get(), positions, lanes,
                       partial.get() + i / per * size);
    }
  });
  for (int64_t b = 1; b < blocks; ++b)
    for (int64_t k = 0; k < size; ++k) partial[k] += partial[b * size + k];
  return partial;
}

}  // namespace

void conv_grad_cpu(const ConvGradArgs& g) {
  const int64_t area = g.kernel_h * g.kernel_w, lanes = (area * g.in_c + kLanes - 1) / kLanes * kLanes;
  const Floats of_center = sums_of(g, g.x, g.a, g.count, lanes);
  Floats of_radius;
  if (g.weight != nullptr) of_radius = sums_of(g, g.radius, g.radius_a, g.radius_count, lanes);
  for (int64_t o = 0; o < g.out_c; ++o)
    for (int64_t c = 0; c < g.in_c; ++c)
      for (int64_t k = 0; k < area; ++k) {
        const int64_t from = o * lanes + k * g.in_c + c;
        const int64_t to = (o * g.in_c + c) * area + k;
        const float r = g.weight == nullptr || g.weight[to] == 0.f ? 0.f : of_radius[from];
        g.out[to] = of_center[from] + (r != 0.f && g.weight[to] < 0.f ? -r : r);
      }
}

FR_NS_END
