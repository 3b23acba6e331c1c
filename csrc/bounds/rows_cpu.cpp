// Backward step: one pass over the coefficients, one row at a time, summed in a fixed order.
#include <algorithm>
#include <cstring>

#include "bounds/entry_cpu.h"
#include "bounds/fma.h"
#include "bounds/formulas.h"
#include "bounds/serial_cpu.h"
#include "bounds/window.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int kTogether = 3;       // rows of one example that share a read of its lines
constexpr int64_t kMostRows = 16;  // that share lines in the first cache
constexpr int64_t kColumns = 512;  // of them at a time

// What the intercepts add up to.
struct Sums {
  Vec low, up;
};

// kSides bounds; kOut matrices written (1: shared or lower only); kTwo: a slope per side. kN rows of one example in the
// columns [begin, end), one alone and whole if they are windows.
template <int kSides, int kOut, bool kTwo, int kN>
void back_row(const BackArgs& g, int64_t row, int64_t begin, int64_t end, Sums* sums) {
  const Rows& r = g.rows;
  const int64_t maps = map_size(r), ex = example_of(r, row);
  const float *a0[kN], *less[kN];
#pragma GCC unroll 4
  for (int k = 0; k < kN; ++k) {
    a0[k] = r.a + source_row(r, row + k) * r.length;
    less[k] = r.minus != nullptr ? r.a + r.minus[row + k] * r.length : nullptr;
  }
  const float* s0 = g.slopes + ex * maps;
  const float* s1 = kTwo ? s0 + g.examples * maps : s0;
  const float* i0 = g.intercepts + ex * maps;
  const float* i1 = i0 + g.examples * maps;
  float* o0 = g.out + row * r.length;
  float* o1 = kOut == 2 ? o0 + r.count * r.length : nullptr;
  Vec low[kN], up[kN];
#pragma GCC unroll 4
  for (int k = 0; k < kN; ++k) low[k] = sums[k].low, up[k] = sums[k].up;
  const auto one = [&](int64_t at, int64_t map, int n) FR_INLINE_LAMBDA {
    const bool full = n == kLanes;
    const auto get = [&](const float* p) FR_INLINE_LAMBDA { return full ? load(p) : load_n(p, n); };
    const auto put = [&](float* p, Vec v) FR_INLINE_LAMBDA { full ? store(p, v) : store_n(p, v, n); };
    const Vec sl = get(s0 + map), il = get(i0 + map), iu = get(i1 + map);
    const Vec su = kTwo ? get(s1 + map) : sl;
#pragma GCC unroll 4
    for (int k = 0; k < kN; ++k) {
      const int64_t to = k * r.length + at;
      Vec a = get(a0[k] + at);
      if (less[k] != nullptr) a = a - get(less[k] + at);
      low[k] = fmadd(a, serving(0, a, il, iu), low[k]);
      put(o0 + to, a * (kTwo ? serving(0, a, sl, su) : sl));
      if (kSides == 2) {
        Vec c = a;
        if (r.side_stride != 0) {
          c = get(a0[k] + r.side_stride + at);
          if (less[k] != nullptr) c = c - get(less[k] + r.side_stride + at);
        }
        up[k] = fmadd(c, serving(1, c, il, iu), up[k]);
        if (kOut == 2) put(o1 + to, c * (kTwo ? serving(1, c, sl, su) : sl));
      }
    }
  };
  for (int64_t line = 0; line < lines_of(r); ++line) {
    Segment s = segment_of(r, row, line);
    if (r.corner_y == nullptr) s = {begin, begin, end, end, begin};
    for (float* o : {o0, o1}) {
      if (o == nullptr) continue;
      if (s.begin > s.line_begin)
        std::memset(o + s.line_begin, 0, static_cast<size_t>(s.begin - s.line_begin) * sizeof(float));
      if (s.line_end > s.end) std::memset(o + s.end, 0, static_cast<size_t>(s.line_end - s.end) * sizeof(float));
    }
    int64_t i = s.begin, map = s.map;
    for (; i + kLanes <= s.end; i += kLanes, map += kLanes) one(i, map, kLanes);
    if (i < s.end) one(i, map, static_cast<int>(s.end - i));
  }
#pragma GCC unroll 4
  for (int k = 0; k < kN; ++k) sums[k] = {low[k], up[k]};
}

template <int kSides, int kOut, bool kTwo>
void back_range(const BackArgs& g, int64_t begin, int64_t end) {
  const Rows& r = g.rows;
  for (int64_t row = begin, n; row < end; row += n) {
    n = 1;
    while (row + n < end && n < kMostRows && r.corner_y == nullptr && example_of(r, row + n) == example_of(r, row)) ++n;
    Sums sums[kMostRows];
    for (int64_t k = 0; k < n; ++k) sums[k] = {Vec(0.f), Vec(0.f)};
    const int64_t columns = n > kTogether ? kColumns : r.length;
    for (int64_t at = 0; at < r.length; at += columns) {
      const int64_t stop = std::min(r.length, at + columns);
      int64_t k = 0;
      for (; k + kTogether <= n; k += kTogether)
        back_row<kSides, kOut, kTwo, kTogether>(g, row + k, at, stop, sums + k);
      for (; k < n; ++k) back_row<kSides, kOut, kTwo, 1>(g, row + k, at, stop, sums + k);
    }
    for (int64_t k = 0; k < n; ++k) {
      g.b_out[row + k] = g.b[row + k] + lane_sum(sums[k].low);
      if (kSides == 2) g.b_out[r.count + row + k] = g.b[r.count + row + k] + lane_sum(sums[k].up);
    }
  }
}

using BackFn = void (*)(const BackArgs&, int64_t, int64_t);
BackFn pick_back(const BackArgs& g) {
  const bool two = g.slope_sides == 2;
  if (g.rows.sides == 1) return two ? back_range<1, 1, true> : back_range<1, 1, false>;
  if (g.sides_out == 1) return back_range<2, 1, false>;
  return two ? back_range<2, 2, true> : back_range<2, 2, false>;
}

}  // namespace

void back_rows(const BackArgs& g, int64_t begin, int64_t end) { pick_back(g)(g, begin, end); }

void back_cpu(const BackArgs& g) {
  parallel_for(g.rows.count, grain_of(g.rows), [&](int64_t begin, int64_t end) { back_rows(g, begin, end); });
}

FR_NS_END
