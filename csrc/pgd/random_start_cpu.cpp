#include <algorithm>

#include "pgd/random_start.h"
#include "pgd/row_cpu.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kBlock = 4096;  // elements of one work item, a multiple of four
constexpr int64_t kGrainElements = 4096;

void linf_part(const RandomStartArgs& a, int64_t row, int64_t begin, int64_t end) {
  const uint32_t example = static_cast<uint32_t>(a.first_example + row);
  const int64_t base = row * a.n;
  for (int64_t i = begin; i < end; i += 16) {
    uint32_t u[16];
    for (int k = 0; k < 4; ++k) {
      const Philox4 p = philox(a.seed, kStreamElements, example, static_cast<uint64_t>(i / 4 + k));
      for (int j = 0; j < 4; ++j) u[4 * k + j] = p.r[j];
    }
    const int m = static_cast<int>(std::min<int64_t>(16, end - i));
    for (int k = 0; k < m; ++k)
      a.out[base + i + k] = random_linf(a.x0[base + i + k], param_at(a.eps, row, a.n, i + k), a.lo, a.hi, u[k]);
  }
}

void ball_row(const RandomStartArgs& a, int64_t row) {
  const bool l2 = a.norm == Norm::l2;
  const uint32_t example = static_cast<uint32_t>(a.first_example + row);
  const float* x0 = a.x0 + row * a.n;
  float* out = a.out + row * a.n;
  int64_t sum = 0;
  for (int64_t i = 0; i < a.n; i += 4) {
    const Ball4 b = random_ball4(philox(a.seed, kStreamElements, example, static_cast<uint64_t>(i / 4)), l2);
    const int m = static_cast<int>(std::min<int64_t>(4, a.n - i));
    for (int k = 0; k < m; ++k) {
      sum += ball_term(b.t[k], l2);
      out[i + k] = b.t[k];
    }
  }
  const float scale = ball_scale(sum, param_at(a.eps, row, a.n, 0), l2, a.seed, example);
  for (int64_t i = 0; i < a.n; ++i) out[i] = random_ball(x0[i], out[i], scale, a.lo, a.hi);
}

}  // namespace

void random_start_cpu(const RandomStartArgs& a) {
  if (a.batch * a.n == 0) return;
  if (a.norm != Norm::linf) {
    parallel_for(a.batch, std::max<int64_t>(1, kGrainElements / a.n), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) ball_row(a, row);
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
