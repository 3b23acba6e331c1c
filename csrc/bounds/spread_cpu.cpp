// The adjoint of a convolution: for a few positions at a time the products with every tap, from registers, which are
// then added where they belong. Positions are independent, so a result does not depend on what else is computed.
#include <algorithm>
#include <cstring>

#include "bounds/entry_cpu.h"
#include "bounds/serial_cpu.h"
#include "bounds/taps.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kTarget = 6144;  // taps that stay in the first cache

typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));

FR_HD void add_quad(float* o, const float* v) {
  *reinterpret_cast<Quad*>(o) = *reinterpret_cast<const Quad*>(o) + *reinterpret_cast<const Quad*>(v);
}

FR_HD void add_to(float* FR_RESTRICT o, const float* FR_RESTRICT v, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(o + i, load(o + i) + load(v + i));
  for (; i + 4 <= n; i += 4) add_quad(o + i, v + i);
  for (; i < n; ++i) o[i] += v[i];
}

// Where the taps of one row of positions go: the examples' images, or windows of them, start at `origin`.
struct Place {
  float* out;                    // of the example
  int64_t top, first_y, last_y;  // of the taps that lie on it
  int64_t left;                  // of position 0
};

#if defined(__AVX512F__)
// 4 x 4 taps of one number of four positions that lie side by side on the output, without overlap: line by line.
FR_HD void add_quads(const SpreadArgs& g, const Place& at, int64_t left, const float* t, int64_t apart) {
  const __m512 a = load(t).v, b = load(t + apart).v, c = load(t + 2 * apart).v, d = load(t + 3 * apart).v;
  const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44), cd = _mm512_shuffle_f32x4(c, d, 0x44);  // lines 0 and 1
  const __m512 AB = _mm512_shuffle_f32x4(a, b, 0xEE), CD = _mm512_shuffle_f32x4(c, d, 0xEE);
  const Vec line[4] = {_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD),
                       _mm512_shuffle_f32x4(AB, CD, 0x88), _mm512_shuffle_f32x4(AB, CD, 0xDD)};
#pragma GCC unroll 4
  for (int ky = 0; ky < 4; ++ky) {
    if (ky < at.first_y || ky >= at.last_y) continue;
    float* o = at.out + (at.top + ky) * g.out_w + left;
    store(o, load(o) + line[ky]);
  }
}
#endif

// One line of taps of every position. Neighbours overlap, so they are visited in turns in which they do not: a load
// would otherwise wait for the stores before it. The order is the same for every row of positions of this geometry.
template <bool kQuad>
void add_lines(const SpreadArgs& g, const Place& at, const float* taps) {
  const int64_t turns = (g.kernel_w + g.stride_x - 1) / g.stride_x, line = g.kernel_w * g.out_c;
  for (int64_t turn = 0; turn < turns; ++turn)
    for (int64_t x = turn; x < g.in_w; x += turns) {
      const int64_t left = at.left + x * g.stride_x;
      const float* t = taps + x * g.lanes;
#if defined(__AVX512F__)
      if (kQuad && g.kernel_h == 4 && turns * g.stride_x == 4 && g.kernel_w == 4 && left >= 0 && left + 16 <= g.out_w &&
          x + 3 * turns < g.in_w) {
        add_quads(g, at, left, t, turns * g.lanes);
        x += 3 * turns;
        continue;
      }
#endif
      if (left >= 0 && left + g.kernel_w <= g.out_w) {
        for (int64_t ky = at.first_y; ky < at.last_y; ++ky) {
          float* o = at.out + ((at.top + ky) * g.out_w + left) * g.out_c;
          if constexpr (kQuad)
            add_quad(o, t + ky * 4);
          else
            add_to(o, t + ky * line, line);
        }
        continue;
      }
      const int64_t first = std::max<int64_t>(0, -left);
      const int64_t count = (std::min(g.kernel_w, g.out_w - left) - first) * g.out_c;
      for (int64_t ky = at.first_y; ky < at.last_y; ++ky)
        add_to(at.out + ((at.top + ky) * g.out_w + left + first) * g.out_c, t + ky * line + first * g.out_c, count);
    }
}

// The taps of one row of positions, `row` counted over all examples.
FR_HD void add_row(const SpreadArgs& g, int64_t row, const float* taps) {
  const int64_t item = row / g.in_h, y = row % g.in_h, size = g.out_h * g.out_w * g.out_c;
  float* out = g.out + item * size;
  if (y == 0) std::memset(out, 0, static_cast<size_t>(size) * sizeof(float));
  Place at{out, y * g.stride_y - g.pad_y, 0, 0, -g.pad_x};
  if (g.origin_y != nullptr) {
    at.top += g.origin_y[item % g.origins];
    at.left += g.origin_x[item % g.origins];
  }
  at.first_y = std::max<int64_t>(0, -at.top);
  at.last_y = std::min(g.kernel_h, g.out_h - at.top);
  if (g.kernel_w * g.out_c == 4)
    add_lines<true>(g, at, taps);
  else
    add_lines<false>(g, at, taps);
}

template <int kTaps>
void spread_range(const SpreadArgs& g, int64_t begin, int64_t end) {
  constexpr int kPositions = positions_for(kTaps);
  alignas(64) float taps[kSpreadBuffer];
  const int64_t stop = end * g.in_h * g.in_w;
  const int64_t target = std::max<int64_t>(1, kTarget / (g.in_w * g.lanes)) * g.in_w;  // whole rows of positions
  int64_t base = begin * g.in_h * g.in_w, filled = 0;                                  // taps of [base, base + filled)
  while (base < stop) {
    const int64_t wanted = std::min(target, stop - base);
    while (filled < wanted) {
      const float* a = g.a + (base + filled) * g.in_c;
      if (base + filled + kPositions <= stop) {
        all_products<kTaps, kPositions>(g.in_c, g.in_c, g.lanes, a, g.weight, taps + filled * g.lanes);
        filled += kPositions;
      } else {
        all_products<kTaps, 1>(g.in_c, g.in_c, g.lanes, a, g.weight, taps + filled * g.lanes);
        ++filled;
      }
    }
    const int64_t rows = filled / g.in_w, used = rows * g.in_w;
    for (int64_t row = 0; row < rows; ++row) add_row(g, base / g.in_w + row, taps + row * g.in_w * g.lanes);
    std::memmove(taps, taps + used * g.lanes, static_cast<size_t>((filled - used) * g.lanes) * sizeof(float));
    base += used;
    filled -= used;
  }
}

}  // namespace

void spread_items(const SpreadArgs& g, int64_t begin, int64_t end) {
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
  f(g, begin, end);
}

void spread_cpu(const SpreadArgs& g) {
  const int64_t work = g.in_h * g.in_w * g.in_c * g.lanes / kLanes;
  parallel_for(g.count, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, work)),
               [&](int64_t begin, int64_t end) { spread_items(g, begin, end); });
}

FR_NS_END
