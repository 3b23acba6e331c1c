// Elementwise passes over neurons: a thread takes four neighbouring ones, or twice four.
#pragma once

#include "runtime/wide_cuda.h"

FR_NS_BEGIN

constexpr int kNeuronThreads = 128;

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
  __shared__ T kept[kKeep ? kPlanes : 1][kKeep ? 8 : 1][kKeep ? kNeuronThreads : 1];  // a column for each thread
  const int column = kKeep ? static_cast<int>(threadIdx.x) : 0;
  each_element<kWide, 4>(m.count, m.shift, static_cast<int64_t>(blockIdx.x) * kNeuronThreads + threadIdx.x,
                         static_cast<int64_t>(gridDim.x) * kNeuronThreads, [&](auto i) {
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

FR_NS_END
