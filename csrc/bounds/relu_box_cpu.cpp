// What follows an interval product where a ReLU reads it, in one pass over its centre and radius, and the gradients.
#include <algorithm>
#include <memory>

#include "bounds/entry_cpu.h"
#include "bounds/relu_box.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

using Floats = std::unique_ptr<float[]>;
Floats zeros(int64_t n) { return Floats(new float[static_cast<size_t>(std::max<int64_t>(1, n))]()); }
FR_HD Vec get(const float* p, int n) { return n == kLanes ? load(p) : load_n(p, n); }
FR_HD void put(float* p, Vec v, int n) { n == kLanes ? store(p, v) : store_n(p, v, n); }
FR_HD void add(float* p, Vec v, int n) { put(p, get(p, n) + v, n); }

// The bias of each of the n numbers of an example.
Floats repeated(const ReluBoxArgs& g) {
  Floats all = zeros(g.n);
  for (int64_t i = 0; i < g.n && g.bias != nullptr; i += g.period)
    std::copy_n(g.bias, std::min(g.period, g.n - i), all.get() + i);
  return all;
}

// Calls part(at, i, n) for every vector's worth of one example's numbers: `at` counted over all examples, `i` in it.
template <class Part>
FR_HD void each(const ReluBoxArgs& g, int64_t example, const Part& part) {
  int64_t i = 0;
  for (; i + kLanes <= g.n; i += kLanes) part(example * g.n + i, i, kLanes);
  if (i < g.n) part(example * g.n + i, i, static_cast<int>(g.n - i));
}

}  // namespace

void relu_box_cpu(const ReluBoxArgs& g) {
  const Floats bias = repeated(g);
  const int64_t all = g.batch * g.n;
  parallel_for(g.batch, std::max<int64_t>(1, 8192 / std::max<int64_t>(1, g.n)), [&](int64_t begin, int64_t end) {
    for (int64_t example = begin; example < end; ++example) {
      int64_t living = 0;
      each(g, example, [&](int64_t at, int64_t i, int n) FR_INLINE_LAMBDA {
        const Vec c = get(g.center + at, n), r = get(g.radius + (g.shared ? i : at), n), b = get(bias.get() + i, n);
        if (g.slopes != nullptr) {
          Vec slope_low, slope_up, low, up;
          relu_box_lines(c, r, b, g.adaptive, slope_low, slope_up, low, up);
          put(g.slopes + at, slope_low, n);
          if (g.adaptive) put(g.slopes + all + at, slope_up, n);
          put(g.intercepts + at, low, n);
          put(g.intercepts + all + at, up, n);
          living += __builtin_popcount(~bits(slope_up == Vec(0.f)) & ((1u << n) - 1));
        }
        if (g.next_center == nullptr) return;
        Vec x = c, y = r;
        relu_center(x, y);
        put(g.next_center + at, x, n);
        put(g.next_radius + at, y, n);
      });
      g.living[example] = living;
    }
  });
}

void relu_box_grad_cpu(const ReluBoxGradArgs& a) {
  const ReluBoxArgs& g = a.forward;
  const Floats bias = repeated(g);
  const int64_t all = g.batch * g.n;
  const int64_t per = examples_of_run(g.batch), blocks = runs_of(g.batch);
  // sums over the examples of a block: of what reaches the biases, and of the radius' gradient where one serves all
  const int64_t sums = std::max<int64_t>(1, blocks) * g.n;
  const Floats to_bias = zeros(sums), to_radius = zeros(g.shared ? sums : 1);
  parallel_for(blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t example = first * per; example < std::min(g.batch, last * per); ++example) {
      float* const bias_sums = to_bias.get() + example / per * g.n;
      float* const radius_sums = g.shared ? to_radius.get() + example / per * g.n : nullptr;
      each(g, example, [&](int64_t at, int64_t i, int n) FR_INLINE_LAMBDA {
        const Vec zero(0.f), c = get(g.center + at, n), r = get(g.radius + (g.shared ? i : at), n),
                             b = get(bias.get() + i, n);
        Vec to_l = zero, to_u = zero, through = zero;  // through: what the lines bring to the bias
        if (a.from_slopes != nullptr)
          through =
              relu_box_lines_grad(c, r, b, g.adaptive, get(a.from_slopes + (g.adaptive ? all : 0) + at, n),
                                  get(a.from_intercepts + at, n), get(a.from_intercepts + all + at, n), to_l, to_u);
        if (a.from_center != nullptr)
          relu_center_grad(c, r, get(a.from_center + at, n), get(a.from_radius + at, n), to_l, to_u);
        const Vec to_c = to_l + to_u, to_r = to_u - to_l;
        put(a.to_center + at, to_c, n);
        if (g.shared)
          add(radius_sums + i, to_r, n);
        else
          put(a.to_radius + at, to_r, n);
        add(bias_sums + i, through + to_c, n);
      });
    }
  });
  for (int64_t b = 1; b < blocks; ++b)
    for (int64_t i = 0; i < g.n; ++i) {
      to_bias[static_cast<size_t>(i)] += to_bias[static_cast<size_t>(b * g.n + i)];
      if (g.shared) to_radius[static_cast<size_t>(i)] += to_radius[static_cast<size_t>(b * g.n + i)];
    }
  if (g.shared) std::copy_n(to_radius.get(), g.n, a.to_radius);
  if (a.to_bias == nullptr) return;
  std::fill_n(a.to_bias, g.period, 0.f);
  for (int64_t i = 0; i < g.n; i += g.period)
    for (int64_t k = 0; k < std::min(g.period, g.n - i); ++k) a.to_bias[k] += to_bias[static_cast<size_t>(i + k)];
}

FR_NS_END
