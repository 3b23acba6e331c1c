// What follows an interval product where a ReLU reads it, and the gradients, on CUDA.
#include <type_traits>

#include "bounds/kernels.h"
#include "bounds/neurons_cuda.h"
#include "bounds/relu_box.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = kNeuronThreads;

// in: centre, radius, bias; out: slopes low and up, intercepts low and up, centre and radius behind the ReLU
template <bool kWide>
__global__ void __launch_bounds__(kThreads) relu_box_kernel(Map<float, 3, 6> m, bool adaptive, bool lines) {
  each_neuron<kWide, true>(m, [&](const float (&in)[3], float (&out)[6]) {
    if (lines) relu_box_lines(in[0], in[1], in[2], adaptive, out[0], out[1], out[2], out[3]);
    if (!adaptive) out[0] = out[1];
    out[4] = in[0], out[5] = in[1];
    relu_center(out[4], out[5]);
  });
}

// A thread takes four neighbouring neurons, or one, through the examples of a run, so that what these add up to needs
// no atomics: sums of what reaches the bias, and of the radius' gradient where one serves all.
template <bool kWide>
__global__ void __launch_bounds__(kThreads) relu_box_grad_kernel(ReluBoxGradArgs a) {
  using Place = std::conditional_t<kWide, Four, One>;
  constexpr int kN = Place::count;
  const ReluBoxArgs& g = a.forward;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kN, all = g.batch * g.n;
  if (i >= g.n) return;
  const int64_t each = examples_of_run(g.batch), run = blockIdx.y, stop = (run + 1) * each;
  const Place own{i};
  const auto bias = load_or<Use::again>(g.bias, g.bias != nullptr, 0.f, Place{i % g.period});
  auto radius = load_at<Use::again>(g.radius, own);
  Values<float, kN> to_bias = {}, to_radius = {};
  for (int64_t example = run * each; example < stop && example < g.batch; ++example) {
    const Place at{example * g.n + i}, above{all + example * g.n + i};
    const auto center = load_at(g.center, at);
    if (!g.shared) radius = load_at(g.radius, at);
    float to_l[kN] = {}, to_u[kN] = {};
    if (a.from_slopes != nullptr) {
      const auto slope = load_at(a.from_slopes, g.adaptive ? above : at);
      const auto low = load_at(a.from_intercepts, at), up = load_at(a.from_intercepts, above);
#pragma unroll
      for (int k = 0; k < kN; ++k)
        to_bias.v[k] = to_bias.v[k] + relu_box_lines_grad(center.v[k], radius.v[k], bias.v[k], g.adaptive, slope.v[k],
                                                          low.v[k], up.v[k], to_l[k], to_u[k]);
    }
    if (a.from_center != nullptr) {
      const auto x = load_at(a.from_center, at), y = load_at(a.from_radius, at);
#pragma unroll
      for (int k = 0; k < kN; ++k) relu_center_grad(center.v[k], radius.v[k], x.v[k], y.v[k], to_l[k], to_u[k]);
    }
    Values<float, kN> to_c, to_r;
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      to_c.v[k] = to_l[k] + to_u[k], to_r.v[k] = to_u[k] - to_l[k];
      to_bias.v[k] = to_bias.v[k] + to_c.v[k];
      to_radius.v[k] = to_radius.v[k] + to_r.v[k];
    }
    store_at(a.to_center, at, to_c);
    if (!g.shared) store_at(a.to_radius, at, to_r);
  }
  store_at(a.sums + run * g.n, own, to_bias);
  if (g.shared) store_at(a.sums + (kReluBoxRuns + run) * g.n, own, to_radius);
}

// out[k] = the sum of from[row * width + k] over the rows, in an order of its own: by a block, or by a thread where
// rows are few.
template <bool kBlockEach>
__global__ void __launch_bounds__(kThreads)
    column_sum_kernel(const float* from, float* out, int64_t rows, int64_t width) {
  constexpr int64_t kEach = kBlockEach ? kThreads : 1;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t k = thread / kEach; k < width; k += threads / kEach) {
    double sum = 0.;
    for (int64_t row = thread % kEach; row < rows; row += kEach) sum += from[row * width + k];
    if (kBlockEach) sum = block_sum(sum);
    if (thread % kEach == 0) out[k] = static_cast<float>(sum);
  }
}

}  // namespace
FR_NS_END

namespace fastrobust {

void relu_box_cuda(const ReluBoxArgs& g, void* stream) {
  const int64_t all = g.batch * g.n;
  if (all == 0) return;
  const bool lines = g.slopes != nullptr;
  Map<float, 3, 6> m{{{g.center}, {g.radius, g.shared ? g.n : 0}, {g.bias, g.bias == nullptr ? 0 : g.period}},
                     {g.slopes, lines && g.adaptive ? g.slopes + all : nullptr, lines ? g.intercepts : nullptr,
                      lines ? g.intercepts + all : nullptr, g.next_center, g.next_radius},
                     all,
                     0};
  const dim3 grid(blocks_of(all, 8 * kThreads));
  if (m.wide())
    FR_LAUNCH(relu_box_kernel<true>, grid, dim3(kThreads), 0, stream, m, g.adaptive, lines);
  else
    FR_LAUNCH(relu_box_kernel<false>, grid, dim3(kThreads), 0, stream, m, g.adaptive, lines);
}

void relu_box_grad_cuda(const ReluBoxGradArgs& a, void* stream) {
  const ReluBoxArgs& g = a.forward;
  const int64_t runs = runs_of(g.batch);
  if (g.n == 0) return;
  Addresses lie = Addresses().add(g.center).add(g.radius).add(g.bias).add(a.from_slopes).add(a.from_intercepts);
  lie.add(a.from_center).add(a.from_radius).add(a.to_center).add(a.to_radius).add(a.sums);
  const bool wide = lie.whole(g.n) && (g.bias == nullptr || g.period % 4 == 0);
  const int64_t per_block = kThreads * (wide ? 4 : 1);
  const dim3 grid(static_cast<unsigned>((g.n + per_block - 1) / per_block), static_cast<unsigned>(runs));
  if (runs > 0 && wide)
    FR_LAUNCH(relu_box_grad_kernel<true>, grid, dim3(kThreads), 0, stream, a);
  else if (runs > 0)
    FR_LAUNCH(relu_box_grad_kernel<false>, grid, dim3(kThreads), 0, stream, a);
  if (a.to_bias != nullptr)
    FR_LAUNCH(column_sum_kernel<true>, dim3(blocks_of(g.period, 1)), dim3(kThreads), 0, stream, a.sums, a.to_bias,
              runs * (g.n / g.period), g.period);
  if (g.shared)
    FR_LAUNCH(column_sum_kernel<false>, dim3(blocks_of(g.n, kThreads)), dim3(kThreads), 0, stream,
              a.sums + kReluBoxRuns * g.n, a.to_radius, runs, g.n);
}

}  // namespace fastrobust
