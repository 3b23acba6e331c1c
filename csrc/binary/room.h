// What the kernels of the lists share: working memory of a thread, and rows cut into parts of equal work.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/simd.h"

FR_NS_BEGIN

// Floats from the start of a cache line, kept by the thread and grown when more are asked for.
class Room {
 public:
  ~Room() { delete[] all_; }
  float* floats(int64_t count) {
    if (count > size_) {
      delete[] all_;
      size_ = 0;
      all_ = new float[static_cast<size_t>(count) + kLanes];
      size_ = count;
    }
    return all_ + (kLine - reinterpret_cast<uintptr_t>(all_) % kLine) / sizeof(float);
  }

 private:
  static constexpr size_t kLine = kLanes * sizeof(float);
  float* all_ = nullptr;
  int64_t size_ = 0;
};

// First row of a part: parts hold about the same number of entries. `Args` has the lists of a GatherArgs.
template <class Args>
int64_t row_boundary(const Args& a, int64_t part, int64_t parts) {
  if (a.segments > 1) return a.rows * part / parts;
  const int64_t target = (a.entries + 2 * a.rows) * part / parts;
  int64_t lo = 0, hi = a.rows;
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if (a.ptr[2 * mid] + 2 * mid < target)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo;
}

FR_NS_END
