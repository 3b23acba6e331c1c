// Products of the rows in the lanes with single weights, several outputs at a time in registers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bounds/fma.h"
#include "core/simd.h"

FR_NS_BEGIN

#if defined(__AVX512F__)
constexpr int kMostOut = 8, kMostVectors = 3;  // of a product in registers: outputs, vectors of rows
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int kMostOut = 6, kMostVectors = 1;
#else
constexpr int kMostOut = 2, kMostVectors = 1;
#endif

struct Run {
  int64_t begin, end;  // of a list
};
// What a product of kOut outputs reads: the weight of input i and output j is base[weight[i] + column(j)].
struct Product {
  const Run* runs;
  int count;
  const float* values;  // [inputs][kM vectors]
  const int32_t* weight;
  const float* base;
};

// Adds to acc; `column(j)` must not depend on the input.
template <int kOut, int kM, class Column>
FR_HD void add_products(const Product& p, const Column& column, Vec (&total)[kOut][kM]) {
  constexpr int kWays = kOut * kM >= 6 ? 1 : kOut * kM >= 3 ? 2 : 4;  // sums at a time hide the latency
  Vec acc[kWays][kOut][kM];
#pragma GCC unroll 8
  for (int u = 0; u < kWays; ++u)
#pragma GCC unroll 8
    for (int j = 0; j < kOut; ++j)
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) acc[u][j][m] = u == 0 ? total[j][m] : Vec(0.f);
  const auto one = [&](int64_t i, Vec(&sums)[kOut][kM]) FR_INLINE_LAMBDA {
    const float *v = p.values + i * kM * kLanes, *w = p.base + p.weight[i];
    Vec s[kM];
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) s[m] = load(v + m * kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < kOut; ++j) {
      const Vec b(w[column(j)]);
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) sums[j][m] = fmadd(b, s[m], sums[j][m]);
    }
  };
  for (int r = 0; r < p.count; ++r) {
    int64_t i = p.runs[r].begin;
    for (const int64_t end = p.runs[r].end; i < end; i += kWays) {
      if (i + kWays <= end) {
#pragma GCC unroll 4
        for (int u = 0; u < kWays; ++u) one(i + u, acc[u]);
      } else {
        for (; i < end; ++i) one(i, acc[0]);
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kOut; ++j)
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) {
      Vec sum = acc[0][j][m];
#pragma GCC unroll 4
      for (int u = 1; u < kWays; ++u) sum = sum + acc[u][j][m];
      total[j][m] = sum;
    }
}

// Where products go: `set` and `add` with the weights in column given[j] for output j, `line` adds those of column j.
enum class Result { set, add, line };
template <int kOut, int kM, Result kTo>
void write_products(const Product& p, const int32_t* given, const int32_t* place, float* out) {
  int64_t column[kOut];
  Vec acc[kOut][kM];
#pragma GCC unroll 8
  for (int j = 0; j < kOut; ++j) {
    column[j] = kTo == Result::line ? j : given[j];
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) acc[j][m] = kTo == Result::set ? Vec(0.f) : load(out + (place[j] * kM + m) * kLanes);
  }
  if constexpr (kTo == Result::line)
    add_products<kOut, kM>(p, [](int j) FR_INLINE_LAMBDA { return j; }, acc);
  else
    add_products<kOut, kM>(p, [&](int j) FR_INLINE_LAMBDA { return column[j]; }, acc);
#pragma GCC unroll 8
  for (int j = 0; j < kOut; ++j)
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) store(out + (place[j] * kM + m) * kLanes, acc[j][m]);
}

using ProductFn = void (*)(const Product&, const int32_t*, const int32_t*, float*);
template <int kM, Result kTo, int kOut = kMostOut>
ProductFn product_of(int64_t outs) {
  if constexpr (kOut > 1)
    if (outs < kOut) return product_of<kM, kTo, kOut - 1>(outs);
  return write_products<kOut, kM, kTo>;
}
// Calls Block<kM>(work, group).run(first, n) for all of `items` rows, kM vectors that hold n of them.
template <template <int> class Block, class Work>
void over_rows(Work& work, int64_t group, int64_t items) {
  for (int64_t first = 0; first < items; first += kMostVectors * kLanes) {
    const int64_t n = std::min<int64_t>(items - first, kMostVectors * kLanes);
    if constexpr (kMostVectors >= 3)
      if (n > 2 * kLanes) {
        Block<3>(work, group).run(first, n);
        continue;
      }
    if constexpr (kMostVectors >= 2)
      if (n > kLanes) {
        Block<2>(work, group).run(first, n);
        continue;
      }
    Block<1>(work, group).run(first, n);
  }
}

// Along one axis of a convolution, seen from its input: where the inputs end that the same outputs read as read `at`,
// and the first output that reads `reach` = input + padding.
inline int64_t cell_end(int64_t at, int64_t pad, int64_t kernel, int64_t stride, int64_t size) {
  return kernel % stride != 0 ? at + 1 : std::min(size, ((at + pad) / stride + 1) * stride - pad);
}
inline int64_t first_source(int64_t reach, int64_t kernel, int64_t stride) {
  return reach < kernel ? 0 : (reach - kernel + stride) / stride;
}

// Pieces of nearly the same size, as few as there must be: calls f(first, size).
template <class F>
FR_HD void pieces(int64_t n, const F& f) {
  for (int64_t left = (n + kMostOut - 1) / kMostOut, at = 0; left > 0; --left) {
    const int64_t size = (n - at + left - 1) / left;
    f(at, size);
    at += size;
  }
}

FR_NS_END
