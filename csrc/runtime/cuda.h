// What every .cu file needs: checked launches, block reductions. Kernels keep to this subset of CUDA, which
// tests/cuda_emulation also provides on the CPU: FR_LAUNCH, __syncthreads, warp shuffles, static __shared__ arrays,
// FR_DYNAMIC_SHARED, integer atomicAdd.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/macros.h"

#if !defined(FASTROBUST_EMULATED_CUDA)
#include <cuda_runtime.h>

namespace fastrobust {

// Clears the error, so that one failure does not poison later calls, and says where it happened.
inline void cuda_check(cudaError_t status, const char* what, const char* file, int line) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  std::string text = std::string(what) + " failed: " + cudaGetErrorName(status) + " (" + cudaGetErrorString(status) +
                     ") at " + file + ":" + std::to_string(line);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
    cudaDeviceProp p;
    int device = 0;
    if (cudaGetDevice(&device) == cudaSuccess && cudaGetDeviceProperties(&p, device) == cudaSuccess)
      text += std::string("; this device is ") + p.name + ", sm_" + std::to_string(10 * p.major + p.minor) +
              "; see fastrobust info for the architectures of this build";
  }
  throw std::runtime_error(text);
}

}  // namespace fastrobust

#define FR_CUDA_CHECK(call) ::fastrobust::cuda_check((call), #call, __FILE__, __LINE__)
#define FR_DYNAMIC_SHARED(T, name)                              \
  extern __shared__ __align__(16) unsigned char shared_bytes[]; \
  T* name = reinterpret_cast<T*>(shared_bytes)
#define FR_LAUNCH(kernel, grid, block, shared, stream, ...)                                 \
  do {                                                                                      \
    kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);        \
    ::fastrobust::cuda_check(cudaGetLastError(), "launch of " #kernel, __FILE__, __LINE__); \
  } while (0)
#endif

FR_NS_BEGIN

constexpr int kWarp = 32;

__device__ __forceinline__ double warp_sum(double v) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const float w = __shfl_xor_sync(0xffffffffu, v, offset);
    v = w > v ? w : v;
  }
  return v;
}

// Sum or maximum over a block of at most 1024 threads, a multiple of 32; every thread gets the result. The order of
// addition is fixed. Safe to call again at once.
__device__ __forceinline__ double block_sum(double v) {
  __shared__ double parts[kWarp];
  v = warp_sum(v);
  const int warps = static_cast<int>(blockDim.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  __syncthreads();
  if (lane == 0) parts[threadIdx.x / kWarp] = v;
  __syncthreads();
  double total = 0.;
  for (int w = 0; w < warps; ++w) total += parts[w];
  return total;
}
__device__ __forceinline__ float block_max(float v) {
  __shared__ float parts[kWarp];
  v = warp_max(v);
  const int warps = static_cast<int>(blockDim.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  __syncthreads();
  if (lane == 0) parts[threadIdx.x / kWarp] = v;
  __syncthreads();
  float top = parts[0];
  for (int w = 1; w < warps; ++w) top = parts[w] > top ? parts[w] : top;
  return top;
}

// Grids: y is limited to 65535, so kernels stride over it.
inline unsigned grid_y(int64_t n) { return static_cast<unsigned>(n < 65535 ? n : 65535); }
// Along x for n elements, kernels stride over what is left.
inline unsigned blocks_of(int64_t n, int64_t per_block) {
  const int64_t blocks = (n + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20);
}

FR_NS_END
