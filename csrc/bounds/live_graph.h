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

// How many positions the taps of a kernel span.
inline int64_t span_of(int64_t kernel, int64_t dilation) { return dilation * (kernel - 1) + 1; }

// The positions of a map that the positions `from` of the result of a convolution or pooling read.
inline Rect reached(const GraphLink& l, const Rect& from, const GraphStage& to) {
  if (l.kind == LinkKind::identity || from.empty()) return from;
  return {std::max<int64_t>(0, from.top * l.stride_y - l.pad_y),
          std::min(to.map_height, (from.bottom - 1) * l.stride_y - l.pad_y + span_of(l.kernel_h, l.dilation_y)),
          std::max<int64_t>(0, from.left * l.stride_x - l.pad_x),
          std::min(to.map_width, (from.right - 1) * l.stride_x - l.pad_x + span_of(l.kernel_w, l.dilation_x))};
}

// Whether the positions of a convolution's source that meet one neuron lie line by line, with all of their channels.
inline bool by_lines(const GraphLink& l) { return l.groups == 1 && l.dilation_y == 1 && l.dilation_x == 1; }

// The neurons of one stage and example whose lines are not zero: position by position, channels ascending. Of a stage
// that only poolings read, those that one of their neurons follows.
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

// followed: [map], not 0 where a pooling's neuron follows; null: every neuron counts.
inline void find(const GraphStage& s, const LinesOf& map, const uint8_t* followed, Alive& found) {
  int64_t count = 0;
  for (int64_t position = 0; position < s.map_height * s.map_width; ++position) {
    found.start[static_cast<size_t>(position)] = count;
    for (int64_t c = 0; c < s.channels; c += kLanes) {
      const int64_t at = position * s.channels + c;
      const int n = static_cast<int>(std::min<int64_t>(kLanes, s.channels - c));
      uint32_t live = living(map, at, n);
      for (int i = 0; followed != nullptr && i < n; ++i)
        if (followed[at + i] == 0) live &= ~(1u << i);
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
// Of a link: where the weights of a neuron of its source lie and in which column those of one of the stage, and where
// the neurons of each position and group of channels start; of a pooling, which neuron of the stage each follows, or
// -1.
struct Offsets {
  std::unique_ptr<int32_t[]> at, column;
  std::unique_ptr<int32_t[]> source_start, stage_start;  // [positions * groups + 1], with groups
};

// What a thread works on.
struct GraphWork {
  const GraphArgs& g;
  int64_t example = -1;
  std::unique_ptr<Alive[]> alive;     // of each stage but the input
  std::unique_ptr<Values[]> held;     // the rows' coefficients at each stage, by the number of the neuron in `alive`
  std::unique_ptr<Offsets[]> weight;  // of each link
  std::unique_ptr<Rect[]> rects;
  std::unique_ptr<Run[]> runs;               // of the neurons that meet one output
  std::unique_ptr<int32_t[]> column, place;  // of the outputs that are computed together
  std::unique_ptr<int32_t[]> counted;        // 0, 1, 2, ...
  std::unique_ptr<uint8_t[]> followed;       // of a stage that poolings read, and below the number of each neuron
  std::unique_ptr<int32_t[]> number;
  bool apart = false;  // the sides have coefficients of their own

  explicit GraphWork(const GraphArgs& args)
      : g(args),
        alive(new Alive[static_cast<size_t>(args.count)]),
        held(new Values[static_cast<size_t>(args.count)]),
        rects(new Rect[static_cast<size_t>(args.count)]) {
    int64_t most = 1, links = 0, lines = 1, pooled = 0;
    for (int i = 0; i < g.count; ++i) {
      const GraphStage& s = g.stages[i];
      if (!last(i)) alive[static_cast<size_t>(i)].reserve(s);
      most = std::max(most, s.numbers() + 1);
      links = std::max<int64_t>(links, s.first + s.links);
      apart = apart || s.slope_sides == 2 || (s.entry >= 0 && g.entries[s.entry].side_stride != 0);
    }
    apart = apart && g.sides == 2;
    weight.reset(new Offsets[static_cast<size_t>(links)]);
    for (int i = 0; i < g.count; ++i)
      for (int k = g.stages[i].first; k < g.stages[i].first + g.stages[i].links; ++k) {
        const GraphLink& l = g.links[k];
        if (l.kind == LinkKind::identity || l.source < 0) continue;
        const GraphStage &s = g.stages[l.source], &t = g.stages[i];
        Offsets& to = weight[static_cast<size_t>(k)];
        to.at.reset(new int32_t[static_cast<size_t>(s.numbers())]);
        if (l.kind == LinkKind::pick) {
          pooled = std::max(pooled, t.numbers());
          continue;
        }
        if (!last(i)) to.column.reset(new int32_t[static_cast<size_t>(t.numbers())]);
        if (l.groups > 1) {
          to.source_start.reset(new int32_t[static_cast<size_t>(s.map_height * s.map_width * l.groups + 1)]);
          to.stage_start.reset(new int32_t[static_cast<size_t>(t.map_height * t.map_width * l.groups + 1)]);
        }
        lines = std::max(lines, by_lines(l) ? l.kernel_h : l.kernel_h * l.kernel_w);
        most = std::max(most, l.kernel_h * l.kernel_w * t.channels);
      }
    counted.reset(new int32_t[static_cast<size_t>(most)]);
    for (int64_t i = 0; i < most; ++i) counted[static_cast<size_t>(i)] = static_cast<int32_t>(i);
    column.reset(new int32_t[static_cast<size_t>(most)]);
    place.reset(new int32_t[static_cast<size_t>(most)]);
    runs.reset(new Run[static_cast<size_t>(lines)]);
    followed.reset(new uint8_t[static_cast<size_t>(pooled)]);
    number.reset(new int32_t[static_cast<size_t>(pooled)]);
  }

  bool last(int stage) const { return stage + 1 == g.count; }
  int64_t neurons(int stage) const {
    return last(stage) ? g.stages[stage].numbers() : alive[static_cast<size_t>(stage)].count;
  }
  float* values(int stage) { return held[static_cast<size_t>(stage)].at.get(); }

  void turn_to(int64_t to) {
    if (example == to) return;
    example = to;
    for (int i = 0; i < g.count; ++i) {
      const GraphStage& s = g.stages[i];
      if (!last(i))
        find(s, LinesOf(s, g.examples, example), only_pooled(i) ? follow(i) : nullptr, alive[static_cast<size_t>(i)]);
      const int64_t n = neurons(i) + s.channels;  // what lies outside comes behind
      Values& v = held[static_cast<size_t>(i)];
      if (v.room < n) {
        v.room = n + n / 8;
        v.at.reset(new float[static_cast<size_t>(v.room * kMostVectors * kLanes)]);
      }
      for (int k = s.first; k < s.first + s.links; ++k) {
        const GraphLink& l = g.links[k];
        if (l.kind == LinkKind::identity || l.source < 0) continue;
        Offsets& offsets = weight[static_cast<size_t>(k)];
        if (l.kind == LinkKind::pick) {
          pick(l, i, offsets.at.get());
          continue;
        }
        weights_of(l, i, offsets.at.get());
        const int64_t apart = g.stages[l.source].channels, own = s.channels / l.groups;
        if (l.groups > 1) {
          starts_of(g.stages[l.source], alive[static_cast<size_t>(l.source)], l.groups, offsets.source_start.get());
          if (!last(i)) starts_of(s, alive[static_cast<size_t>(i)], l.groups, offsets.stage_start.get());
        }
        const Alive& list = alive[static_cast<size_t>(i)];
        for (int64_t j = 0; j < list.count && !last(i); ++j) {
          const int32_t c = list.channel[static_cast<size_t>(j)];
          offsets.column[static_cast<size_t>(j)] = static_cast<int32_t>((l.groups == 1 ? c : c % own) * apart);
        }
      }
    }
  }

 private:
  bool only_pooled(int stage) const {
    const GraphStage& s = g.stages[stage];
    for (int k = s.first; k < s.first + s.links; ++k)
      if (g.links[k].kind != LinkKind::pick || g.links[k].source < 0) return false;
    return s.entry < 0;
  }
  const int32_t* index_of(const GraphLink& l) const { return l.index + example * g.stages[l.source].numbers(); }
  const uint8_t* follow(int stage) {
    const GraphStage& s = g.stages[stage];
    std::fill_n(followed.get(), s.numbers(), uint8_t{0});
    for (int k = s.first; k < s.first + s.links; ++k) {
      const Alive& list = alive[static_cast<size_t>(g.links[k].source)];
      const int32_t* index = index_of(g.links[k]);
      for (int64_t j = 0; j < list.count; ++j)
        followed[static_cast<size_t>(index[list.neuron[static_cast<size_t>(j)]])] = 1;
    }
    return followed.get();
  }
  // Of each living neuron of a pooling the neuron of the stage that it follows, or -1 where that has no lines.
  void pick(const GraphLink& l, int stage, int32_t* to) {
    const Alive &from = alive[static_cast<size_t>(l.source)], &list = alive[static_cast<size_t>(stage)];
    const int32_t* index = index_of(l);
    if (!last(stage)) {
      std::fill_n(number.get(), g.stages[stage].numbers(), -1);
      for (int64_t j = 0; j < list.count; ++j)
        number[static_cast<size_t>(list.neuron[static_cast<size_t>(j)])] = static_cast<int32_t>(j);
    }
    for (int64_t j = 0; j < from.count; ++j) {
      const int32_t i = index[from.neuron[static_cast<size_t>(j)]];
      to[j] = last(stage) ? i : number[static_cast<size_t>(i)];
    }
  }
  // Of each living neuron of the source where its weights are, less what depends on the output that they meet.
  void weights_of(const GraphLink& l, int stage, int32_t* to) const {
    const GraphStage &s = g.stages[l.source], &t = g.stages[stage];
    const Alive& list = alive[static_cast<size_t>(l.source)];
    const int64_t own = t.channels / l.groups;
    const int64_t step = last(stage) ? l.kernel_h * l.kernel_w * own : 1, tap = last(stage) ? 0 : s.channels;
    for (int64_t y = 0, position = 0; y < s.map_height; ++y)
      for (int64_t x = 0; x < s.map_width; ++x, ++position) {
        const int64_t ky = y * l.stride_y / l.dilation_y, kx = x * l.stride_x / l.dilation_x;
        const int64_t shift = (ky * l.kernel_w + kx) * own * tap;
        for (int64_t k = list.start[static_cast<size_t>(position)]; k < list.start[static_cast<size_t>(position) + 1];
             ++k)
          to[k] = static_cast<int32_t>(list.channel[static_cast<size_t>(k)] * step - shift);
      }
  }
  static void starts_of(const GraphStage& s, const Alive& list, int64_t groups, int32_t* to) {
    const int64_t own = s.channels / groups, positions = s.map_height * s.map_width;
    for (int64_t position = 0; position < positions; ++position) {
      int64_t k = list.start[static_cast<size_t>(position)];
      const int64_t end = list.start[static_cast<size_t>(position) + 1];
      for (int64_t group = 0; group < groups; ++group) {
        *to++ = static_cast<int32_t>(k);
        while (k < end && list.channel[static_cast<size_t>(k)] < (group + 1) * own) ++k;
      }
    }
    *to = static_cast<int32_t>(list.count);
  }
};

// The windows that the rows of a group need, of each stage.
inline void frame(const GraphArgs& g, int64_t group, Rect* rects) {
  for (int i = 0; i < g.count; ++i) {
    const GraphStage& s = g.stages[i];
    Rect all;
    if (s.entry >= 0) all = {0, s.map_height, 0, s.map_width};
    for (int k = s.first; k < s.first + s.links; ++k) {
      const GraphLink& l = g.links[k];
      const Rect from = l.source >= 0 ? rects[l.source] : Rect{g.y[group], g.y[group] + 1, g.x[group], g.x[group] + 1};
      all.join(reached(l, from, s));
    }
    rects[i] = all;
  }
}

FR_NS_END
