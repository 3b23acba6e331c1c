// The windows of a max pooling: which inputs the lines around it are made from.
#pragma once

#include <cstdint>

#include "runtime/dispatch.h"

namespace fastrobust {

// Over [lower, upper], planes by rows: of each window the tap with the largest lower end (of equal ones the largest
// upper end, of those the first) and among the others the first with the largest upper end.
template <class T>
struct PoolPicksArgs {
  const T* lower = nullptr;  // [planes, height, width]
  const T* upper = nullptr;
  int64_t* source = nullptr;  // [planes, out_h, out_w], flat positions of a plane
  int64_t* rival = nullptr;   // -1 where the window has one tap
  int64_t planes = 0, height = 0, width = 0, out_h = 0, out_w = 0;
  int64_t kernel_h = 1, kernel_w = 1, stride_y = 1, stride_x = 1, pad_y = 0, pad_x = 0, dilation_y = 1, dilation_x = 1;
};

struct PoolTable {
  void (*picks)(const PoolPicksArgs<float>&);
  void (*picks_double)(const PoolPicksArgs<double>&);
};

FR_CPU_TABLE(PoolTable, pool)

}  // namespace fastrobust
