// Interval convolutions: centre and radius in one pass over padded copies, a few positions times a few channels of the
// result in registers. Each value has its own accumulator, so it does not depend on what else is computed.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "bounds/depthwise_cpu.h"
#include "bounds/entry_cpu.h"
#include "bounds/fma.h"
#include "bounds/formulas.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

#if defined(__AVX512F__)
constexpr int kNarrow = 8, kWide = 6, kMaxVectors = 2;  // positions at one and at two vectors of channels
constexpr int kAlone = kNarrow;                         // the same where the centre's product is alone
#else
constexpr int kNarrow = 2, kWide = 2, kMaxVectors = 1;
constexpr int kAlone = 4;  // fewer sums than eight registers would wait for each other
#endif

// Padded copies of centre and radius, [batch][1 or 2][height][width][channels], and the weight as [taps][lanes].
struct Padded {
  int64_t height, width, image, taps, lanes, copies;
  explicit Padded(const IntervalConvArgs& g)
      : height(std::max((g.out_h - 1) * g.stride_y + (g.kernel_h - 1) * g.dilation_y + 1, g.in_h + g.pad_y)),
        width(std::max((g.out_w - 1) * g.stride_x + (g.kernel_w - 1) * g.dilation_x + 1, g.in_w + g.pad_x)),
        image(height * width * g.in_c),
        taps(g.kernel_h * g.kernel_w * g.in_c),
        lanes((g.out_c + kLanes - 1) / kLanes * kLanes),
        copies(g.radius != nullptr ? 2 : 1) {}
};

void copy_row(const IntervalConvArgs& g, const float* from, const int64_t* stride, float* to) {
  if (stride[3] == 1 && stride[2] == g.in_c) {
    std::memcpy(to, from, static_cast<size_t>(g.in_w * g.in_c) * sizeof(float));
    return;
  }
  if (stride[3] == 1) {
    for (int64_t x = 0; x < g.in_w; ++x) std::copy_n(from + x * stride[2], g.in_c, to + x * g.in_c);
    return;
  }
  for (int64_t c = 0; c < g.in_c; ++c)
    for (int64_t x = 0; x < g.in_w; ++x) to[x * g.in_c + c] = from[x * stride[2] + c * stride[3]];
}

void pad_image(const IntervalConvArgs& g, const Padded& s, const float* from, const int64_t* stride, float* to) {
  const auto zero = [&](float* p, int64_t n) { std::memset(p, 0, static_cast<size_t>(n) * sizeof(float)); };
  const int64_t row = s.width * g.in_c, left = g.pad_x * g.in_c, filled = g.in_w * g.in_c;
  zero(to, g.pad_y * row);
  for (int64_t y = 0; y < g.in_h; ++y) {
    float* line = to + (y + g.pad_y) * row;
    zero(line, left);
    copy_row(g, from + y * stride[1], stride, line + left);
    zero(line + left + filled, row - left - filled);
  }
  zero(to + (g.pad_y + g.in_h) * row, (s.height - g.pad_y - g.in_h) * row);
}

void pack_weight(const IntervalConvArgs& g, const Padded& s, float* to) {
  const int64_t area = g.kernel_h * g.kernel_w;
  std::memset(to, 0, static_cast<size_t>(s.taps * s.lanes) * sizeof(float));
  for (int64_t o = 0; o < g.out_c; ++o)
    for (int64_t c = 0; c < g.in_c; ++c)
      for (int64_t k = 0; k < area; ++k) to[(k * g.in_c + c) * s.lanes + o] = g.weight[(o * g.in_c + c) * area + k];
}

// Without kReach only the centre's product: a convolution.
template <int kPositions, int kVectors, bool kReach>
FR_HD void tile(const IntervalConvArgs& g, const Padded& s, const float* weight, const float* const* base,
                int64_t first, int64_t channel, int count) {
  Vec mid[kPositions][kVectors], reach[kPositions][kVectors];
#pragma GCC unroll 8
  for (int p = 0; p < kPositions; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) mid[p][v] = reach[p][v] = Vec(0.f);
  const float* at[kPositions];
#pragma GCC unroll 8
  for (int p = 0; p < kPositions; ++p) at[p] = base[p];
  // neighbouring taps of a line are one run of numbers, unless they lie apart
  const int64_t runs = g.dilation_x == 1 ? 1 : g.kernel_w, run = g.kernel_w / runs * g.in_c;
  const float* w = weight + channel;
  const int64_t right = g.dilation_x * g.in_c, down = g.dilation_y * s.width * g.in_c;
  for (int64_t ky = 0; ky < g.kernel_h; ++ky) {
    int64_t begin = ky * down;
    for (int64_t k = 0; k < runs; ++k, begin += right)
      for (int64_t i = begin; i < begin + run; ++i, w += s.lanes) {
        Vec wk[kVectors], ak[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) wk[v] = load(w + v * kLanes), ak[v] = vabs(wk[v]);
#pragma GCC unroll 8
        for (int p = 0; p < kPositions; ++p) {
          const Vec c(at[p][i]), r(kReach ? at[p][i + s.image] : 0.f);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            mid[p][v] = fmadd(wk[v], c, mid[p][v]);
            if (kReach) reach[p][v] = fmadd(ak[v], r, reach[p][v]);
          }
        }
      }
  }
