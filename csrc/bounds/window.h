// Where a row of coefficients lies on its map.
#pragma once

#include "bounds/args.h"
#include "core/macros.h"

FR_NS_BEGIN

// The part of one line of a window that lies on the map: [begin, end) in the row, map offset of `begin`.
struct Segment {
  int64_t line_begin, begin, end, line_end, map;
};

FR_HD Segment segment_of(const Rows& r, int64_t row, int64_t line) {
  if (r.corner_y == nullptr) return {0, 0, r.length, r.length, 0};
  const int64_t y = r.corner_y[row] + line, x = r.corner_x[row], base = line * r.width * r.channels;
  const int64_t stop = base + r.width * r.channels;
  if (y < 0 || y >= r.map_height) return {base, stop, stop, stop, 0};
  int64_t first = x < 0 ? -x : 0, last = r.map_width - x < r.width ? r.map_width - x : r.width;
  if (first > r.width) first = r.width;
  if (last < first) last = first;
  return {base, base + first * r.channels, base + last * r.channels, stop, (y * r.map_width + x + first) * r.channels};
}
// Position i of a row on its map, or -1 outside.
FR_HD int64_t map_of(const Rows& r, int64_t row, int64_t i) {
  if (r.corner_y == nullptr) return i;
  const int64_t line = r.width * r.channels, y = r.corner_y[row] + i / line,
                x = r.corner_x[row] + i % line / r.channels;
  if (y < 0 || y >= r.map_height || x < 0 || x >= r.map_width) return -1;
  return (y * r.map_width + x) * r.channels + i % r.channels;
}
FR_HD int64_t lines_of(const Rows& r) { return r.corner_y == nullptr ? 1 : r.height; }
FR_HD int64_t map_size(const Rows& r) {
  return r.corner_y == nullptr ? r.length : r.map_height * r.map_width * r.channels;
}
FR_HD int64_t source_row(const Rows& r, int64_t row) { return r.pick != nullptr ? r.pick[row] : row; }
FR_HD float coefficient(const Rows& r, int64_t row, int64_t side_offset, int64_t i) {
  const float a = r.a[side_offset + source_row(r, row) * r.length + i];
  return r.minus != nullptr ? a - r.a[side_offset + r.minus[row] * r.length + i] : a;
}
// Rows that a thread takes at a time on the CPU.
FR_HD int64_t grain_of(const Rows& r) { return r.length < 16384 ? 16384 / (r.length > 0 ? r.length : 1) : 1; }
FR_HD int64_t example_of(const Rows& r, int64_t row) { return r.example != nullptr ? r.example[row] : row; }

FR_NS_END
