// Copies feature maps between plain tensors and the fast layout, and between fast layouts.
#include <algorithm>
#include <cstring>
#include <vector>

#include "binary/layout.h"
#include "core/quads.h"
#include "core/simd.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kGrainFloats = 32768;

FR_HD void copy_floats(float* dst, const float* src, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
  for (; i + 4 <= n; i += 4) store_quad(dst + i, load_quad(src + i));
  for (; i < n; ++i) dst[i] = src[i];
}

// Where each pixel of a channel lies, so that the copies below need no division.
std::vector<int64_t> pixel_offsets(const Layout& l, int64_t height, int64_t width) {
  std::vector<int64_t> at(static_cast<size_t>(height * width));
  for (int64_t y = 0; y < height; ++y) {
    const int64_t row = row_at(l, y);
    for (int64_t x = 0; x < width; ++x)
      at[static_cast<size_t>(y * width + x)] = row + (l.phases_w == 1 ? x * l.col : column_at(l, x));
  }
  return at;
}

// Contiguous images on one side, `lanes` of them interleaved on the other.
template <bool kInterleave>
void transpose_images(const float* src, float* dst, int64_t image, const int64_t* at, int64_t pixels, int64_t lanes,
                      int64_t count) {
  const Quad zero = {0.f, 0.f, 0.f, 0.f};
  // Sixteen pixels of four images at a time: images often lie a power of two apart and share few cache sets, so their
  // lines are finished while they are there.
  const int64_t even = pixels / 4 * 4;
  for (int64_t first = 0; first < even; first += 16)
    for (int64_t n = 0; n < lanes; n += 4)
      for (int64_t i = first; i < std::min(even, first + 16); i += 4) {
        Quad q[4];
        if (kInterleave) {
          for (int j = 0; j < 4; ++j) q[j] = n + j < count ? load_quad(src + (n + j) * image + i) : zero;
          transpose(q);
          for (int j = 0; j < 4; ++j) store_quad(dst + at[i + j] + n, q[j]);
        } else {
          for (int j = 0; j < 4; ++j) q[j] = load_quad(src + at[i + j] + n);
          transpose(q);
          for (int j = 0; j < 4; ++j)
            if (n + j < count) store_quad(dst + (n + j) * image + i, q[j]);
        }
      }
  for (int64_t i = even; i < pixels; ++i)
    for (int64_t n = 0; n < count; ++n) {
      if (kInterleave)
        dst[at[i] + n] = src[n * image + i];
      else
        dst[n * image + i] = src[at[i] + n];
    }
}

// Channels side by side on the plain side (channels_last), up to kChannels of them, images on the other. Offsets of
// pixels: `plain` and `fast`.
constexpr int64_t kChannels = 16, kPixels = 16;
template <bool kInterleave>
void transpose_channels(const RelayoutArgs& a, const float* src, float* dst, const int64_t* plain, const int64_t* fast,
                        int64_t channels, int64_t lanes, int64_t count) {
  const Layout &p = kInterleave ? a.from : a.to, &f = kInterleave ? a.to : a.from;
  const Quad zero = {0.f, 0.f, 0.f, 0.f};
  const int64_t pixels = a.height * a.width, even = channels / 4 * 4;
  // Sixteen pixels of four images at a time: images often lie a power of two apart and share few cache sets, and the
  // lines of the other side, a few bytes of each written per image, stay in the first level until they are full.
  for (int64_t first = 0; first < pixels; first += kPixels) {
    const int64_t end = std::min(pixels, first + kPixels);
    for (int64_t n = 0; n < lanes; n += 4)
      for (int64_t i = first; i < end; ++i) {
        if (kInterleave && i + kPixels < pixels)
          for (int64_t j = n; j < std::min(n + 4, count); ++j)
            __builtin_prefetch(src + j * p.block + plain[i + kPixels]);
        for (int64_t c = 0; c < even; c += 4) {
          Quad q[4];
          if (kInterleave) {
            for (int j = 0; j < 4; ++j) q[j] = n + j < count ? load_quad(src + (n + j) * p.block + plain[i] + c) : zero;
            transpose(q);
            for (int j = 0; j < 4; ++j) store_quad(dst + (c + j) * f.channel + fast[i] + n, q[j]);
          } else {
            for (int j = 0; j < 4; ++j) q[j] = load_quad(src + (c + j) * f.channel + fast[i] + n);
            transpose(q);
            for (int j = 0; j < 4; ++j)
              if (n + j < count) store_quad(dst + (n + j) * p.block + plain[i] + c, q[j]);
          }
        }
      }
  }
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t c = even; c < channels; ++c)
      for (int64_t n = 0; n < count; ++n) {
        if (kInterleave)
          dst[c * f.channel + fast[i] + n] = src[n * p.block + plain[i] + c];
        else
          dst[n * p.block + plain[i] + c] = src[c * f.channel + fast[i] + n];
      }
}

