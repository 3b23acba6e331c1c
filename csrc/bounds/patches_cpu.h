// What the positions of a convolution read of an image with a border of zeros.
#pragma once

#include <algorithm>
#include <cstring>

#include "bounds/taps.h"
#include "core/simd.h"

FR_NS_BEGIN

// `channels` numbers of each position, from positions that are `from_apart` to such that are `to_apart`.
inline void copy_channels(const float* from, int64_t positions, int64_t channels, int64_t from_apart, float* to,
                          int64_t to_apart) {
  if (from_apart == channels && to_apart == channels) {
    std::copy_n(from, positions * channels, to);
    return;
  }
  for (; positions > 0; --positions, from += from_apart, to += to_apart) std::copy_n(from, channels, to);
}

struct Bordered {
  int64_t positions_h, positions_w;    // of the convolution
  int64_t image_h, image_w, channels;  // without the border
  int64_t kernel_h, kernel_w, stride_y, stride_x, pad_y, pad_x;
  int64_t dilation_y = 1, dilation_x = 1;

  int64_t height() const { return (positions_h - 1) * stride_y + (kernel_h - 1) * dilation_y + 1; }
  int64_t width() const { return (positions_w - 1) * stride_x + (kernel_w - 1) * dilation_x + 1; }
  int64_t pitch() const { return width() * channels; }
  int64_t line() const { return kernel_w * channels; }  // of taps
  bool dilated() const { return dilation_y != 1 || dilation_x != 1; }
  bool whole_vectors() const { return line() % kLanes == 0 && !dilated(); }  // of windows that need no patches
  int64_t numbers() const { return height() * pitch(); }

  // Into the middle of `to`, whose border stays as it is. The image may be a group of another's channels, of which a
  // position has `apart`.
  void fill(const float* image, float* to, int64_t apart) const {
    const int64_t lines = std::min(image_h, height() - pad_y), columns = std::min(image_w, width() - pad_x);
    for (int64_t y = 0; y < lines && columns > 0; ++y)
      copy_channels(image + y * image_w * apart, columns, channels, apart,
                    to + (y + pad_y) * pitch() + pad_x * channels, channels);
  }
  void fill(const float* image, float* to) const { fill(image, to, channels); }

  // The taps of every position of a bordered image, zero beyond them: [positions][patch_stride(lanes)].
  void patches(const float* image, int64_t lanes, float* to) const {
    if (dilated())
      patches_apart(image, lanes, to);
    else if (line() == 4)
      patches_by(image, lanes, to, [](const float* from, float* out, int64_t) { std::memcpy(out, from, 16); });
    else if (line() % kLanes == 0)
      patches_by(image, lanes, to, [](const float* from, float* out, int64_t n) {
        for (int64_t i = 0; i < n; i += kLanes) store(out + i, load(from + i));
      });
    else
      patches_by(image, lanes, to, [](const float* from, float* out, int64_t n) {
        for (int64_t i = 0; i < n; ++i) out[i] = from[i];
      });
  }

 private:
  void patches_apart(const float* image, int64_t lanes, float* to) const {
    const int64_t taps = kernel_h * line();
    for (int64_t y = 0; y < positions_h; ++y)
      for (int64_t x = 0; x < positions_w; ++x, to += patch_stride(lanes)) {
        const float* from = image + y * stride_y * pitch() + x * stride_x * channels;
        for (int64_t ky = 0; ky < kernel_h; ++ky)
          copy_channels(from + ky * dilation_y * pitch(), kernel_w, channels, dilation_x * channels, to + ky * line(),
                        channels);
        std::fill(to + taps, to + lanes, 0.f);
      }
  }
  template <class Copy>
  void patches_by(const float* image, int64_t lanes, float* to, const Copy& copy) const {
    const int64_t n = line(), row = pitch(), taps = kernel_h * n;
    for (int64_t y = 0; y < positions_h; ++y)
      for (int64_t x = 0; x < positions_w; ++x, to += patch_stride(lanes)) {
        const float* from = image + y * stride_y * row + x * stride_x * channels;
        for (int64_t ky = 0; ky < kernel_h; ++ky) copy(from + ky * row, to + ky * n, n);
        for (int64_t i = taps; i < lanes; ++i) to[i] = 0.f;
      }
  }
};

// Sums of one block of examples, to those of others.
inline void add_numbers(const float* FR_RESTRICT from, int64_t n, float* FR_RESTRICT to) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

constexpr int windows_for(int taps) { return kMostTaps == 4 ? (taps <= 2 ? 8 : 6) : positions_for(taps); }

