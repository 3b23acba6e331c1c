// The neurons of an example whose lines are not zero, and how products over them find their weights.
#pragma once

#include <algorithm>
#include <memory>

#include "bounds/args.h"
#include "core/simd.h"

FR_NS_BEGIN

// first + i * step for the lanes i of `live`, one after the other; a whole vector may be overwritten.
FR_HD void append(uint32_t live, int32_t* to, int32_t first, int32_t step = 1) {
#if defined(__AVX512F__)
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i v = _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_mullo_epi32(lane, _mm512_set1_epi32(step)));
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(live), v));
#else
  for (; live != 0; live &= live - 1) *to++ = first + __builtin_ctz(live) * step;
#endif
}

// Which of the n neurons from `at` on have lines that are not zero, as bits.
template <class Lines>
FR_HD uint32_t living(const Lines& map, int64_t at, int n) {
  const Vec zero(0.f);
  const auto none = [&](const float* p) FR_INLINE_LAMBDA {
    return (n == kLanes ? load(p + at) : load_n(p + at, n)) == zero;  // NaN is not none
  };
  const Mask dead = none(map.slope_low) & none(map.slope_up) & none(map.low) & none(map.up);
  return ~bits(dead) & ((1u << n) - 1);
}

// The lines of one example at the activation of a step, a number per neuron.
struct LineMaps {
  const float *slope_low, *slope_up, *low, *up;
  LineMaps(const ChainStep& s, int64_t examples, int64_t example) {
    const int64_t map = s.map_height * s.map_width * s.channels;
    slope_low = s.slopes + example * map;
    slope_up = s.slope_sides == 2 ? slope_low + examples * map : slope_low;
    low = s.intercepts + example * map;
    up = low + examples * map;
  }
};

// Of one activation: position by position, channels ascending.
struct LiveList {
  int64_t count = 0;
  std::unique_ptr<int32_t[]> neuron, channel;
  std::unique_ptr<int64_t[]> start;  // [positions + 1] of a position's neurons
  // Where a neuron's weights lie, less what depends on the output that they meet: those of output position (y, x) start
  // ((y + pad_y) kernel_w + x + pad_x) out_channels taps further.
  std::unique_ptr<int32_t[]> weight;
  std::unique_ptr<uint32_t[]> mask;  // of each vector of channels of each position, as bits

  void reserve(const ChainStep& s) {
    const auto positions = static_cast<size_t>(s.map_height * s.map_width);
    const auto most = positions * static_cast<size_t>(s.channels);
    neuron.reset(new int32_t[most + kLanes]);  // whole vectors are written
    channel.reset(new int32_t[most + kLanes]);
    weight.reset(new int32_t[most + kLanes]);
    start.reset(new int64_t[positions + 1]);
    mask.reset(new uint32_t[positions * static_cast<size_t>((s.channels + kLanes - 1) / kLanes)]);
  }

  void find(const ChainStep& s, const LineMaps& map) {
    const int64_t step = s.turned ? 1 : s.lanes, tap = s.turned ? s.lanes : 1;
    count = 0;
    uint32_t* bits_to = mask.get();
    for (int64_t y = 0, position = 0; y < s.map_height; ++y)
      for (int64_t x = 0; x < s.map_width; ++x, ++position) {
        const int64_t shift = (y * s.stride_y * s.kernel_w + x * s.stride_x) * s.out_channels * tap;
        start[static_cast<size_t>(position)] = count;
        for (int64_t c = 0; c < s.channels; c += kLanes) {
          const int64_t at = position * s.channels + c;
          const int n = static_cast<int>(std::min<int64_t>(kLanes, s.channels - c));
          const uint32_t live = living(map, at, n);
          *bits_to++ = live;
          append(live, neuron.get() + count, static_cast<int32_t>(at));
          append(live, channel.get() + count, static_cast<int32_t>(c));
          append(live, weight.get() + count, static_cast<int32_t>(c * step - shift), static_cast<int32_t>(step));
          count += __builtin_popcount(live);
        }
      }
    start[static_cast<size_t>(s.map_height * s.map_width)] = count;
  }

  // The lanes of v that are in `live`, written to `to` one after the other (a whole vector may be overwritten); their
  // end.
  FR_HD static float* compress(uint32_t live, Vec v, float* to) {
#if defined(__AVX512F__)
    store(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(live), v.v));
#else
    float f[kLanes];
    store(f, v);
    float* next = to;
    for (uint32_t left = live; left != 0; left &= left - 1) *next++ = f[__builtin_ctz(left)];
#endif
    return to + __builtin_popcount(live);
  }
};

FR_NS_END
