// Global memory by 16 bytes a thread, and the loops of the kernels that stream it.
//
// The optimiser may take a float4 access apart when it moves the address; the instructions here are written out, so it
// cannot. Every address must be a multiple of 16 bytes: the launchers look (Addresses), and each kernel has a variant
// without wide accesses for memory that lies otherwise. Both add in the same order and give the same bits.
#pragma once

#include <cstring>

#include "runtime/cuda.h"
#if defined(FASTROBUST_EMULATED_CUDA)
#include <cstdio>
#include <cstdlib>
#endif

FR_NS_BEGIN

// once: read or written by one thread, first to leave the caches. again: read-only in this kernel, other blocks read it
// too.
enum class Use { once, again };

template <class T, int kCount>
struct Values {
  T v[kCount];
};

// ---- the instructions ----
struct alignas(16) Words {
  uint32_t w[4];
};

#if defined(FASTROBUST_EMULATED_CUDA)

inline void must_be_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 == 0) return;
  std::fprintf(stderr, "cuda_emulation: a 16-byte access of an address that is no multiple of 16\n");
  std::abort();
}
template <Use kUse>
Words load_words(const void* p) {
  must_be_aligned(p);
  Words w;
  std::memcpy(&w, p, sizeof w);
  return w;
}
inline void store_words(void* p, const Words& w) {
  must_be_aligned(p);
  std::memcpy(p, &w, sizeof w);
}

#else

// Loads of memory that the kernel also writes stay in the order of the source; those of read-only memory may move.
template <Use kUse>
__device__ __forceinline__ Words load_words(const void* p) {
  Words w;
  const size_t at = __cvta_generic_to_global(p);
  if constexpr (kUse == Use::once)
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.w[0]), "=r"(w.w[1]), "=r"(w.w[2]), "=r"(w.w[3])
                 : "l"(at)
                 : "memory");
  else
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(w.w[0]), "=r"(w.w[1]), "=r"(w.w[2]), "=r"(w.w[3])
        : "l"(at));
  return w;
}
__device__ __forceinline__ void store_words(void* p, const Words& w) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(w.w[0]),
               "r"(w.w[1]), "r"(w.w[2]), "r"(w.w[3])
               : "memory");
}

#endif

// kCount neighbours that fill whole 16-byte words.
template <int kCount, Use kUse = Use::once, class T>
__device__ __forceinline__ Values<T, kCount> load_wide(const T* p) {
  constexpr int kEach = 16 / sizeof(T);
  static_assert(kCount % kEach == 0, "whole words");
  Values<T, kCount> r;
#pragma unroll
  for (int i = 0; i < kCount / kEach; ++i) {
    const Words w = load_words<kUse>(p + i * kEach);
    memcpy(r.v + i * kEach, w.w, sizeof w);
  }
  return r;
}
template <int kCount, class T>
__device__ __forceinline__ void store_wide(T* p, const Values<T, kCount>& r) {
  constexpr int kEach = 16 / sizeof(T);
  static_assert(kCount % kEach == 0, "whole words");
#pragma unroll
  for (int i = 0; i < kCount / kEach; ++i) {
    Words w;
    memcpy(w.w, r.v + i * kEach, sizeof w);
    store_words(p + i * kEach, w);
  }
}

// ---- places of a row that a thread works on together: one element, four neighbours, or twice four ----
struct One {
  static constexpr int count = 1;
  int64_t first;
  __device__ __forceinline__ int64_t at(int) const { return first; }
};
struct Four {
  static constexpr int count = 4;
  int64_t first;
  __device__ __forceinline__ int64_t at(int k) const { return first + k; }
};
struct Eight {
  static constexpr int count = 8;
  int64_t first, second;
  __device__ __forceinline__ int64_t at(int k) const { return k < 4 ? first + k : second + k - 4; }
};

