// The gradient of a convolution's weight where a position has few taps: a product of very many rows with itself almost
// (taps x positions times positions x channels), summed in blocks of examples that do not depend on the threads.
#include <algorithm>
#include <cstring>
#include <memory>

#include "bounds/entry_cpu.h"
#include "bounds/taps.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kExamples = 32;  // of one partial sum
// The patch of every position of one example: [positions][kTaps * kLanes], zero outside the image and beyond the taps.
void patches(const ConvGradArgs& g, const float* x, int64_t lanes, float* to) {
  std::memset(to, 0, static_cast<size_t>(g.out_h * g.out_w * lanes) * sizeof(float));
  const int64_t line = g.kernel_w * g.in_c;
  for (int64_t y = 0; y < g.out_h; ++y)
    for (int64_t c = 0; c < g.out_w; ++c) {
      float* patch = to + (y * g.out_w + c) * lanes;
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

template <int kTaps>
void sum_examples(const ConvGradArgs& g, int64_t begin, int64_t end, float* patch, float* sums) {
  constexpr int64_t lanes = kTaps * kLanes;
  const int64_t positions = g.out_h * g.out_w;
  std::memset(sums, 0, static_cast<size_t>(g.out_c * lanes) * sizeof(float));
  for (int64_t i = begin; i < end; ++i) {
    patches(g, g.x + i * g.in_h * g.in_w * g.in_c, lanes, patch);
    const float* a = g.a + i * positions * g.out_c;
    add_sums_of_channels<kTaps>(a, g.out_c, patch, positions, lanes, sums);
  }
}

}  // namespace

void conv_grad_cpu(const ConvGradArgs& g) {
  using Fn = void (*)(const ConvGradArgs&, int64_t, int64_t, float*, float*);
  const Fn fns[] = {sum_examples<1>, sum_examples<2>, sum_examples<3>, sum_examples<4>};
  const int64_t taps = g.kernel_h * g.kernel_w * g.in_c, lanes = (taps + kLanes - 1) / kLanes * kLanes;
  const int64_t blocks = (g.count + kExamples - 1) / kExamples, size = g.out_c * lanes;
  const Fn f = fns[lanes / kLanes - 1];
  const std::unique_ptr<float[]> partial(new float[static_cast<size_t>(blocks * size)]);
  parallel_for(blocks, 1, [&](int64_t first, int64_t last) {
    const std::unique_ptr<float[]> patch(new float[static_cast<size_t>(g.out_h * g.out_w * lanes)]);
    for (int64_t b = first; b < last; ++b)
      f(g, b * kExamples, std::min(g.count, (b + 1) * kExamples), patch.get(), partial.get() + b * size);
  });
  for (int64_t o = 0; o < g.out_c; ++o)
    for (int64_t c = 0; c < g.in_c; ++c)
      for (int64_t k = 0; k < g.kernel_h * g.kernel_w; ++k) {
        float sum = 0.f;
        for (int64_t b = 0; b < blocks; ++b) sum += partial[static_cast<size_t>(b * size + o * lanes + k * g.in_c + c)];
        g.out[(o * g.in_c + c) * g.kernel_h * g.kernel_w + k] = sum;
      }
}

FR_NS_END
