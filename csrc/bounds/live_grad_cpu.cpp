// Gradients of rows that go through a ReLU and a dense layer, without the neurons that have no lines: a neuron's row of
// the weight meets the few rows of an example in the first cache, for both gradients at once, and what the rows have of
// a block of neurons goes on to lines and coefficients from there. One thread has a neuron for all examples, in order.
#include <algorithm>

#include "bounds/entry_cpu.h"
#include "bounds/fma.h"
#include "bounds/line_grads.h"
#include "bounds/live_cpu.h"
#include "bounds/neurons_cpu.h"
#include "bounds/parts.h"
#include "bounds/window.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int kRows = kNeuronRows;      // at a time
constexpr int64_t kBlock = 4 * kLanes;  // neurons of one task
constexpr int64_t kColumns =
    28 * kLanes;  // at a time: the rows', the weight's and its gradient's stay in the first cache

// Rows of one example and what they have of the neurons of a block, side by side: rows of scaled lie a power of two
// apart.
struct Some {
  const float* from[kRows];
  float scaled[kRows][kBlock], to_scaled[kRows][kBlock];
};

// to_scaled[neuron] += from . weight, to_weight += scaled[neuron] * from in the columns [begin, end); the next neuron's
// are fetched meanwhile.
template <int kR>
void neuron_rows(Some& s, int64_t neuron, int64_t begin, int64_t end, const float* weight, float* to_weight,
                 int64_t next) {
  constexpr int kGroups = (kR + 3) / 4 * 4;
  Vec total[kGroups];
#pragma GCC unroll 12
  for (int r = 0; r < kGroups; ++r) total[r] = Vec(0.f);
  const int64_t whole = begin + (end - begin) / kLanes * kLanes;
#pragma GCC unroll 4
  for (int part = 0; part < kParts; ++part) {
    Part sum[kR], factor[kR];
    const float* from[kR];
#pragma GCC unroll 9
    for (int r = 0; r < kR; ++r) sum[r] = Part(0.f), factor[r] = Part(s.scaled[r][neuron]), from[r] = s.from[r];
    const auto one = [&](int64_t at, const auto& get, const auto& put) FR_INLINE_LAMBDA {
      const auto row = [&](int r) FR_INLINE_LAMBDA { return get(from[r] + at); };
      put(to_weight + at, both_products(get(weight + at), get(to_weight + at), factor, row, sum));
    };
    for (int64_t at = begin; at < whole; at += kLanes) {
      if (part == 0) {
        __builtin_prefetch(weight + next + at);
        __builtin_prefetch(to_weight + next + at, 1);
      }
      one(
          at + part * kPartLanes, [](const float* p) FR_INLINE_LAMBDA { return load_part(p); },
          [](float* p, Part v) FR_INLINE_LAMBDA { store_part(p, v); });
    }
    if (whole < end) {
      const int rest = static_cast<int>(end - whole);
      one(
          whole, [rest, part](const float* p) FR_INLINE_LAMBDA { return part_of(load_n(p, rest), part); },
          [rest, part](float* p, Part v) FR_INLINE_LAMBDA {
            Vec all = load_n(p, rest);
            set_part(all, part, v);
            store_n(p, all, rest);
          });
    }
#pragma GCC unroll 9
    for (int r = 0; r < kR; ++r) set_part(total[r], part, sum[r]);
  }
  float dots[kGroups];
#pragma GCC unroll 3
  for (int r = 0; r < kGroups; r += 4) four_sums(total[r], total[r + 1], total[r + 2], total[r + 3], dots + r);
  for (int r = 0; r < kR; ++r) s.to_scaled[r][neuron] += dots[r];
}

using RowsFn = void (*)(Some&, int64_t, int64_t, int64_t, const float*, float*, int64_t);
template <int kR = kRows>
RowsFn pick(int64_t rows) {
  if constexpr (kR > 1)
    if (rows < kR) return pick<kR - 1>(rows);
  return neuron_rows<kR>;
}

FR_HD Vec get(const float* p, int n) { return n == kLanes ? load(p) : load_n(p, n); }
FR_HD void put(float* p, Vec v, int n) { n == kLanes ? store(p, v) : store_n(p, v, n); }

// The neurons [first, last), and gradients of their lines in one example.
struct Block {
  int64_t first, last;
  float slopes[2][kBlock], intercepts[2][kBlock];
};

// Coefficients of `row` in the matrix of `side`, from `at` on.
FR_HD Vec coefficients(const Rows& r, int side, int64_t row, int64_t at, int n) {
  const float* a = r.a + side * r.side_stride + at;
  const Vec v = get(a + source_row(r, row) * r.length, n);
  return r.minus != nullptr ? v - get(a + r.minus[row] * r.length, n) : v;
}

void scale(const LiveGradArgs& g, const LineMaps& map, const Block& b, int side, int64_t row, float* to) {
  for (int64_t c = b.first; c < b.last; c += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, b.last - c));
    const Vec v = coefficients(g.rows, side, row, c, n), low = get(map.slope_low + c, n), up = get(map.slope_up + c, n);
    store(to + c - b.first, v * (side == 0 ? by_sign(v, low, up) : by_sign(v, up, low)));
  }
}

