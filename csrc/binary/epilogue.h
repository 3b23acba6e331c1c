// What happens to a sum before it is written, for float and for sixteen lanes.
#pragma once

#include "core/simd.h"

FR_NS_BEGIN

// Zero for negative values; NaN stays NaN as in torch.
template <class V>
FR_HD V relu(V v) {
  return select(v < V(0.f), V(0.f), v);
}

template <class V>
FR_HD V affine(V sum, V scale, V shift) {
  return sum * scale + shift;
}

// The gradient that passes a ReLU whose output was `gate`.
template <class V>
FR_HD V through(V v, V gate) {
  return select(gate > V(0.f), v, V(0.f));
}

#if !defined(__CUDACC__)
// The same with the sides of the ReLU as bits, lane i as bit i.
FR_HD Vec through(Vec v, uint16_t open) {
#if defined(__AVX512F__)
  return _mm512_maskz_mov_ps(open, v.v);
#else
  constexpr int kEach = kLanes / kRegs;
  Mask m;
  for (int i = 0; i < kRegs; ++i)
    for (int j = 0; j < kEach; ++j) m.r[i][j] = -((open >> (i * kEach + j)) & 1);
  return select(m, v, Vec(0.f));
#endif
}
#endif

FR_NS_END
