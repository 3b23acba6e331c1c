#pragma once

#include "pgd/args.h"
#include "pgd/step.h"

namespace fastrobust {
void linf_cuda(const StepArgs& a, void* stream);
// Steepest step in the box and exact projection, one block an example.
void l1_cuda(const StepArgs& a, void* stream);
}  // namespace fastrobust

FR_NS_BEGIN

// The sum over the threads of a block; every thread gets it.
template <int kThreads>
__device__ ExactSum block_exact_sum(const ExactSum& mine) {
  __shared__ double parts[3 * kThreads];
  parts[3 * threadIdx.x] = mine.hi;
  parts[3 * threadIdx.x + 1] = mine.lo;
  parts[3 * threadIdx.x + 2] = mine.bound;
  __syncthreads();
  ExactSum all;
  for (int t = 0; t < kThreads; ++t) {
    ExactSum part;
    part.hi = parts[3 * t];
    part.lo = parts[3 * t + 1];
    part.bound = parts[3 * t + 2];
    exact_add(&all, part);
  }
  __syncthreads();
  return all;
}

FR_NS_END
