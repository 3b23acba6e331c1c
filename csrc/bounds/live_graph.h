// What a thread needs to take rows through a graph: windows, living neurons, where their weights lie, room for rows.
#pragma once

#include <algorithm>
#include <memory>

#include "bounds/args.h"
#include "bounds/live_cpu.h"
#include "bounds/live_products.h"
#include "core/simd.h"

FR_NS_BEGIN

// Positions [top, bottom) x [left, right) of a map.
struct Rect {
  int64_t top = 0, bottom = 0, left = 0, right = 0;
  bool empty() const { return top >= bottom || left >= right; }
  void join(const Rect& o) {
    if (o.empty()) return;
    if (empty()) {
      *this = o;
      return;
    }
    top = std::min(top, o.top), bottom = std::max(bottom, o.bottom);
    left = std::min(left, o.left), right = std::max(right, o.right);
  }
};

// The positions of a map that the positions `from` of the convolution's result read.
inline Rect reached(const GraphLink& l, const Rect& from, const GraphStage& to) {
  if (l.kind == LinkKind::identity || from.empty()) return from;
  return {std::max<int64_t>(0, from.top * l.stride_y - l.pad_y),
          std::min(to.map_height, (from.bottom - 1) * l.stride_y - l.pad_y + l.kernel_h),
          std::max<int64_t>(0, from.left * l.stride_x - l.pad_x),
          std::min(to.map_width, (from.right - 1) * l.stride_x - l.pad_x + l.kernel_w)};
}

// The neurons of one stage and example whose lines are not zero: position by position, channels ascending.
struct Alive {
  int64_t count = 0;
  std::unique_ptr<int32_t[]> neuron, channel;
  std::unique_ptr<int64_t[]> start;  // [positions + 1] of a position's neurons
  std::unique_ptr<float[]> lines;    // [neurons][4]: slopes and intercepts, lower first

  void reserve(const GraphStage& s) {
    const auto positions = static_cast<size_t>(s.map_height * s.map_width);
    const auto most = positions * static_cast<size_t>(s.channels) + kLanes;  // whole vectors are written
    neuron.reset(new int32_t[most]);
    channel.reset(new int32_t[most]);
    start.reset(new int64_t[positions + 1]);
    lines.reset(new float[4 * most]);
  }
};

struct LinesOf {
  const float *slope_low, *slope_up, *low, *up;
  LinesOf(const GraphStage& s, int64_t examples, int64_t example) {
    const int64_t map = s.map_height * s.map_width * s.channels, at = s.shared ? 0 : example * map;
    const int64_t apart = s.shared ? map : examples * map;
    slope_low = s.slopes + at;
    slope_up = s.slope_sides == 2 ? slope_low + apart : slope_low;
    low = s.intercepts + at;
    up = low + apart;
  }
};

inline void find(const GraphStage& s, const LinesOf& map, Alive& found) {
  int64_t count = 0;
  for (int64_t position = 0; position < s.map_height * s.map_width; ++position) {
    found.start[static_cast<size_t>(position)] = count;
    for (int64_t c = 0; c < s.channels; c += kLanes) {
      const int64_t at = position * s.channels + c;
      const int n = static_cast<int>(std::min<int64_t>(kLanes, s.channels - c));
      const uint32_t live = living(map, at, n);
      append(live, found.neuron.get() + count, static_cast<int32_t>(at));
      append(live, found.channel.get() + count, static_cast<int32_t>(c));
      count += __builtin_popcount(live);
    }
  }
  found.start[static_cast<size_t>(s.map_height * s.map_width)] = count;
  found.count = count;
  for (int64_t k = 0; k < count; ++k) {
    const int32_t i = found.neuron[static_cast<size_t>(k)];
    float* to = found.lines.get() + 4 * k;
    to[0] = map.slope_low[i], to[1] = map.slope_up[i], to[2] = map.low[i], to[3] = map.up[i];
  }
}

struct Values {
  std::unique_ptr<float[]> at;
  int64_t room = 0;  // neurons
};
struct Offsets {
  std::unique_ptr<int32_t[]> at, column;  // of the neurons of the source, and of the stage
};

// What a thread works on.
struct GraphWork {
  const GraphArgs& g;
  int64_t example = -1;
  std::unique_ptr<Alive[]> alive;     // of each stage but the input
  std::unique_ptr<Values[]> held;     // the rows' coefficients at each stage, by the number of the neuron in `alive`
  std::unique_ptr<Offsets[]> weight;  // of each link: where the weights of a neuron of its source lie
  std::unique_ptr<Rect[]> rects;
  std::unique_ptr<int32_t[]> column, place;  // of the outputs that are computed together
  std::unique_ptr<int32_t[]> counted;        // 0, 1, 2, ...
  bool apart = false;                        // the sides have coefficients of their own

