// Gradients of rows through a chain of activations and convolutions: a few rows of one example go down the chain again
// (where the way down did not keep them), and their gradients come back up, in a core's cache. Sums over examples are
// formed in blocks that do not depend on the threads.
#include <algorithm>
#include <memory>

#include "bounds/entry_cpu.h"
#include "bounds/live_cpu.h"
#include "bounds/neurons_cpu.h"
#include "bounds/patches_cpu.h"
#include "bounds/serial_cpu.h"
#include "core/floats.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kRows = 16;  // at a time

int64_t positions_of(const ChainStep& s) { return s.map_height * s.map_width; }
int64_t before(const ChainStep& s) { return positions_of(s) * s.channels; }
int64_t after(const ChainStep& s) { return s.out_height * s.out_width * s.out_channels; }
int64_t padded(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

// Sizes of the buffers, and the transposed weights [lanes][channels, padded].
struct Plan {
  int64_t longest = 0, positions = 0, patch = 0, spare = 0, weights = 0;
  int64_t weight_at[kMaxChain];  // of each step in a block's sums
  Floats turned[kMaxChain];

  explicit Plan(const ChainGradArgs& g) {
    longest = g.rows.length;
    for (int i = 0; i < g.count; ++i) {
      const ChainStep& s = g.steps[i].forward;
      const int64_t wide = padded(s.channels);
      longest = std::max(longest, std::max(before(s), after(s)));
      positions = std::max(positions, positions_of(s));
      patch = std::max(patch, positions_of(s) * patch_stride(s.lanes));
      spare = std::max(spare, positions_of(s) * wide);
      weight_at[i] = weights;
      if (g.steps[i].to_weight != nullptr) weights += s.channels * s.lanes;
      turned[i] = Floats::zeros(s.lanes * wide);
      for (int64_t o = 0; o < s.channels; ++o)
        for (int64_t t = 0; t < s.lanes; ++t) turned[i][t * wide + o] = s.weight[o * s.lanes + t];
    }
  }
};

Bordered bordered(const ChainStep& s) {
  return {s.map_height, s.map_width, s.out_height, s.out_width, s.out_channels, s.kernel_h,
          s.kernel_w,   s.stride_y,  s.stride_x,   s.pad_y,     s.pad_x};
}
// From one to the next: not a power of two, or their windows would meet in few places of the first cache.
int64_t bordered_apart(const ChainStep& s) { return bordered(s).numbers() + 4 * kLanes; }

// Whether the neurons' windows are whole vectors, so that single ones can be taken.
bool by_neuron(const ChainGradArgs& g, int i) {
  const ChainGradStep& step = g.steps[i];
  return g.living && step.to_weight != nullptr && step.forward.kernel_w * step.forward.out_channels % kLanes == 0;
}

class Worker {
 public:
  Worker(const ChainGradArgs& g, const Plan& plan)
      : g_(g), plan_(plan), patch_(Floats(plan.patch)), spare_(Floats(plan.spare)) {
    const int64_t rows = kRows * g.rows.sides;
    next_.reset(new int64_t[static_cast<size_t>(plan.positions)]);
    for (Floats& f : grads_) f = Floats(rows * plan.longest);
    for (int i = 0; i < g.count; ++i) {
      scaled_[i] = Floats(rows * before(g.steps[i].forward));
      if (g.steps[i].forward.kept == nullptr) spread_[i] = Floats(rows * after(g.steps[i].forward));
      const int64_t images = bordered_apart(g.steps[i].forward) * (by_neuron(g, i) ? rows : 1);
      bordered_[i] = Floats::zeros(images);
      if (by_neuron(g, i)) lists_[i].reserve(g.steps[i].forward);
    }
  }

  void start(int64_t example) {
    for (int i = 0; i < g_.count; ++i) {
      if (!by_neuron(g_, i)) continue;
      const ChainStep& s = g_.steps[i].forward;
      lists_[i].find(s, LineMaps(s, g_.examples, example));
    }
  }

  // Rows [begin, end) in the order of the examples; adds the gradients of the weights to `sums`.
  void run(int64_t begin, int64_t end, float* sums) {
    for (; begin < end; begin += kRows) some(begin, std::min(kRows, end - begin), sums);
  }

 private:
  void some(int64_t begin, int64_t n, float* sums) {
    const Rows& all = g_.rows;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t id = g_.order != nullptr ? g_.order[begin + k] : begin + k;
      id_[k] = id;
      pick_[k] = all.pick != nullptr ? all.pick[id] : id;
      if (all.minus != nullptr) minus_[k] = all.minus[id];
      example_[k] = all.example[id];
      for (int side = 0; side < all.sides; ++side) from_[side * n + k] = g_.from[side * all.count + id];
    }
    look_ahead(begin + n, n);
    Rows r = all;
    r.pick = pick_;
    r.minus = all.minus != nullptr ? minus_ : nullptr;
    r.example = example_;
    r.count = n;
    for (int i = 0; i < g_.count; ++i) r = down(i, r);
    ConcretizeGradArgs c;
    c.rows = r;
    c.center = g_.center, c.radius = g_.radius;
    c.from = from_;
    c.to_a = grads_[0].get(), c.to_center = g_.to_center, c.to_radius = g_.to_radius;
    concretize_grad_rows(c, 0, n);
    for (int i = g_.count - 1; i >= 0; --i) up(i, n, sums);
    const int64_t length = all.length, matrices = all.side_stride != 0 ? 2 : 1;
    for (int64_t m = 0; m < matrices && !straight(); ++m)
      for (int64_t k = 0; k < n; ++k)
        std::copy_n(grads_[0].get() + (m * n + k) * length, length, g_.to_a + (m * all.count + id_[k]) * length);
  }

  // Whether gradients of the rows lie one after the other where they go.
  bool straight() const { return g_.order == nullptr && g_.rows.side_stride == 0; }

  // What the next rows, from `begin` on, read first: it is fetched into the second cache between products.
  void look_ahead(int64_t begin, int64_t n) {
    ranges_ = range_ = 0;
    n = g_.order != nullptr ? 0 : std::min(n, g_.rows.count - begin);
    if (n <= 0) return;
    const auto add = [&](const float* rows, int64_t length) {
      if (rows != nullptr) ahead_[ranges_++] = {rows + begin * length, n * length};
    };
    for (int i = 0; i < g_.count; ++i) add(g_.steps[i].forward.kept, after(g_.steps[i].forward));
    if (g_.rows.pick == nullptr) add(g_.rows.a, g_.rows.length);
  }
  void fetch(int64_t lines) {
    for (; range_ < ranges_; ++range_) {
      Range& r = ahead_[range_];
      for (; r.count > 0; r.count -= kLanes, r.from += kLanes) {
        if (lines-- == 0) return;
        __builtin_prefetch(r.from, 0, 2);
      }
    }
  }

  // Through the activation and the adjoint of the convolution; the rows that come out.
  Rows down(int i, const Rows& r) {
    const ChainStep& s = g_.steps[i].forward;
    rows_[i] = r;
    matrices_[i] = s.slope_sides == 2 ? r.sides : (r.side_stride != 0 ? 2 : 1);
    const float zeros[2 * kRows] = {};
    float unused[2 * kRows];
    BackArgs back;
    back.rows = r;
    back.slopes = s.slopes, back.intercepts = s.intercepts;
    back.examples = g_.examples;
    back.slope_sides = s.slope_sides, back.sides_out = matrices_[i];
    back.b = zeros, back.b_out = unused;
    back.out = scaled_[i].get();
    back_rows(back, 0, r.count);
    Rows next;
    next.length = after(s);
    next.example = r.example;
    next.count = r.count, next.sides = r.sides;
    if (s.kept != nullptr) {
      next.a = s.kept;
      next.pick = id_;
      next.side_stride = matrices_[i] == 2 ? g_.rows.count * next.length : 0;
      return next;
    }
    SpreadArgs p;
    p.a = scaled_[i].get(), p.weight = s.weight, p.out = spread_[i].get();
    p.count = matrices_[i] * r.count;
    p.in_h = s.map_height, p.in_w = s.map_width, p.in_c = s.channels;
    p.out_h = s.out_height, p.out_w = s.out_width, p.out_c = s.out_channels;
    p.kernel_h = s.kernel_h, p.kernel_w = s.kernel_w, p.stride_y = s.stride_y, p.stride_x = s.stride_x;
    p.pad_y = s.pad_y, p.pad_x = s.pad_x, p.lanes = s.lanes;
    spread_items(p, 0, p.count);
    next.a = spread_[i].get();
    next.side_stride = matrices_[i] == 2 ? r.count * next.length : 0;
    return next;
  }

  // The gradients of what step i returned, in grads_[0], become those of what it was given.
  void up(int i, int64_t n, float* sums) {
    const ChainGradStep& step = g_.steps[i];
    const ChainStep& s = step.forward;
    const int64_t wide = padded(s.channels), size = before(s), positions = positions_of(s), images = matrices_[i] * n;
    const Bordered border = bordered(s);
    const bool direct = border.whole_vectors() && wide <= kMostTaps * kLanes;  // without patches
    const bool alone = by_neuron(g_, i) && lists_[i].count * 4 < size * 3;
    if (alone) living_neurons(i, images, sums + plan_.weight_at[i]);
    for (int64_t image = 0; image < images && !alone; ++image) {
      float* out = grads_[1].get() + image * size;
      border.fill(grads_[0].get() + image * after(s), bordered_[i].get());
      const auto ahead = [&] { fetch(32); };
      float* const found = wide == s.channels ? out : spare_.get();
      if (direct) {
        convolve_image(border, bordered_[i].get(), wide / kLanes, plan_.turned[i].get(), found, ahead);
      } else {
        border.patches(bordered_[i].get(), s.lanes, patch_.get());
        convolve(patch_.get(), positions, s.lanes, plan_.turned[i].get(), wide, found, ahead);
      }
      if (wide != s.channels)
        for (int64_t p = 0; p < positions; ++p) std::copy_n(spare_.get() + p * wide, s.channels, out + p * s.channels);
      if (step.to_weight == nullptr) continue;
      const float* scaled = scaled_[i].get() + image * size;
      float* own = sums + plan_.weight_at[i];
      if (direct)
        add_window_sums(border, scaled, s.channels, bordered_[i].get(), s.lanes, own);
      else
        add_sums_of_taps(scaled, s.channels, patch_.get(), positions, s.lanes, own);
    }
    BackGradArgs b;
    b.rows = rows_[i];
    b.slopes = s.slopes, b.intercepts = s.intercepts;
    b.examples = g_.examples;
    b.slope_sides = s.slope_sides, b.sides_out = matrices_[i];
    b.from_out = grads_[1].get(), b.from_b = from_;
    b.to_a = i == 0 && straight() ? g_.to_a + id_[0] * g_.rows.length : grads_[0].get();
    b.to_slopes = step.to_slopes, b.to_intercepts = step.to_intercepts;
    int64_t rows[kRows];
    for (int64_t k = 0; k < n; ++k) rows[k] = k;
    back_grad_rows(b, rows, n);
  }

  // The part of `up` behind the activation, of the neurons that have lines; the others pass nothing on. The weights of
  // a few channels and their gradients stay in the first cache while the positions go by.
  void living_neurons(int i, int64_t images, float* sums) {
    const ChainStep& s = g_.steps[i].forward;
    const LiveList& live = lists_[i];
    const int64_t size = before(s), apart = bordered_apart(s), positions = positions_of(s);
    const Bordered border = bordered(s);
    const WindowShape shape{s.kernel_h, border.line(), border.pitch()};
    for (int64_t image = 0; image < images; ++image)
      border.fill(grads_[0].get() + image * after(s), bordered_[i].get() + image * apart);
    std::fill_n(grads_[1].get(), images * size, 0.f);
    const int64_t turns = (images + kNeuronRows - 1) / kNeuronRows, per = (images + turns - 1) / turns;
    const int64_t block = std::max<int64_t>(1, 2048 / s.lanes);
    for (int64_t first = 0; first < images; first += per) {
      const int64_t rows = std::min(per, images - first);
      const NeuronFn gradients = neuron_fn(rows);
      std::copy_n(live.start.get(), positions, next_.get());
      for (int64_t channels = block; channels < s.channels + block; channels += block)
        for (int64_t p = 0; p < positions; ++p) {
          const float* x[kNeuronRows];
          const int64_t y = p / s.map_width * s.stride_y, left = p % s.map_width * s.stride_x;
          const float* corner = bordered_[i].get() + first * apart + y * shape.pitch + left * s.out_channels;
          for (int64_t r = 0; r < rows; ++r) x[r] = corner + r * apart;
          int64_t k = next_[static_cast<size_t>(p)];
          for (; k < live.start[static_cast<size_t>(p) + 1] && live.channel[static_cast<size_t>(k)] < channels; ++k) {
            float factor[kNeuronRows], dots[kNeuronRows + 3];
            const int64_t neuron = live.neuron[static_cast<size_t>(k)] + first * size;
            const int64_t at = live.channel[static_cast<size_t>(k)] * s.lanes;
            fetch(8);
            for (int64_t r = 0; r < rows; ++r) factor[r] = scaled_[i][neuron + r * size];
            gradients(shape, x, factor, s.weight + at, sums + at, dots);
            for (int64_t r = 0; r < rows; ++r) grads_[1][neuron + r * size] = dots[r];
          }
          next_[static_cast<size_t>(p)] = k;
        }
    }
  }

  const ChainGradArgs& g_;
  const Plan& plan_;
  LiveList lists_[kMaxChain];
  std::unique_ptr<int64_t[]> next_;  // of each position's neurons, the one that comes next
  Floats patch_, spare_, grads_[2], scaled_[kMaxChain], spread_[kMaxChain], bordered_[kMaxChain];
  Rows rows_[kMaxChain];
  int matrices_[kMaxChain];
  int64_t id_[kRows], pick_[kRows], minus_[kRows], example_[kRows];
  float from_[2 * kRows];
  struct Range {
    const float* from;
    int64_t count;
  };
  Range ahead_[kMaxChain + 1];
  int ranges_ = 0, range_ = 0;
};

