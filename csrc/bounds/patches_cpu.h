// Convolutions of gradients and of their sums by patches: the step is one of a chain, seen from the image that its
// adjoint wrote to.
#pragma once

#include <algorithm>
#include <cstring>

#include "bounds/args.h"
#include "bounds/taps.h"
#include "core/floats.h"

FR_NS_BEGIN

inline int64_t positions_of(const ChainStep& s) { return s.map_height * s.map_width; }
inline int64_t before(const ChainStep& s) { return positions_of(s) * s.channels; }
inline int64_t after(const ChainStep& s) { return s.out_height * s.out_width * s.out_channels; }
inline int64_t padded(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

// The transposed weight: [lanes][channels, padded].
inline Floats turned_weight(const ChainStep& s) {
  const int64_t wide = padded(s.channels);
  Floats turned = Floats::zeros(s.lanes * wide);
  for (int64_t o = 0; o < s.channels; ++o)
    for (int64_t t = 0; t < s.lanes; ++t) turned[t * wide + o] = s.weight[o * s.lanes + t];
  return turned;
}

// An image with its border: what the taps touch.
inline int64_t bordered_height(const ChainStep& s) { return (s.map_height - 1) * s.stride_y + s.kernel_h; }
inline int64_t bordered_width(const ChainStep& s) { return (s.map_width - 1) * s.stride_x + s.kernel_w; }
inline int64_t bordered(const ChainStep& s) { return bordered_height(s) * bordered_width(s) * s.out_channels; }

// Into the middle of `to`, whose border stays as it is.
inline void inside_border(const ChainStep& s, const float* image, float* to) {
  const int64_t height = std::min(s.out_height, bordered_height(s) - s.pad_y), width = bordered_width(s);
  const int64_t line = std::min(s.out_width, width - s.pad_x) * s.out_channels;
  for (int64_t y = 0; y < height && line > 0; ++y)
    std::copy_n(image + y * s.out_width * s.out_channels, line,
                to + ((y + s.pad_y) * width + s.pad_x) * s.out_channels);
}

// The taps of every position of a bordered image, zero beyond them: [positions][patch_stride(lanes)].
template <class Copy>
void patches_by(const ChainStep& s, const float* image, float* to, const Copy& copy) {
  const int64_t line = s.kernel_w * s.out_channels, row = bordered_width(s) * s.out_channels;
  const int64_t taps = s.kernel_h * line;
  for (int64_t y = 0; y < s.map_height; ++y)
    for (int64_t x = 0; x < s.map_width; ++x, to += patch_stride(s.lanes)) {
      const float* from = image + y * s.stride_y * row + x * s.stride_x * s.out_channels;
      for (int64_t ky = 0; ky < s.kernel_h; ++ky) copy(from + ky * row, to + ky * line, line);
      for (int64_t i = taps; i < s.lanes; ++i) to[i] = 0.f;
    }
}

inline void patches(const ChainStep& s, const float* image, float* to) {
  const int64_t line = s.kernel_w * s.out_channels;
  if (line == 4)
    patches_by(s, image, to, [](const float* from, float* out, int64_t) { std::memcpy(out, from, 16); });
  else if (line % kLanes == 0)
    patches_by(s, image, to, [](const float* from, float* out, int64_t n) {
      for (int64_t i = 0; i < n; i += kLanes) store(out + i, load(from + i));
    });
  else
    patches_by(s, image, to, [](const float* from, float* out, int64_t n) {
      for (int64_t i = 0; i < n; ++i) out[i] = from[i];
    });
}

template <int kTaps>
void convolve_with(const float* patch, int64_t positions, int64_t lanes, const float* turned, int64_t wide,
                   float* out) {
  constexpr int kPositions = positions_for(kTaps);
  const int64_t stride = patch_stride(lanes);
  int64_t p = 0;
  for (; p + kPositions <= positions; p += kPositions)
    all_products<kTaps, kPositions>(lanes, stride, wide, patch + p * stride, turned, out + p * wide);
  for (; p < positions; ++p) all_products<kTaps, 1>(lanes, stride, wide, patch + p * stride, turned, out + p * wide);
}

// out[position][0, wide) = patch[position] * turned
inline void convolve(const float* patch, int64_t positions, int64_t lanes, const float* turned, int64_t wide,
                     float* out) {
#if defined(__AVX512F__)
  const int64_t vectors = wide / kLanes;
  const auto f = vectors == 1   ? convolve_with<1>
                 : vectors == 2 ? convolve_with<2>
                 : vectors == 3 ? convolve_with<3>
                                : convolve_with<4>;
#else
  const auto f = wide == kLanes ? convolve_with<1> : convolve_with<2>;
#endif
  f(patch, positions, lanes, turned, wide, out);
}

FR_NS_END
