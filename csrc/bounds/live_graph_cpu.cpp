// Rows of coefficients through a graph of activations and convolutions down to the input, with the rows of a group in
// the lanes: windows stay windows, and neurons whose lines are zero are left out on both sides of every product.
#include <algorithm>
#include <memory>

#include "bounds/entry_cpu.h"
#include "bounds/fma.h"
#include "bounds/formulas.h"
#include "bounds/live_graph.h"
#include "bounds/live_products.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int kLongestRuns = 64;  // kernel heights

// A block of rows of one group in kM vectors. Where the sides have coefficients of their own the upper side's rows come
// after the lower one's.
template <int kM>
class Block {
 public:
  Block(GraphWork& work, int64_t group) : g_(work.g), work_(work), group_(group) {}

  // Rows [first, first + n), n <= kM kLanes, of both sides one after the other where they are apart.
  void run(int64_t first, int64_t n) {
    const int64_t begin = g_.starts[group_], own = g_.starts[group_ + 1] - begin;
    float flips[kM * kLanes];
    n_ = n, first_ = first;
    for (int64_t i = 0; i < kM * kLanes; ++i) {
      const int64_t item = first + std::min(i, n - 1), row = begin + item % own;
      row_[i] = g_.order != nullptr ? g_.order[row] : row;
      side_[i] = static_cast<int>(item / own);
      flips[i] = side_[i] == 1 ? -1.f : 1.f;
      lost_[i] = 0.f;
    }
    each([&](int m) { flip_[m] = load(flips + m * kLanes), low_[m] = up_[m] = Vec(0.f); });
    shared_ = g_.sides == 2 && !work_.apart;
    if (g_.channel != nullptr) parts(first, n);
    for (int i = 0; i < g_.count; ++i) {
      if (work_.rects[i].empty()) continue;
      arrive(i);
      if (!work_.last(i)) lines(i);
    }
    leave();
  }

