// Max pooling: the formulas (see PoolArgs).
#pragma once

#include "binary/layout.h"
#include "core/simd.h"

FR_NS_BEGIN

// One pixel of a window after the other, by rows.
template <class V>
FR_HD void take_larger(V v, V number, V& best, V& taken) {
  const auto larger = (v > best) | !(v == v);
  best = select(larger, v, best);
  taken = select(larger, number, taken);
}

// First pixel of a window in a dimension that lies inside, from where it begins.
FR_HD int64_t first_inside(int64_t begin, int64_t dilation) {
  return begin >= 0 ? 0 : (-begin + dilation - 1) / dilation;
}
// One behind the last.
FR_HD int64_t end_inside(int64_t begin, int64_t dilation, int64_t kernel, int64_t size) {
  const int64_t fit = begin >= size ? 0 : (size - begin + dilation - 1) / dilation;
  return fit < kernel ? fit : kernel;
}

// What is taken where nothing is larger than -inf, by dimension.
FR_HD int64_t first_taken(int64_t begin, int64_t dilation, int64_t kernel) {
  const int64_t first = first_inside(begin, dilation);
  return first < kernel ? first : kernel - 1;
}

FR_NS_END
