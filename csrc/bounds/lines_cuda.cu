// Lines around activations, their gradients and ranges on CUDA: a thread takes four neighbouring neurons, or twice
// four.
#include "bounds/kernels.h"
#include "bounds/lines.h"
#include "runtime/wide_cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 128;

// One number per neuron, from [count], or from [period] again and again; null: zeros.
template <class T>
struct Input {
  const T* p = nullptr;
  int64_t period = 0;

  __device__ __forceinline__ int64_t place(int64_t i) const { return period == 0 ? i : i % period; }
  __device__ __forceinline__ Values<T, 1> at(One i) const { return load_at(p, One{place(i.first)}); }
  __device__ __forceinline__ Values<T, 4> at(Four i) const { return load_at(p, Four{place(i.first)}); }
  __device__ __forceinline__ Values<T, 8> at(Eight i) const {
    return load_at(p, Eight{place(i.first), place(i.second)});
  }
};
// What is read and written; outputs that are null are not wanted.
template <class T, int kIn, int kOut>
struct Map {
  Input<T> in[kIn];
  T* out[kOut];
  int64_t count;
  int shift;

  // Whether 16-byte accesses serve, with `shift`.
  bool wide() {
    Addresses lie;
    bool repeats = false;
    for (const Input<T>& each : in) {
      lie.add(each.p);
      repeats |= each.period != 0;
      if (each.period % 4 != 0) return false;
    }
    for (T* const p : out) lie.add(p);
    shift = lie.shift;
    return lie.aligned && (!repeats || shift == 0);
  }
};

// f(numbers in, numbers out) for every neuron. At once, a thread has the code of eight neurons; where that is long, it
// goes from one to the next and keeps its numbers in shared memory, where an index known only at run time costs
// nothing.
template <bool kWide, bool kAtOnce, class T, int kIn, int kOut, class F>
__device__ __forceinline__ void each_neuron(const Map<T, kIn, kOut>& m, F f) {
  constexpr bool kKeep = kWide && !kAtOnce;
  constexpr int kPlanes = kIn > kOut ? kIn : kOut;
  __shared__ T kept[kKeep ? kPlanes : 1][kKeep ? 8 : 1][kKeep ? kThreads : 1];  // a column for each thread
  const int column = kKeep ? static_cast<int>(threadIdx.x) : 0;
  each_element<kWide, 4>(m.count, m.shift, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                         static_cast<int64_t>(gridDim.x) * kThreads, [&](auto i) {
                           constexpr int kCount = decltype(i)::count;
                           Values<T, kCount> in[kIn], out[kOut];
                           for (int s = 0; s < kIn; ++s)
                             in[s] = m.in[s].p != nullptr ? m.in[s].at(i) : all_equal(T(0), i);
                           if constexpr (kKeep && kCount > 1) {
                             for (int s = 0; s < kIn; ++s)
                               for (int k = 0; k < kCount; ++k) kept[s][k][column] = in[s].v[k];
#pragma unroll 1
                             for (int k = 0; k < kCount; ++k) {
                               T from[kIn], to[kOut];
                               for (int s = 0; s < kIn; ++s) from[s] = kept[s][k][column];
                               f(from, to);
                               for (int s = 0; s < kOut; ++s) kept[s][k][column] = to[s];
                             }
                             for (int s = 0; s < kOut; ++s)
                               for (int k = 0; k < kCount; ++k) out[s].v[k] = kept[s][k][column];
                           } else {
#pragma unroll
                             for (int k = 0; k < kCount; ++k) {
                               T from[kIn], to[kOut];
                               for (int s = 0; s < kIn; ++s) from[s] = in[s].v[k];
                               f(from, to);
                               for (int s = 0; s < kOut; ++s) out[s].v[k] = to[s];
                             }
                           }
                           for (int s = 0; s < kOut; ++s)
                             if (m.out[s] != nullptr) store_at(m.out[s], i, out[s]);
                         });
}

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
template void lines_cuda(const LinesArgs<float>&, void*);
template void lines_cuda(const LinesArgs<double>&, void*);
template void lines_grad_cuda(const LinesGradArgs<float>&, void*);
template void lines_grad_cuda(const LinesGradArgs<double>&, void*);

}  // namespace fastrobust
