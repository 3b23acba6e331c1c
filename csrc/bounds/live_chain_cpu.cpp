// Rows of coefficients through a chain of activations and linear layers down to the input, example by example with the
// rows in the lanes: neurons whose lines are zero are left out on both sides of every product.
#include <algorithm>
#include <memory>

#include "bounds/entry_cpu.h"
#include "bounds/fma.h"
#include "bounds/formulas.h"
#include "bounds/live_cpu.h"
#include "bounds/live_products.h"
#include "core/floats.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int kLongestRuns = 64;  // kernel heights

// What a thread works on.
struct Work {
  const ChainArgs& g;
  std::unique_ptr<LiveList[]> lists;
  std::unique_ptr<int32_t[]> inside;         // the last step's taps, relative to position (0, 0)
  std::unique_ptr<int32_t[]> column, place;  // of the outputs that are computed together
  Floats from, to;
  int64_t taps = 0;
  bool apart = false;  // the sides have coefficients of their own

  explicit Work(const ChainArgs& args) : g(args), lists(new LiveList[static_cast<size_t>(args.count)]) {
    const ChainStep& last = g.steps[g.count - 1];
    int64_t most = last.out_height * last.out_width * last.out_channels + 1;
    apart = g.rows.side_stride != 0;
    for (int i = 0; i < g.count; ++i) {
      const ChainStep& s = g.steps[i];
      lists[static_cast<size_t>(i)].reserve(s);
      most = std::max(most, s.map_height * s.map_width * s.channels);
      apart = apart || s.slope_sides == 2;
    }
    apart = apart && g.rows.sides == 2;
    from = Floats(most * kMostVectors * kLanes);
    to = Floats(most * kMostVectors * kLanes);
    taps = last.kernel_h * last.kernel_w * last.out_channels;
    inside.reset(new int32_t[static_cast<size_t>(taps)]);
    column.reset(new int32_t[static_cast<size_t>(most)]);
    place.reset(new int32_t[static_cast<size_t>(std::max(taps, most))]);
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t line = last.kernel_w * last.out_channels;
      inside[static_cast<size_t>(t)] = static_cast<int32_t>(t / line * last.out_width * last.out_channels + t % line);
    }
  }
};

// A block of rows of one example in kM vectors. Where the sides have coefficients of their own the upper side's rows
// come after the lower one's.
template <int kM>
class Block {
 public:
  Block(Work& work, int64_t example) : g_(work.g), work_(work), example_(example) {}

  // Rows [first, first + n), n <= kM kLanes, of both sides one after the other where they are apart.
  void run(int64_t first, int64_t n) {
    const int64_t own = g_.starts[example_ + 1] - g_.starts[example_];
    float flips[kM * kLanes];
    n_ = n;
    for (int64_t i = 0; i < kM * kLanes; ++i) {
      const int64_t item = first + std::min(i, n - 1), row = g_.starts[example_] + item % own;
      row_[i] = g_.order != nullptr ? g_.order[row] : row;
      side_[i] = static_cast<int>(item / own);
      flips[i] = side_[i] == 1 ? -1.f : 1.f;
      lost_[i] = 0.f;
    }
    each([&](int m) { flip_[m] = load(flips + m * kLanes), low_[m] = up_[m] = Vec(0.f); });
    shared_ = g_.rows.sides == 2 && !work_.apart;
    enter();
    for (int i = 0; i + 1 < g_.count; ++i) {
      gather(i);
      std::swap(work_.from, work_.to);
    }
    scatter();
    leave();
  }

