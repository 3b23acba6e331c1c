// The adjoint of a convolution: for a few positions at a time the products with every tap, from registers, which are
// then added where they belong. Positions are independent, so a result does not depend on what else is computed.
#include <algorithm>
#include <cstring>

#include "bounds/entry_cpu.h"
#include "bounds/fma.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

#if defined(__AVX512F__)
constexpr int kMaxPositions = 12;
constexpr int positions_for(int taps) { return taps == 1 ? 12 : taps == 2 ? 12 : taps == 3 ? 8 : 6; }
#else
constexpr int kMaxPositions = 4;
constexpr int positions_for(int taps) { return taps == 1 ? 4 : 2; }
#endif

// taps[p][0, kTaps) = the sum over channels of a[p][c] * weight[c][0, kTaps), in vectors.
template <int kTaps, int kPositions>
FR_HD void products(const SpreadArgs& g, const float* a, const float* weight, float* taps) {
  Vec acc[kPositions][kTaps];
#pragma GCC unroll 12
  for (int p = 0; p < kPositions; ++p)
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) acc[p][t] = Vec(0.f);
  for (int64_t c = 0; c < g.in_c; ++c) {
    Vec w[kTaps];
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) w[t] = load(weight + c * g.lanes + t * kLanes);
#pragma GCC unroll 12
    for (int p = 0; p < kPositions; ++p) {
      const Vec v(a[p * g.in_c + c]);
#pragma GCC unroll 4
      for (int t = 0; t < kTaps; ++t) acc[p][t] = fmadd(v, w[t], acc[p][t]);
    }
  }
#pragma GCC unroll 12
  for (int p = 0; p < kPositions; ++p)
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) store(taps + p * g.lanes + t * kLanes, acc[p][t]);
}

typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));

FR_HD void add_to(float* FR_RESTRICT o, const float* FR_RESTRICT v, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(o + i, load(o + i) + load(v + i));
  for (; i + 4 <= n; i += 4)
    *reinterpret_cast<Quad*>(o + i) = *reinterpret_cast<const Quad*>(o + i) + *reinterpret_cast<const Quad*>(v + i);
  for (; i < n; ++i) o[i] += v[i];
}

// A walk over the positions of consecutive examples.
struct Walk {
  int64_t item, y, x;
  void next(const SpreadArgs& g) {
    if (++x < g.in_w) return;
    x = 0;
    if (++y < g.in_h) return;
    y = 0;
    ++item;
  }
};

FR_HD void add_position(const SpreadArgs& g, const Walk& at, const float* taps) {
  float* out = g.out + at.item * g.out_h * g.out_w * g.out_c;
  if (at.y == 0 && at.x == 0) std::memset(out, 0, static_cast<size_t>(g.out_h * g.out_w * g.out_c) * sizeof(float));
  const int64_t top = at.y * g.stride_y - g.pad_y, left = at.x * g.stride_x - g.pad_x;
  const int64_t first = std::max<int64_t>(0, -left), count = (std::min(g.kernel_w, g.out_w - left) - first) * g.out_c;
  const int64_t last_y = std::min(g.kernel_h, g.out_h - top);
  for (int64_t ky = std::max<int64_t>(0, -top); ky < last_y; ++ky)
    add_to(out + ((top + ky) * g.out_w + left + first) * g.out_c, taps + (ky * g.kernel_w + first) * g.out_c, count);
}

// Blocks of kTaps vectors of taps, the rest in one smaller block.
template <int kTaps, int kPositions>
FR_HD void all_products(const SpreadArgs& g, const float* a, float* taps) {
  int64_t t = 0;
  for (; t + kTaps * kLanes <= g.lanes; t += kTaps * kLanes) products<kTaps, kPositions>(g, a, g.weight + t, taps + t);
  const int64_t rest = (g.lanes - t) / kLanes;
  if constexpr (kTaps > 1)
    if (rest == 1) products<1, kPositions>(g, a, g.weight + t, taps + t);
  if constexpr (kTaps > 2)
    if (rest == 2) products<2, kPositions>(g, a, g.weight + t, taps + t);
  if constexpr (kTaps > 3)
    if (rest == 3) products<3, kPositions>(g, a, g.weight + t, taps + t);
}

template <int kTaps>
void spread_range(const SpreadArgs& g, int64_t begin, int64_t end) {
  constexpr int kPositions = positions_for(kTaps);
  alignas(64) float taps[kMaxPositions * kSpreadLanes];
  const int64_t per = g.in_h * g.in_w, stop = end * per;
  Walk at{begin, 0, 0};
  int64_t q = begin * per;
  for (; q + kPositions <= stop; q += kPositions) {
    all_products<kTaps, kPositions>(g, g.a + q * g.in_c, taps);
    for (int p = 0; p < kPositions; ++p, at.next(g)) add_position(g, at, taps + p * g.lanes);
  }
  for (; q < stop; ++q, at.next(g)) {
    all_products<kTaps, 1>(g, g.a + q * g.in_c, taps);
    add_position(g, at, taps);
  }
}

}  // namespace

void spread_cpu(const SpreadArgs& g) {
  using Fn = void (*)(const SpreadArgs&, int64_t, int64_t);
  const int64_t vectors = g.lanes / kLanes;
  Fn f = spread_range<4>;
#if defined(__AVX512F__)
  if (vectors <= 3)
    f = vectors == 1 ? spread_range<1> : vectors == 2 ? spread_range<2> : spread_range<3>;
  else if (vectors % 4 != 0 && vectors % 3 == 0)
    f = spread_range<3>;
#else
  f = vectors == 1 ? spread_range<1> : spread_range<2>;
#endif
  const int64_t work = g.in_h * g.in_w * g.in_c * vectors;
  parallel_for(g.count, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, work)),
               [&](int64_t begin, int64_t end) { f(g, begin, end); });
}

FR_NS_END
