// Interval bounds of margins through a whole chain of layers in one call: where our products are as fast as the
// vendor's, or cost less than the calls around them.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <memory>

#include "bounds/entry_cpu.h"

FR_NS_BEGIN
namespace {

// Where centre and radius lie: [batch, channels * height * width], channels last or first.
struct Place {
  const float *center, *radius;
  bool channels_last;
  bool shared = false;  // one radius for all examples
};

// Numbers of one example before and after a step.
int64_t numbers_in(const IntervalLayer& s) {
  return s.kind == LayerKind::dense ? s.n : s.conv.in_h * s.conv.in_w * s.conv.in_c;
}
int64_t numbers_out(const IntervalLayer& s) {
  if (s.kind == LayerKind::dense) return s.m;
  return s.kind == LayerKind::flatten ? numbers_in(s) : s.conv.out_h * s.conv.out_w * s.conv.out_c;
}

class Chain {
 public:
  explicit Chain(const IntervalChainArgs& g) : g_(g), widest_(g.numbers), conv_work_(0) {
    for (int i = 0; i < g.count; ++i) {
      const IntervalLayer& s = g.layers[i];
      widest_ = std::max(widest_, numbers_out(s));
      shared_ |= s.kind != LayerKind::flatten && std::isinf(g.low) && std::isinf(g.high);
      if (s.kind != LayerKind::conv) continue;
      IntervalConvArgs c = s.conv;
      c.batch = g.batch;
      c.radius = g.x;  // any address: two products
      conv_work_ = std::max(conv_work_, interval_conv_work_cpu(c));
    }
  }

  int64_t work() const { return 4 * g_.batch * widest_ + conv_work_; }

  ChainResult run() {
    if (!inputs_are_fine()) return ChainResult::refused;
    Place at = start();
    int64_t n = g_.numbers;
    for (int i = 0; i < g_.count; ++i) {
      at = step(g_.layers[i], at);
      n = numbers_out(g_.layers[i]);
    }
    margins(at, n);
    const int64_t values = g_.sides * g_.batch * (g_.classes - 1);
    return std::all_of(g_.out, g_.out + values, [](float v) { return std::isfinite(v); }) ? ChainResult::done
                                                                                          : ChainResult::refused;
  }

 private:
  bool inputs_are_fine() const {
    const float low = std::max(g_.low, -FLT_MAX), high = std::min(g_.high, FLT_MAX);
    int outside = 0;  // NaN included
    for (int64_t i = 0; i < g_.batch * g_.numbers; ++i) outside |= !(g_.x[i] >= low) | !(g_.x[i] <= high);
    const auto known = [&](int64_t y) { return y >= 0 && y < g_.classes; };
    return outside == 0 && std::all_of(g_.labels, g_.labels + g_.batch, known);
  }

  float* buffer(int which) const { return g_.work + which * g_.batch * widest_; }

  // The buffers that do not hold `at`.
  void other(const Place& at, float*& center, float*& radius) const {
    const int first = at.radius == buffer(1) ? 2 : 0;
    center = buffer(first);
    radius = buffer(first + 1);
  }

  Place start() const {
    if (shared_) {
      std::fill_n(buffer(1), g_.numbers, g_.eps);
      return {g_.x, buffer(1), false, true};
    }
    IntervalStepArgs s;
    s.a = g_.x;
    s.out_a = buffer(0);
    s.out_b = buffer(1);
    s.count = g_.batch * g_.numbers;
    s.eps_value = g_.eps;
    s.lo = g_.low;
    s.hi = g_.high;
    s.step = IntervalStep::box;
    interval_step_cpu(s);
    return {s.out_a, s.out_b, false};
  }

  Place step(const IntervalLayer& s, const Place& at) const {
    Place to = at;
    float *center, *radius;
    other(at, center, radius);
    if (s.kind == LayerKind::flatten) {
      if (!at.channels_last) return at;
      channels_first(s, at.center, center);
      channels_first(s, at.radius, radius);
      to.channels_last = false;
    } else if (s.kind == LayerKind::dense) {
      IntervalArgs a;
      a.center = at.center, a.radius = at.radius, a.weight = s.weight, a.bias = s.bias;
      a.out_a = center, a.out_b = radius;
      a.batch = g_.batch, a.n = s.n, a.m = s.m, a.finish = s.finish, a.shared = at.shared;
      interval_cpu(a);
      to.channels_last = false;
    } else {
      IntervalConvArgs c = s.conv;
      const int64_t h = c.in_h, w = c.in_w, ch = c.in_c, image = h * w * ch;
      const int64_t last[] = {image, w * ch, ch, 1}, first[] = {image, w, 1, h * w};
      std::copy_n(at.channels_last ? last : first, 4, c.center_stride);
      std::copy_n(at.channels_last ? last : first, 4, c.radius_stride);
      if (at.shared) c.radius_stride[0] = 0;
      c.center = at.center, c.radius = at.radius, c.weight = s.weight, c.bias = s.bias;
      c.work = g_.work + 4 * g_.batch * widest_;
      c.out_a = center, c.out_b = radius;
      c.batch = g_.batch, c.finish = s.finish;
      interval_conv_cpu(c);
      to.channels_last = true;
    }
    to.center = center;
    to.radius = radius;
    to.shared = false;
    return to;
  }

  void channels_first(const IntervalLayer& s, const float* from, float* to) const {
    const int64_t positions = s.conv.in_h * s.conv.in_w, channels = s.conv.in_c;
    for (int64_t i = 0; i < g_.batch; ++i, from += positions * channels, to += positions * channels)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t p = 0; p < positions; ++p) to[c * positions + p] = from[p * channels + c];
  }

  void margins(const Place& at, int64_t n) const {
    const int64_t rows = g_.batch * (g_.classes - 1);
    // Plain arrays: a vector that grows leaves code which the linker could share between instruction sets.
    const std::unique_ptr<int64_t[]> picks(new int64_t[static_cast<size_t>(3 * rows)]);
    const std::unique_ptr<float[]> b(new float[static_cast<size_t>(g_.sides * rows)]);
    int64_t *plus = picks.get(), *minus = plus + rows, *example = minus + rows, r = 0;
    for (int64_t i = 0; i < g_.batch; ++i)
      for (int64_t j = 0; j < g_.classes; ++j) {
        const int64_t y = g_.labels[i];
        if (j == y) continue;
        plus[r] = y;
        minus[r] = j;
        example[r] = i;
        b[r++] = g_.bias != nullptr ? g_.bias[y] - g_.bias[j] : 0.f;
      }
    if (g_.sides == 2) std::copy_n(b.get(), rows, b.get() + rows);
    ConcretizeArgs c;
    c.rows.a = g_.weight;
    c.rows.pick = plus, c.rows.minus = minus, c.rows.example = example;
    c.rows.count = rows, c.rows.length = n, c.rows.sides = g_.sides;
    c.center = at.center, c.radius = at.radius;
    c.b = b.get(), c.out = g_.out;
    concretize_cpu(c);
  }

  const IntervalChainArgs& g_;
  int64_t widest_, conv_work_;
  bool shared_ = false;
};

}  // namespace

int64_t interval_chain_work_cpu(const IntervalChainArgs& g) { return Chain(g).work(); }
ChainResult interval_chain_cpu(const IntervalChainArgs& g) { return Chain(g).run(); }

FR_NS_END