// What comes after `to_scaled` of a row and a side.
template <bool kTwo>
void pass_on(const LiveGradArgs& g, const LineMaps& map, Block& b, int side, int64_t row, const float* to_scaled) {
  const Rows& r = g.rows;
  const int last_side = !kTwo && r.side_stride == 0 ? r.sides - 1 : side;  // one matrix serves both
  for (int64_t c = b.first; c < b.last; c += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, b.last - c));
    const int64_t at = c - b.first;
    const Vec v = coefficients(r, side, row, c, n), zero(0.f);
    Vec to_v = zero, to_s[2] = {zero, zero}, to_b[2] = {zero, zero};
    slope_grad<kTwo>(side, v, load(to_scaled + at), get(map.slope_low + c, n), get(map.slope_up + c, n), to_v, to_s);
    for (int k = side; k <= last_side; ++k)
      intercept_grad(k, v, Vec(g.from_b[k * r.count + row]), get(map.low + c, n), get(map.up + c, n), to_v, to_b);
    for (int k = 0; k < 2; ++k) {
      store(b.slopes[k] + at, load(b.slopes[k] + at) + to_s[k]);
      store(b.intercepts[k] + at, load(b.intercepts[k] + at) + to_b[k]);
    }
    if (g.picked == 0) {
      put(g.to_a + (side * r.count + row) * r.length + c, to_v, n);
      continue;
    }
    float* to = g.to_a + r.pick[row] * r.length + c;
    put(to, get(to, n) + to_v, n);
    if (r.minus == nullptr) continue;
    to = g.to_a + r.minus[row] * r.length + c;
    put(to, get(to, n) - to_v, n);
  }
}

void example_block(const LiveGradArgs& g, int64_t example, Block& b) {
  const ChainStep& s = g.step;
  const int64_t n = s.out_height * s.out_width * s.out_channels, begin = g.starts[example];
  const int64_t rows = g.starts[example + 1] - begin, items = rows * g.matrices;
  const LineMaps map(s, g.examples, example);
  int32_t list[kBlock + kLanes];
  int64_t count = 0;
  for (int64_t c = b.first; c < b.last; c += kLanes) {
    const uint32_t live = living(map, c, static_cast<int>(std::min<int64_t>(kLanes, b.last - c)));
    append(live, list + count, static_cast<int32_t>(c - b.first));
    count += __builtin_popcount(live);
  }
  for (int k = 0; k < 2; ++k) std::fill_n(b.slopes[k], kBlock, 0.f), std::fill_n(b.intercepts[k], kBlock, 0.f);
  for (int64_t item = 0; item < items;) {
    const int64_t some_rows = std::min<int64_t>(kRows, items - item);
    Some some;
    int64_t row[kRows];
    int side[kRows];
    for (int64_t k = 0; k < some_rows; ++k) {
      const int64_t at = begin + (item + k) % rows;
      row[k] = g.order != nullptr ? g.order[at] : at, side[k] = static_cast<int>((item + k) / rows);
      some.from[k] = g.from + (side[k] * g.rows.count + row[k]) * n;
      scale(g, map, b, side[k], row[k], some.scaled[k]);
      std::fill_n(some.to_scaled[k], kBlock, 0.f);
    }
    const RowsFn f = pick(some_rows);
    for (int64_t column = 0; column < n; column += kColumns)
      for (int64_t k = 0; k < count; ++k) {
        const int64_t neuron = list[k], next = k + 1 < count ? list[k + 1] - neuron : 0, at = (b.first + neuron) * n;
        f(some, neuron, column, std::min(n, column + kColumns), s.weight + at, g.to_weight + at, next * n);
      }
    for (int64_t k = 0; k < some_rows; ++k)
      (s.slope_sides == 2 ? pass_on<true> : pass_on<false>)(g, map, b, side[k], row[k], some.to_scaled[k]);
    item += some_rows;
  }
  const int64_t to = example * s.channels + b.first, all = g.examples * s.channels;
  for (int k = 0; k < 2; ++k) {
    if (k < s.slope_sides) std::copy_n(b.slopes[k], b.last - b.first, g.to_slopes + k * all + to);
    std::copy_n(b.intercepts[k], b.last - b.first, g.to_intercepts + k * all + to);
  }
}

}  // namespace

void live_grad_cpu(const LiveGradArgs& g) {
  const int64_t neurons = g.step.channels, n = g.step.out_height * g.step.out_width * g.step.out_channels;
  parallel_for((neurons + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      Block b;
      b.first = block * kBlock, b.last = std::min(neurons, b.first + kBlock);
      std::fill(g.to_weight + b.first * n, g.to_weight + b.last * n, 0.f);
      for (int64_t row = 0; row < g.picked; ++row) std::fill_n(g.to_a + row * neurons + b.first, b.last - b.first, 0.f);
      for (int64_t example = 0; example < g.examples; ++example) example_block(g, example, b);
    }
  });
}

FR_NS_END
