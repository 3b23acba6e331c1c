// Addresses in a Layout.
#pragma once

#include <cstring>

#include "binary/args.h"
#include "core/macros.h"

FR_NS_BEGIN

// Of image n, or of the group of images that starts with it.
FR_HD int64_t image_at(const Layout& l, int64_t n) { return n / l.lanes * l.block + n % l.lanes + l.origin; }

FR_HD int64_t row_at(const Layout& l, int64_t y) {
  return y % l.phases_h * l.phases_w * l.phase + y / l.phases_h * l.row;
}
FR_HD int64_t column_at(const Layout& l, int64_t x) { return x % l.phases_w * l.phase + x / l.phases_w * l.col; }

FR_HD int64_t address(const Layout& l, int64_t n, int64_t c, int64_t y, int64_t x) {
  return image_at(l, n) + c * l.channel + row_at(l, y) + column_at(l, x);
}

// Floats of the run of an output plane, and whether position p of it is a pixel and not border.
FR_HD int64_t run_length(const GatherArgs& a) { return ((a.height - 1) * a.pitch + a.width) * a.lanes; }
FR_HD bool is_pixel(const GatherArgs& a, int64_t p) {
  return p >= 0 && p < run_length(a) && p / a.lanes % a.pitch < a.width;
}

#if !defined(__CUDACC__)
// Zeros in what a plane of `size` floats without phases holds beside the pixels.
inline void clear_borders(float* plane, const Layout& l, int64_t height, int64_t width, int64_t size) {
  const auto clear = [&](int64_t from, int64_t to) {
    std::memset(plane + from, 0, static_cast<size_t>(to - from) * sizeof(float));
  };
  clear(0, l.origin);
  const int64_t gap = l.row - width * l.col;
  for (int64_t y = 0; y + 1 < height && gap > 0; ++y) {
    float* const p = plane + l.origin + y * l.row + width * l.col;
    for (int64_t i = 0; i < gap; ++i) p[i] = 0.f;
  }
  clear(l.origin + (height - 1) * l.row + width * l.col, size);
}
#endif

FR_NS_END
