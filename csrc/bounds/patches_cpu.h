// What the positions of a convolution read of an image with a border of zeros.
#pragma once

#include <algorithm>
#include <cstring>

#include "bounds/taps.h"
#include "core/simd.h"

FR_NS_BEGIN

struct Bordered {
  int64_t positions_h, positions_w;    // of the convolution
  int64_t image_h, image_w, channels;  // without the border
  int64_t kernel_h, kernel_w, stride_y, stride_x, pad_y, pad_x;

  int64_t height() const { return (positions_h - 1) * stride_y + kernel_h; }
  int64_t width() const { return (positions_w - 1) * stride_x + kernel_w; }
  int64_t pitch() const { return width() * channels; }
  int64_t line() const { return kernel_w * channels; }  // of taps
  int64_t numbers() const { return height() * pitch(); }

  // Into the middle of `to`, whose border stays as it is.
  void fill(const float* image, float* to) const {
    const int64_t lines = std::min(image_h, height() - pad_y);
    const int64_t count = std::min(image_w, width() - pad_x) * channels;
    for (int64_t y = 0; y < lines && count > 0; ++y)
      std::copy_n(image + y * image_w * channels, count, to + (y + pad_y) * pitch() + pad_x * channels);
  }

  // The taps of every position of a bordered image, zero beyond them: [positions][patch_stride(lanes)].
  void patches(const float* image, int64_t lanes, float* to) const {
    if (line() == 4)
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

FR_NS_END
