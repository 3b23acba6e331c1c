// Enough of CUDA's language to run the library's kernels on the CPU, so that their arithmetic and indexing are tested
// on machines without a GPU. Blocks run one after the other; the threads of a block are fibers that switch at barriers
// and shuffles. It checks results, not races or speed.
#pragma once
#define FASTROBUST_EMULATED_CUDA 1

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static  // one block at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }

namespace cuda_emulation {

enum class State { ready, block_barrier, warp_barrier, done };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state = State::ready;
};

struct Machine {
  dim3 grid, block, block_index, thread_index;
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  std::vector<uint64_t> slots;  // what each thread last gave to a shuffle
  std::vector<char> dynamic_shared;
  int current = 0;
  const std::function<void()>* body = nullptr;
};
inline Machine& machine() {
  static Machine m;
  return m;
}

inline void entry() {
  Machine& m = machine();
  (*m.body)();
  m.fibers[m.current].state = State::done;
  swapcontext(&m.fibers[m.current].context, &m.scheduler);
}

inline void wait(State s) {
  Machine& m = machine();
  Fiber& f = m.fibers[m.current];
  f.state = s;
  swapcontext(&f.context, &m.scheduler);
}

// Threads that have returned no longer take part in barriers, as on the device.
inline bool release(State s, size_t begin, size_t end) {
  Machine& m = machine();
  bool waiting = false;
  for (size_t i = begin; i < end; ++i) {
    if (m.fibers[i].state == s)
      waiting = true;
    else if (m.fibers[i].state != State::done)
      return false;
  }
  if (waiting)
    for (size_t i = begin; i < end; ++i)
      if (m.fibers[i].state == s) m.fibers[i].state = State::ready;
  return waiting;
}

inline void run_block() {
  Machine& m = machine();
  const size_t n = m.block.x * m.block.y * m.block.z;
  m.fibers.resize(n);
  m.slots.assign(n, 0);
  for (size_t i = 0; i < n; ++i) {
    Fiber& f = m.fibers[i];
    f.stack.resize(64 * 1024);
    f.state = State::ready;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = &m.scheduler;
    makecontext(&f.context, entry, 0);
  }
  while (true) {
    bool ran = false, left = false;
    for (size_t i = 0; i < n; ++i) {
      if (m.fibers[i].state != State::ready) continue;
      m.current = static_cast<int>(i);
      m.thread_index = dim3(i % m.block.x, i / m.block.x % m.block.y, i / (m.block.x * m.block.y));
      swapcontext(&m.scheduler, &m.fibers[i].context);
      ran = true;
    }
    for (size_t i = 0; i < n; i += 32) ran |= release(State::warp_barrier, i, i + 32 < n ? i + 32 : n);
    ran |= release(State::block_barrier, 0, n);
    for (const Fiber& f : m.fibers) left |= f.state != State::done;
    if (!left) return;
    if (!ran) {
      std::fprintf(stderr, "cuda_emulation: threads wait at different barriers\n");
      std::abort();
    }
  }
}

inline void launch(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body) {
  // What the driver refuses.
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
      shared > 48 * 1024) {
    std::fprintf(stderr, "cuda_emulation: no device starts %ux%ux%u blocks of %llu threads with %zu bytes\n", grid.x,
                 grid.y, grid.z, static_cast<unsigned long long>(threads), shared);
    std::abort();
  }
  Machine& m = machine();
  m.grid = grid;
  m.block = block;
  m.body = &body;
  m.dynamic_shared.assign(shared, 0);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        m.block_index = dim3(x, y, z);
        run_block();
      }
}

template <class T>
T exchange(T v, int source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffled values have at most 8 bytes");
  Machine& m = machine();
  const int me = m.current, warp = me / 32 * 32;
  std::memcpy(&m.slots[me], &v, sizeof v);
  wait(State::warp_barrier);
  const int from = warp + source_lane;
  T got = v;
  if (source_lane >= 0 && source_lane < 32 && from < static_cast<int>(m.slots.size()))
    std::memcpy(&got, &m.slots[from], sizeof got);
  wait(State::warp_barrier);
  return got;
}

}  // namespace cuda_emulation

#define threadIdx (::cuda_emulation::machine().thread_index)
#define blockIdx (::cuda_emulation::machine().block_index)
#define blockDim (::cuda_emulation::machine().block)
#define gridDim (::cuda_emulation::machine().grid)

inline void __syncthreads() { cuda_emulation::wait(cuda_emulation::State::block_barrier); }
inline void __syncwarp(unsigned = 0xffffffffu) { cuda_emulation::wait(cuda_emulation::State::warp_barrier); }
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  return cuda_emulation::exchange(v, (cuda_emulation::machine().current % 32) ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T v, int delta) {
  return cuda_emulation::exchange(v, cuda_emulation::machine().current % 32 + delta);
}
template <class T>
T __shfl_up_sync(unsigned, T v, int delta) {
  return cuda_emulation::exchange(v, cuda_emulation::machine().current % 32 - delta);
}
template <class T>
T __shfl_sync(unsigned, T v, int lane) {
  return cuda_emulation::exchange(v, lane % 32);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (cuda_emulation::exchange(predicate != 0 ? 1 : 0, lane) != 0) bits |= 1u << lane;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
template <class T, class U>
T atomicAdd(T* p, U v) {
  const T old = *p;
  *p = old + static_cast<T>(v);
  return old;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
template <class T>
T __ldg(const T* p) {
  return *p;
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0;
inline int cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
#define FR_CUDA_CHECK(call) (void)(call)
#define FR_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(::cuda_emulation::machine().dynamic_shared.data())
#define FR_LAUNCH(kernel, grid, block, shared, stream, ...)                                  \
  do {                                                                                       \
    (void)(stream);                                                                          \
    ::cuda_emulation::launch(dim3(grid), dim3(block), shared, [&] { kernel(__VA_ARGS__); }); \
  } while (0)