// Channels side by side on the plain side, each in rows of its own on the other (one lane), up to kChannels of them.
template <bool kInto>
void transpose_rows(const RelayoutArgs& a, const float* src, float* dst, int64_t channels) {
  const Layout &p = kInto ? a.from : a.to, &f = kInto ? a.to : a.from;
  const int64_t even = channels / 4 * 4, step = p.col * f.phases_w;
  for (int64_t y = 0; y < a.height; ++y)
    for (int64_t phase = 0; phase < std::min<int64_t>(f.phases_w, a.width); ++phase) {
      const int64_t width = (a.width - phase + f.phases_w - 1) / f.phases_w;
      const int64_t plain = y * p.row + phase * p.col, fast = row_at(f, y) + phase * f.phase;
      const float* const from = src + (kInto ? plain : fast);
      float* const to = dst + (kInto ? fast : plain);
      const auto one = [&](int64_t x, int64_t c) FR_INLINE_LAMBDA {
        if (kInto)
          to[c * f.channel + x] = from[x * step + c];
        else
          to[x * step + c] = from[c * f.channel + x];
      };
      int64_t x = 0;
      for (; x + 4 <= width; x += 4) {
        for (int64_t c = 0; c < even; c += 4) {
          Quad q[4];
          for (int j = 0; j < 4; ++j)
            q[j] = load_quad(kInto ? from + (x + j) * step + c : from + (c + j) * f.channel + x);
          transpose(q);
          for (int j = 0; j < 4; ++j) store_quad(kInto ? to + (c + j) * f.channel + x : to + (x + j) * step + c, q[j]);
        }
        for (int64_t c = even; c < channels; ++c)
          for (int j = 0; j < 4; ++j) one(x + j, c);
      }
      for (; x < width; ++x)
        for (int64_t c = 0; c < channels; ++c) one(x, c);
    }
}

struct Job {
  const RelayoutArgs& a;
  const int64_t* from;  // pixel offsets
  const int64_t* to;
  const float* src;  // of the channel
  float* dst;
  int64_t n0, count;  // images n0 .. n0 + count
};

// Same images side by side in both: whole pixels, or whole rows where both are contiguous.
void copy_blocks(const Job& j, int64_t lanes) {
  const RelayoutArgs& a = j.a;
  const float* const src = j.src + image_at(a.from, j.n0);
  float* const dst = j.dst + image_at(a.to, j.n0);
  const bool rows = a.from.phases_w == 1 && a.to.phases_w == 1 && a.from.col == lanes && a.to.col == lanes;
  for (int64_t y = 0; y < a.height; ++y) {
    const int64_t *const f = j.from + y * a.width, *const t = j.to + y * a.width;
    if (rows)
      copy_floats(dst + t[0], src + f[0], a.width * lanes);
    else
      for (int64_t x = 0; x < a.width; ++x) copy_floats(dst + t[x], src + f[x], lanes);
  }
}

void copy_any(const Job& j) {
  const RelayoutArgs& a = j.a;
  for (int64_t n = j.n0; n < j.n0 + j.count; ++n) {
    const float* const src = j.src + image_at(a.from, n);
    float* const dst = j.dst + image_at(a.to, n);
    for (int64_t i = 0; i < a.height * a.width; ++i) dst[j.to[i]] = src[j.from[i]];
  }
}