#pragma GCC unroll 8
  for (int p = 0; p < kPositions; ++p) {
    if (p >= count) break;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const int64_t o = channel + v * kLanes;
      const int n = static_cast<int>(std::min<int64_t>(kLanes, g.out_c - o));
      Vec a = mid[p][v], b = reach[p][v];
      if (g.bias != nullptr) a = a + load_n(g.bias + o, n);
      const bool both = kReach || g.reach != nullptr;
      if (!kReach && both) b = load_n(g.reach + (first + p) % (g.out_h * g.out_w) * g.out_c + o, n);
      if (both && g.finish == Finish::ends) from_center(a, b);
      if (both && g.finish == Finish::relu_center) relu_center(a, b);
      const int64_t at = (first + p) * (g.out_apart != 0 ? g.out_apart : g.out_c) + o;
      store_n(g.out_a + at, a, n);
      if (both) store_n(g.out_b + at, b, n);
    }
  }
}

template <int kPositions, int kVectors, bool kReach>
void tiles(const IntervalConvArgs& g, const Padded& s, const float* weight, const float* images, int64_t begin,
           int64_t end) {
  const int64_t area = g.out_h * g.out_w, total = g.batch * area;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * kPositions;
    const int count = static_cast<int>(std::min<int64_t>(kPositions, total - first));
    const float* base[kPositions];
    for (int p = 0; p < kPositions; ++p) {  // missing positions repeat the last one and are not stored
      const int64_t q = first + std::min(p, count - 1), image = q / area, y = q % area / g.out_w, x = q % g.out_w;
      base[p] = images + image * s.copies * s.image + (y * g.stride_y * s.width + x * g.stride_x) * g.in_c;
    }
    int64_t channel = 0;
    for (; channel + kVectors * kLanes <= s.lanes; channel += kVectors * kLanes)
      tile<kPositions, kVectors, kReach>(g, s, weight, base, first, channel, count);
    if constexpr (kVectors > 1)
      if (channel < s.lanes) tile<kPositions, 1, kReach>(g, s, weight, base, first, channel, count);
  }
}

void convolve(const IntervalConvArgs& g) {
  const int64_t total = g.batch * g.out_h * g.out_w;
  if (total * g.out_c == 0) return;
  const Padded s(g);
  float* weight = g.work;
  float* images = weight + s.taps * s.lanes;
  pack_weight(g, s, weight);
  parallel_for(g.batch, std::max<int64_t>(1, 16384 / s.image), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* to = images + i * s.copies * s.image;
      pad_image(g, s, g.center + i * g.center_stride[0], g.center_stride, to);
      if (g.radius != nullptr) pad_image(g, s, g.radius + i * g.radius_stride[0], g.radius_stride, to + s.image);
    }
  });
  const bool wide = kMaxVectors > 1 && s.lanes > kLanes;
  const int64_t narrow = g.radius == nullptr ? kAlone : kNarrow;
  const int64_t positions = wide ? kWide : narrow, count = (total + positions - 1) / positions;
  const int64_t grain = std::max<int64_t>(1, 65536 / (positions * s.taps * s.lanes / kLanes));
  parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    if (g.radius == nullptr)
      wide ? tiles<kWide, kMaxVectors, false>(g, s, weight, images, begin, end)
           : tiles<kAlone, 1, false>(g, s, weight, images, begin, end);
    else
      wide ? tiles<kWide, kMaxVectors, true>(g, s, weight, images, begin, end)
           : tiles<kNarrow, 1, true>(g, s, weight, images, begin, end);
  });
}

// The part of group k.
IntervalConvArgs group_of(const IntervalConvArgs& g, int64_t k) {
  IntervalConvArgs one = g;
  one.groups = 1, one.in_c = g.in_c / g.groups, one.out_c = g.out_c / g.groups, one.out_apart = g.out_c;
  const auto moved = [](auto* p, int64_t n) { return p != nullptr ? p + n : p; };
  one.center = moved(g.center, k * one.in_c * g.center_stride[3]);
  one.radius = moved(g.radius, k * one.in_c * g.radius_stride[3]);
  one.weight = moved(g.weight, k * one.out_c * one.in_c * g.kernel_h * g.kernel_w);
  one.bias = moved(g.bias, k * one.out_c);
  one.out_a = moved(g.out_a, k * one.out_c);
  one.out_b = moved(g.out_b, k * one.out_c);
  return one;
}

