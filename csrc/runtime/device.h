// The CUDA device, seen from files that know nothing of CUDA.
#pragma once

#include <string>
#include <vector>

namespace fastrobust {

struct DeviceReport {
  bool built = false;         // CUDA kernels are in this build
  std::string toolkit;        // "13.0.88", "emulated" or ""
  std::string architectures;  // "75-real,...,120"
  std::vector<std::string> devices;
  std::string error;  // why there is none, when there is none
};
// Asks the driver; never called at import.
DeviceReport device_report();

// Makes `device` current for the lifetime of the guard.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
};

}  // namespace fastrobust
