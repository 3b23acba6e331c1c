// Products of rows of coefficients with weights, and their gradients: panels of b's columns, packed, times a few rows
// of a from registers. Each number has its own sum over all of `count`, in order.
#include <algorithm>

#include "bounds/entry_cpu.h"
#include "bounds/fma.h"
#include "bounds/pack.h"
#include "core/floats.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 9, kVectors = 3;
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int kRows = 6, kVectors = 1;
#else
constexpr int kRows = 3, kVectors = 1;
#endif
constexpr int64_t kPanel = int64_t{kVectors} * kLanes;
constexpr int64_t kGroup = 16 * kRows;  // rows of one task

template <int kR, int kV>
void tile(const ProductArgs& g, const float* panel, int64_t row, int64_t at, int64_t width) {
  Vec acc[kR][kV];
#pragma GCC unroll 9
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) acc[r][v] = Vec(0.f);
  const float* a = g.a + row * g.a_row;
  for (int64_t k = 0; k < g.count; ++k, panel += kPanel, a += g.a_step) {
    Vec b[kV];
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) b[v] = load(panel + v * kLanes);
#pragma GCC unroll 9
    for (int r = 0; r < kR; ++r) {
      const Vec x(a[r * g.a_row]);
#pragma GCC unroll 3
      for (int v = 0; v < kV; ++v) acc[r][v] = fmadd(x, b[v], acc[r][v]);
    }
  }
#pragma GCC unroll 9
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) {
      const int64_t n = width - v * kLanes;
      float* out = g.out + (row + r) * g.columns + at + v * kLanes;
      if (n >= kLanes)
        store(out, acc[r][v]);
      else if (n > 0)
        store_n(out, acc[r][v], static_cast<int>(n));
    }
}

using TileFn = void (*)(const ProductArgs&, const float*, int64_t, int64_t, int64_t);
template <int kV, int kR = kRows>
TileFn pick_rows(int64_t rows) {
  if constexpr (kR > 1)
    if (rows < kR) return pick_rows<kV, kR - 1>(rows);
  return tile<kR, kV>;
}
template <int kV = kVectors>
TileFn tile_of(int64_t rows, int64_t width) {
  if constexpr (kV > 1)
    if (width <= (kV - 1) * kLanes) return tile_of<kV - 1>(rows, width);
  return pick_rows<kV>(rows);
}

}  // namespace

void product_cpu(const ProductArgs& g) {
  const int64_t groups = (g.rows + kGroup - 1) / kGroup, panels = (g.columns + kPanel - 1) / kPanel;
  parallel_for(groups * panels, 1, [&](int64_t first, int64_t last) {
    const Floats panel(g.count * kPanel);
    for (int64_t task = first, packed = -1; task < last; ++task) {
      const int64_t at = task / groups * kPanel, width = std::min(kPanel, g.columns - at);
      if (packed != at) pack_panel<kPanel>(g.b + at * g.b_column, g.b_step, g.b_column, g.count, width, panel.get());
      packed = at;
      const int64_t begin = task % groups * kGroup, end = std::min(g.rows, begin + kGroup);
      for (int64_t row = begin; row < end; row += kRows) tile_of(end - row, width)(g, panel.get(), row, at, width);
    }
  });
}

FR_NS_END
