#include <algorithm>

#include "core/exp.h"
#include "pgd/losses.h"
#include "pgd/row_cpu.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kGrainElements = 4096;

FR_HD Vec load_or(const float* p, int64_t left, float fill) {
  if (left >= kLanes) return load(p);
  alignas(64) static constexpr float lane[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return select(load(lane) < Vec(static_cast<float>(left)), load_n(p, static_cast<int>(left)), Vec(fill));
}
FR_HD void store_left(float* p, Vec v, int64_t left) {
  left >= kLanes ? store(p, v) : store_n(p, v, static_cast<int>(left));
}

bool any_nan(const float* z, int64_t k) {
  uint32_t found = 0;
  for (int64_t i = 0; i < k; i += kLanes) {
    const Vec v = load_or(z + i, k - i, 0.f);
    found |= ~bits(v == v) & 0xffffu;
  }
  return found != 0;
}

// What a row without a loss gives: no number, and a gradient that no step follows.
void undefined(const LossArgs& a, int64_t row) {
  a.value[row] = NAN;
  std::fill_n(a.grad + row * a.classes, a.classes, NAN);
}

struct Softmax {
  float top;
  double sum;
  bool exists() const { return std::isfinite(top); }
};
// Largest logit and sum of exp(z - top); exp(z - top) is left in `e` when given.
Softmax softmax(const float* z, int64_t k, float* e) {
  Vec m(-INFINITY);
  for (int64_t i = 0; i < k; i += kLanes) m = vmax(m, load_or(z + i, k - i, -INFINITY));
  const float top = max_lane(m);
  DVec s(0.);
  for (int64_t i = 0; i < k; i += kLanes) {
    const Vec v = portable_exp(load_or(z + i, k - i, -INFINITY) - Vec(top));
    s = s + widen(v);
    if (e != nullptr) store_left(e + i, v, k - i);
  }
  return {top, sum(s)};
}

void cross_entropy(const LossArgs& a, int64_t row) {
  const float* z = a.logits + row * a.classes;
  float* g = a.grad + row * a.classes;
  const Softmax s = softmax(z, a.classes, g);
  if (!s.exists() || any_nan(z, a.classes)) return undefined(a, row);
  const Vec inverse(static_cast<float>(1. / s.sum));
  for (int64_t i = 0; i < a.classes; i += kLanes)
    store_left(g + i, load_or(g + i, a.classes - i, 0.f) * inverse, a.classes - i);
  const int64_t y = a.labels[row];
  // p_y - 1 as minus the sum of the others' would need another pass; in double the cancellation is harmless.
  g[y] = static_cast<float>(static_cast<double>(portable_exp(z[y] - s.top)) / s.sum - 1.);
  a.value[row] = static_cast<float>((static_cast<double>(s.top) - z[y]) + std::log(s.sum));
}

void kl(const LossArgs& a, int64_t row) {
  const float* z = a.logits + row * a.classes;
  const float* r = a.reference + row * a.classes;
  float* g = a.grad + row * a.classes;
  const Softmax q = softmax(z, a.classes, g), p = softmax(r, a.classes, nullptr);
  if (!q.exists() || !p.exists() || any_nan(z, a.classes) || any_nan(r, a.classes)) return undefined(a, row);
  const Vec inverse_q(static_cast<float>(1. / q.sum)), inverse_p(static_cast<float>(1. / p.sum));
  DVec inner(0.);
  for (int64_t i = 0; i < a.classes; i += kLanes) {
    const int64_t left = a.classes - i;
    const Vec ri = load_or(r + i, left, 0.f) - Vec(p.top), zi = load_or(z + i, left, 0.f) - Vec(q.top);
    Vec pi = portable_exp(ri) * inverse_p;
    if (left < kLanes) {
      float keep[kLanes] = {};
      store_n(keep, pi, static_cast<int>(left));
      pi = load(keep);
    }
    inner = inner + widen(pi) * widen(ri - zi);
    store_left(g + i, load_or(g + i, left, 0.f) * inverse_q - pi, left);
  }
  // sum p = 1: the logs of the two sums leave the sum
  a.value[row] = static_cast<float>(sum(inner) + std::log(q.sum) - std::log(p.sum));
}

void sparse(const LossArgs& a, int64_t row) {
  const float* z = a.logits + row * a.classes;
  float* g = a.grad + row * a.classes;
  const int64_t y = a.labels[row], target = a.targets != nullptr ? a.targets[row] : y;
  if (any_nan(z, a.classes)) return undefined(a, row);
  Top t;
  top_start(&t);
  // The first sixteen fill the top; of the rest only those that can enter it are looked at one by one.
  for (int64_t j = 0; j < std::min<int64_t>(a.classes, kLanes); ++j) top_add(&t, z[j], j, j == y);
  for (int64_t i = kLanes; i < a.classes; i += kLanes) {
    const Vec bar(a.loss == Loss::margin ? t.other : vmin(t.value[3], t.other));
    for (uint32_t b = bits(load_or(z + i, a.classes - i, -INFINITY) > bar); b != 0; b &= b - 1) {
      const int64_t j = i + __builtin_ctz(b);
      top_add(&t, z[j], j, j == y);
    }
  }
  const Sparse s = sparse_loss(a.loss, t, z[y], y, z[target], target);
  std::fill(g, g + a.classes, 0.f);
  for (int k = 0; k < s.count; ++k) g[s.index[k]] += s.weight[k];
  a.value[row] = s.value;
}

}  // namespace

void loss_cpu(const LossArgs& a) {
  const auto row_fn = a.loss == Loss::cross_entropy ? cross_entropy : (a.loss == Loss::kl ? kl : sparse);
  parallel_for(a.batch, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, a.classes)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) row_fn(a, row);
               });
}

void agrees_cpu(const AgreesArgs& a) {
  const int64_t grain = std::max<int64_t>(1, 4 * kGrainElements / std::max<int64_t>(1, a.classes));
  parallel_for(a.batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* z = a.logits + row * a.classes;
      const int64_t y = a.labels[row];
      bool beaten = y < 0 || y >= a.classes;  // as of targets that are no classes
      for (int64_t j = 0; j < a.classes && !beaten; ++j) beaten = j != y && outranks(z[j], z[y], j < y);
      a.out[row] = beaten != a.wanted;
    }
  });
}

FR_NS_END
