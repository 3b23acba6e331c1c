// Gradients of the backward step and of concretisation. One pass over the rows; the rows of one example are visited in
// order by one thread, so that what they add to its maps needs no locks and does not depend on the threads.
#include <algorithm>
#include <cstring>

#include "bounds/entry_cpu.h"
#include "bounds/line_grads.h"
#include "bounds/serial_cpu.h"
#include "bounds/window.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

// The part of whole maps that is visited.
struct Columns {
  int64_t begin, end;
};

// Calls part(at, map, n) for every vector of a row that lies on the map, and sets the rest of `outs` to zero.
template <class Part>
FR_HD void each_vector(const Rows& r, int64_t row, float* out0, float* out1, const Columns& columns, const Part& part) {
  for (int64_t line = 0; line < lines_of(r); ++line) {
    Segment s = segment_of(r, row, line);
    if (r.corner_y == nullptr) s = {columns.begin, columns.begin, columns.end, columns.end, columns.begin};
    for (float* o : {out0, out1}) {
      if (o == nullptr) continue;
      if (s.begin > s.line_begin)
        std::memset(o + s.line_begin, 0, static_cast<size_t>(s.begin - s.line_begin) * sizeof(float));
      if (s.line_end > s.end) std::memset(o + s.end, 0, static_cast<size_t>(s.line_end - s.end) * sizeof(float));
    }
    int64_t i = s.begin, map = s.map;
    for (; i + kLanes <= s.end; i += kLanes, map += kLanes) part(i, map, kLanes);
    if (i < s.end) part(i, map, static_cast<int>(s.end - i));
  }
}

FR_HD Vec get(const float* p, int n) { return n == kLanes ? load(p) : load_n(p, n); }
FR_HD void put(float* p, Vec v, int n) { n == kLanes ? store(p, v) : store_n(p, v, n); }
FR_HD void add(float* p, Vec v, int n) { put(p, get(p, n) + v, n); }

// A coefficient of one side, with the row that is subtracted.
FR_HD Vec coefficients(const float* a, const float* less, int64_t at, int n) {
  const Vec v = get(a + at, n);
  return less != nullptr ? v - get(less + at, n) : v;
}

constexpr int kTogether = 3;       // rows of one example that share a read of its lines and of their gradients
constexpr int64_t kColumns = 512;  // of which as many stay in the first cache for all rows

// Rows id[0, kN) of one example, one alone if they are windows. kTwo: a slope per side; kApart: a matrix for each side.
template <bool kTwo, int kSides, bool kApart, int kN>
void back_grad_row(const BackGradArgs& g, const int64_t* id, const Columns& columns) {
  const Rows& r = g.rows;
  const int64_t maps = map_size(r), ex = example_of(r, id[0]);
  const float *a[kN], *less[kN];
#pragma GCC unroll 4
  for (int k = 0; k < kN; ++k) {
    a[k] = r.a + source_row(r, id[k]) * r.length;
    less[k] = r.minus != nullptr ? r.a + r.minus[id[k]] * r.length : nullptr;
  }
  const float* s[2] = {g.slopes + ex * maps, nullptr};
  const float* b[2] = {g.intercepts + ex * maps, nullptr};
  s[1] = kTwo ? s[0] + g.examples * maps : s[0];
  b[1] = b[0] + g.examples * maps;
  float* to_s[2] = {g.to_slopes + ex * maps, nullptr};
  float* to_b[2] = {g.to_intercepts + ex * maps, nullptr};
  to_s[1] = kTwo ? to_s[0] + g.examples * maps : to_s[0];
  to_b[1] = to_b[0] + g.examples * maps;
  const int64_t other_from = g.sides_out == 2 ? r.count * r.length : 0;
  float* first = g.to_a + id[0] * r.length;
  each_vector(r, id[0], first, kApart ? first + r.count * r.length : nullptr, columns,
              [&](int64_t at, int64_t map, int n) FR_INLINE_LAMBDA {
                const Vec zero(0.f), sl = get(s[0] + map, n), su = get(s[1] + map, n), bl = get(b[0] + map, n),
                                     bu = get(b[1] + map, n);
                Vec add_s[2] = {zero, zero}, add_b[2] = {zero, zero};
#pragma GCC unroll 4
                for (int i = 0; i < kN; ++i) {
                  Vec out[2] = {zero, zero}, v = zero;
                  const float* from = g.from_out + id[i] * r.length + at;
#pragma GCC unroll 2
                  for (int side = 0; side < kSides; ++side) {
                    const int k = kApart ? side : 0;
                    if (side == k)
                      v = coefficients(a[i] + k * r.side_stride,
                                       less[i] == nullptr ? less[i] : less[i] + k * r.side_stride, at, n);
                    intercept_grad(side, v, Vec(g.from_b[side * r.count + id[i]]), bl, bu, out[k], add_b);
                    if (kTwo || side == k) {
                      const Vec f = get(from + (kTwo ? side : k) * other_from, n);
                      slope_grad<kTwo>(side, v, f, sl, su, out[k], add_s);
                    }
                  }
                  float* to = g.to_a + id[i] * r.length + at;
                  put(to, out[0], n);
                  if (kApart) put(to + r.count * r.length, out[1], n);
                }
                add(to_s[0] + map, add_s[0], n);
                if (kTwo) add(to_s[1] + map, add_s[1], n);
                add(to_b[0] + map, add_b[0], n);
                add(to_b[1] + map, add_b[1], n);
              });
}