 private:
  template <class F>
  FR_HD static void each(const F& f) {
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) f(m);
  }
  struct Sums {
    Vec low[kM], up[kM];
  };
  // What is summed by itself first: fewer roundings than one long sum has.
  template <class F>
  FR_HD void summed(const F& f) {
    Sums sums;
    each([&](int m) { sums.low[m] = sums.up[m] = Vec(0.f); });
    f(sums);
    each([&](int m) { low_[m] = low_[m] + sums.low[m], up_[m] = up_[m] + sums.up[m]; });
  }

  // The coefficients of a neuron, at `v`, times its lines.
  FR_HD void line(const LineMaps& map, int64_t neuron, float* v, Sums& sums) {
    const Vec il(map.low[neuron]), iu(map.up[neuron]), sl(map.slope_low[neuron]), su(map.slope_up[neuron]);
    each([&](int m) FR_INLINE_LAMBDA {
      const Vec a = load(v + m * kLanes);
      const auto positive = a * flip_[m] >= Vec(0.f);
      sums.low[m] = fmadd(a, select(positive, il, iu), sums.low[m]);
      if (shared_) sums.up[m] = fmadd(a, select(positive, iu, il), sums.up[m]);
      store(v + m * kLanes, a * select(positive, sl, su));
    });
  }

  // The rows as they are given, at the first activation.
  void enter() {
    const Rows& r = g_.rows;
    const LiveList& live = work_.lists[0];
    const LineMaps map(g_.steps[0], g_.examples, example_);
    const float *plus[kM * kLanes], *minus[kM * kLanes];
    for (int64_t i = 0; i < n_; ++i) {
      const float* a = r.a + side_[i] * r.side_stride;
      plus[i] = a + (r.pick != nullptr ? r.pick[row_[i]] : row_[i]) * r.length;
      minus[i] = r.minus != nullptr ? a + r.minus[row_[i]] * r.length : nullptr;
    }
    alignas(64) float tile[kM * kLanes * kLanes] = {};
    int64_t k = 0;
    for (int64_t at = 0; at < r.length; at += kLanes) {
      const int width = static_cast<int>(std::min<int64_t>(kLanes, r.length - at));
      for (int64_t i = 0; i < n_; ++i) {
        Vec v = width == kLanes ? load(plus[i] + at) : load_n(plus[i] + at, width);
        if (minus[i] != nullptr) v = v - (width == kLanes ? load(minus[i] + at) : load_n(minus[i] + at, width));
        store(tile + i * kLanes, v);
        const auto fine = v * Vec(0.f) == Vec(0.f);  // what is no number shows where the neuron has no lines, too
        if (any(!fine)) lost_[i] = NAN;
      }
      summed([&](Sums& sums) {
        for (; k < live.count && live.neuron[static_cast<size_t>(k)] < at + width; ++k) {
          const int64_t neuron = live.neuron[static_cast<size_t>(k)];
          float* v = work_.from.get() + k * kM * kLanes;
          for (int64_t i = 0; i < kM * kLanes; ++i) v[i] = tile[i * kLanes + neuron - at];
          line(map, neuron, v, sums);
        }
      });
    }
  }

  // Where the gradients take up row i of the block below the layer of a step; null: they do not.
  float* kept_row(const ChainStep& s, int64_t i) const {
    const int64_t row = (work_.apart ? side_[i] * g_.rows.count : 0) + row_[i];
    return s.kept == nullptr ? nullptr : s.kept + row * s.out_height * s.out_width * s.out_channels;
  }

  // Through the layer of step i to the activation of the next one: outputs that meet the same inputs together.
  void gather(int step) {
    const ChainStep& s = g_.steps[step];
    const LiveList &in = work_.lists[static_cast<size_t>(step)], &out = work_.lists[static_cast<size_t>(step) + 1];
    const LineMaps map(g_.steps[step + 1], g_.examples, example_);
    const int64_t tap = s.turned ? s.lanes : 1;
    const bool one = s.map_height == 1 && s.map_width == 1 && s.pad_y == 0 && s.pad_x == 0 &&
                     s.kernel_h == s.out_height && s.kernel_w == s.out_width;  // a dense layer
    int32_t *column = work_.column.get(), *place = work_.place.get();
    float* kept[kM * kLanes];
    for (int64_t i = 0; i < n_; ++i) {
      kept[i] = kept_row(s, i);
      if (kept[i] != nullptr) std::fill_n(kept[i], s.out_height * s.out_width * s.out_channels, 0.f);
    }
    Run runs[kLongestRuns];
    for (int64_t top = 0, bottom; top < s.out_height; top = bottom) {
      bottom = one ? s.out_height : cell_end(top, s.pad_y, s.kernel_h, s.stride_y, s.out_height);
      const int64_t first_y = one ? 0 : first_source(top + s.pad_y, s.kernel_h, s.stride_y);
      const int64_t last_y = std::min((top + s.pad_y) / s.stride_y, s.map_height - 1);
      for (int64_t left = 0, right; left < s.out_width; left = right) {
        right = one ? s.out_width : cell_end(left, s.pad_x, s.kernel_w, s.stride_x, s.out_width);
        int64_t n = 0;
        for (int64_t y = top; y < bottom; ++y)
          for (int64_t x = left; x < right; ++x) {
            const int64_t* start = out.start.get() + y * s.out_width + x;
            const int64_t away = ((y - top) * s.kernel_w + x - left) * s.out_channels;
            for (int64_t k = start[0]; k < start[1]; ++k, ++n) {
              column[n] = static_cast<int32_t>((away + out.channel[static_cast<size_t>(k)]) * tap);
              place[n] = static_cast<int32_t>(k);
            }
          }
        if (n == 0) continue;
        const int64_t first_x = one ? 0 : first_source(left + s.pad_x, s.kernel_w, s.stride_x);
        const int64_t last_x = std::min((left + s.pad_x) / s.stride_x, s.map_width - 1);
        int count = 0;
        for (int64_t py = first_y; py <= last_y && first_x <= last_x; ++py) {
          const int64_t* start = in.start.get() + py * s.map_width;
          runs[count++] = {start[first_x], start[last_x + 1]};
        }
        const float* base = s.weight + ((top + s.pad_y) * s.kernel_w + left + s.pad_x) * s.out_channels * tap;
        const Product p{runs, count, work_.from.get(), in.weight.get(), base};
        pieces(n, [&](int64_t at, int64_t size) {
          product_of<kM, Result::set>(size)(p, column + at, place + at, work_.to.get());
        });
        for (int64_t k = 0; k < n && s.kept != nullptr; ++k) {
          const float* from = work_.to.get() + place[k] * kM * kLanes;
          const int64_t neuron = out.neuron[static_cast<size_t>(place[k])];
          for (int64_t i = 0; i < n_; ++i) kept[i][neuron] = from[i];
        }
        summed([&](Sums& sums) {
          for (int64_t k = 0; k < n; ++k)
            line(map, out.neuron[static_cast<size_t>(place[k])], work_.to.get() + place[k] * kM * kLanes, sums);
        });
      }
    }
  }

  // Through the last layer to the input, all of whose numbers count.
  void scatter() {
    const ChainStep& s = g_.steps[g_.count - 1];
    const LiveList& in = work_.lists[static_cast<size_t>(g_.count) - 1];
    const int64_t inputs = s.out_height * s.out_width * s.out_channels;
    std::fill_n(work_.to.get(), inputs * kM * kLanes, 0.f);
    for (int64_t py = 0, position = 0; py < s.map_height; ++py)
      for (int64_t px = 0; px < s.map_width; ++px, ++position) {
        const Run run{in.start[static_cast<size_t>(position)], in.start[static_cast<size_t>(position) + 1]};
        if (run.begin == run.end) continue;
        const int64_t top = py * s.stride_y - s.pad_y, left = px * s.stride_x - s.pad_x;
        float* to = work_.to.get();
        const int32_t* place = work_.inside.get();
        if (top >= 0 && left >= 0 && top + s.kernel_h <= s.out_height && left + s.kernel_w <= s.out_width) {
          to += (top * s.out_width + left) * s.out_channels * kM * kLanes;
        } else {  // taps beyond the border go to one place behind the image
          int32_t* at = work_.place.get();
          place = at;
          for (int64_t y = top; y < top + s.kernel_h; ++y)
            for (int64_t x = left; x < left + s.kernel_w; ++x)
              for (int64_t c = 0; c < s.out_channels; ++c) {
                const bool on = y >= 0 && x >= 0 && y < s.out_height && x < s.out_width;
                *at++ = static_cast<int32_t>(on ? (y * s.out_width + x) * s.out_channels + c : inputs);
              }
        }
        const float* base = s.weight + (py * s.stride_y * s.kernel_w + px * s.stride_x) * s.out_channels;
        pieces(work_.taps, [&](int64_t at, int64_t size) {
          const Product p{&run, 1, work_.from.get(), in.weight.get(), base + at};
          product_of<kM, Result::line>(size)(p, nullptr, place + at, to);
        });
      }
  }

  // The extremes over the input set.
  void leave() {
    const ConcretizeArgs& e = g_.end;
    const ChainStep& s = g_.steps[g_.count - 1];
    const int64_t inputs = s.out_height * s.out_width * s.out_channels, base = example_ * inputs;
    const bool box = e.center != nullptr;
    for (int64_t i = 0; i < n_ && s.kept != nullptr; ++i) {
      float* row = kept_row(s, i);
      for (int64_t k = 0; k < inputs; ++k) row[k] = work_.to[k * kM * kLanes + i];
    }
    const float *middle = (box ? e.center : e.x) + base, *reach = (box ? e.radius : e.eps) + base;
    const auto end = [&](const auto& term) FR_INLINE_LAMBDA {
      each([&](int m) FR_INLINE_LAMBDA {
        constexpr int kWays = 4;
        Vec mid[kWays], size[kWays];
        for (int u = 0; u < kWays; ++u) mid[u] = size[u] = Vec(0.f);
        const auto one = [&](int64_t i, int u) FR_INLINE_LAMBDA {
          const Vec v = load(work_.to.get() + (i * kM + m) * kLanes);
          mid[u] = fmadd(v, Vec(middle[i]), mid[u]);
          size[u] = term(v, Vec(reach[i]), size[u]);
        };
        int64_t i = 0;
        for (; i + kWays <= inputs; i += kWays)
#pragma GCC unroll 4
          for (int u = 0; u < kWays; ++u) one(i + u, u);
        for (; i < inputs; ++i) one(i, 0);
        store(middle_ + m * kLanes, (mid[0] + mid[1]) + (mid[2] + mid[3]));
        store(size_ + m * kLanes, e.dual == Dual::linf
                                      ? vmax_nan(vmax_nan(size[0], size[1]), vmax_nan(size[2], size[3]))
                                      : (size[0] + size[1]) + (size[2] + size[3]));
      });
    };
    with_term(box, e.dual, end);
    float low[kM * kLanes], up[kM * kLanes];
    each([&](int m) { store(low + m * kLanes, low_[m]), store(up + m * kLanes, up_[m]); });
    for (int64_t i = 0; i < n_; ++i) {
      float size = size_[i];
      if (e.dual == Dual::l2 && !box)
        size = root_of_squares(size, [&] {
          double wide = 0.;
          for (int64_t k = 0; k < inputs; ++k) {
            const float w = work_.to[k * kM * kLanes + i] * reach[k];
            wide += static_cast<double>(w) * w;
          }
          return wide;
        });
      const auto put = [&](int side, float offset) {
        const int64_t at = side * g_.rows.count + row_[i];
        e.out[at] = g_.b[at] + (offset + lost_[i]) + (side == 1 ? middle_[i] + size : middle_[i] - size);
      };
      put(side_[i], low[i]);
      if (shared_) put(1, up[i]);
    }
  }

  const ChainArgs& g_;
  Work& work_;
  int64_t example_, n_ = 0;
  int64_t row_[kM * kLanes];
  int side_[kM * kLanes];
  float lost_[kM * kLanes], middle_[kM * kLanes], size_[kM * kLanes];
  Vec flip_[kM], low_[kM], up_[kM];
  bool shared_ = false;
};

void run_example(Work& work, int64_t example) {
  const ChainArgs& g = work.g;
  const int64_t own = g.starts[example + 1] - g.starts[example], items = work.apart ? 2 * own : own;
  if (own == 0) return;
  for (int i = 0; i < g.count; ++i)
    work.lists[static_cast<size_t>(i)].find(g.steps[i], LineMaps(g.steps[i], g.examples, example));
  over_rows<Block>(work, example, items);
}

}  // namespace

void live_chain_cpu(const ChainArgs& g) {
  parallel_for(g.examples, 1, [&](int64_t begin, int64_t end) {
    Work work(g);
    for (int64_t i = begin; i < end; ++i) run_example(work, i);
  });
}

FR_NS_END