 private:
  template <class F>
  FR_HD static void each(const F& f) {
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) f(m);
  }
  // The numbers of one line of a rectangle: of neurons in `alive`, or of the input itself.
  Run line_of(int stage, int64_t y) const {
    const Rect& r = work_.rects[stage];
    const GraphStage& s = g_.stages[stage];
    if (work_.last(stage)) return {(y * s.map_width + r.left) * s.channels, (y * s.map_width + r.right) * s.channels};
    const int64_t* start = work_.alive[static_cast<size_t>(stage)].start.get() + y * s.map_width;
    return {start[r.left], start[r.right]};
  }

  // Everything that the rows bring to a stage.
  void arrive(int stage) {
    const GraphStage& s = g_.stages[stage];
    const GraphLink* links = g_.links + s.first;
    const bool sets =
        s.entry < 0 && s.links > 0 && links[0].kind != LinkKind::identity && links[0].source >= 0 && !work_.last(stage);
    if (!sets) {
      for (int64_t y = work_.rects[stage].top; y < work_.rects[stage].bottom; ++y) {
        const Run run = line_of(stage, y);
        std::fill_n(work_.values(stage) + run.begin * kM * kLanes, (run.end - run.begin) * kM * kLanes, 0.f);
      }
    }
    if (s.entry >= 0) enter(stage, g_.entries[s.entry]);
    for (int k = 0; k < s.links; ++k) {
      const GraphLink& l = links[k];
      if (l.source >= 0 && work_.rects[l.source].empty()) {
        if (k == 0 && sets) gather<Result::set>(stage, l, s.first + k);
      } else if (l.source < 0) {
        l.kind == LinkKind::identity ? unit(stage, l) : kernel(stage, l);
      } else if (l.kind == LinkKind::identity) {
        copy(stage, l);
      } else if (work_.last(stage)) {
        scatter(stage, l, s.first + k);
      } else if (k == 0 && sets) {
        gather<Result::set>(stage, l, s.first + k);
      } else {
        gather<Result::add>(stage, l, s.first + k);
      }
    }
  }

  // The coefficients of the neurons times their lines.
  void lines(int stage) {
    const float* maps = work_.alive[static_cast<size_t>(stage)].lines.get();
    for (int64_t y = work_.rects[stage].top; y < work_.rects[stage].bottom; ++y) {
      const Run run = line_of(stage, y);
      Vec low[kM], up[kM], both[kM];  // summed by themselves first: fewer roundings than one long sum has
      each([&](int m) FR_INLINE_LAMBDA { low[m] = up[m] = both[m] = Vec(0.f); });
      for (int64_t k = run.begin; k < run.end; ++k) {
        const float* map = maps + 4 * k;
        float* v = work_.values(stage) + k * kM * kLanes;
        if (map[0] == map[1] && map[2] == map[3]) {  // one line, as most neurons have
          const Vec i(map[2]), slope(map[0]);
          const bool scaled = map[0] != 1.f;
          each([&](int m) FR_INLINE_LAMBDA {
            const Vec a = load(v + m * kLanes);
            both[m] = fmadd(a, i, both[m]);
            if (scaled) store(v + m * kLanes, a * slope);
          });
          continue;
        }
        const Vec sl(map[0]), su(map[1]), il(map[2]), iu(map[3]);
        each([&](int m) FR_INLINE_LAMBDA {
          const Vec a = load(v + m * kLanes);
          const auto positive = a * flip_[m] >= Vec(0.f);
          low[m] = fmadd(a, select(positive, il, iu), low[m]);
          if (shared_) up[m] = fmadd(a, select(positive, iu, il), up[m]);
          store(v + m * kLanes, a * select(positive, sl, su));
        });
      }
      each([&](int m)
               FR_INLINE_LAMBDA { low_[m] = low_[m] + (low[m] + both[m]), up_[m] = up_[m] + (up[m] + both[m]); });
    }
  }

  // Rows that are given, at the stage where they start.
  void enter(int stage, const GraphEntry& e) {
    const GraphStage& s = g_.stages[stage];
    const int64_t length = s.map_height * s.map_width * s.channels;
    const Alive& live = work_.alive[static_cast<size_t>(stage)];
    const float *plus[kM * kLanes], *minus[kM * kLanes];
    for (int64_t i = 0; i < n_; ++i) {
      const float* a = e.a + side_[i] * e.side_stride;
      plus[i] = a + (e.pick != nullptr ? e.pick[row_[i]] : row_[i]) * length;
      minus[i] = e.minus != nullptr ? a + e.minus[row_[i]] * length : nullptr;
    }
    alignas(64) float tile[kM * kLanes * kLanes] = {};
    int64_t k = 0;
    for (int64_t at = 0; at < length; at += kLanes) {
      const int width = static_cast<int>(std::min<int64_t>(kLanes, length - at));
      for (int64_t i = 0; i < n_; ++i) {
        Vec v = width == kLanes ? load(plus[i] + at) : load_n(plus[i] + at, width);
        if (minus[i] != nullptr) v = v - (width == kLanes ? load(minus[i] + at) : load_n(minus[i] + at, width));
        store(tile + i * kLanes, v);
        const auto fine = v * Vec(0.f) == Vec(0.f);  // what is no number shows where the neuron has no lines, too
        if (any(!fine)) lost_[i] = NAN;
      }
      const auto put = [&](int64_t neuron, int64_t to) FR_INLINE_LAMBDA {
        float* v = work_.values(stage) + to * kM * kLanes;
        for (int64_t i = 0; i < kM * kLanes; ++i) v[i] = tile[i * kLanes + neuron - at];
      };
      if (work_.last(stage))
        for (int64_t i = at; i < at + width; ++i) put(i, i);
      else
        for (; k < live.count && live.neuron[static_cast<size_t>(k)] < at + width; ++k)
          put(live.neuron[static_cast<size_t>(k)], k);
    }
  }

  // Which channels the lanes of unit vectors take, in pieces of one vector of channels.
  struct Part {
    int64_t first;  // channel
    uint32_t lanes;
    int to, width;
  };
  void parts(int64_t first, int64_t n) {
    const int64_t begin = g_.starts[group_], own = g_.starts[group_ + 1] - begin;
    parts_count_ = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t c = g_.channel[begin + (first + i) % own], base = c / kLanes * kLanes;
      const bool same = parts_count_ > 0 && parts_[parts_count_ - 1].first == base && (first + i) % own != 0;
      if (!same)
        parts_[parts_count_++] = {base, 0, static_cast<int>(i),
                                  static_cast<int>(std::min<int64_t>(kLanes, g_.channels - base))};
      parts_[parts_count_ - 1].lanes |= 1u << (c - base);
    }
  }
  // v[lane] += sign * weights[channel of the lane]
  FR_HD void add_channels(const float* weights, float* v) {
    alignas(64) float row[(kM + 1) * kLanes];
    each([&](int m) FR_INLINE_LAMBDA { store(row + m * kLanes, Vec(0.f)); });
    for (int p = 0; p < parts_count_; ++p) {
      const Part& part = parts_[p];
      const float* w = weights + part.first;
      const Vec all = part.width == kLanes ? load(w) : load_n(w, part.width);
#if defined(__AVX512F__)
      store(row + part.to, _mm512_maskz_compress_ps(static_cast<__mmask16>(part.lanes), all.v));
#else
      float f[kLanes];
      store(f, all);
      float* to = row + part.to;
      for (uint32_t left = part.lanes; left != 0; left &= left - 1) *to++ = f[__builtin_ctz(left)];
#endif
    }
    each([&](int m) FR_INLINE_LAMBDA { store(v + m * kLanes, load(v + m * kLanes) + load(row + m * kLanes)); });
  }
  // Calls f(number, neuron's channel, position) for the living neurons at the positions `r` of a stage.
  template <class F>
  FR_HD void over(int stage, const Rect& r, const F& f) {
    const GraphStage& s = g_.stages[stage];
    const Alive& live = work_.alive[static_cast<size_t>(stage)];
    for (int64_t y = r.top; y < r.bottom; ++y)
      for (int64_t x = r.left; x < r.right; ++x) {
        const int64_t position = y * s.map_width + x;
        if (work_.last(stage)) {
          for (int64_t c = 0; c < s.channels; ++c) f(position * s.channels + c, c, y, x);
        } else {
          for (int64_t k = live.start[static_cast<size_t>(position)]; k < live.start[static_cast<size_t>(position) + 1];
               ++k)
            f(k, live.channel[static_cast<size_t>(k)], y, x);
        }
      }
  }
  Rect start() const { return {g_.y[group_], g_.y[group_] + 1, g_.x[group_], g_.x[group_] + 1}; }

  // Unit vectors through a convolution: its weights.
  void kernel(int stage, const GraphLink& l) {
    const GraphStage& s = g_.stages[stage];
    const Rect at = start();
    over(stage, reached(l, at, s), [&](int64_t k, int64_t c, int64_t y, int64_t x) FR_INLINE_LAMBDA {
      const int64_t ky = y + l.pad_y - at.top * l.stride_y, kx = x + l.pad_x - at.left * l.stride_x;
      add_channels(l.weight + ((ky * l.kernel_w + kx) * s.channels + c) * g_.channels,
                   work_.values(stage) + k * kM * kLanes);
    });
  }
  void unit(int stage, const GraphLink& l) {
    const int64_t begin = g_.starts[group_], own = g_.starts[group_ + 1] - begin;
    over(stage, start(), [&](int64_t k, int64_t c, int64_t, int64_t) {
      float* v = work_.values(stage) + k * kM * kLanes;
      for (int64_t i = 0; i < n_; ++i)
        if (g_.channel[begin + (first_ + i) % own] == c) v[i] += l.sign;
    });
  }

  // The same neurons of another stage.
  void copy(int stage, const GraphLink& l) {
    const GraphStage& s = g_.stages[stage];
    const Rect& r = work_.rects[l.source];
    const Alive& from = work_.alive[static_cast<size_t>(l.source)];
    const Vec sign(l.sign);
    for (int64_t y = r.top; y < r.bottom; ++y)
      for (int64_t x = r.left; x < r.right; ++x) {
        const auto position = static_cast<size_t>(y * s.map_width + x);
        int64_t i = from.start[position];
        const int64_t end = from.start[position + 1];
        over(stage, {y, y + 1, x, x + 1}, [&](int64_t k, int64_t c, int64_t, int64_t) FR_INLINE_LAMBDA {
          while (i < end && from.channel[static_cast<size_t>(i)] < c) ++i;
          if (i == end || from.channel[static_cast<size_t>(i)] != c) return;
          const float* a = work_.values(l.source) + i * kM * kLanes;
          float* v = work_.values(stage) + k * kM * kLanes;
          each([&](int m) FR_INLINE_LAMBDA {
            store(v + m * kLanes, fmadd(sign, load(a + m * kLanes), load(v + m * kLanes)));
          });
        });
      }
  }

  // Through a convolution: outputs that meet the same inputs together.
  template <Result kTo>
  void gather(int stage, const GraphLink& l, int link) {
    const GraphStage &t = g_.stages[stage], &s = g_.stages[l.source];
    const Rect to = work_.rects[stage], from = work_.rects[l.source];
    const Alive &in = work_.alive[static_cast<size_t>(l.source)], &out = work_.alive[static_cast<size_t>(stage)];
    int32_t *column = work_.column.get(), *place = work_.place.get();
    Run runs[kLongestRuns];
    for (int64_t top = to.top, bottom; top < to.bottom; top = bottom) {
      bottom = cell_end(top, l.pad_y, l.kernel_h, l.stride_y, to.bottom);
      const int64_t first_y = std::max(from.top, first_source(top + l.pad_y, l.kernel_h, l.stride_y));
      const int64_t last_y = std::min((top + l.pad_y) / l.stride_y, from.bottom - 1);
      for (int64_t left = to.left, right; left < to.right; left = right) {
        right = cell_end(left, l.pad_x, l.kernel_w, l.stride_x, to.right);
        int64_t n = 0;
        const int32_t *columns = column, *places = place;
        if (bottom == top + 1 && right == left + 1) {
          const int64_t* start = out.start.get() + top * t.map_width + left;
          n = start[1] - start[0];
          columns = work_.weight[static_cast<size_t>(link)].column.get() + start[0];
          places = work_.counted.get() + start[0];
        } else {
          for (int64_t y = top; y < bottom; ++y)
            for (int64_t x = left; x < right; ++x) {
              const int64_t* start = out.start.get() + y * t.map_width + x;
              const int64_t away = ((y - top) * l.kernel_w + x - left) * t.channels;
              for (int64_t k = start[0]; k < start[1]; ++k, ++n) {
                column[n] = static_cast<int32_t>((away + out.channel[static_cast<size_t>(k)]) * s.channels);
                place[n] = static_cast<int32_t>(k);
              }
            }
        }
        if (n == 0) continue;
        const int64_t first_x = std::max(from.left, first_source(left + l.pad_x, l.kernel_w, l.stride_x));
        const int64_t last_x = std::min((left + l.pad_x) / l.stride_x, from.right - 1);
        int count = 0;
        for (int64_t y = first_y; y <= last_y && first_x <= last_x; ++y) {
          const int64_t* start = in.start.get() + y * s.map_width;
          if (start[first_x] < start[last_x + 1]) runs[count++] = {start[first_x], start[last_x + 1]};
        }
        if (count == 0 && kTo == Result::add) continue;
        const float* base = l.weight + ((top + l.pad_y) * l.kernel_w + left + l.pad_x) * t.channels * s.channels;
        const Product p{runs, count, work_.values(l.source), work_.weight[static_cast<size_t>(link)].at.get(), base};
        pieces(n, [&](int64_t at, int64_t size) {
          product_of<kM, kTo>(size)(p, columns + at, places + at, work_.values(stage));
        });
      }
    }
  }

  // Through a convolution to the input, all of whose numbers count.
  void scatter(int stage, const GraphLink& l, int link) {
    const GraphStage &t = g_.stages[stage], &s = g_.stages[l.source];
    const Rect from = work_.rects[l.source];
    const Alive& in = work_.alive[static_cast<size_t>(l.source)];
    const int64_t inputs = t.map_height * t.map_width * t.channels, taps = l.kernel_h * l.kernel_w * t.channels;
    int32_t *inside = work_.column.get(), *border = work_.place.get();
    for (int64_t k = 0; k < taps; ++k) {
      const int64_t line = l.kernel_w * t.channels;
      inside[k] = static_cast<int32_t>(k / line * t.map_width * t.channels + k % line);
    }
    for (int64_t py = from.top; py < from.bottom; ++py)
      for (int64_t px = from.left; px < from.right; ++px) {
        const int64_t* start = in.start.get() + py * s.map_width + px;
        const Run run{start[0], start[1]};
        if (run.begin == run.end) continue;
        const int64_t top = py * l.stride_y - l.pad_y, left = px * l.stride_x - l.pad_x;
        float* to = work_.values(stage);
        const int32_t* place = inside;
        if (top >= 0 && left >= 0 && top + l.kernel_h <= t.map_height && left + l.kernel_w <= t.map_width) {
          to += (top * t.map_width + left) * t.channels * kM * kLanes;
        } else {  // taps beyond the border go to one place behind the image
          int32_t* at = border;
          place = border;
          for (int64_t y = top; y < top + l.kernel_h; ++y)
            for (int64_t x = left; x < left + l.kernel_w; ++x)
              for (int64_t c = 0; c < t.channels; ++c) {
                const bool on = y >= 0 && x >= 0 && y < t.map_height && x < t.map_width;
                *at++ = static_cast<int32_t>(on ? (y * t.map_width + x) * t.channels + c : inputs);
              }
        }
        const float* base = l.weight + (py * l.stride_y * l.kernel_w + px * l.stride_x) * t.channels;
        pieces(taps, [&](int64_t at, int64_t size) {
          const Product p{&run, 1, work_.values(l.source), work_.weight[static_cast<size_t>(link)].at.get(), base + at};
          product_of<kM, Result::line>(size)(p, nullptr, place + at, to);
        });
      }
  }

  // The extremes over the input set.
  void leave() {
    const ConcretizeArgs& e = g_.end;
    const int input = g_.count - 1;
    const GraphStage& s = g_.stages[input];
    const int64_t base = work_.example * s.map_height * s.map_width * s.channels;
    const bool box = e.center != nullptr;
    const float *middle = (box ? e.center : e.x) + base, *reach = (box ? e.radius : e.eps) + base;
    Vec mid[kM], size[kM];
    each([&](int m) { mid[m] = size[m] = Vec(0.f); });
    const auto end = [&](const auto& term) FR_INLINE_LAMBDA {
      for (int64_t y = work_.rects[input].top; y < work_.rects[input].bottom; ++y) {
        const Run run = line_of(input, y);
        Vec a[kM], b[kM];
        each([&](int m) FR_INLINE_LAMBDA { a[m] = b[m] = Vec(0.f); });
        for (int64_t i = run.begin; i < run.end; ++i) {
          const Vec c(middle[i]), r(reach[i]);
          each([&](int m) FR_INLINE_LAMBDA {
            const Vec v = load(work_.values(input) + (i * kM + m) * kLanes);
            a[m] = fmadd(v, c, a[m]);
            b[m] = term(v, r, b[m]);
          });
        }
        each([&](int m) FR_INLINE_LAMBDA {
          mid[m] = mid[m] + a[m];
          size[m] = e.dual == Dual::linf ? vmax_nan(size[m], b[m]) : size[m] + b[m];
        });
      }
    };
    if (work_.rects[input].empty())
      ;
    else if (box)
      end([](Vec v, Vec r, Vec sum) FR_INLINE_LAMBDA { return fmadd(vabs(v), r, sum); });
    else if (e.dual == Dual::l1)
      end([](Vec v, Vec r, Vec sum) FR_INLINE_LAMBDA { return norm_term<Dual::l1>(vabs(v * r), sum); });
    else if (e.dual == Dual::l2)
      end([](Vec v, Vec r, Vec sum) FR_INLINE_LAMBDA { return norm_term<Dual::l2>(vabs(v * r), sum); });
    else
      end([](Vec v, Vec r, Vec sum) FR_INLINE_LAMBDA { return norm_term<Dual::linf>(vabs(v * r), sum); });
    float low[kM * kLanes], up[kM * kLanes], centre[kM * kLanes], length[kM * kLanes];
    each([&](int m) {
      store(low + m * kLanes, low_[m]), store(up + m * kLanes, up_[m]);
      store(centre + m * kLanes, mid[m]);
      store(length + m * kLanes, size[m]);
    });
    for (int64_t i = 0; i < n_ && e.dual == Dual::l2 && !box; ++i)
      length[i] = root_of_squares(length[i], [&] {
        double wide = 0.;
        for (int64_t y = work_.rects[input].top; y < work_.rects[input].bottom; ++y) {
          const Run run = line_of(input, y);
          for (int64_t k = run.begin; k < run.end; ++k) {
            const float w = work_.values(input)[k * kM * kLanes + i] * reach[k];
            wide += static_cast<double>(w) * w;
          }
        }
        return wide;
      });
    for (int64_t i = 0; i < n_; ++i) {
      const auto put = [&](int side, float offset) {
        const int64_t at = side * g_.rows + row_[i];
        const float end_of = side == 1 ? centre[i] + length[i] : centre[i] - length[i];
        e.out[at] = g_.b[at] + (offset + lost_[i]) + end_of;
      };
      put(side_[i], low[i]);
      if (shared_) put(1, up[i]);
    }
  }

  const GraphArgs& g_;
  GraphWork& work_;
  int64_t group_, n_ = 0, first_ = 0;
  int64_t row_[kM * kLanes];
  int side_[kM * kLanes];
  float lost_[kM * kLanes];
  Part parts_[kM * kLanes];
  int parts_count_ = 0;
  Vec flip_[kM], low_[kM], up_[kM];
  bool shared_ = false;
};

void run_group(GraphWork& work, int64_t group) {
  const GraphArgs& g = work.g;
  const int64_t own = g.starts[group + 1] - g.starts[group], items = work.apart ? 2 * own : own;
  if (own == 0) return;
  work.turn_to(g.example[group]);
  frame(work, group);
  over_rows<Block>(work, group, items);
}

}  // namespace

void live_graph_cpu(const GraphArgs& g) {
  parallel_for(g.groups, 1, [&](int64_t begin, int64_t end) {
    GraphWork work(g);
    for (int64_t i = begin; i < end; ++i) run_group(work, i);
  });
}

FR_NS_END