// The gradients of an example's maps are sums over its rows.
void clear(const ChainGradArgs& g, int64_t example) {
  const auto zero = [&](float* p, int sides, int64_t map) {
    for (int side = 0; side < sides && p != nullptr; ++side)
      std::fill_n(p + (side * g.examples + example) * map, map, 0.f);
  };
  for (int i = 0; i < g.count; ++i) {
    const ChainStep& s = g.steps[i].forward;
    zero(g.steps[i].to_slopes, s.slope_sides, before(s));
    zero(g.steps[i].to_intercepts, 2, before(s));
  }
  const int64_t input = after(g.steps[g.count - 1].forward);
  zero(g.to_center, 1, input);
  zero(g.to_radius, 1, input);
}

}  // namespace

void chain_grad_cpu(const ChainGradArgs& g) {
  const Plan plan(g);
  // Blocks of about four examples, an even number of blocks for each of a few threads.
  const int64_t blocks = std::clamp<int64_t>((g.examples / 4 + 7) / 8 * 8, 1, 64);
  const Floats sums(blocks * plan.weights);
  parallel_for(blocks, 1, [&](int64_t first, int64_t last) {
    Worker worker(g, plan);
    for (int64_t i = first; i < last; ++i) {
      float* own = sums.get() + i * plan.weights;
      std::fill_n(own, plan.weights, 0.f);
      for (int64_t e = i * g.examples / blocks; e < (i + 1) * g.examples / blocks; ++e) {
        clear(g, e);
        worker.start(e);
        worker.run(g.starts[e], g.starts[e + 1], own);
      }
    }
  });
  for (int64_t b = 1; b < blocks; ++b) add_numbers(sums.get() + b * plan.weights, plan.weights, sums.get());
  for (int i = 0; i < g.count; ++i)
    if (g.steps[i].to_weight != nullptr)
      std::copy_n(sums.get() + plan.weight_at[i], g.steps[i].forward.channels * g.steps[i].forward.lanes,
                  g.steps[i].to_weight);
}

FR_NS_END
