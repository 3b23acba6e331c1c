// Convolutions with one channel a group (depthwise): lanes are channels. Images are [height][width][channels].
#pragma once

#include <algorithm>
#include <memory>

#include "bounds/fma.h"
#include "core/floats.h"
#include "core/macros.h"

FR_NS_BEGIN

// Along one axis: which taps meet at each of `count` places, and the places that they come from.
struct DepthwiseTaps {
  int64_t count;
  std::unique_ptr<int64_t[]> start, tap, from;

  // Of a convolution places are positions and come from the image; turned, the other way round.
  DepthwiseTaps(int64_t places, int64_t kernel, int64_t others, int64_t stride, int64_t pad, int64_t dilation,
                bool turned)
      : count(places),
        start(new int64_t[static_cast<size_t>(places + 1)]),
        tap(new int64_t[static_cast<size_t>(places * kernel)]),
        from(new int64_t[static_cast<size_t>(places * kernel)]) {
    int64_t n = 0;
    for (int64_t i = 0; i < places; ++i) {
      start[static_cast<size_t>(i)] = n;
      for (int64_t k = 0; k < kernel; ++k) {
        int64_t at = turned ? i + pad - k * dilation : i * stride - pad + k * dilation;
        if (turned && (at < 0 || at % stride != 0)) continue;
        if (turned) at /= stride;
        if (at < 0 || at >= others) continue;
        tap[static_cast<size_t>(n)] = k, from[static_cast<size_t>(n)] = at;
        ++n;
      }
    }
    start[static_cast<size_t>(places)] = n;
  }
};

struct Depthwise {
  int64_t positions_h, positions_w;  // of the convolution
  int64_t image_h, image_w, channels;
  int64_t kernel_h, kernel_w, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;

  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t wide() const { return (channels + kLanes - 1) / kLanes * kLanes; }
  int64_t numbers() const { return taps() * wide(); }  // of a weight
  int64_t result() const { return positions_h * positions_w * channels; }
  int64_t image() const { return image_h * image_w * channels; }

  // A weight, channel `apart` numbers from the one before, as [taps][wide].
  void turn(const float* weight, int64_t apart, float* to) const {
    std::fill_n(to, numbers(), 0.f);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t k = 0; k < taps(); ++k) to[k * wide() + c] = weight[c * apart + k];
  }
  void turn_back(const float* weight, int64_t apart, float* to) const {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t k = 0; k < taps(); ++k) to[c * apart + k] = weight[k * wide() + c];
  }

  // result += the convolution of an image.
  void convolve(const float* image, const float* weight, float* result) const {
    gather(DepthwiseTaps(positions_h, kernel_h, image_h, stride_y, pad_y, dilation_y, false),
           DepthwiseTaps(positions_w, kernel_w, image_w, stride_x, pad_x, dilation_x, false), image, image_w, weight,
           result);
  }
  // image += the adjoint of the convolution.
  void spread(const float* result, const float* weight, float* image) const {
    gather(DepthwiseTaps(image_h, kernel_h, positions_h, stride_y, pad_y, dilation_y, true),
           DepthwiseTaps(image_w, kernel_w, positions_w, stride_x, pad_x, dilation_x, true), result, positions_w,
           weight, image);
  }
  // sums [taps][wide] += the gradient of the weight.
  void add_sums(const float* result, const float* image, float* sums) const {
    for (int64_t y = 0; y < positions_h; ++y)
      for (int64_t ky = 0; ky < kernel_h; ++ky) {
        const int64_t line = y * stride_y - pad_y + ky * dilation_y;
        if (line < 0 || line >= image_h) continue;
        for (int64_t kx = 0; kx < kernel_w; ++kx) {
          int64_t first, last;
          const int64_t left = kx * dilation_x - pad_x;
          on_image(left, stride_x, image_w, positions_w, first, last);
          if (first >= last) continue;
          const float* a = result + (y * positions_w + first) * channels;
          const float* x = image + (line * image_w + left + first * stride_x) * channels;
          float* const to = sums + (ky * kernel_w + kx) * wide();
          for (int64_t c = 0; c < channels; c += kLanes) {
            const int n = static_cast<int>(std::min<int64_t>(kLanes, channels - c));
            Vec sum = load(to + c);
            for (int64_t i = 0; i < last - first; ++i)
              sum = fmadd(get(a + i * channels + c, n), get(x + i * stride_x * channels + c, n), sum);
            store(to + c, sum);
          }
        }
      }
  }

 private:
  static FR_HD Vec get(const float* p, int n) { return n == kLanes ? load(p) : load_n(p, n); }
  static FR_HD void put(float* p, Vec v, int n) { n == kLanes ? store(p, v) : store_n(p, v, n); }

  // What one place of `to` is the sum of lies in registers, four vectors of channels at a time.
  void gather(const DepthwiseTaps& down, const DepthwiseTaps& right, const float* from, int64_t width,
              const float* weight, float* to) const {
    for (int64_t y = 0; y < down.count; ++y)
      for (int64_t x = 0; x < right.count; ++x, to += channels) {
        int64_t c = 0;
        for (; c + 4 * kLanes <= channels; c += 4 * kLanes)
          place<4>(down, right, y, x, from + c, width, weight + c, to + c, kLanes);
        for (; c < channels; c += kLanes)
          place<1>(down, right, y, x, from + c, width, weight + c, to + c,
                   static_cast<int>(std::min<int64_t>(kLanes, channels - c)));
      }
  }
  template <int kVectors>
  FR_HD void place(const DepthwiseTaps& down, const DepthwiseTaps& right, int64_t y, int64_t x, const float* from,
                   int64_t width, const float* weight, float* to, int n) const {
    Vec sum[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] = get(to + v * kLanes, n);
    for (int64_t i = down.start[static_cast<size_t>(y)]; i < down.start[static_cast<size_t>(y + 1)]; ++i)
      for (int64_t j = right.start[static_cast<size_t>(x)]; j < right.start[static_cast<size_t>(x + 1)]; ++j) {
        const float* a =
            from + (down.from[static_cast<size_t>(i)] * width + right.from[static_cast<size_t>(j)]) * channels;
        const float* w =
            weight + (down.tap[static_cast<size_t>(i)] * kernel_w + right.tap[static_cast<size_t>(j)]) * wide();
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[v] = fmadd(load(w + v * kLanes), get(a + v * kLanes, n), sum[v]);
      }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) put(to + v * kLanes, sum[v], n);
  }

  // Positions [first, last) of a line whose tap at `offset` lies on an image of `size`.
  static void on_image(int64_t offset, int64_t stride, int64_t size, int64_t positions, int64_t& first, int64_t& last) {
    first = offset < 0 ? (-offset + stride - 1) / stride : 0;
    last = offset < size ? std::min(positions, (size - 1 - offset) / stride + 1) : 0;
  }
};

FR_NS_END