// out[p][0, kTaps vectors) = the window that starts at image + p * right, times turned [lines of taps][kTaps vectors].
template <int kTaps, int kWindows>
void window_products(const Bordered& s, const float* image, const float* turned, float* out) {
  Vec acc[kWindows][kTaps];
#pragma GCC unroll 8
  for (int p = 0; p < kWindows; ++p)
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) acc[p][t] = Vec(0.f);
  const int64_t right = s.stride_x * s.channels;
  for (int64_t ky = 0; ky < s.kernel_h; ++ky, image += s.pitch()) {
    const float* at[kWindows];
#pragma GCC unroll 8
    for (int p = 0; p < kWindows; ++p) at[p] = image + p * right;
    for (int64_t i = 0; i < s.line(); ++i, turned += kTaps * kLanes) {
      Vec w[kTaps];
#pragma GCC unroll 4
      for (int t = 0; t < kTaps; ++t) w[t] = load(turned + t * kLanes);
#pragma GCC unroll 8
      for (int p = 0; p < kWindows; ++p) {
        const Vec v(at[p][i]);
#pragma GCC unroll 4
        for (int t = 0; t < kTaps; ++t) acc[p][t] = fmadd(v, w[t], acc[p][t]);
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < kWindows; ++p)
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) store(out + (p * kTaps + t) * kLanes, acc[p][t]);
}

using WindowsFn = void (*)(const Bordered&, const float*, const float*, float*);
template <int kTaps, int kWindows = windows_for(kTaps)>
WindowsFn windows_fn(int64_t count) {
  if constexpr (kWindows > 1)
    if (count < kWindows) return windows_fn<kTaps, kWindows - 1>(count);
  return window_products<kTaps, kWindows>;
}

// The convolution of a bordered image, for at most kMostTaps vectors of channels, a few windows of a line at a time,
// as many as go into it evenly; calls between() before each.
template <int kTaps = 1, class Between>
void convolve_image(const Bordered& s, const float* image, int64_t vectors, const float* turned, float* out,
                    const Between& between) {
  if constexpr (kTaps < kMostTaps)
    if (vectors > kTaps) return convolve_image<kTaps + 1>(s, image, vectors, turned, out, between);
  constexpr int64_t kMost = windows_for(kTaps);
  const int64_t turns = (s.positions_w + kMost - 1) / kMost, per = (s.positions_w + turns - 1) / turns;
  for (int64_t y = 0; y < s.positions_h; ++y, image += s.stride_y * s.pitch())
    for (int64_t x = 0; x < s.positions_w; x += per) {
      const int64_t count = std::min(per, s.positions_w - x);
      between();
      windows_fn<kTaps>(count)(s, image + x * s.stride_x * s.channels, turned, out);
      out += count * kTaps * kLanes;
    }
}

// sums[o][taps] += the sum over positions of a[position][o] * taps of a bordered image, for kTaps vectors of one line
// of taps, which start at `image` for the first position; rows of `lanes` numbers.
template <int kTaps, int kOut>
FR_HD void add_line_sums(const Bordered& s, const float* a, int64_t out_c, const float* image, int64_t lanes,
                         float* sums) {
  TapSums<kTaps, kOut> acc(sums, lanes);
  const int64_t right = s.stride_x * s.channels, down = s.stride_y * s.pitch();
  for (int64_t y = 0; y < s.positions_h; ++y, image += down)
    for (int64_t x = 0; x < s.positions_w; ++x, a += out_c) acc.add(a, image + x * right);
  acc.write(sums, lanes);
}

// All taps, where a line of them is whole vectors: without patches, from the image, which stays in the first cache.
inline void add_window_sums(const Bordered& s, const float* a, int64_t out_c, const float* image, int64_t lanes,
                            float* sums) {
  for (int64_t ky = 0; ky < s.kernel_h; ++ky, image += s.pitch(), sums += s.line())
    blocks_of_taps(s.line(), [&](auto block, int64_t t) FR_INLINE_LAMBDA {
      blocks_of_channels<block.value>(out_c, [&](auto channels, int64_t o) FR_INLINE_LAMBDA {
        add_line_sums<block.value, channels.value>(s, a + o, out_c, image + t, lanes, sums + o * lanes + t);
      });
    });
}

template <int kTaps, class Between>
void convolve_with(const float* patch, int64_t positions, int64_t lanes, const float* turned, int64_t wide, float* out,
                   const Between& between) {
  constexpr int kPositions = positions_for(kTaps);
  const int64_t stride = patch_stride(lanes);
  int64_t p = 0;
  for (; p + kPositions <= positions; p += kPositions) {
    between();
    all_products<kTaps, kPositions>(lanes, stride, wide, patch + p * stride, turned, false, out + p * wide);
  }
  for (; p < positions; ++p)
    all_products<kTaps, 1>(lanes, stride, wide, patch + p * stride, turned, false, out + p * wide);
}

// out[position][0, wide) = patch[position] * turned; calls between() now and then.
template <class Between>
void convolve(const float* patch, int64_t positions, int64_t lanes, const float* turned, int64_t wide, float* out,
              const Between& between) {
  const int64_t vectors = wide / kLanes;
  auto f = convolve_with<kTapBlock, Between>;
  if constexpr (kTapBlock == 4)
    if (vectors <= 3)
      f = vectors == 1   ? convolve_with<1, Between>
          : vectors == 2 ? convolve_with<2, Between>
                         : convolve_with<3, Between>;
  f(patch, positions, lanes, turned, wide, out, between);
}

FR_NS_END
