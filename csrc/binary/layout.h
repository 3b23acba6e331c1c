// Addresses in a Layout.
#pragma once

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

FR_NS_END
