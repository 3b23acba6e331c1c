// Interval products with one read of W, and the elementwise passes around them.
#include <algorithm>

#include "bounds/entry_cpu.h"
#include "bounds/fma.h"
#include "bounds/formulas.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

// kOut rows of W times kBatch examples: each product W c and |W| r has its own accumulator, so that a result does not
// depend on what else is in the tile. kMid, kReach: which of the two are computed; without kReach |W| r is given.
template <int kOut, int kBatch, bool kMid, bool kReach>
FR_HD void products(const IntervalArgs& g, int64_t j, int64_t i, float (&mids)[kOut][kBatch],
                    float (&reaches)[kOut][kBatch]) {
  Vec mid[kOut][kBatch], reach[kOut][kBatch];
#pragma GCC unroll 4
  for (int o = 0; o < kOut; ++o)
#pragma GCC unroll 6
    for (int b = 0; b < kBatch; ++b) mid[o][b] = reach[o][b] = Vec(0.f);
  const float* w = g.weight + j * g.n;
  const float* c = g.center + i * g.n;
  const float* r = g.shared ? g.radius : g.radius + i * g.n;
  const auto one = [&](int64_t k, auto get) FR_INLINE_LAMBDA {
    Vec wk[kOut], ak[kOut];
#pragma GCC unroll 4
    for (int o = 0; o < kOut; ++o) wk[o] = get(w + o * g.n + k), ak[o] = vabs(wk[o]);
#pragma GCC unroll 6
    for (int b = 0; b < kBatch; ++b) {
      const Vec cv = kMid ? get(c + b * g.n + k) : Vec(0.f), rv = kReach ? get(r + b * g.n + k) : Vec(0.f);
#pragma GCC unroll 4
      for (int o = 0; o < kOut; ++o) {
        if (kMid) mid[o][b] = fmadd(wk[o], cv, mid[o][b]);
        if (kReach) reach[o][b] = fmadd(ak[o], rv, reach[o][b]);
      }
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= g.n; k += kLanes) one(k, [](const float* p) FR_INLINE_LAMBDA { return load(p); });
  if (k < g.n) {
    const int rest = static_cast<int>(g.n - k);
    one(k, [rest](const float* p) FR_INLINE_LAMBDA { return load_n(p, rest); });
  }
#pragma GCC unroll 4
  for (int o = 0; o < kOut; ++o)
#pragma GCC unroll 6
    for (int b = 0; b < kBatch; ++b) {
      if (kMid) mids[o][b] = lane_sum(mid[o][b]);
      if (kReach) reaches[o][b] = lane_sum(reach[o][b]);
    }
}

// `given`: |W| r of the kOut rows where the radius is the same for every example.
template <int kOut, int kBatch, bool kShared>
void tile(const IntervalArgs& g, int64_t j, int64_t i, const float* given) {
  float mid[kOut][kBatch], reach[kOut][kBatch];
  products<kOut, kBatch, true, !kShared>(g, j, i, mid, reach);
  for (int o = 0; o < kOut; ++o)
    for (int b = 0; b < kBatch; ++b) {
      float x = mid[o][b] + (g.bias != nullptr ? g.bias[j + o] : 0.f), y = kShared ? given[o] : reach[o][b];
      if (g.finish == Finish::ends) from_center(x, y);
      if (g.finish == Finish::relu_center) relu_center(x, y);
      g.out_a[(i + b) * g.m + j + o] = x;
      g.out_b[(i + b) * g.m + j + o] = y;
    }
}

#if defined(__AVX512F__)
constexpr int kTileOut = 3, kTileBatch = 4, kTileShared = 6;
#else
constexpr int kTileOut = 1, kTileBatch = 2, kTileShared = 4;
#endif

template <int kOut, bool kShared>
void strip(const IntervalArgs& g, int64_t j, int64_t begin, int64_t end) {
  constexpr int kBatch = kShared ? kTileShared : kTileBatch;
  float given[kOut] = {};
  if (kShared) {
    float none[kOut][1], reach[kOut][1];
    products<kOut, 1, false, true>(g, j, 0, none, reach);
    for (int o = 0; o < kOut; ++o) given[o] = reach[o][0];
  }
  int64_t i = begin;
  for (; i + kBatch <= end; i += kBatch) tile<kOut, kBatch, kShared>(g, j, i, given);
  for (; i < end; ++i) tile<kOut, 1, kShared>(g, j, i, given);
}

template <bool kShared>
void strips(const IntervalArgs& g, int64_t group, int64_t first, int64_t last) {
  for (int64_t begin = 0; begin < g.batch; begin += group) {
    const int64_t end = std::min(g.batch, begin + group);
    for (int64_t s = first; s < last; ++s) {
      int64_t j = s * kTileOut;
      if (j + kTileOut <= g.m)
        strip<kTileOut, kShared>(g, j, begin, end);
      else
        for (; j < g.m; ++j) strip<1, kShared>(g, j, begin, end);
    }
  }
}

}  // namespace

void interval_cpu(const IntervalArgs& g) {
  if (g.batch * g.m == 0) return;
  // as many examples as stay in a core's second cache
  constexpr int64_t kMultiple = kTileBatch * kTileShared;
  const int64_t group =
      std::max<int64_t>(kMultiple, (int64_t{600} << 10) / (8 * std::max<int64_t>(1, g.n)) / kMultiple * kMultiple);
  const int64_t count = (g.m + kTileOut - 1) / kTileOut;
  const int64_t grain = std::max<int64_t>(1, 32768 / (std::max<int64_t>(1, g.n) * kTileOut * std::min(group, g.batch)));
  parallel_for(count, grain, [&](int64_t first, int64_t last) {
    if (g.shared)
      strips<true>(g, group, first, last);
    else
      strips<false>(g, group, first, last);
  });
}

void interval_step_cpu(const IntervalStepArgs& g) {
  parallel_for(g.count, 16384, [&](int64_t begin, int64_t end) {
    const bool each = g.b != nullptr;
    const Vec all(g.eps_value);
    for (int64_t i = begin; i < end; i += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, end - i));
      const auto get = [n](const float* p) FR_INLINE_LAMBDA { return n == kLanes ? load(p) : load_n(p, n); };
      const auto put = [n](float* p, Vec v) FR_INLINE_LAMBDA { n == kLanes ? store(p, v) : store_n(p, v, n); };
      Vec a = get(g.a + i), b = each ? get(g.b + i) : all;
      interval_step(g, a, b);
      put(g.out_a + i, a);
      put(g.out_b + i, b);
    }
  });
}

FR_NS_END
