// What rows through a graph of stages need on the way down and on the way back up.
#pragma once

#include <algorithm>
#include <memory>

#include "bounds/args.h"
#include "bounds/fma.h"
#include "core/simd.h"

FR_NS_BEGIN

constexpr int64_t kStageNumbers = int64_t{128} << 10;  // of all buffers together: 512 KB
constexpr int64_t kStageRows = 12;                     // at a time

inline int64_t size_of(const GraphStage& s) { return s.map_height * s.map_width * s.channels; }

// How many matrices arrive at each stage and leave it, and how many rows are taken at a time.
struct StagePlan {
  std::unique_ptr<int[]> in, out;
  int64_t widest = 0, block = 1;

  explicit StagePlan(const GraphArgs& g)
      : in(new int[static_cast<size_t>(g.count)]), out(new int[static_cast<size_t>(g.count)]) {
    int64_t scaled = 0;
    for (int i = 0; i < g.count; ++i) {
      const GraphStage& s = g.stages[i];
      int k = s.entry >= 0 && g.entries[s.entry].side_stride != 0 ? 2 : 1;
      for (int l = s.first; l < s.first + s.links; ++l) k = std::max(k, out[static_cast<size_t>(g.links[l].source)]);
      in[static_cast<size_t>(i)] = k;
      out[static_cast<size_t>(i)] = s.slope_sides == 2 ? g.sides : k;
      widest = std::max(widest, size_of(s));
      scaled += size_of(s);
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
