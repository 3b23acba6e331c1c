// Lines around activations, their gradients and ranges on CUDA: one thread per neuron.
#include "bounds/kernels.h"
#include "bounds/lines.h"
#include "runtime/cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 256;

template <Activation kAct, class T>
__global__ void __launch_bounds__(kThreads) lines_kernel(LinesArgs<T> g) {
  const T p0 = static_cast<T>(g.p0), p1 = static_cast<T>(g.p1);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < g.count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    T slope_low, slope_up, low, up;
    lines<kAct>(g.lower[i], g.upper[i], p0, p1, g.adaptive, slope_low, slope_up, low, up);
    if (g.bias != nullptr) {
      const T bias = g.bias[i % g.period];
      low = low + slope_low * bias;
      up = up + slope_up * bias;
    }
    g.slopes[i] = slope_low;
    if (g.adaptive) g.slopes[g.count + i] = slope_up;
    g.intercepts[i] = low;
    g.intercepts[g.count + i] = up;
  }
}

template <Activation kAct, class T>
__global__ void __launch_bounds__(kThreads) lines_grad_kernel(LinesGradArgs<T> g) {
  const T p0 = static_cast<T>(g.p0), p1 = static_cast<T>(g.p1);
  const T* const upper_slopes = g.adaptive ? g.from_slopes + g.count : g.from_slopes;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < g.count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    T to_l, to_u;
    lines_grad<kAct>(g.lower[i], g.upper[i], p0, p1, g.adaptive, g.adaptive ? g.from_slopes[i] : T(0), upper_slopes[i],
                     g.from_intercepts[i], g.from_intercepts[g.count + i], to_l, to_u);
    g.to_lower[i] = to_l;
    g.to_upper[i] = to_u;
  }
}

template <Activation kAct>
__global__ void __launch_bounds__(kThreads) range_kernel(RangeArgs<float> g) {
  const float p0 = static_cast<float>(g.p0), p1 = static_cast<float>(g.p1);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < g.count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    float low, up;
    range_of<kAct>(g.lower[i], g.upper[i], p0, p1, low, up);
    g.out_lower[i] = low;
    g.out_upper[i] = up;
  }
}

dim3 grid_of(int64_t count) {
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  return dim3(static_cast<unsigned>(blocks < 65535 * 16 ? blocks : 65535 * 16));
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
    FR_LAUNCH((lines_kernel<kAct, T>), grid_of(g.count), dim3(kThreads), 0, stream, g);
  }
};
template <class T>
struct LinesGrad {
  const LinesGradArgs<T>& g;
  void* stream;
  template <Activation kAct>
  void run() const {
    FR_LAUNCH((lines_grad_kernel<kAct, T>), grid_of(g.count), dim3(kThreads), 0, stream, g);
  }
};
struct Range {
  const RangeArgs<float>& g;
  void* stream;
  template <Activation kAct>
  void run() const {
    FR_LAUNCH((range_kernel<kAct>), grid_of(g.count), dim3(kThreads), 0, stream, g);
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
template void lines_cuda(const LinesArgs<float>&, void*);
template void lines_cuda(const LinesArgs<double>&, void*);
template void lines_grad_cuda(const LinesGradArgs<float>&, void*);
template void lines_grad_cuda(const LinesGradArgs<double>&, void*);

}  // namespace fastrobust