bool depthwise(const IntervalConvArgs& g) { return g.groups > 1 && g.groups == g.in_c && g.groups == g.out_c; }

// The bias joins, and both are finished, at some positions of all examples.
void finish_depthwise(const IntervalConvArgs& g, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p)
    for (int64_t c = 0; c < g.out_c; c += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, g.out_c - c));
      float* const to = g.out_a + p * g.out_c + c;
      Vec a = load_n(to, n), b(0.f);
      if (g.bias != nullptr) a = a + load_n(g.bias + c, n);
      if (g.radius != nullptr) {
        float* const reach = g.out_b + p * g.out_c + c;
        b = load_n(reach, n);
        if (g.finish == Finish::ends) from_center(a, b);
        if (g.finish == Finish::relu_center) relu_center(a, b);
        store_n(reach, b, n);
      }
      store_n(to, a, n);
    }
}

// Centre and radius of every example one after the other, in place.
void convolve_depthwise(const IntervalConvArgs& g) {
  const Depthwise d{g.out_h,    g.out_w,    g.in_h,  g.in_w,  g.in_c,       g.kernel_h,  g.kernel_w,
                    g.stride_y, g.stride_x, g.pad_y, g.pad_x, g.dilation_y, g.dilation_x};
  const Floats weight(d.numbers()), sizes(d.numbers());
  d.turn(g.weight, d.taps(), weight.get());
  for (int64_t i = 0; i < d.numbers(); ++i) sizes[i] = std::fabs(weight[i]);
  const int64_t size = d.result();
  const auto images = [&](int64_t begin, int64_t end, const float* from, const int64_t* stride, const float* w,
                          float* to) {
    const bool dense = stride[3] == 1 && stride[2] == g.in_c && stride[1] == g.in_w * g.in_c;
    const Floats image(dense ? 0 : d.image());
    for (int64_t i = begin; i < end; ++i, to += size) {
      const float* x = from + i * stride[0];
      for (int64_t y = 0; y < g.in_h && !dense; ++y)
        copy_row(g, x + y * stride[1], stride, image.get() + y * g.in_w * g.in_c);
      std::fill_n(to, size, 0.f);
      d.convolve(dense ? x : image.get(), w, to);
    }
  };
  const bool shared = g.radius != nullptr && g.radius_stride[0] == 0;
  const Floats reach(shared ? size : 0);
  if (shared) images(0, 1, g.radius, g.radius_stride, sizes.get(), reach.get());
  parallel_for(g.batch, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, size * d.taps())),
               [&](int64_t begin, int64_t end) {
                 images(begin, end, g.center, g.center_stride, weight.get(), g.out_a + begin * size);
                 if (g.radius != nullptr && !shared)
                   images(begin, end, g.radius, g.radius_stride, sizes.get(), g.out_b + begin * size);
                 for (int64_t i = begin; i < end && shared; ++i) std::copy_n(reach.get(), size, g.out_b + i * size);
                 finish_depthwise(g, begin * g.out_h * g.out_w, end * g.out_h * g.out_w);
               });
}

}  // namespace

int64_t interval_conv_work_cpu(const IntervalConvArgs& g) {
  if (depthwise(g)) return 1;
  if (g.groups > 1) return interval_conv_work_cpu(group_of(g, 0));
  const Padded s(g);
  const int64_t one = s.taps * s.lanes + 2 * s.image + 2 * g.out_h * g.out_w * g.out_c;  // of a shared radius
  return s.taps * s.lanes + g.batch * s.copies * s.image + (g.radius != nullptr ? one : 0);
}

void interval_conv_cpu(const IntervalConvArgs& g) {
  if (depthwise(g)) return convolve_depthwise(g);
  if (g.groups > 1) {
    for (int64_t k = 0; k < g.groups; ++k) interval_conv_cpu(group_of(g, k));
    return;
  }
  if (g.radius == nullptr || g.radius_stride[0] != 0 || g.batch < 2) return convolve(g);
  // one radius for all examples: |w| * r once
  IntervalConvArgs one = g, rest = g;
  const int64_t size = g.out_h * g.out_w * g.out_c;
  rest.radius = nullptr;
  one.batch = 1, one.center = g.radius, one.bias = nullptr, one.finish = Finish::center, one.out_apart = 0;
  std::copy_n(g.radius_stride, 4, one.center_stride);
  one.out_a = g.work + interval_conv_work_cpu(rest);
  one.out_b = one.out_a + size;
  one.work = one.out_b + size;
  convolve(one);
  rest.reach = one.out_b;
  convolve(rest);
}

FR_NS_END
