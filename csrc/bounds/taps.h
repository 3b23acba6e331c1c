// Products of positions with taps, from registers: what convolutions, their adjoints and their gradients are made of.
#pragma once

#include "bounds/fma.h"
#include "core/macros.h"

FR_NS_BEGIN

#if defined(__AVX512F__)
constexpr int positions_for(int taps) { return taps == 1 ? 12 : taps == 2 ? 12 : taps == 3 ? 8 : 6; }
constexpr int kGradChannels = 8;  // of weight_sums at one or two vectors
#else
constexpr int positions_for(int taps) { return taps == 1 ? 4 : 2; }
constexpr int kGradChannels = 2;
#endif

// taps[p][0, kTaps) = the sum over channels of a[p][c] * weight[c][0, kTaps), in vectors; rows of `lanes` numbers,
// those of a `stride` apart.
template <int kTaps, int kPositions>
FR_HD void products(int64_t in_c, int64_t stride, int64_t lanes, const float* a, const float* weight, float* taps) {
  Vec acc[kPositions][kTaps];
#pragma GCC unroll 12
  for (int p = 0; p < kPositions; ++p)
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) acc[p][t] = Vec(0.f);
  for (int64_t c = 0; c < in_c; ++c) {
    Vec w[kTaps];
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) w[t] = load(weight + c * lanes + t * kLanes);
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

// All taps: blocks of kTaps vectors, the rest in one smaller block.
template <int kTaps, int kPositions>
FR_HD void all_products(int64_t in_c, int64_t stride, int64_t lanes, const float* a, const float* weight, float* taps) {
  int64_t t = 0;
  for (; t + kTaps * kLanes <= lanes; t += kTaps * kLanes)
    products<kTaps, kPositions>(in_c, stride, lanes, a, weight + t, taps + t);
  const int64_t rest = (lanes - t) / kLanes;
  if constexpr (kTaps > 1)
    if (rest == 1) products<1, kPositions>(in_c, stride, lanes, a, weight + t, taps + t);
  if constexpr (kTaps > 2)
    if (rest == 2) products<2, kPositions>(in_c, stride, lanes, a, weight + t, taps + t);
  if constexpr (kTaps > 3)
    if (rest == 3) products<3, kPositions>(in_c, stride, lanes, a, weight + t, taps + t);
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

template <int kTaps>
FR_HD void add_sums_of_channels(const float* a, int64_t out_c, const float* patch, int64_t positions, int64_t lanes,
                                float* sums) {
  constexpr int kOut = kTaps <= 2 ? kGradChannels : kGradChannels / 2;
  int64_t o = 0;
  for (; o + kOut <= out_c; o += kOut) add_sums<kTaps, kOut>(a + o, out_c, patch, positions, lanes, sums + o * lanes);
  for (; o < out_c; ++o) add_sums<kTaps, 1>(a + o, out_c, patch, positions, lanes, sums + o * lanes);
}

// Of any number of taps.
inline void add_sums_of_taps(const float* a, int64_t out_c, const float* patch, int64_t positions, int64_t lanes,
                             float* sums) {
  int64_t t = 0;
  for (; t + 4 * kLanes <= lanes; t += 4 * kLanes)
    add_sums_of_channels<4>(a, out_c, patch + t, positions, lanes, sums + t);
  const int64_t rest = (lanes - t) / kLanes;
  if (rest == 1) add_sums_of_channels<1>(a, out_c, patch + t, positions, lanes, sums + t);
  if (rest == 2) add_sums_of_channels<2>(a, out_c, patch + t, positions, lanes, sums + t);
  if (rest == 3) add_sums_of_channels<3>(a, out_c, patch + t, positions, lanes, sums + t);
}

FR_NS_END
