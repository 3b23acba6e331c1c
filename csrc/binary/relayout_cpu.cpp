// Copies feature maps between plain tensors and the fast layout, and between fast layouts.
#include <algorithm>
#include <cstring>

#include "binary/args.h"
#include "core/macros.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kGrainFloats = 32768;

FR_HD int64_t image_at(const Layout& l, int64_t n) { return n / l.lanes * l.block + n % l.lanes + l.origin; }

// Row y of one channel: columns x = first, first + step, ... of image n.
struct Run {
  const float* src;
  float* dst;
  int64_t src_step, dst_step, count;
};

FR_HD void copy_run(const Run& r) {
  if (r.src_step == 1 && r.dst_step == 1) {
    std::memcpy(r.dst, r.src, static_cast<size_t>(r.count) * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < r.count; ++i) r.dst[i * r.dst_step] = r.src[i * r.src_step];
}

// The same columns of all `lanes` images at once, when both sides interleave the same images.
FR_HD void copy_pixels(const Run& r, int64_t lanes) {
  if (r.src_step == lanes && r.dst_step == lanes) {
    std::memcpy(r.dst, r.src, static_cast<size_t>(r.count * lanes) * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < r.count; ++i)
    std::memcpy(r.dst + i * r.dst_step, r.src + i * r.src_step, static_cast<size_t>(lanes) * sizeof(float));
}

}  // namespace

void relayout_cpu(const RelayoutArgs& a) {
  const Layout &s = a.from, &d = a.to;
  const int64_t lanes = d.lanes, blocks = (a.batch + lanes - 1) / lanes;
  const int phases = d.phases_h * d.phases_w;
  const bool fast = a.plane > 0;
  // Column steps of the two sides only differ in phase for x in steps of both phase counts.
  const int64_t step = std::max(s.phases_w, d.phases_w);
  const int64_t grain = std::max<int64_t>(1, kGrainFloats / std::max<int64_t>(1, a.height * a.width * lanes));
  parallel_for(blocks * a.channels, grain, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t block = item / a.channels, c = item % a.channels;
      const int64_t n0 = block * lanes, count = std::min(lanes, a.batch - n0);
      float* const dst = a.dst + c * d.channel;
      const float* const src = a.src + c * s.channel;
      if (fast)
        for (int p = 0; p < phases; ++p)
          std::memset(dst + block * d.block + p * d.phase, 0, static_cast<size_t>(a.plane) * sizeof(float));
      for (int64_t y = 0; y < a.height; ++y)
        for (int64_t x0 = 0; x0 < std::min(step, a.width); ++x0) {
          const int64_t from = y % s.phases_h * s.phases_w * s.phase + x0 % s.phases_w * s.phase +
                               y / s.phases_h * s.row + x0 / s.phases_w * s.col;
          const int64_t to = y % d.phases_h * d.phases_w * d.phase + x0 % d.phases_w * d.phase +
                             y / d.phases_h * d.row + x0 / d.phases_w * d.col;
          const int64_t columns = (a.width - x0 + step - 1) / step;
          Run r{nullptr, nullptr, step / s.phases_w * s.col, step / d.phases_w * d.col, columns};
          if (s.lanes == lanes && count == lanes && lanes > 1) {
            r.src = src + image_at(s, n0) + from;
            r.dst = dst + image_at(d, n0) + to;
            copy_pixels(r, lanes);
          } else {
            for (int64_t n = n0; n < n0 + count; ++n) {
              r.src = src + image_at(s, n) + from;
              r.dst = dst + image_at(d, n) + to;
              copy_run(r);
            }
          }
        }
    }
  });
}

FR_NS_END