template <Use kUse = Use::once, class T>
__device__ __forceinline__ Values<T, 1> load_at(const T* p, One i) {
  return {{p[i.first]}};
}
template <Use kUse = Use::once, class T>
__device__ __forceinline__ Values<T, 4> load_at(const T* p, Four i) {
  return load_wide<4, kUse>(p + i.first);
}
template <Use kUse = Use::once, class T>
__device__ __forceinline__ Values<T, 8> load_at(const T* p, Eight i) {
  const Values<T, 4> a = load_wide<4, kUse>(p + i.first), b = load_wide<4, kUse>(p + i.second);
  return {{a.v[0], a.v[1], a.v[2], a.v[3], b.v[0], b.v[1], b.v[2], b.v[3]}};
}
template <class T>
__device__ __forceinline__ void store_at(T* p, One i, const Values<T, 1>& r) {
  p[i.first] = r.v[0];
}
template <class T>
__device__ __forceinline__ void store_at(T* p, Four i, const Values<T, 4>& r) {
  store_wide<4>(p + i.first, r);
}
template <class T>
__device__ __forceinline__ void store_at(T* p, Eight i, const Values<T, 8>& r) {
  store_wide<4>(p + i.first, Values<T, 4>{{r.v[0], r.v[1], r.v[2], r.v[3]}});
  store_wide<4>(p + i.second, Values<T, 4>{{r.v[4], r.v[5], r.v[6], r.v[7]}});
}
template <class T, class P>
__device__ __forceinline__ Values<T, P::count> all_equal(T v, P) {
  Values<T, P::count> r;
  for (int k = 0; k < P::count; ++k) r.v[k] = v;
  return r;
}
// From memory, or one number for all.
template <Use kUse = Use::once, class T, class P>
__device__ __forceinline__ Values<T, P::count> load_or(const T* p, bool each, T all, P i) {
  return each ? load_at<kUse>(p, i) : all_equal(all, i);
}

// ---- loops ----
// How the elements of several arrays lie: `shift` elements after a multiple of kUnit elements, kUnit of which fill 16
// bytes of the narrowest array; no shift that all share: not aligned.
struct Addresses {
  int unit = 4, shift = -1;
  bool aligned = true;

  // The element size must be a power of two. Null pointers are not looked at.
  Addresses& add(const void* p, int64_t size) {
    if (p == nullptr) return *this;
    const int mine = static_cast<int>(16 / size < 4 ? 4 : 16 / size);  // doubles go by four, as floats do
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    if (address % static_cast<uintptr_t>(size) != 0) aligned = false;
    int at = static_cast<int>(address / static_cast<uintptr_t>(size) % static_cast<uintptr_t>(16 / size));
    if (size == 8) {  // two fill a word: the place among four is not told, a shift of an odd number is refused
      if (at != 0) aligned = false;
      at = 0;
    }
    if (shift < 0) {
      unit = mine;
      shift = at;
    } else {
      if (at % (mine < unit ? mine : unit) != shift % (mine < unit ? mine : unit)) aligned = false;
      if (mine > unit) {
        unit = mine;
        shift = at;
      }
    }
    return *this;
  }
  template <class T>
  Addresses& add(const T* p) {
    return add(p, sizeof(T));
  }
  // All at a multiple of 16 bytes, in every row of n elements.
  bool whole(int64_t n) const { return aligned && shift <= 0 && n % unit == 0; }
};

