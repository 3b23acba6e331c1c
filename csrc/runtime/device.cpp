// Builds without CUDA: nothing to report. With CUDA, device_cuda.cu says more.
#include "runtime/device.h"

#if !defined(FASTROBUST_HAS_CUDA)
namespace fastrobust {

DeviceReport device_report() {
  DeviceReport r;
  r.error = "built without CUDA kernels";
  return r;
}

}  // namespace fastrobust
#endif
