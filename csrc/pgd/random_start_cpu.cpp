#include <algorithm>

#include "pgd/random_start.h"
#include "pgd/row_cpu.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kBlock = 4096;  // elements of one work item, a multiple of four
constexpr int64_t kGrainElements = 4096;

constexpr int kDraw = 64;  // words drawn at a time: sixteen counter blocks side by side

// Words of elements [i, i + 64) of an example; i is a multiple of four. Philox with the lanes innermost, so that its
// rounds vectorise; the formula is philox()'s.
void draw(const RandomStartArgs& a, uint32_t example, int64_t i, uint32_t* u) {
  constexpr int lanes = kDraw / 4;
  Philox4 p[lanes];
  for (int j = 0; j < lanes; ++j) p[j] = philox(a.seed, kStreamElements, example, static_cast<uint64_t>(i / 4 + j));
  std::memcpy(u, p, sizeof p);
}

void linf_part(const RandomStartArgs& a, int64_t row, int64_t begin, int64_t end) {
  const uint32_t example = example_of(a, row);
  const float* x0 = a.x0 + row * a.n;
  const float* sizes = a.eps.per == Per::element ? a.eps.data + row * a.n : nullptr;
  float* out = a.out + row * a.n;
  const Vec eps_all(sizes == nullptr ? param_at(a.eps, row, a.n, 0) : 0.f), lo(a.lo), hi(a.hi);
  for (int64_t i = begin; i < end; i += kDraw) {
    uint32_t u[kDraw];
    float f[kDraw];
    draw(a, example, i, u);
    for (int k = 0; k < kDraw; ++k) f[k] = uniform_half_open(u[k]);
    for (int64_t k = i; k < end && k < i + kDraw; k += kLanes) {
      const int m = static_cast<int>(std::min<int64_t>(kLanes, end - k));
      const Vec eps = sizes == nullptr ? eps_all : load_n(sizes + k, m);
      store_n(out + k, random_linf(load_n(x0 + k, m), eps, lo, hi, load(f + (k - i))), m);
    }
  }
}

template <bool kL2>
void ball_row(const RandomStartArgs& a, int64_t row) {
  const uint32_t example = example_of(a, row);
  const float* x0 = a.x0 + row * a.n;
  float* out = a.out + row * a.n;
  int64_t sum = 0;
  for (int64_t i = 0; i < a.n; i += kDraw) {
    uint32_t u[kDraw];
    float t[kDraw];
    draw(a, example, i, u);
    for (int k = 0; k < kDraw; k += 2) {
      const Normal2 pair = random_ball2(u[k], u[k + 1], kL2);
      t[k] = pair.a;
      t[k + 1] = pair.b;
    }
    const int64_t m = std::min<int64_t>(kDraw, a.n - i);
    for (int64_t k = 0; k < m; ++k) sum += ball_term(t[k], kL2);
    std::memcpy(out + i, t, static_cast<size_t>(m) * sizeof(float));
  }
  const Vec scale(ball_scale(sum, param_at(a.eps, row, a.n, 0), kL2, a.seed, example)), lo(a.lo), hi(a.hi);
  for (int64_t i = 0; i < a.n; i += kLanes) {
    const int m = static_cast<int>(std::min<int64_t>(kLanes, a.n - i));
    store_n(out + i, random_ball(load_n(x0 + i, m), load_n(out + i, m), scale, lo, hi), m);
  }
}

}  // namespace

void random_start_cpu(const RandomStartArgs& a) {
  if (a.batch * a.n == 0) return;
  if (a.norm != Norm::linf) {
    parallel_for(a.batch, std::max<int64_t>(1, kGrainElements / a.n), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) a.norm == Norm::l2 ? ball_row<true>(a, row) : ball_row<false>(a, row);
    });
    return;
  }
  const int64_t per_row = (a.n + kBlock - 1) / kBlock;
  parallel_for(a.batch * per_row, std::max<int64_t>(1, kGrainElements / std::min(a.n, kBlock)),
               [&](int64_t first, int64_t last) {
                 for (int64_t k = first; k < last; ++k) {
                   const int64_t row = k / per_row, begin = (k - row * per_row) * kBlock;
                   linf_part(a, row, begin, std::min(a.n, begin + kBlock));
                 }
               });
}

FR_NS_END
