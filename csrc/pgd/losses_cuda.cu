// Attack losses on CUDA: one warp an example, lanes stride over the classes.
#include <cfloat>

#include "core/exp.h"
#include "pgd/kernels.h"
#include "pgd/losses.h"
#include "runtime/cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 128;

__device__ bool any_nan(const float* z, int64_t k, int lane) {
  bool found = false;
  for (int64_t j = lane; j < k; j += kWarp) found |= !(z[j] == z[j]);
  return warp_max(found ? 1.f : 0.f) > 0.f;
}

// What a row without a loss gives: no number, and a gradient that no step follows.
__device__ void undefined(const LossArgs& a, int64_t row, int lane) {
  for (int64_t j = lane; j < a.classes; j += kWarp) a.grad[row * a.classes + j] = NAN;
  if (lane == 0) a.value[row] = NAN;
}

struct Softmax {
  float top;
  double sum;
  __device__ bool exists() const { return vabs(top) <= FLT_MAX; }
};
__device__ Softmax softmax(const float* z, int64_t k, int lane) {
  float top = -INFINITY;
  for (int64_t j = lane; j < k; j += kWarp) top = vmax(top, z[j]);
  top = warp_max(top);
  double s = 0.;
  for (int64_t j = lane; j < k; j += kWarp) s += portable_exp(z[j] - top);
  return {top, warp_sum(s)};
}

__device__ void cross_entropy(const LossArgs& a, int64_t row, int lane) {
  const float* z = a.logits + row * a.classes;
  const Softmax s = softmax(z, a.classes, lane);
  if (!s.exists() || any_nan(z, a.classes, lane)) return undefined(a, row, lane);
  const float inverse = static_cast<float>(1. / s.sum);
  const int64_t y = a.labels[row];
  for (int64_t j = lane; j < a.classes; j += kWarp) {
    const float e = portable_exp(z[j] - s.top);
    a.grad[row * a.classes + j] = j == y ? static_cast<float>(static_cast<double>(e) / s.sum - 1.) : e * inverse;
  }
  if (lane == 0) a.value[row] = static_cast<float>((static_cast<double>(s.top) - z[y]) + log(s.sum));
}

__device__ void kl(const LossArgs& a, int64_t row, int lane) {
  const float* z = a.logits + row * a.classes;
  const float* r = a.reference + row * a.classes;
  const Softmax q = softmax(z, a.classes, lane), p = softmax(r, a.classes, lane);
  if (!q.exists() || !p.exists() || any_nan(z, a.classes, lane) || any_nan(r, a.classes, lane))
    return undefined(a, row, lane);
  const float inverse_q = static_cast<float>(1. / q.sum), inverse_p = static_cast<float>(1. / p.sum);
  double inner = 0.;
  for (int64_t j = lane; j < a.classes; j += kWarp) {
    const float ri = r[j] - p.top, zi = z[j] - q.top, pi = portable_exp(ri) * inverse_p;
    inner += static_cast<double>(pi) * (ri - zi);
    a.grad[row * a.classes + j] = portable_exp(zi) * inverse_q - pi;
  }
  inner = warp_sum(inner);
  if (lane == 0) a.value[row] = static_cast<float>(inner + log(q.sum) - log(p.sum));
}

// Largest logit apart from the classes taken already; the lower index at ties.
__device__ void next_largest(const float* z, int64_t k, const int64_t* taken, int count, int lane, float* value,
                             int64_t* index) {
  float best = -INFINITY;
  int64_t at = -1;
  for (int64_t j = lane; j < k; j += kWarp) {
    bool skip = false;
    for (int t = 0; t < count; ++t) skip |= taken[t] == j;
    if (!skip && (at < 0 || z[j] > best)) {
      best = z[j];
      at = j;
    }
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, best, offset);
    const int64_t other_at = __shfl_xor_sync(0xffffffffu, static_cast<long long>(at), offset);
    if (other_at >= 0 && (at < 0 || other > best || (other == best && other_at < at))) {
      best = other;
      at = other_at;
    }
  }
  *value = best;
  *index = at;
}

__device__ void sparse(const LossArgs& a, int64_t row, int lane) {
  const float* z = a.logits + row * a.classes;
  const int64_t y = a.labels[row], target = a.targets != nullptr ? a.targets[row] : y;
  if (any_nan(z, a.classes, lane)) return undefined(a, row, lane);
  Top t;
  top_start(&t);
  next_largest(z, a.classes, &y, 1, lane, &t.other, &t.other_index);
  if (a.loss != Loss::margin)
    for (int k = 0; k < 4 && k < a.classes; ++k) next_largest(z, a.classes, t.index, k, lane, &t.value[k], &t.index[k]);
  const Sparse s = sparse_loss(a.loss, t, z[y], y, z[target], target);
  for (int64_t j = lane; j < a.classes; j += kWarp) {
    float g = 0.f;
    for (int k = 0; k < s.count; ++k) g += s.index[k] == j ? s.weight[k] : 0.f;
    a.grad[row * a.classes + j] = g;
  }
  if (lane == 0) a.value[row] = s.value;
}

__global__ void __launch_bounds__(kThreads) loss_kernel(LossArgs a) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  for (int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp; row < a.batch; row += warps) {
    if (a.loss == Loss::cross_entropy)
      cross_entropy(a, row, lane);
    else if (a.loss == Loss::kl)
      kl(a, row, lane);
    else
      sparse(a, row, lane);
  }
}

}  // namespace
FR_NS_END

namespace fastrobust {

void loss_cuda(const LossArgs& a, void* stream) {
  if (a.batch == 0) return;
  const int64_t blocks = (a.batch * kWarp + kThreads - 1) / kThreads;
  FR_LAUNCH(loss_kernel, static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff), kThreads, 0, stream, a);
}

}  // namespace fastrobust
