// What every compiled file shares: host/device markers and the namespace of one instruction set.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FR_HD __host__ __device__ __forceinline__
#else
#define FR_HD inline __attribute__((always_inline))
#endif

#define FR_RESTRICT __restrict__
// Loop bodies given as lambdas must be inlined, or the loop does not stay in registers.
#define FR_INLINE_LAMBDA __attribute__((always_inline))

// The same headers are compiled once per instruction set. An inline namespace keeps their copies apart: without it the
// linker would keep one weak copy for all, perhaps the AVX-512 one, and older processors would crash.
#ifndef FASTROBUST_ISA
#define FASTROBUST_ISA isa_baseline
#endif
#define FR_NS_BEGIN      \
  namespace fastrobust { \
  inline namespace FASTROBUST_ISA {
#define FR_NS_END \
  }               \
  }
