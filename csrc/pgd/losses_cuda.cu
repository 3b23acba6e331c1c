// Attack losses on CUDA: one warp an example, lanes stride over the classes.
#include <cfloat>

#include "core/exp.h"
#include "pgd/kernels.h"
#include "pgd/losses.h"
#include "runtime/wide_cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 128;

// One example, for the lanes of a warp. Sums are in the order of a plain loop over the lanes (see each_in_order).
template <bool kWide>
struct WarpRow {
  const LossArgs& a;
  int64_t row;
  int lane;
  const float* z;
  float* grad;

  __device__ __forceinline__ WarpRow(const LossArgs& args, int64_t r, int l)
      : a(args), row(r), lane(l), z(args.logits + r * args.classes), grad(args.grad + r * args.classes) {}

  template <class Body>
  __device__ __forceinline__ void each(Body body) const {
    each_element<kWide, 4>(a.classes, 0, lane, kWarp, body);
  }
  template <int kTerms, class Natural, class Add>
  __device__ __forceinline__ void each_term(Natural natural, Add add) const {
    each_in_order<kWide, 4, kTerms, kWarp, kThreads>(0, a.classes, natural, add);
  }

  // The largest number; NaN when there is one.
  __device__ float top_of(const float* p) const {
    float top = -INFINITY;
    bool nan = false;
    each([&](auto i) {
      const auto v = load_at(p, i);
      for (int k = 0; k < i.count; ++k) {
        top = vmax(top, v.v[k]);
        nan |= !(v.v[k] == v.v[k]);
      }
    });
    top = warp_max(top);
    return warp_max(nan ? 1.f : 0.f) > 0.f ? NAN : top;
  }
  // What a row without a loss gives: no number, and a gradient that no step follows.
  __device__ void undefined() const {
    each([&](auto i) { store_at(grad, i, all_equal(static_cast<float>(NAN), i)); });
    if (lane == 0) a.value[row] = NAN;
  }

  __device__ void cross_entropy() const {
    const float top = top_of(z);
    if (!(vabs(top) <= FLT_MAX)) return undefined();
    double sum = 0.;
    each_term<1>(
        [&](auto i, auto& t) {
          const auto v = load_at(z, i);
          for (int k = 0; k < i.count; ++k) t.v[0][k] = portable_exp(v.v[k] - top);
        },
        [&](const float* t) { sum += t[0]; });
    sum = warp_sum(sum);
    const float inverse = static_cast<float>(1. / sum);
    const int64_t y = a.labels[row];
    each([&](auto i) {
      auto v = load_at(z, i);
      for (int k = 0; k < i.count; ++k) {
        const float e = portable_exp(v.v[k] - top);
        v.v[k] = i.at(k) == y ? static_cast<float>(static_cast<double>(e) / sum - 1.) : e * inverse;
      }
      store_at(grad, i, v);
    });
    if (lane == 0) a.value[row] = static_cast<float>((static_cast<double>(top) - z[y]) + log(sum));
  }

  __device__ void kl() const {
    const float* const r = a.reference + row * a.classes;
    const float top = top_of(z), top_r = top_of(r);
    if (!(vabs(top) <= FLT_MAX) || !(vabs(top_r) <= FLT_MAX)) return undefined();
    double sum = 0., sum_r = 0., inner = 0.;
    each_term<2>(
        [&](auto i, auto& t) {
          const auto v = load_at(z, i), w = load_at(r, i);
          for (int k = 0; k < i.count; ++k) {
            t.v[0][k] = portable_exp(v.v[k] - top);
            t.v[1][k] = portable_exp(w.v[k] - top_r);
          }
        },
        [&](const float* t) {
          sum += t[0];
          sum_r += t[1];
        });
    sum = warp_sum(sum);
    sum_r = warp_sum(sum_r);
    const float inverse = static_cast<float>(1. / sum), inverse_r = static_cast<float>(1. / sum_r);
    each_term<2>(
        [&](auto i, auto& t) {
          auto v = load_at(z, i);
          const auto w = load_at(r, i);
          for (int k = 0; k < i.count; ++k) {
            const float ri = w.v[k] - top_r, zi = v.v[k] - top, p = portable_exp(ri) * inverse_r;
            t.v[0][k] = p;
            t.v[1][k] = ri - zi;
            v.v[k] = portable_exp(zi) * inverse - p;
          }
          store_at(grad, i, v);
        },
        [&](const float* t) { inner += static_cast<double>(t[0]) * t[1]; });
    inner = warp_sum(inner);
    if (lane == 0) a.value[row] = static_cast<float>(inner + log(sum) - log(sum_r));
  }

