// Gradients of the product of rows with the weight of a dense layer, without the neurons that have no lines: a neuron's
// row of the weight meets the few rows of an example in the first cache, for both gradients at once. One thread has a
// neuron for all examples, in order.
#include <algorithm>

#include "bounds/entry_cpu.h"
#include "bounds/fma.h"
#include "bounds/live_cpu.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 9;  // at a time
#else
constexpr int kRows = 3;
#endif
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
  Vec sum[kR], factor[kR];
  const float* from[kR];
#pragma GCC unroll 9
  for (int r = 0; r < kR; ++r) sum[r] = Vec(0.f), factor[r] = Vec(s.scaled[r][neuron]), from[r] = s.from[r];
  const auto one = [&](int64_t at, const auto& get, const auto& put) FR_INLINE_LAMBDA {
    __builtin_prefetch(weight + next + at);
    __builtin_prefetch(to_weight + next + at, 1);
    const Vec w = get(weight + at);
    Vec even = get(to_weight + at), odd(0.f);
#pragma GCC unroll 9
    for (int r = 0; r < kR; ++r) {
      Vec x = get(from[r] + at);
#if defined(__AVX512F__)
      asm("" : "+v"(x.v));  // one load for both products: loads are what this loop is short of
#endif
      sum[r] = fmadd(w, x, sum[r]);
      if (r % 2 == 0)
        even = fmadd(factor[r], x, even);
      else
        odd = fmadd(factor[r], x, odd);
    }
    put(to_weight + at, even + odd);
  };
  int64_t at = begin;
  for (; at + kLanes <= end; at += kLanes)
    one(
        at, [](const float* p) FR_INLINE_LAMBDA { return load(p); },
        [](float* p, Vec v) FR_INLINE_LAMBDA { store(p, v); });
  if (at < end) {
    const int rest = static_cast<int>(end - at);
    one(
        at, [rest](const float* p) FR_INLINE_LAMBDA { return load_n(p, rest); },
        [rest](float* p, Vec v) FR_INLINE_LAMBDA { store_n(p, v, rest); });
  }
#pragma GCC unroll 9
  for (int r = 0; r < kR; ++r) s.to_scaled[r][neuron] += lane_sum(sum[r]);
}

using RowsFn = void (*)(Some&, int64_t, int64_t, int64_t, const float*, float*, int64_t);
template <int kR = kRows>
RowsFn pick(int64_t rows) {
  if constexpr (kR > 1)
    if (rows < kR) return pick<kR - 1>(rows);
  return neuron_rows<kR>;
}

// The neurons [first, last) for one example.
void example_block(const LiveGradArgs& g, int64_t example, int64_t first, int64_t last) {
  const ChainStep& s = g.step;
  const int64_t n = s.out_height * s.out_width * s.out_channels, begin = g.starts[example];
  const int64_t rows = g.starts[example + 1] - begin, items = rows * g.matrices;
  const LineMaps map(s, g.examples, example);
  const Vec zero(0.f);
  int32_t list[kBlock];
  int64_t living = 0;
  for (int64_t c = first; c < last; c += kLanes) {
    const int width = static_cast<int>(std::min<int64_t>(kLanes, last - c));
    const auto none = [&](const float* p) FR_INLINE_LAMBDA { return load_n(p + c, width) == zero; };
    const Mask dead = none(map.slope_low) & none(map.slope_up) & none(map.low) & none(map.up);
    for (uint32_t live = ~bits(dead) & ((1u << width) - 1); live != 0; live &= live - 1)
      list[living++] = static_cast<int32_t>(c - first + __builtin_ctz(live));
  }
  for (int64_t item = 0; item < items;) {
    const int64_t count = std::min<int64_t>(kRows, items - item);
    Some some;
    int64_t place[kRows];
    for (int64_t k = 0; k < count; ++k) {
      const int64_t at = begin + (item + k) % rows, row = g.order != nullptr ? g.order[at] : at;
      place[k] = ((item + k) / rows * g.count + row) * s.channels + first;
      some.from[k] = g.from + ((item + k) / rows * g.count + row) * n;
      std::copy_n(g.scaled + place[k], last - first, some.scaled[k]);
      const int64_t next = std::min(place[k] + rows * s.channels, (g.matrices * g.count - 1) * s.channels + first);
      for (int64_t c = 0; c < last - first; c += kLanes) {  // the next example's, most likely
        __builtin_prefetch(g.scaled + next + c);
        __builtin_prefetch(g.to_scaled + next + c, 1);
      }
      std::fill_n(some.to_scaled[k], last - first, 0.f);
    }
    const RowsFn f = pick(count);
    for (int64_t column = 0; column < n; column += kColumns)
      for (int64_t k = 0; k < living; ++k) {
        const int64_t neuron = list[k], next = k + 1 < living ? list[k + 1] - neuron : 0, at = (first + neuron) * n;
        f(some, neuron, column, std::min(n, column + kColumns), s.weight + at, g.to_weight + at, next * n);
      }
    for (int64_t k = 0; k < count; ++k) std::copy_n(some.to_scaled[k], last - first, g.to_scaled + place[k]);
    item += count;
  }
}

}  // namespace

void live_grad_cpu(const LiveGradArgs& g) {
  const int64_t neurons = g.step.channels, n = g.step.out_height * g.step.out_width * g.step.out_channels;
  parallel_for((neurons + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock, last = std::min(neurons, first + kBlock);
      std::fill(g.to_weight + first * n, g.to_weight + last * n, 0.f);
      for (int64_t example = 0; example < g.examples; ++example) example_block(g, example, first, last);
    }
  });
}

FR_NS_END
