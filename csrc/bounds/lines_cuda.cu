// Lines around activations, their gradients and ranges on CUDA: a thread takes four neighbouring neurons, or twice
// four.
#include "bounds/kernels.h"
#include "bounds/lines.h"
#include "bounds/neurons_cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = kNeuronThreads;

template <Activation kAct>
constexpr bool kShort = kAct == Activation::relu;

// in: lower, upper, bias; out: slopes low and up, intercepts low and up
template <Activation kAct, bool kWide, class T>
__global__ void __launch_bounds__(kThreads) lines_kernel(Map<T, 3, 4> m, T p0, T p1, bool adaptive) {
  const bool shifted = m.in[2].p != nullptr;
  each_neuron<kWide, kShort<kAct>>(m, [&](const T(&in)[3], T(&out)[4]) {
    lines<kAct>(in[0], in[1], p0, p1, adaptive, out[0], out[1], out[2], out[3]);
    if (shifted) {
      out[2] = out[2] + out[0] * in[2];
      out[3] = out[3] + out[1] * in[2];
    }
  });
}

// in: lower, upper, gradients of slopes low and up and of intercepts low and up; out: gradients of lower and upper
template <Activation kAct, bool kWide, class T>
__global__ void __launch_bounds__(kThreads, 4) lines_grad_kernel(Map<T, 6, 2> m, T p0, T p1, bool adaptive) {
  each_neuron<kWide, kShort<kAct>>(m, [&](const T(&in)[6], T(&out)[2]) {
    lines_grad<kAct>(in[0], in[1], p0, p1, adaptive, in[2], in[3], in[4], in[5], out[0], out[1]);
  });
}

template <Activation kAct, bool kWide>
__global__ void __launch_bounds__(kThreads) range_kernel(Map<float, 2, 2> m, float p0, float p1) {
  each_neuron<kWide, true>(
      m, [&](const float (&in)[2], float (&out)[2]) { range_of<kAct>(in[0], in[1], p0, p1, out[0], out[1]); });
}

// in: slopes, lower, upper; out: intercepts, points
template <Activation kAct, bool kWide, class T>
__global__ void __launch_bounds__(kThreads) support_kernel(Map<T, 3, 2> m, T p0, T p1, bool above) {
  each_neuron<kWide, kShort<kAct>>(
      m, [&](const T(&in)[3], T(&out)[2]) { support<kAct>(in[0], in[1], in[2], p0, p1, above, out[0], out[1]); });
}

// Calls f.run<activation>() for the activation of the arguments.
template <class F>
void dispatch(Activation a, const F& f) {
  switch (a) {
    case Activation::relu:
      return f.template run<Activation::relu>();
    case Activation::hardtanh:
      return f.template run<Activation::hardtanh>();
    case Activation::sigmoid:
      return f.template run<Activation::sigmoid>();
    case Activation::tanh:
      return f.template run<Activation::tanh>();
    case Activation::arctan:
      return f.template run<Activation::arctan>();
    case Activation::softplus:
      return f.template run<Activation::softplus>();
    case Activation::elu:
      return f.template run<Activation::elu>();
    case Activation::silu:
      return f.template run<Activation::silu>();
    case Activation::gelu:
      return f.template run<Activation::gelu>();
    case Activation::gelu_tanh:
      return f.template run<Activation::gelu_tanh>();
  }
}

