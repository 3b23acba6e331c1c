// The gradient of a convolution's weight: a product of very many rows (taps x positions times positions x channels),
// summed in blocks of examples that do not depend on the threads.
#include <algorithm>

#include "bounds/entry_cpu.h"
#include "bounds/patches_cpu.h"
#include "core/floats.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

// The products of one of the two maps.
struct Part {
  const float *x, *a;
  int64_t count;
};

// Sums of a times patches of x over the examples: [parts][out_c][lanes].
Floats sums_of(const ConvGradArgs& g, const Part* parts, int64_t count, int64_t lanes) {
  const Bordered border{g.out_h,    g.out_w,    g.in_h,     g.in_w,  g.in_c, g.kernel_h,
                        g.kernel_w, g.stride_y, g.stride_x, g.pad_y, g.pad_x};
  constexpr int64_t kBlocks = 16;  // of examples of one part
  const int64_t size = g.out_c * lanes, positions = g.out_h * g.out_w;
  Floats sums = Floats::zeros(count * kBlocks * size);
  parallel_for(count * kBlocks, 1, [&](int64_t first, int64_t last) {
    const Floats patch(positions * patch_stride(lanes)), image = Floats::zeros(border.numbers());
    for (int64_t block = first; block < last; ++block) {
      const Part& part = parts[block / kBlocks];
      const int64_t b = block % kBlocks;
      for (int64_t i = b * part.count / kBlocks; i < (b + 1) * part.count / kBlocks; ++i) {
        border.fill(part.x + i * g.in_h * g.in_w * g.in_c, image.get());
        const float* a = part.a + i * positions * g.out_c;
        if (border.whole_vectors()) {
          add_window_sums(border, a, g.out_c, image.get(), lanes, sums.get() + block * size);
          continue;
        }
        border.patches(image.get(), lanes, patch.get());
        add_sums_of_taps(a, g.out_c, patch.get(), positions, lanes, sums.get() + block * size);
      }
    }
  });
  for (int64_t k = 0; k < count; ++k) {
    float* own = sums.get() + k * kBlocks * size;
    for (int64_t b = 1; b < kBlocks; ++b) add_numbers(own + b * size, size, own);
    if (k > 0) std::copy_n(own, size, sums.get() + k * size);
  }
  return sums;
}

}  // namespace

void conv_grad_cpu(const ConvGradArgs& g) {
  const int64_t area = g.kernel_h * g.kernel_w, lanes = (area * g.in_c + kLanes - 1) / kLanes * kLanes;
  const Part parts[] = {{g.x, g.a, g.count}, {g.radius, g.radius_a, g.radius_count}};
  const Floats sums = sums_of(g, parts, g.weight != nullptr ? 2 : 1, lanes);
  const float *of_center = sums.get(), *of_radius = of_center + g.out_c * lanes;
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