  // Largest logit apart from the first kTaken of `taken`; the lower index at ties.
  template <int kTaken>
  __device__ void next_largest(const int64_t* taken, float* value, int64_t* index) const {
    float best = -INFINITY;
    int64_t at = -1;
    each([&](auto i) {
      const auto v = load_at(z, i);
      for (int k = 0; k < i.count; ++k) {
        bool skip = false;
#pragma unroll
        for (int t = 0; t < kTaken; ++t) skip |= taken[t] == i.at(k);
        if (!skip && (at < 0 || v.v[k] > best)) {
          best = v.v[k];
          at = i.at(k);
        }
      }
    });
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

  template <Loss kLoss>
  __device__ void sparse() const {
    const int64_t y = a.labels[row], target = a.targets != nullptr ? a.targets[row] : y;
    const float top = top_of(z);
    if (!(top == top)) return undefined();
    Top t;
    top_start(&t);
    next_largest<1>(&y, &t.other, &t.other_index);
    if constexpr (kLoss != Loss::margin) {
      next_largest<0>(t.index, &t.value[0], &t.index[0]);
      if (a.classes > 1) next_largest<1>(t.index, &t.value[1], &t.index[1]);
      if (a.classes > 2) next_largest<2>(t.index, &t.value[2], &t.index[2]);
      if (a.classes > 3) next_largest<3>(t.index, &t.value[3], &t.index[3]);
    }
    const Sparse s = sparse_loss(kLoss, t, z[y], y, z[target], target);
    each([&](auto i) {
      Values<float, decltype(i)::count> g;
      for (int k = 0; k < i.count; ++k) {
        g.v[k] = 0.f;
#pragma unroll
        for (int e = 0; e < 5; ++e)  // an index known when compiling keeps the list in registers
          if (e < s.count) g.v[k] += s.index[e] == i.at(k) ? s.weight[e] : 0.f;
      }
      store_at(grad, i, g);
    });
    if (lane == 0) a.value[row] = s.value;
  }
};

template <Loss kLoss, bool kWide>
__global__ void __launch_bounds__(kThreads, 8) loss_kernel(LossArgs a) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  for (int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp; row < a.batch; row += warps) {
    const WarpRow<kWide> r(a, row, lane);
    if constexpr (kLoss == Loss::cross_entropy)
      r.cross_entropy();
    else if constexpr (kLoss == Loss::kl)
      r.kl();
    else
      r.template sparse<kLoss>();
  }
}

template <bool kWide>
__global__ void __launch_bounds__(kThreads) agrees_kernel(AgreesArgs a) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  for (int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp; row < a.batch; row += warps) {
    const float* z = a.logits + row * a.classes;
    const int64_t y = a.labels[row];
    const bool known = y >= 0 && y < a.classes;  // targets may be no classes
    const float label = known ? z[y] : 0.f;
    bool beaten = !known;
    each_element<kWide, 4>(a.classes, 0, lane, kWarp, [&](auto i) {
      const auto v = load_at(z, i);
      for (int k = 0; k < i.count; ++k) beaten |= i.at(k) != y && outranks(v.v[k], label, i.at(k) < y);
    });
    beaten = warp_max(beaten ? 1.f : 0.f) > 0.f;
    if (lane == 0) a.out[row] = beaten != a.wanted;
  }
}

inline unsigned warp_grid(int64_t batch) {
  const int64_t blocks = (batch * kWarp + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff);
}

template <Loss kLoss>
void launch(const LossArgs& a, void* stream) {
  const unsigned grid = warp_grid(a.batch);
  if (Addresses().add(a.logits).add(a.reference).add(a.grad).whole(a.classes))
    FR_LAUNCH((loss_kernel<kLoss, true>), grid, kThreads, 0, stream, a);
  else
    FR_LAUNCH((loss_kernel<kLoss, false>), grid, kThreads, 0, stream, a);
}

}  // namespace
FR_NS_END

namespace fastrobust {

void loss_cuda(const LossArgs& a, void* stream) {
  if (a.batch == 0) return;
  switch (a.loss) {
    case Loss::cross_entropy:
      return launch<Loss::cross_entropy>(a, stream);
    case Loss::margin:
      return launch<Loss::margin>(a, stream);
    case Loss::dlr:
      return launch<Loss::dlr>(a, stream);
    case Loss::dlr_targeted:
      return launch<Loss::dlr_targeted>(a, stream);
    case Loss::kl:
      return launch<Loss::kl>(a, stream);
  }
}

void agrees_cuda(const AgreesArgs& a, void* stream) {
  if (a.batch == 0) return;
  if (Addresses().add(a.logits).whole(a.classes))
    FR_LAUNCH(agrees_kernel<true>, warp_grid(a.batch), kThreads, 0, stream, a);
  else
    FR_LAUNCH(agrees_kernel<false>, warp_grid(a.batch), kThreads, 0, stream, a);
}

}  // namespace fastrobust
