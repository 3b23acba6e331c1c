// Gradients of the two products of an interval layer, W c and |W| r: tiles of both in registers, one read of W. Each
// number has its own sums, in an order that depends on nothing else.
#include <algorithm>

#include "bounds/entry_cpu.h"
#include "bounds/fma.h"
#include "core/floats.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 6, kVectors = 2;
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int kRows = 6, kVectors = 1;
#else
constexpr int kRows = 2, kVectors = 1;
#endif
constexpr int64_t kPanel = int64_t{kVectors} * kLanes;

// At most n numbers; kFull: n is known to be large enough.
template <bool kFull = false>
FR_HD Vec get(const float* p, int64_t n) {
  return kFull || n >= kLanes ? load(p) : load_n(p, static_cast<int>(std::max<int64_t>(0, n)));
}
FR_HD void put(float* p, Vec v, int64_t n) { n >= kLanes ? store(p, v) : store_n(p, v, static_cast<int>(n)); }

// The gradients of centre and radius turned, kRows neurons side by side: neurons of one example lie a power of two
// apart.
struct Turned {
  Floats center, radius;  // [m / kRows, rounded up][batch][kRows]

  static void turn(const float* from, int64_t batch, int64_t m, int64_t first, int64_t last, float* to) {
    for (int64_t tile = first; tile < last; ++tile)
      for (int64_t k = 0; k < batch; ++k)
        for (int r = 0; r < kRows; ++r) {
          const int64_t j = tile * kRows + r;
          to[(tile * batch + k) * kRows + r] = j < m ? from[k * m + j] : 0.f;
        }
  }
  explicit Turned(const IntervalGradArgs& g) {
    const int64_t tiles = (g.m + kRows - 1) / kRows;
    center = Floats(tiles * kRows * g.batch);
    radius = Floats(tiles * kRows * g.radius_batch);
    parallel_for(tiles, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, g.batch * kRows)),
                 [&](int64_t first, int64_t last) {
                   turn(g.from_center, g.batch, g.m, first, last, center.get());
                   turn(g.from_radius, g.radius_batch, g.m, first, last, radius.get());
                 });
  }
};

// a[row][k] * b[k][column], k < count, for kR rows and a panel of `width` columns; v(k, column vector) gives b.
// a(row, k) at a[row * row_step + k * step].
template <int kR, class Get>
FR_HD void product(const float* a, int64_t row_step, int64_t step, int64_t count, const Get& b,
                   Vec (&sum)[kR][kVectors]) {
#pragma GCC unroll 6
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec(0.f);
  for (int64_t k = 0; k < count; ++k) {
    Vec col[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) col[v] = b(k, v);
#pragma GCC unroll 6
    for (int r = 0; r < kR; ++r) {
      const Vec x(a[r * row_step + k * step]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fmadd(x, col[v], sum[r][v]);
    }
  }
}

// Rows [j, j + kRows) of the weight's gradient in the columns [at, at + width).
template <bool kFull>
void weight_tile(const IntervalGradArgs& g, const Turned& turned, int64_t j, int64_t at, int64_t width) {
  Vec mid[kRows][kVectors], reach[kRows][kVectors];
  const auto from = [&](const float* x) {
    return [&g, x, at, width](int64_t k, int v)
               FR_INLINE_LAMBDA { return get<kFull>(x + k * g.n + at + v * kLanes, width - v * kLanes); };
  };
  product<kRows>(turned.center.get() + j * g.batch, 1, kRows, g.batch, from(g.center), mid);
  product<kRows>(turned.radius.get() + j * g.radius_batch, 1, kRows, g.radius_batch, from(g.radius), reach);
  for (int r = 0; r < kRows && j + r < g.m; ++r)
    for (int v = 0; v < kVectors && v * kLanes < width; ++v) {
      const int64_t to = (j + r) * g.n + at + v * kLanes, n = width - v * kLanes;
      const Vec zero(0.f), w = get(g.weight + to, n), s = reach[r][v];
      const Vec turned = select(w > zero, s, select(w < zero, -s, zero));
      put(g.to_weight + to, get(g.to_weight + to, n) + mid[r][v] + turned, n);
    }
}

// Rows [i, i + kR) of the gradient of centre or radius.
template <int kR, bool kAbsolute, bool kFull>
void input_tile(const IntervalGradArgs& g, const float* a, float* to, int64_t i, int64_t at, int64_t width) {
  Vec sum[kR][kVectors];
  product<kR>(
      a + i * g.m, g.m, 1, g.m,
      [&](int64_t k, int v) FR_INLINE_LAMBDA {
        const Vec w = get<kFull>(g.weight + k * g.n + at + v * kLanes, width - v * kLanes);
        return kAbsolute ? vabs(w) : w;
      },
      sum);
  for (int r = 0; r < kR; ++r)
    for (int v = 0; v < kVectors && v * kLanes < width; ++v)
      put(to + (i + r) * g.n + at + v * kLanes, sum[r][v], width - v * kLanes);
}

template <bool kAbsolute, bool kFull>
void inputs(const IntervalGradArgs& g, const float* a, float* to, int64_t batch, int64_t at, int64_t width) {
  if (to == nullptr) return;
  int64_t i = 0;
  for (; i + kRows <= batch; i += kRows) input_tile<kRows, kAbsolute, kFull>(g, a, to, i, at, width);
  for (; i < batch; ++i) input_tile<1, kAbsolute, kFull>(g, a, to, i, at, width);
}

template <bool kFull>
void panel(const IntervalGradArgs& g, const Turned& turned, int64_t at, int64_t width) {
  for (int64_t j = 0; j < g.m; j += kRows) weight_tile<kFull>(g, turned, j, at, width);
  inputs<false, kFull>(g, g.from_center, g.to_center, g.batch, at, width);
  inputs<true, kFull>(g, g.from_radius, g.to_radius, g.radius_batch, at, width);
}

}  // namespace

void interval_grad_cpu(const IntervalGradArgs& g) {
  const Turned turned(g);
  parallel_for((g.n + kPanel - 1) / kPanel, 1, [&](int64_t first, int64_t last) {
    for (int64_t at = first * kPanel; at < std::min(g.n, last * kPanel); at += kPanel)
      at + kPanel <= g.n ? panel<true>(g, turned, at, kPanel) : panel<false>(g, turned, at, g.n - at);
  });
}

FR_NS_END
