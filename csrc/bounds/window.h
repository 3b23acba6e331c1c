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
// Position i of a row on its map, or -1 outside; the upper left corner of its window is (y, x).
FR_HD int64_t map_at(const Rows& r, int64_t corner_y, int64_t corner_x, int64_t i) {
  const int64_t line = r.width * r.channels, y = corner_y + i / line, x = corner_x + i % line / r.channels;
  if (y < 0 || y >= r.map_height || x < 0 || x >= r.map_width) return -1;
  return (y * r.map_width + x) * r.channels + i % r.channels;
}
FR_HD int64_t lines_of(const Rows& r) { return r.corner_y == nullptr ? 1 : r.height; }
FR_HD int64_t map_size(const Rows& r) {
  return r.corner_y == nullptr ? r.length : r.map_height * r.map_width * r.channels;
}
FR_HD int64_t source_row(const Rows& r, int64_t row) { return r.pick != nullptr ? r.pick[row] : row; }
// Rows that a thread takes at a time on the CPU.
FR_HD int64_t grain_of(const Rows& r) { return r.length < 16384 ? 16384 / (r.length > 0 ? r.length : 1) : 1; }
FR_HD int64_t example_of(const Rows& r, int64_t row) { return r.example != nullptr ? r.example[row] : row; }

FR_NS_END
