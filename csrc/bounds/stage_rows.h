// What rows through a graph of stages need on the way down and on the way back up.
#pragma once

#include <algorithm>
#include <memory>

#include "bounds/args.h"
#include "bounds/fma.h"
#include "core/simd.h"

FR_NS_BEGIN

constexpr int64_t kStageNumbers = int64_t{128} << 10;  // of all buffers together: 512 KB
constexpr int64_t kStageRows = 48;                     // at a time

inline int64_t size_of(const GraphStage& s) { return s.map_height * s.map_width * s.channels; }

// How many matrices arrive at each stage and leave it, where a row lies that leaves it (beside those that are still to
// be read, or beside all others), and how many rows are taken at a time.
struct StagePlan {
  std::unique_ptr<int[]> in, out;
  std::unique_ptr<int64_t[]> at;
  int64_t widest = 0, scaled = 0, block = 1;

  StagePlan(const GraphArgs& g, bool all)
      : in(new int[static_cast<size_t>(g.count)]),
        out(new int[static_cast<size_t>(g.count)]),
        at(new int64_t[static_cast<size_t>(g.count)]) {
    const std::unique_ptr<int[]> last(new int[static_cast<size_t>(g.count)]());  // stage that reads it
    for (int i = 0; i < g.count; ++i)
      for (int l = g.stages[i].first; l < g.stages[i].first + g.stages[i].links; ++l)
        last[static_cast<size_t>(g.links[l].source)] = all ? g.count : i;
    for (int i = 0; i < g.count; ++i) {
      const GraphStage& s = g.stages[i];
      int k = s.entry >= 0 && g.entries[s.entry].side_stride != 0 ? 2 : 1;
      for (int l = s.first; l < s.first + s.links; ++l) k = std::max(k, out[static_cast<size_t>(g.links[l].source)]);
      in[static_cast<size_t>(i)] = k;
      out[static_cast<size_t>(i)] = s.slope_sides == 2 ? g.sides : k;
      widest = std::max(widest, size_of(s));
      int64_t free = 0;
      for (int j = 0; j < i; ++j)
        if (last[static_cast<size_t>(j)] > i) free = std::max(free, at[static_cast<size_t>(j)] + size_of(g.stages[j]));
      at[static_cast<size_t>(i)] = free;
      scaled = std::max(scaled, free + size_of(s));
    }
    block = std::clamp<int64_t>(kStageNumbers / std::max<int64_t>(1, g.sides * (scaled + 2 * widest)), 1, kStageRows);
    if (block > 3) block -= block % 3;  // rows share reads of their lines by threes
  }
};

inline void add_to(float* to, const float* from, float sign, int64_t n) {
  const Vec s(sign);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, fmadd(s, load(from + i), load(to + i)));
  for (; i < n; ++i) to[i] += sign * from[i];
}

FR_NS_END
