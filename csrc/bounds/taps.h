// Products of positions with taps, from registers: what convolutions, their adjoints and their gradients are made of.
#pragma once

#include <type_traits>

#include "bounds/fma.h"
#include "core/macros.h"

FR_NS_BEGIN

// How many positions, and of the gradients' sums how many channels, are in registers beside so many vectors of taps.
#if defined(__AVX512F__)
constexpr int kMostTaps = 4;
constexpr int positions_for(int taps) { return taps <= 2 ? 12 : taps == 3 ? 8 : 6; }
constexpr int channels_for(int taps) { return taps <= 2 ? 8 : 4; }
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int kMostTaps = 2;
constexpr int positions_for(int taps) { return taps == 1 ? 6 : 2; }
constexpr int channels_for(int taps) { return taps == 1 ? 6 : 2; }
#else
constexpr int kMostTaps = 1;
constexpr int positions_for(int) { return 2; }
constexpr int channels_for(int) { return 2; }
#endif
// Blocks that taps are taken in: two vectors at a time leave registers for few positions only.
constexpr int kTapBlock = kMostTaps == 4 ? 4 : 1;

// Calls f(vectors, first) for blocks of kTaps vectors of taps, the rest in one smaller block.
template <int kTaps = kTapBlock, class F>
FR_HD void blocks_of_taps(int64_t lanes, const F& f) {
  int64_t t = 0;
  for (; t + kTaps * kLanes <= lanes; t += kTaps * kLanes) f(std::integral_constant<int, kTaps>(), t);
  const int64_t rest = (lanes - t) / kLanes;
  if constexpr (kTaps > 1)
    if (rest == 1) f(std::integral_constant<int, 1>(), t);
  if constexpr (kTaps > 2)
    if (rest == 2) f(std::integral_constant<int, 2>(), t);
  if constexpr (kTaps > 3)
    if (rest == 3) f(std::integral_constant<int, 3>(), t);
}

// taps[p][0, kTaps) = the sum over channels of a[p][c] * weight[c][0, kTaps), in vectors; rows of `lanes` numbers,
// those of a `stride` and those of the weight `apart`.
template <int kTaps, int kPositions>
FR_HD void products(int64_t in_c, int64_t stride, int64_t lanes, int64_t apart, const float* a, const float* weight,
                    float* taps) {
  Vec acc[kPositions][kTaps];
#pragma GCC unroll 12
  for (int p = 0; p < kPositions; ++p)
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) acc[p][t] = Vec(0.f);
  for (int64_t c = 0; c < in_c; ++c) {
    Vec w[kTaps];
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) w[t] = load(weight + c * apart + t * kLanes);
#pragma GCC unroll 12
    for (int p = 0; p < kPositions; ++p) {
      const Vec v(a[p * stride + c]);
#pragma GCC unroll 4
      for (int t = 0; t < kTaps; ++t) acc[p][t] = fmadd(v, w[t], acc[p][t]);
    }
  }
#pragma GCC unroll 12
  for (int p = 0; p < kPositions; ++p)
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) store(taps + p * lanes + t * kLanes, acc[p][t]);
}

// All taps: blocks of kTaps vectors, the rest in one smaller block. blocked: the weights are those of `block_weights`.
template <int kTaps, int kPositions>
FR_HD void all_products(int64_t in_c, int64_t stride, int64_t lanes, const float* a, const float* weight, bool blocked,
                        float* taps) {
  const auto block = [&](auto width, int64_t t) FR_INLINE_LAMBDA {
    constexpr int kWidth = width.value;
    products<kWidth, kPositions>(in_c, stride, lanes, blocked ? kWidth * kLanes : lanes, a,
                                 weight + (blocked ? t * in_c : t), taps + t);
  };
  blocks_of_taps<kTaps>(lanes, block);
}

// Rows of weights as blocks of kTaps vectors: rows of a block are next to each other, for a power of two apart they
// would share few places of the first cache.
template <int kTaps>
void block_weights(int64_t in_c, int64_t lanes, const float* weight, float* to) {
  for (int64_t t = 0; t < lanes; t += kTaps * kLanes) {
    const int64_t width = lanes - t < kTaps * kLanes ? lanes - t : kTaps * kLanes;
    for (int64_t c = 0; c < in_c; ++c)
      for (int64_t k = 0; k < width; k += kLanes, to += kLanes) store(to, load(weight + c * lanes + t + k));
  }
}

// Rows of patches lie this far apart: not a power of two, of which the first cache has few places.
constexpr int64_t patch_stride(int64_t lanes) { return lanes + kLanes; }

// Sums of kOut channels times kTaps vectors of taps, rows of `lanes` numbers, in registers.
template <int kTaps, int kOut>
struct TapSums {
  Vec sum[kOut][kTaps];

  FR_HD TapSums(const float* sums, int64_t lanes) {
#pragma GCC unroll 8
    for (int o = 0; o < kOut; ++o)
#pragma GCC unroll 4
      for (int t = 0; t < kTaps; ++t) sum[o][t] = load(sums + o * lanes + t * kLanes);
  }
  // sum[o] += a[o] * taps
  FR_HD void add(const float* a, const float* taps) {
    Vec v[kTaps];
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) v[t] = load(taps + t * kLanes);
#pragma GCC unroll 8
    for (int o = 0; o < kOut; ++o) {
      const Vec w(a[o]);
#pragma GCC unroll 4
      for (int t = 0; t < kTaps; ++t) sum[o][t] = fmadd(w, v[t], sum[o][t]);
    }
  }
  FR_HD void write(float* sums, int64_t lanes) const {
#pragma GCC unroll 8
    for (int o = 0; o < kOut; ++o)
#pragma GCC unroll 4
      for (int t = 0; t < kTaps; ++t) store(sums + o * lanes + t * kLanes, sum[o][t]);
  }
};

// sums[o][taps] += the sum over positions of a[position][o] * patch[position][taps]; rows of `lanes` numbers.
template <int kTaps, int kOut>
FR_HD void add_sums(const float* a, int64_t out_c, const float* patch, int64_t positions, int64_t lanes, float* sums) {
  TapSums<kTaps, kOut> acc(sums, lanes);
  for (int64_t p = 0; p < positions; ++p) acc.add(a + p * out_c, patch + p * patch_stride(lanes));
  acc.write(sums, lanes);
}

// Calls f(channels, first) for blocks of as many channels as go beside kTaps vectors, the rest in one smaller block.
template <int kTaps, int kOut = channels_for(kTaps), class F>
FR_HD void blocks_of_channels(int64_t out_c, const F& f, int64_t o = 0) {
  for (; o + kOut <= out_c; o += kOut) f(std::integral_constant<int, kOut>(), o);
  if constexpr (kOut > 1)
    if (o < out_c) blocks_of_channels<kTaps, kOut - 1>(out_c, f, o);
}

// Of any number of channels and taps.
inline void add_sums_of_taps(const float* a, int64_t out_c, const float* patch, int64_t positions, int64_t lanes,
                             float* sums) {
  blocks_of_taps(lanes, [&](auto block, int64_t t) FR_INLINE_LAMBDA {
    blocks_of_channels<block.value>(out_c, [&](auto channels, int64_t o) FR_INLINE_LAMBDA {
      add_sums<block.value, channels.value>(a + o, out_c, patch + t, positions, lanes, sums + o * lanes + t);
    });
  });
}

FR_NS_END
