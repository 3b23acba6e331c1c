// The adjoint of a convolution whose taps fill a few registers: products of one position at a time, added where they
// belong.
#include <algorithm>
#include <cstring>

#include "bounds/entry_cpu.h"
#include "bounds/fma.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

template <int kTaps, int kPositions>
FR_HD void products(const SpreadArgs& g, const float* a, float* taps) {
  Vec acc[kPositions][kTaps];
#pragma GCC unroll 8
  for (int p = 0; p < kPositions; ++p)
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) acc[p][t] = Vec(0.f);
  for (int64_t c = 0; c < g.in_c; ++c) {
    Vec w[kTaps];
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) w[t] = load(g.weight + c * g.lanes + t * kLanes);
#pragma GCC unroll 8
    for (int p = 0; p < kPositions; ++p) {
      const Vec v(a[p * g.in_c + c]);
#pragma GCC unroll 4
      for (int t = 0; t < kTaps; ++t) acc[p][t] = fmadd(v, w[t], acc[p][t]);
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < kPositions; ++p)
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) store(taps + (p * kTaps + t) * kLanes, acc[p][t]);
}

template <int kTaps>
void spread_one(const SpreadArgs& g, int64_t item) {
  constexpr int kPositions = kTaps == 1 ? 8 : (kTaps == 2 ? 4 : 2);
  const float* a = g.a + item * g.in_h * g.in_w * g.in_c;
  float* out = g.out + item * g.out_h * g.out_w * g.out_c;
  std::memset(out, 0, static_cast<size_t>(g.out_h * g.out_w * g.out_c) * sizeof(float));
  float taps[kPositions * kTaps * kLanes];
  const int64_t line = g.kernel_w * g.out_c;
  const auto add = [&](int64_t y, int64_t x, const float* t) {
    const int64_t left = x * g.stride_x - g.pad_x;
    const int64_t first = std::max<int64_t>(0, -left) * g.out_c, last = std::min(g.kernel_w, g.out_w - left) * g.out_c;
    for (int64_t ky = 0; ky < g.kernel_h; ++ky) {
      const int64_t row = y * g.stride_y - g.pad_y + ky;
      if (row < 0 || row >= g.out_h) continue;
      float* FR_RESTRICT o = out + (row * g.out_w + left) * g.out_c;
      const float* FR_RESTRICT v = t + ky * line;
      for (int64_t i = first; i < last; ++i) o[i] += v[i];
    }
  };
  for (int64_t y = 0; y < g.in_h; ++y) {
    int64_t x = 0;
    for (; x + kPositions <= g.in_w; x += kPositions) {
      products<kTaps, kPositions>(g, a + (y * g.in_w + x) * g.in_c, taps);
      for (int p = 0; p < kPositions; ++p) add(y, x + p, taps + p * kTaps * kLanes);
    }
    for (; x < g.in_w; ++x) {
      products<kTaps, 1>(g, a + (y * g.in_w + x) * g.in_c, taps);
      add(y, x, taps);
    }
  }
}

}  // namespace

void spread_cpu(const SpreadArgs& g) {
  using Fn = void (*)(const SpreadArgs&, int64_t);
  const Fn fns[] = {spread_one<1>, spread_one<2>, spread_one<3>, spread_one<4>};
  const Fn f = fns[g.lanes / kLanes - 1];
  const int64_t work = g.in_h * g.in_w * g.in_c * (g.lanes / kLanes);
  parallel_for(g.count, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, work)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(g, i);
  });
}

FR_NS_END
