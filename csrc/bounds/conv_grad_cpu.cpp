// The gradient of a convolution's weight: a product of very many rows (taps x positions times positions x channels),
// summed in blocks of examples that do not depend on the threads.
#include <algorithm>

#include "bounds/depthwise_cpu.h"
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

bool depthwise(const ConvGradArgs& g) { return g.groups > 1 && g.groups == g.in_c && g.groups == g.out_c; }

// Sums of a times patches of x over some examples, added to what is there.
class Sums {
 public:
  Sums(const ConvGradArgs& g, int64_t lanes)
      : g_(g),
        lanes_(lanes),
        border_{g.out_h,    g.out_w,    g.in_h,  g.in_w,  g.in_c / g.groups, g.kernel_h,  g.kernel_w,
                g.stride_y, g.stride_x, g.pad_y, g.pad_x, g.dilation_y,      g.dilation_x},
        patch_(positions() * patch_stride(lanes)),
        image_(Floats::zeros(border_.numbers())),
        slice_(g.groups > 1 ? positions() * out() : 0) {}

  void add(const float* x, const float* a, float* to) const {
    for (int64_t k = 0; k < g_.groups; ++k, to += out() * lanes_) {
      border_.fill(x + k * border_.channels, image_.get(), g_.in_c);
      const float* own = a;
      if (g_.groups > 1) {
        copy_channels(a + k * out(), positions(), out(), g_.out_c, slice_.get(), out());
        own = slice_.get();
      }
      if (border_.whole_vectors()) {
        add_window_sums(border_, own, out(), image_.get(), lanes_, to);
        continue;
      }
      border_.patches(image_.get(), lanes_, patch_.get());
      add_sums_of_taps(own, out(), patch_.get(), positions(), lanes_, to);
    }
  }

 private:
  int64_t positions() const { return g_.out_h * g_.out_w; }
  int64_t out() const { return g_.out_c / g_.groups; }  // of a group

  const ConvGradArgs& g_;
  const int64_t lanes_;
  const Bordered border_;
  const Floats patch_, image_, slice_;
};

// The same over all of them: [parts][out_c][lanes], of depthwise convolutions [parts][taps][channels in whole vectors].
Floats sums_of(const ConvGradArgs& g, const Part* parts, int64_t count, int64_t lanes, const Depthwise& d) {
  constexpr int64_t kBlocks = 16;  // of examples of one part
  const int64_t size = depthwise(g) ? d.numbers() : g.out_c * lanes;
  const int64_t in = g.in_h * g.in_w * g.in_c, out = g.out_h * g.out_w * g.out_c;
  Floats sums = Floats::zeros(count * kBlocks * size);
  const auto blocks_of = [&](int64_t first, int64_t last, const auto& add) {
    for (int64_t block = first; block < last; ++block) {
      const Part& part = parts[block / kBlocks];
      const int64_t b = block % kBlocks;
      for (int64_t i = b * part.count / kBlocks; i < (b + 1) * part.count / kBlocks; ++i)
        add(part.x + i * in, part.a + i * out, sums.get() + block * size);
    }
  };
  parallel_for(count * kBlocks, 1, [&](int64_t first, int64_t last) {
    if (depthwise(g)) {
      blocks_of(first, last, [&](const float* x, const float* a, float* to) { d.add_sums(a, x, to); });
      return;
    }
    const Sums own(g, lanes);
    blocks_of(first, last, [&](const float* x, const float* a, float* to) { own.add(x, a, to); });
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
  const int64_t area = g.kernel_h * g.kernel_w, per = g.in_c / g.groups;
  const int64_t lanes = (area * per + kLanes - 1) / kLanes * kLanes;
  const Depthwise d{g.out_h,    g.out_w,    g.in_h,  g.in_w,  g.in_c,       g.kernel_h,  g.kernel_w,
                    g.stride_y, g.stride_x, g.pad_y, g.pad_x, g.dilation_y, g.dilation_x};
  const Part parts[] = {{g.x, g.a, g.count}, {g.radius, g.radius_a, g.radius_count}};
  const Floats sums = sums_of(g, parts, g.weight != nullptr ? 2 : 1, lanes, d);
  const float *of_center = sums.get(), *of_radius = of_center + (depthwise(g) ? d.numbers() : g.out_c * lanes);
  for (int64_t o = 0; o < g.out_c; ++o)
    for (int64_t c = 0; c < per; ++c)
      for (int64_t k = 0; k < area; ++k) {
        const int64_t from = depthwise(g) ? k * d.wide() + o : o * lanes + k * per + c;
        const int64_t to = (o * per + c) * area + k;
        const float r = g.weight == nullptr || g.weight[to] == 0.f ? 0.f : of_radius[from];
        g.out[to] = of_center[from] + (r != 0.f && g.weight[to] < 0.f ? -r : r);
      }
}

FR_NS_END
