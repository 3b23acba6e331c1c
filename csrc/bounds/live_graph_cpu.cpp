// Rows of coefficients through a graph of activations and convolutions down to the input, with the rows of a group in
// the lanes: windows stay windows, and neurons whose lines are zero are left out on both sides of every product.
#include <algorithm>
#include <memory>

#include "bounds/entry_cpu.h"
#include "bounds/fma.h"
#include "bounds/formulas.h"
#include "bounds/live_graph.h"
#include "bounds/live_graph_ends.h"
#include "bounds/live_products.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

// A block of rows of one group in kM vectors. Where the sides have coefficients of their own the upper side's rows come
// after the lower one's.
template <int kM>
class Block : private GraphRows<kM> {
 public:
  Block(GraphWork& work, int64_t group) : GraphRows<kM>(work), group_(group) {}

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
  using Base = GraphRows<kM>;
  using Base::each, Base::line_of, Base::leave, Base::g_, Base::work_, Base::n_, Base::row_, Base::side_, Base::lost_;
  using Base::low_, Base::up_, Base::shared_;

  // Everything that the rows bring to a stage.
  void arrive(int stage) {
    const GraphStage& s = g_.stages[stage];
    const GraphLink* links = g_.links + s.first;
    const bool sets =
        s.entry < 0 && s.links > 0 && links[0].kind == LinkKind::conv && links[0].source >= 0 && !work_.last(stage);
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
      } else if (l.kind == LinkKind::pick) {
        follow(stage, l, s.first + k);
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
  // v[lane] += weights[channel of the lane], of one group of channels: where the lane's own is another, nothing.
  template <bool kGroups>
  FR_HD void add_channels(const float* weights, int64_t group, float* v) {
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
    each([&](int m) FR_INLINE_LAMBDA {
      Vec w = load(row + m * kLanes);
      if constexpr (kGroups) w = select(load(lane_group_ + m * kLanes) == Vec(static_cast<float>(group)), w, Vec(0.f));
      store(v + m * kLanes, load(v + m * kLanes) + w);
    });
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
    const int64_t begin = g_.starts[group_], own = g_.starts[group_ + 1] - begin, out = g_.channels / l.groups;
    for (int64_t i = 0; i < n_ && l.groups > 1; ++i)
      lane_group_[i] = static_cast<float>(g_.channel[begin + (first_ + i) % own] / out);
    l.groups > 1 ? kernel<true>(stage, l) : kernel<false>(stage, l);
  }
  template <bool kGroups>
  void kernel(int stage, const GraphLink& l) {
    const GraphStage& s = g_.stages[stage];
    const Rect at = start();
    const int64_t own = s.channels / l.groups;
    over(stage, reached(l, at, s), [&](int64_t k, int64_t c, int64_t y, int64_t x) FR_INLINE_LAMBDA {
      const int64_t dy = y + l.pad_y - at.top * l.stride_y, dx = x + l.pad_x - at.left * l.stride_x;
      const int64_t ky = dy / l.dilation_y, kx = dx / l.dilation_x;
      if (ky * l.dilation_y != dy || kx * l.dilation_x != dx) return;
      const int64_t group = kGroups ? c / own : 0;
      add_channels<kGroups>(l.weight + ((ky * l.kernel_w + kx) * own + c - group * own) * g_.channels, group,
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

  // Through a pooling: each of its neurons to the one that it follows.
  void follow(int stage, const GraphLink& l, int link) {
    const Rect& r = work_.rects[l.source];
    const int32_t* to = work_.weight[static_cast<size_t>(link)].at.get();
    for (int64_t y = r.top; y < r.bottom; ++y) {
      const Run run = line_of(l.source, y);
      for (int64_t k = run.begin; k < run.end; ++k) {
        if (to[k] < 0) continue;
        const float* a = work_.values(l.source) + k * kM * kLanes;
        float* v = work_.values(stage) + static_cast<int64_t>(to[k]) * kM * kLanes;
        each([&](int m) FR_INLINE_LAMBDA { store(v + m * kLanes, load(v + m * kLanes) + load(a + m * kLanes)); });
      }
    }
  }

  // The living neurons of the positions [y0, y1] x [x0, x1] of a convolution's source, of one group of channels, that
  // the neuron at (top, left) of the stage meets.
  template <bool kLines>
  FR_HD int meets(const GraphLink& l, int link, int64_t group, int64_t top, int64_t left, const Rect& r) {
    const GraphStage& s = g_.stages[l.source];
    Run* runs = work_.runs.get();
    int count = 0;
    if constexpr (kLines) {
      for (int64_t y = r.top; y < r.bottom && r.left < r.right; ++y) {
        const int64_t* start = work_.alive[static_cast<size_t>(l.source)].start.get() + y * s.map_width;
        if (start[r.left] < start[r.right]) runs[count++] = {start[r.left], start[r.right]};
      }
      return count;
    }
    const int64_t* position = work_.alive[static_cast<size_t>(l.source)].start.get();
    const int32_t* starts = work_.weight[static_cast<size_t>(link)].source_start.get();
    for (int64_t y = r.top; y < r.bottom; ++y) {
      if ((top + l.pad_y - y * l.stride_y) % l.dilation_y != 0) continue;
      for (int64_t x = r.left; x < r.right; ++x) {
        if ((left + l.pad_x - x * l.stride_x) % l.dilation_x != 0) continue;
        const int64_t at = y * s.map_width + x, own = at * l.groups + group;
        const Run run = l.groups == 1 ? Run{position[at], position[at + 1]} : Run{starts[own], starts[own + 1]};
        if (run.begin < run.end) runs[count++] = run;
      }
    }
    return count;
  }

  // Through a convolution: outputs that meet the same inputs together.
  template <Result kTo>
  void gather(int stage, const GraphLink& l, int link) {
    by_lines(l) ? gather<kTo, true>(stage, l, link) : gather<kTo, false>(stage, l, link);
  }
  template <Result kTo, bool kLines>
  void gather(int stage, const GraphLink& l, int link) {
    const GraphStage &t = g_.stages[stage], &s = g_.stages[l.source];
    const Rect to = work_.rects[stage], from = work_.rects[l.source];
    const Alive& out = work_.alive[static_cast<size_t>(stage)];
    const Offsets& offsets = work_.weight[static_cast<size_t>(link)];
    const int64_t span_y = span_of(l.kernel_h, l.dilation_y), span_x = span_of(l.kernel_w, l.dilation_x);
    const int64_t groups = kLines ? 1 : l.groups, own = t.channels / groups;
    int32_t *column = work_.column.get(), *place = work_.place.get();
    for (int64_t top = to.top, bottom; top < to.bottom; top = bottom) {
      bottom = l.dilation_y > 1 ? top + 1 : cell_end(top, l.pad_y, l.kernel_h, l.stride_y, to.bottom);
      Rect r{std::max(from.top, first_source(top + l.pad_y, span_y, l.stride_y)),
             std::min((top + l.pad_y) / l.stride_y + 1, from.bottom)};
      for (int64_t left = to.left, right; left < to.right; left = right) {
        right = l.dilation_x > 1 ? left + 1 : cell_end(left, l.pad_x, l.kernel_w, l.stride_x, to.right);
        r.left = std::max(from.left, first_source(left + l.pad_x, span_x, l.stride_x));
        r.right = std::min((left + l.pad_x) / l.stride_x + 1, from.right);
        for (int64_t group = 0; group < groups; ++group) {
          const auto among = [&](int64_t position) FR_INLINE_LAMBDA {  // the outputs of a position
            if (groups == 1)
              return Run{out.start[static_cast<size_t>(position)], out.start[static_cast<size_t>(position) + 1]};
            const int32_t* start = offsets.stage_start.get() + position * groups + group;
            return Run{start[0], start[1]};
          };
          int64_t n = 0;
          const int32_t *columns = column, *places = place;
          if (bottom == top + 1 && right == left + 1) {
            const Run run = among(top * t.map_width + left);
            n = run.end - run.begin;
            columns = offsets.column.get() + run.begin;
            places = work_.counted.get() + run.begin;
          } else {
            for (int64_t y = top; y < bottom; ++y)
              for (int64_t x = left; x < right; ++x) {
                const Run run = among(y * t.map_width + x);
                const int64_t away = ((y - top) * l.kernel_w + x - left) * own * s.channels;
                for (int64_t k = run.begin; k < run.end; ++k, ++n) {
                  column[n] = static_cast<int32_t>(away) + offsets.column[static_cast<size_t>(k)];
                  place[n] = static_cast<int32_t>(k);
                }
              }
          }
          if (n == 0) continue;
          const int count = meets<kLines>(l, link, group, top, left, r);
          if (count == 0 && kTo == Result::add) continue;
          const int64_t ky = kLines ? top + l.pad_y : (top + l.pad_y) / l.dilation_y;
          const int64_t kx = kLines ? left + l.pad_x : (left + l.pad_x) / l.dilation_x;
          const Product p{work_.runs.get(), count, work_.values(l.source), offsets.at.get(),
                          l.weight + (ky * l.kernel_w + kx) * own * s.channels};
          pieces(n, [&](int64_t at, int64_t size) {
            product_of<kM, kTo>(size)(p, columns + at, places + at, work_.values(stage));
          });
        }
      }
    }
  }

  // Through a convolution to the input, all of whose numbers count.
  void scatter(int stage, const GraphLink& l, int link) {
    const GraphStage &t = g_.stages[stage], &s = g_.stages[l.source];
    const Rect from = work_.rects[l.source];
    const Alive& in = work_.alive[static_cast<size_t>(l.source)];
    const Offsets& offsets = work_.weight[static_cast<size_t>(link)];
    const int64_t own = t.channels / l.groups, taps = l.kernel_h * l.kernel_w * own;
    const int64_t span_y = span_of(l.kernel_h, l.dilation_y), span_x = span_of(l.kernel_w, l.dilation_x);
    int32_t *inside = work_.column.get(), *border = work_.place.get();
    for (int64_t k = 0; k < taps; ++k) {
      const int64_t line = l.kernel_w * own, ky = k / line, kx = k % line / own;
      inside[k] = static_cast<int32_t>((ky * l.dilation_y * t.map_width + kx * l.dilation_x) * t.channels + k % own);
    }
    for (int64_t py = from.top; py < from.bottom; ++py)
      for (int64_t px = from.left; px < from.right; ++px) {
        const int64_t position = py * s.map_width + px, *start = in.start.get() + position;
        if (start[0] == start[1]) continue;
        const int64_t top = py * l.stride_y - l.pad_y, left = px * l.stride_x - l.pad_x;
        float* to = work_.values(stage);
        const int32_t* place = inside;
        if (top >= 0 && left >= 0 && top + span_y <= t.map_height && left + span_x <= t.map_width) {
          to += (top * t.map_width + left) * t.channels * kM * kLanes;
        } else {  // taps beyond the border go to a place behind the image
          int32_t* at = border;
          place = border;
          for (int64_t y = top; y < top + span_y; y += l.dilation_y)
            for (int64_t x = left; x < left + span_x; x += l.dilation_x)
              for (int64_t c = 0; c < own; ++c) {
                const bool on = y >= 0 && x >= 0 && y < t.map_height && x < t.map_width;
                *at++ = static_cast<int32_t>(on ? (y * t.map_width + x) * t.channels + c : t.numbers());
              }
        }
        for (int64_t group = 0; group < l.groups; ++group) {
          Run run{start[0], start[1]};
          if (l.groups > 1) {
            const int32_t* part = offsets.source_start.get() + position * l.groups + group;
            run = {part[0], part[1]};
          }
          if (run.begin == run.end) continue;
          pieces(taps, [&](int64_t at, int64_t size) {
            const Product p{&run, 1, work_.values(l.source), offsets.at.get(), l.weight + at};
            product_of<kM, Result::line>(size)(p, nullptr, place + at, to + group * own * kM * kLanes);
          });
        }
      }
  }

  int64_t group_, first_ = 0;
  alignas(64) float lane_group_[kM * kLanes] = {};  // of unit vectors through a convolution with groups
  Part parts_[kM * kLanes];
  int parts_count_ = 0;
  Vec flip_[kM];
};

void run_group(GraphWork& work, int64_t group) {
  const GraphArgs& g = work.g;
  const int64_t own = g.starts[group + 1] - g.starts[group], items = work.apart ? 2 * own : own;
  if (own == 0) return;
  work.turn_to(g.example[group]);
  frame(g, group, work.rects.get());
  over_rows<Block>(work, group, items);
}

}  // namespace

void live_graph_cpu(const GraphArgs& g) {
  parallel_for(g.groups, 1, [&](int64_t begin, int64_t end) {
    GraphWork work(g);
    for (int64_t i = begin; i < end; ++i) run_group(work, i);
  });
}

WindowSize live_graph_window_cpu(const GraphArgs& g) {
  const std::unique_ptr<Rect[]> rects(new Rect[static_cast<size_t>(g.count)]);
  WindowSize size{1, 1};
  for (int64_t i = 0; i < g.groups; ++i) {
    frame(g, i, rects.get());
    const Rect& r = rects[static_cast<size_t>(g.count) - 1];
    size = {std::max(size.height, r.bottom - r.top), std::max(size.width, r.right - r.left)};
  }
  return size;
}

FR_NS_END
