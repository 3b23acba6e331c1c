// Matrices turned, four by four numbers at a time: weights of dense layers behind images, between orders of channels.
#include <algorithm>

#include "bounds/entry_cpu.h"
#include "core/quads.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kStrip = 16;  // rows of one task: a line of the result

void strip(const float* from, float* to, int64_t begin, int64_t end, int64_t rows, int64_t columns) {
  const int64_t quads = begin + (end - begin) / 4 * 4, whole = columns / 4 * 4;
  for (int64_t c = 0; c < whole; c += 4)
    for (int64_t r = begin; r < quads; r += 4) {
      Quad q[4];
      for (int i = 0; i < 4; ++i) q[i] = load_quad(from + (r + i) * columns + c);
      transpose(q);
      for (int i = 0; i < 4; ++i) store_quad(to + (c + i) * rows + r, q[i]);
    }
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = c < whole ? quads : begin; r < end; ++r) to[c * rows + r] = from[r * columns + c];
}

}  // namespace

void turn_cpu(const float* from, float* to, int64_t count, int64_t rows, int64_t columns) {
  const int64_t strips = (rows + kStrip - 1) / kStrip;
  parallel_for(count * strips, std::max<int64_t>(1, 16384 / (kStrip * std::max<int64_t>(1, columns))),
               [&](int64_t first, int64_t last) {
                 for (int64_t task = first; task < last; ++task) {
                   const int64_t at = task / strips * rows * columns, row = task % strips * kStrip;
                   strip(from + at, to + at, row, std::min(rows, row + kStrip), rows, columns);
                 }
               });
}

FR_NS_END