  explicit GraphWork(const GraphArgs& args)
      : g(args),
        alive(new Alive[static_cast<size_t>(args.count)]),
        held(new Values[static_cast<size_t>(args.count)]),
        rects(new Rect[static_cast<size_t>(args.count)]) {
    int64_t most = 1, links = 0;
    for (int i = 0; i < g.count; ++i) {
      const GraphStage& s = g.stages[i];
      if (i + 1 < g.count) alive[static_cast<size_t>(i)].reserve(s);
      most = std::max(most, s.map_height * s.map_width * s.channels + 1);
      links = std::max<int64_t>(links, s.first + s.links);
      apart = apart || s.slope_sides == 2 || (s.entry >= 0 && g.entries[s.entry].side_stride != 0);
    }
    apart = apart && g.sides == 2;
    weight.reset(new Offsets[static_cast<size_t>(links)]);
    for (int i = 0; i < g.count; ++i)
      for (int k = g.stages[i].first; k < g.stages[i].first + g.stages[i].links; ++k) {
        const GraphLink& l = g.links[k];
        if (l.kind == LinkKind::identity || l.source < 0) continue;
        const GraphStage& s = g.stages[l.source];
        weight[static_cast<size_t>(k)].at.reset(
            new int32_t[static_cast<size_t>(s.map_height * s.map_width * s.channels)]);
        if (!last(i)) {
          const GraphStage& t = g.stages[i];
          weight[static_cast<size_t>(k)].column.reset(
              new int32_t[static_cast<size_t>(t.map_height * t.map_width * t.channels)]);
        }
        most = std::max(most, l.kernel_h * l.kernel_w * g.stages[i].channels);
      }
    counted.reset(new int32_t[static_cast<size_t>(most)]);
    for (int64_t i = 0; i < most; ++i) counted[static_cast<size_t>(i)] = static_cast<int32_t>(i);
    column.reset(new int32_t[static_cast<size_t>(most)]);
    place.reset(new int32_t[static_cast<size_t>(most)]);
  }

  bool last(int stage) const { return stage + 1 == g.count; }
  int64_t neurons(int stage) const {
    const GraphStage& s = g.stages[stage];
    return last(stage) ? s.map_height * s.map_width * s.channels : alive[static_cast<size_t>(stage)].count;
  }
  float* values(int stage) { return held[static_cast<size_t>(stage)].at.get(); }

  void turn_to(int64_t to) {
    if (example == to) return;
    example = to;
    for (int i = 0; i + 1 < g.count; ++i)
      find(g.stages[i], LinesOf(g.stages[i], g.examples, example), alive[static_cast<size_t>(i)]);
    for (int i = 0; i < g.count; ++i) {
      const int64_t n = neurons(i) + 1;  // one more for what lies outside
      Values& v = held[static_cast<size_t>(i)];
      if (v.room < n) {
        v.room = n + n / 8;
        v.at.reset(new float[static_cast<size_t>(v.room * kMostVectors * kLanes)]);
      }
      for (int k = g.stages[i].first; k < g.stages[i].first + g.stages[i].links; ++k) {
        if (int32_t* to = weight[static_cast<size_t>(k)].at.get()) weights_of(g.links[k], i, to);
        if (int32_t* to = weight[static_cast<size_t>(k)].column.get()) {
          const Alive& own = alive[static_cast<size_t>(i)];
          const auto apart = static_cast<int32_t>(g.stages[g.links[k].source].channels);
          for (int64_t j = 0; j < own.count; ++j) to[j] = own.channel[static_cast<size_t>(j)] * apart;
        }
      }
    }
  }

 private:
  // Of each living neuron of the source where its weights are, less what depends on the output that they meet.
  void weights_of(const GraphLink& l, int stage, int32_t* to) const {
    const GraphStage &s = g.stages[l.source], &t = g.stages[stage];
    const Alive& list = alive[static_cast<size_t>(l.source)];
    const int64_t step = last(stage) ? l.kernel_h * l.kernel_w * t.channels : 1, tap = last(stage) ? 1 : s.channels;
    for (int64_t y = 0, position = 0; y < s.map_height; ++y)
      for (int64_t x = 0; x < s.map_width; ++x, ++position) {
        const int64_t shift = (y * l.stride_y * l.kernel_w + x * l.stride_x) * t.channels * tap;
        for (int64_t k = list.start[static_cast<size_t>(position)]; k < list.start[static_cast<size_t>(position) + 1];
             ++k)
          to[k] = static_cast<int32_t>(list.channel[static_cast<size_t>(k)] * step - shift);
      }
  }
};

// The windows that the rows of a group need.
inline void frame(GraphWork& work, int64_t group) {
  const GraphArgs& g = work.g;
  for (int i = 0; i < g.count; ++i) {
    const GraphStage& s = g.stages[i];
    Rect all;
    if (s.entry >= 0) all = {0, s.map_height, 0, s.map_width};
    for (int k = s.first; k < s.first + s.links; ++k) {
      const GraphLink& l = g.links[k];
      const Rect from =
          l.source >= 0 ? work.rects[l.source] : Rect{g.y[group], g.y[group] + 1, g.x[group], g.x[group] + 1};
      all.join(reached(l, from, s));
    }
    work.rects[i] = all;
  }
}

FR_NS_END