template <class T>
struct Lines {
  const LinesArgs<T>& g;
  void* stream;
  template <Activation kAct>
  void run() const {
    Map<T, 3, 4> m{{{g.lower}, {g.upper}, {g.bias, g.bias == nullptr ? 0 : g.period}},
                   {g.slopes, g.adaptive ? g.slopes + g.count : nullptr, g.intercepts, g.intercepts + g.count},
                   g.count,
                   0};
    const dim3 grid(blocks_of(g.count, 8 * kThreads));
    const T p0 = static_cast<T>(g.p0), p1 = static_cast<T>(g.p1);
    if (m.wide())
      FR_LAUNCH((lines_kernel<kAct, true, T>), grid, dim3(kThreads), 0, stream, m, p0, p1, g.adaptive);
    else
      FR_LAUNCH((lines_kernel<kAct, false, T>), grid, dim3(kThreads), 0, stream, m, p0, p1, g.adaptive);
  }
};
template <class T>
struct LinesGrad {
  const LinesGradArgs<T>& g;
  void* stream;
  template <Activation kAct>
  void run() const {
    const T* const up = g.adaptive ? g.from_slopes + g.count : g.from_slopes;
    Map<T, 6, 2> m{{{g.lower},
                    {g.upper},
                    {g.adaptive ? g.from_slopes : nullptr},
                    {up},
                    {g.from_intercepts},
                    {g.from_intercepts + g.count}},
                   {g.to_lower, g.to_upper},
                   g.count,
                   0};
    const dim3 grid(blocks_of(g.count, 8 * kThreads));
    const T p0 = static_cast<T>(g.p0), p1 = static_cast<T>(g.p1);
    if (m.wide())
      FR_LAUNCH((lines_grad_kernel<kAct, true, T>), grid, dim3(kThreads), 0, stream, m, p0, p1, g.adaptive);
    else
      FR_LAUNCH((lines_grad_kernel<kAct, false, T>), grid, dim3(kThreads), 0, stream, m, p0, p1, g.adaptive);
  }
};
template <class T>
struct Support {
  const SupportArgs<T>& g;
  void* stream;
  template <Activation kAct>
  void run() const {
    Map<T, 3, 2> m{{{g.slopes}, {g.lower}, {g.upper}}, {g.intercepts, g.points}, g.count, 0};
    const dim3 grid(blocks_of(g.count, 8 * kThreads));
    const T p0 = static_cast<T>(g.p0), p1 = static_cast<T>(g.p1);
    if (m.wide())
      FR_LAUNCH((support_kernel<kAct, true, T>), grid, dim3(kThreads), 0, stream, m, p0, p1, g.above);
    else
      FR_LAUNCH((support_kernel<kAct, false, T>), grid, dim3(kThreads), 0, stream, m, p0, p1, g.above);
  }
};
struct Range {
  const RangeArgs<float>& g;
  void* stream;
  template <Activation kAct>
  void run() const {
    Map<float, 2, 2> m{{{g.lower}, {g.upper}}, {g.out_lower, g.out_upper}, g.count, 0};
    const dim3 grid(blocks_of(g.count, 8 * kThreads));
    const float p0 = static_cast<float>(g.p0), p1 = static_cast<float>(g.p1);
    if (m.wide())
      FR_LAUNCH((range_kernel<kAct, true>), grid, dim3(kThreads), 0, stream, m, p0, p1);
    else
      FR_LAUNCH((range_kernel<kAct, false>), grid, dim3(kThreads), 0, stream, m, p0, p1);
  }
};

}  // namespace
FR_NS_END

namespace fastrobust {

template <class T>
void lines_cuda(const LinesArgs<T>& g, void* stream) {
  if (g.count > 0) dispatch(g.activation, Lines<T>{g, stream});
}
template <class T>
void lines_grad_cuda(const LinesGradArgs<T>& g, void* stream) {
  if (g.count > 0) dispatch(g.activation, LinesGrad<T>{g, stream});
}
void range_cuda(const RangeArgs<float>& g, void* stream) {
  if (g.count > 0) dispatch(g.activation, Range{g, stream});
}
template <class T>
void support_cuda(const SupportArgs<T>& g, void* stream) {
  if (g.count > 0) dispatch(g.activation, Support<T>{g, stream});
}
template void support_cuda(const SupportArgs<float>&, void*);
template void support_cuda(const SupportArgs<double>&, void*);
template void lines_cuda(const LinesArgs<float>&, void*);
template void lines_cuda(const LinesArgs<double>&, void*);
template void lines_grad_cuda(const LinesGradArgs<float>&, void*);
template void lines_grad_cuda(const LinesGradArgs<double>&, void*);

}  // namespace fastrobust