template <bool kTwo, int kSides, bool kApart>
void back_grad_some(const BackGradArgs& g, const int64_t* id, int64_t count) {
  const bool windows = g.rows.corner_y != nullptr;
  const int64_t step = windows ? std::max<int64_t>(1, g.rows.length) : kColumns;
  for (int64_t at = 0; at < g.rows.length; at += step) {
    const Columns columns{at, std::min(g.rows.length, at + step)};
    int64_t k = 0;
    for (; k + kTogether <= count && !windows; k += kTogether)
      back_grad_row<kTwo, kSides, kApart, kTogether>(g, id + k, columns);
    for (; k < count; ++k) back_grad_row<kTwo, kSides, kApart, 1>(g, id + k, columns);
  }
}

template <int kSides, bool kApart>
void concretize_grad_row(const ConcretizeGradArgs& g, int64_t row) {
  const Rows& r = g.rows;
  const int64_t base = example_of(r, row) * map_size(r);
  const float* a = r.a + source_row(r, row) * r.length;
  const float* less = r.minus != nullptr ? r.a + r.minus[row] * r.length : nullptr;
  float* out0 = g.to_a + row * r.length;
  float* out1 = kApart ? out0 + r.count * r.length : nullptr;
  each_vector(r, row, out0, out1, {0, r.length}, [&](int64_t at, int64_t map, int n) FR_INLINE_LAMBDA {
    const Vec zero(0.f), c = get(g.center + base + map, n), reach = get(g.radius + base + map, n);
    Vec add_c = zero, add_r = zero, out[2] = {zero, zero}, v = zero;
#pragma GCC unroll 2
    for (int side = 0; side < kSides; ++side) {
      const int k = kApart ? side : 0;
      if (side == k) v = coefficients(a + k * r.side_stride, less == nullptr ? less : less + k * r.side_stride, at, n);
      extreme_grad(side, v, Vec(g.from[side * r.count + row]), c, reach, out[k], add_c, add_r);
    }
    put(out0 + at, out[0], n);
    if (kApart) put(out1 + at, out[1], n);
    if (g.to_center != nullptr) add(g.to_center + base + map, add_c, n);
    if (g.to_radius != nullptr) add(g.to_radius + base + map, add_r, n);
  });
}

// Calls some(g, rows, count) for pieces of the rows of each example.
template <class Args, class F>
void by_example(const Args& g, const F& some) {
  const int64_t mean = g.rows.count * g.rows.length / std::max<int64_t>(1, g.examples);
  parallel_for(g.examples, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, mean)), [&](int64_t begin, int64_t end) {
    constexpr int64_t kPiece = 16 * kTogether;
    int64_t id[kPiece];
    for (int64_t example = begin; example < end; ++example)
      for (int64_t i = g.starts[example]; i < g.starts[example + 1]; i += kPiece) {
        const int64_t n = std::min(kPiece, g.starts[example + 1] - i);
        for (int64_t k = 0; k < n; ++k) id[k] = g.order != nullptr ? g.order[i + k] : i + k;
        some(g, id, n);
      }
  });
}

using BackSome = void (*)(const BackGradArgs&, const int64_t*, int64_t);
template <bool kTwo>
BackSome pick_sides(const Rows& r) {
  if (r.sides == 1) return r.side_stride != 0 ? back_grad_some<kTwo, 1, true> : back_grad_some<kTwo, 1, false>;
  return r.side_stride != 0 ? back_grad_some<kTwo, 2, true> : back_grad_some<kTwo, 2, false>;
}
BackSome pick_back(const BackGradArgs& g) {
  return g.slope_sides == 2 ? pick_sides<true>(g.rows) : pick_sides<false>(g.rows);
}
using EndRow = void (*)(const ConcretizeGradArgs&, int64_t);
EndRow pick_end(const Rows& r) {
  if (r.sides == 1) return r.side_stride != 0 ? concretize_grad_row<1, true> : concretize_grad_row<1, false>;
  return r.side_stride != 0 ? concretize_grad_row<2, true> : concretize_grad_row<2, false>;
}

}  // namespace

void back_grad_rows(const BackGradArgs& g, const int64_t* rows, int64_t count) { pick_back(g)(g, rows, count); }

void concretize_grad_rows(const ConcretizeGradArgs& g, int64_t begin, int64_t end) {
  const EndRow f = pick_end(g.rows);
  for (int64_t row = begin; row < end; ++row) f(g, row);
}

void back_grad_cpu(const BackGradArgs& g) { by_example(g, pick_back(g)); }

void concretize_grad_cpu(const ConcretizeGradArgs& g) {
  by_example(g, [](const ConcretizeGradArgs& args, const int64_t* rows, int64_t count) {
    const EndRow f = pick_end(args.rows);
    for (int64_t k = 0; k < count; ++k) f(args, rows[k]);
  });
}

void pick_grad_cpu(const PickGradArgs& g) {
  constexpr int64_t kColumns = 16 * kLanes;  // of one task: the sums stay in the first cache
  parallel_for((g.length + kColumns - 1) / kColumns, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kColumns, end = std::min(g.length, last * kColumns);
    for (int64_t row = 0; row < g.rows; ++row)
      std::memset(g.out + row * g.length + begin, 0, static_cast<size_t>(end - begin) * sizeof(float));
    for (int64_t at = begin; at < end; at += kColumns)
      for (int64_t i = 0; i < g.count; ++i) {
        const float* from = g.from + i * g.length;
        float* plus = g.out + g.pick[i] * g.length;
        float* minus = g.minus != nullptr ? g.out + g.minus[i] * g.length : nullptr;
        for (int64_t k = at; k < std::min(end, at + kColumns); k += kLanes) {
          const int n = static_cast<int>(std::min<int64_t>(kLanes, end - k));
          const Vec v = get(from + k, n);
          add(plus + k, v, n);
          if (minus != nullptr) add(minus + k, -v, n);
        }
      }
  });
}

FR_NS_END
