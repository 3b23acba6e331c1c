// Runs an entry on the CPU (device -1) or enqueues its CUDA twin.
#pragma once

#include "bindings/bindings.h"
#include "runtime/device.h"

namespace fastrobust {

#if defined(FASTROBUST_HAS_CUDA)
#define FR_CUDA_KERNEL(name) name
#else
#define FR_CUDA_KERNEL(name) nullptr
#endif

template <class Args, class Gpu>
void on_device(int device, uintptr_t stream, int64_t work, const Args& a, void (*cpu)(const Args&), Gpu gpu) {
  without_gil(work, [&] {
    if (device < 0) {
      cpu(a);
      return;
    }
#if defined(FASTROBUST_HAS_CUDA)
    const DeviceGuard guard(device);
    gpu(a, reinterpret_cast<void*>(stream));
#else
    (void)stream;
    (void)gpu;
    throw std::runtime_error(
        "fastrobust was built without CUDA kernels; rebuild with nvcc on PATH (FASTROBUST_CUDA=ON)");
#endif
  });
}

}  // namespace fastrobust