bool is_plain(const Layout& l, int64_t width) {
  return l.lanes == 1 && l.col == 1 && l.row == width && l.phases_h * l.phases_w == 1;
}
bool is_channels_last(const Layout& l) { return l.lanes == 1 && l.channel == 1 && l.phases_h * l.phases_w == 1; }

}  // namespace

void relayout_cpu(const RelayoutArgs& a) {
  const Layout &s = a.from, &d = a.to;
  // Images are handled in the larger of the two groups.
  const int64_t lanes = std::max(s.lanes, d.lanes), blocks = (a.batch + lanes - 1) / lanes;
  const int64_t pixels = a.height * a.width;
  const std::vector<int64_t> from = pixel_offsets(s, a.height, a.width), to = pixel_offsets(d, a.height, a.width);
  const int phases = d.phases_h * d.phases_w;
  const int64_t group = lanes / d.lanes;  // destination blocks per group of images
  const bool into = is_channels_last(s), out_of = is_channels_last(d),
             by_rows = lanes == 1 && ((into && d.col == 1) || (out_of && s.col == 1)),
             by_channels = by_rows || (lanes % 4 == 0 && (into || out_of));
  const int64_t each = by_channels ? kChannels : 1, groups = (a.channels + each - 1) / each;
  const int64_t grain = std::max<int64_t>(1, kGrainFloats / std::max<int64_t>(1, pixels * lanes * each));
  parallel_for(blocks * groups, grain, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t block = item / groups, c = (item - block * groups) * each;
      const int64_t channels = std::min(each, a.channels - c), n0 = block * lanes,
                    count = std::min(lanes, a.batch - n0);
      const Job job{a, from.data(), to.data(), a.src + c * s.channel, a.dst + c * d.channel, n0, count};
      // Calls f(a plane that is written, whether all of its rows are).
      const auto planes = [&](const auto& f) {
        if (a.plane == 0) return;
        for (int64_t b = block * group; b * d.lanes < n0 + count; ++b)
          for (int64_t k = 0; k < channels * phases; ++k)
            f(job.dst + b * d.block + k % phases * d.phase + k / phases * d.channel,
              phases == 1 && (b + 1) * d.lanes <= a.batch);
      };
      planes([&](float* plane, bool rows) {
        if (!rows) std::memset(plane, 0, static_cast<size_t>(a.plane) * sizeof(float));
      });
      const float* const src = job.src + image_at(s, n0);
      float* const dst = job.dst + image_at(d, n0);
      if (by_rows && into) {
        transpose_rows<true>(a, src, dst, channels);
      } else if (by_rows) {
        transpose_rows<false>(a, src, dst, channels);
      } else if (by_channels && into) {
        transpose_channels<true>(a, src, dst, job.from, job.to, channels, lanes, count);
      } else if (by_channels) {
        transpose_channels<false>(a, src, dst, job.to, job.from, channels, lanes, count);
      } else if (s.lanes == d.lanes && (lanes == 1 ? s.col == 1 && d.col == 1 : count == lanes)) {
        for (int64_t n = 0; n < count; n += s.lanes)
          copy_blocks({a, job.from, job.to, job.src, job.dst, n0 + n, 1}, lanes);
      } else if (lanes % 4 == 0 && s.lanes == 1 && is_plain(s, a.width)) {
        transpose_images<true>(src, dst, s.block, job.to, pixels, lanes, count);
      } else if (lanes % 4 == 0 && d.lanes == 1 && is_plain(d, a.width)) {
        transpose_images<false>(src, dst, d.block, job.from, pixels, lanes, count);
      } else {
        copy_any(job);
      }
      // Afterwards, while the lines are near.
      planes([&](float* plane, bool rows) {
        if (rows) clear_borders(plane, d, a.height, a.width, a.plane);
      });
    }
  });
}

FR_NS_END
