#include "runtime/cuda.h"
#include "runtime/device.h"

namespace fastrobust {

#if defined(FASTROBUST_EMULATED_CUDA)

DeviceReport device_report() {
  DeviceReport r;
  r.error = "the CUDA kernels of this build are emulated on the CPU (tests only)";
  return r;
}
DeviceGuard::DeviceGuard(int device) : previous_(device) {}
DeviceGuard::~DeviceGuard() = default;

#else

DeviceReport device_report() {
  DeviceReport r;
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    r.error = std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status);
    return r;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, i) == cudaSuccess)
      r.devices.push_back(std::string(p.name) + " (sm_" + std::to_string(10 * p.major + p.minor) + ")");
  }
  if (count == 0) r.error = "no CUDA device found";
  return r;
}

DeviceGuard::DeviceGuard(int device) : previous_(-1) {
  int current = 0;
  FR_CUDA_CHECK(cudaGetDevice(&current));
  if (current == device) return;
  FR_CUDA_CHECK(cudaSetDevice(device));
  previous_ = current;
}
DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

#endif

}  // namespace fastrobust