// body(One | Four | Eight) over the n elements of a row that lies `shift` elements after a multiple of kUnit (of 8 with
// 16-bit arrays), for thread `thread` of `threads`. Without kWide: body(One) alone.
template <bool kWide, int kUnit, class Body>
__device__ __forceinline__ void each_element(int64_t n, int64_t shift, int64_t thread, int64_t threads, Body body) {
  if constexpr (!kWide) {
    for (int64_t i = thread; i < n; i += threads) body(One{i});
  } else {
    int64_t head = (kUnit - shift % kUnit) % kUnit;
    head = head < n ? head : n;
    const int64_t units = (n - head) / kUnit, tail = n - head - units * kUnit;
    if constexpr (kUnit == 8) {
      for (int64_t u = thread; u < units; u += threads) body(Eight{head + 8 * u, head + 8 * u + 4});
    } else {
      int64_t u = thread;
      for (; u + threads < units; u += 2 * threads) body(Eight{head + 4 * u, head + 4 * (u + threads)});
      if (u < units) body(Four{head + 4 * u});
    }
    if (thread < head + tail) body(One{thread < head ? thread : thread + units * kUnit});
  }
}

// ---- sums in the order of a plain loop ----
// Thread t of kStride adds elements t, t + kStride, t + 2 kStride, ...: an order that does not depend on how memory
// lies. A warp reads eight runs of 32 neighbours by 16 bytes a lane and deals them out through shared memory.
// `natural(place, terms)` sees neighbours, may write them, and gives kTerms numbers for each; `add(terms)` gets those
// of one element, in the order of the plain loop. All threads of a warp must call it together. Elements [begin, end) of
// a row: both and the row's addresses are multiples of kUnit with kWide.
template <int kTerms, int kCount>
struct Terms {
  float v[kTerms][kCount];
};

// Eight runs of a warp; one function, so that a kernel with several loops has it once.
template <int kThreads>
__device__ __forceinline__ float* warp_buffer() {
  __shared__ float4 buffers[kThreads / kWarp][2 * kWarp];
  return reinterpret_cast<float*>(buffers[threadIdx.x / kWarp]);
}

template <bool kWide, int kUnit, int kTerms, int kStride, int kThreads, class Natural, class Add>
__device__ __forceinline__ void each_in_order(int64_t begin, int64_t end, Natural natural, Add add) {
  const int thread = static_cast<int>(threadIdx.x) % kStride;
  if constexpr (!kWide) {
    for (int64_t i = begin + thread; i < end; i += kStride) {
      Terms<kTerms, 1> t;
      natural(One{i}, t);
      float one[kTerms];
      for (int s = 0; s < kTerms; ++s) one[s] = t.v[s][0];
      add(one);
    }
  } else {
    float* const mine = warp_buffer<kThreads>();
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = thread - lane;
    // Where the lane's two quads lie: among the eight runs of the warp, and in the row.
    const int near = kUnit == 8 ? 8 * lane : 4 * lane, far = kUnit == 8 ? near + 4 : near + 4 * kWarp;
    const int first = near / kWarp * kStride + warp + near % kWarp, second = far / kWarp * kStride + warp + far % kWarp;
    for (int64_t start = begin; start < end; start += 8 * kStride) {
      Terms<kTerms, 8> t = {};
      if (start + second < end) {
        natural(Eight{start + first, start + second}, t);
      } else if (kUnit == 4 && start + first < end) {
        if constexpr (kUnit == 4) {
          Terms<kTerms, 4> half;
          natural(Four{start + first}, half);
          for (int s = 0; s < kTerms; ++s)
            for (int k = 0; k < 4; ++k) t.v[s][k] = half.v[s][k];
        }
      }
#pragma unroll
      for (int s = 0; s < kTerms; ++s) {
        __syncwarp();
        *reinterpret_cast<float4*>(mine + near) = make_float4(t.v[s][0], t.v[s][1], t.v[s][2], t.v[s][3]);
        *reinterpret_cast<float4*>(mine + far) = make_float4(t.v[s][4], t.v[s][5], t.v[s][6], t.v[s][7]);
        __syncwarp();
#pragma unroll
        for (int r = 0; r < 8; ++r) t.v[s][r] = mine[r * kWarp + lane];
      }
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        if (start + r * kStride + thread >= end) break;
        float one[kTerms];
        for (int s = 0; s < kTerms; ++s) one[s] = t.v[s][r];
        add(one);
      }
    }
  }
}

FR_NS_END
