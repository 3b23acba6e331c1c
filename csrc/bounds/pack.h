// Columns of a matrix as a panel that lies in one piece, zero beyond them.
#pragma once

#include <algorithm>

#include "core/quads.h"
#include "core/simd.h"

FR_NS_BEGIN

// Four numbers of each of four columns, which lie `apart`, as four lines of four.
template <int64_t kPanel>
FR_HD void turn_quads(const float* from, int64_t apart, float* to) {
  Quad q[4];
  for (int i = 0; i < 4; ++i) q[i] = load_quad(from + i * apart);
  transpose(q);
  for (int i = 0; i < 4; ++i) store_quad(to + i * kPanel, q[i]);
}

// b[k * step + c * column], k < count, c < width, as [count][kPanel]. One of the strides is 1.
template <int64_t kPanel>
inline void pack_panel(const float* b, int64_t step, int64_t column, int64_t count, int64_t width, float* to) {
  if (column == 1) {
    for (int64_t k = 0; k < count; ++k)
      for (int64_t v = 0; v < kPanel; v += kLanes) {
        const int n = static_cast<int>(std::clamp<int64_t>(width - v, 0, kLanes));
        const float* from = b + k * step + v;
        store(to + k * kPanel + v, n == kLanes ? load(from) : load_n(from, n));
      }
    return;
  }
  const int64_t quads = step == 1 ? width / 4 * 4 : 0, lines = count / 4 * 4;
  for (int64_t k = 0; k < lines; k += 4)
    for (int64_t c = 0; c < quads; c += 4) turn_quads<kPanel>(b + c * column + k, column, to + k * kPanel + c);
  for (int64_t k = 0; k < count; ++k)
    for (int64_t c = k < lines ? quads : 0; c < kPanel; ++c)
      to[k * kPanel + c] = c < width ? b[c * column + k * step] : 0.f;
}

FR_NS_END
