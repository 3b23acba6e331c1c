// Working memory of the CPU kernels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/simd.h"

FR_NS_BEGIN

// Numbers from the start of a cache line on, so that whole vectors do not lie across two. Not by aligned new: glibc
// before 2.38 does not use freed aligned blocks again for blocks of their own size.
class Floats {
 public:
  Floats() = default;
  explicit Floats(int64_t n) : all_(new float[static_cast<size_t>(n) + kLanes]) {
    constexpr size_t kLine = kLanes * sizeof(float);
    at_ = all_.get() + (kLine - reinterpret_cast<uintptr_t>(all_.get()) % kLine) / sizeof(float);
  }
  static Floats zeros(int64_t n) {
    Floats f(n);
    std::fill_n(f.get(), n, 0.f);
    return f;
  }
  float* get() const { return at_; }
  float& operator[](int64_t i) const { return at_[i]; }

 private:
  std::unique_ptr<float[]> all_;
  float* at_ = nullptr;
};

FR_NS_END
